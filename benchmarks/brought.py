"""How much of what Litmus and Chaos Mesh publish is taken as it is (Show 3 of bring-your-own).

    python -m benchmarks.brought --charts DIR --chaos-mesh DIR [--user DIR]

DIR: a checkout of litmuschaos/chaos-charts and one of chaos-mesh/chaos-mesh; nothing of them is part of this project. Counted
are the files: every `engine*.yaml` of the charts, and every YAML of Chaos Mesh's examples and tests that holds a resource of it.
Templates (engines whose appinfo is left empty) count as taken: with `--target` they run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlchaos_dagster.catalog import Catalog, parse_file, read_spec
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.manifests.drafts import place
from mlchaos_dagster.domain.manifests.files import bring
from mlchaos_dagster.errors import SpecError

_QUOTED = re.compile(r'"[^"]*"')


@dataclass
class Count:
    """What became of a set of files."""

    accepted: list[str] = field(default_factory=list[str])
    warned: list[str] = field(default_factory=list[str])
    refused: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """File → its reasons."""
    templates: list[str] = field(default_factory=list[str])
    """Of the first two: those that need `--target`."""
    experiments: int = 0
    warnings: Counter[str] = field(default_factory=Counter[str])


def count(files: Iterable[Path], root: Path, environment: Environment) -> Count:
    """Look at each file as `mlchaos check FILE -e …` does."""
    found = Count()
    for path in files:
        name = str(path.relative_to(root))
        try:
            brought = bring(read_spec(path), name)
            if brought is None:
                parse_file(path)  # one of ours, such as stages
                found.accepted.append(name)
                continue
            if brought.problems:
                raise SpecError(brought.problems)
            for draft in brought.drafts:
                if draft.selection.select:
                    place(draft, environment)
                else:
                    place(draft, environment, "nodes" if draft.selection.kind == "Node" else "pods")
        except SpecError as e:
            found.refused[name] = [p.what for p in e.problems]
            continue
        (found.warned if brought.notes else found.accepted).append(name)
        if any(not d.selection.select for d in brought.drafts):
            found.templates.append(name)
        found.experiments += len(brought.drafts)
        found.warnings.update(group(p.what) for p in brought.notes)
    return found


def group(what: str) -> str:
    """A message without the path and the words of its file."""
    return _QUOTED.sub('"…"', what.split(": ", 1)[-1])[:110]


def open_environment() -> Environment:
    """That of the cluster, with both backends, and a target of each kind for files that name none."""
    cluster = Catalog().environment("cluster")
    litmus, mesh = ("litmus_engine",), ("chaos_mesh_resource",)
    targets = dict(cluster.targets)
    targets["pods"] = next(t for t in targets.values() if t.kubernetes.kind == "Pod")
    targets["nodes"] = next(t for t in targets.values() if t.kubernetes.kind == "Node")
    backends = {**cluster.backends, "litmus": litmus, "chaos_mesh": mesh}
    backends["kubernetes"] = (*backends["kubernetes"], "gpu_memory_hog")
    return cluster.model_copy(update={"backends": backends, "targets": targets})


def main(arguments: list[str]) -> int:
    """Print the counts; 0 whatever they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.brought", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--charts", type=Path)
    parser.add_argument("--chaos-mesh", type=Path)
    parser.add_argument("--user", type=Path)
    given = parser.parse_args(arguments)
    sets: list[tuple[str, Path, list[Path]]] = []
    if given.charts:
        sets.append(("chaos-charts", given.charts, sorted(given.charts.rglob("engine*.yaml"))))
    if given.chaos_mesh:
        folders = [given.chaos_mesh / d for d in ("examples", "test", "e2e-test", "config/samples")]
        files = [
            p for d in folders for p in sorted(d.rglob("*.yaml")) if "chaos-mesh.org/v1alpha1" in p.read_text("utf-8")
        ]
        sets.append(("chaos-mesh", given.chaos_mesh, files))
    if given.user:
        sets.append(("user", given.user, [p for p in sorted(given.user.iterdir()) if p.suffix in (".yaml", ".json")]))
    if not sets:
        parser.error("nothing to look at. Allowed: --charts DIR, --chaos-mesh DIR, --user DIR")
    environment = open_environment()
    for title, root, files in sets:
        show(title, count(files, root, environment), len(files))
    return 0


def show(title: str, found: Count, files: int) -> None:
    """One set, with its reasons."""
    out = sys.stdout.write
    taken = len(found.accepted) + len(found.warned)
    out(
        f"\n{title}: {files} files, {taken} accepted ({len(found.warned)} with warnings, {len(found.templates)} with --target), "
    )
    out(f"{len(found.refused)} refused; {found.experiments} experiments\n")
    for what, n in found.warnings.most_common():
        out(f"  warning {n:3} × {what}\n")
    for name, reasons in found.refused.items():
        out(f"  refused {name}: {reasons[0]}{f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
