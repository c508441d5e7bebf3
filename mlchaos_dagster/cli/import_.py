"""`mlchaos import`: other tools' YAML as experiments and suites of ours, and what an environment needs for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App, common, current
from mlchaos_dagster.cli.brought import placed, taken, tell
from mlchaos_dagster.errors import SpecError, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.domain.environment import Environment
    from mlchaos_dagster.domain.manifests.drafts import Brought, Placed


@click.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--to", metavar="DIR", help="Write into a library there; without it everything is printed.")
@click.option(
    "--target", metavar="NAME", help="Target of the environment, where the file names none or another is meant."
)
@click.option("--force", is_flag=True, help="Overwrite what --to finds there.")
@common
def command(files: tuple[str, ...], to: str | None, target: str | None, force: bool) -> None:
    """Turn YAML of Litmus (ChaosEngine, ChaosSchedule) and Chaos Mesh into experiments and suites.

    They then run like any other, here and in Dagster, with guards, window, abort, verdict and proof of recovery. The
    lines that the environment needs for them are printed with them. Exit code 2: one of the files cannot be run; nothing was written.
    """
    app = current()
    brought = taken([Path(f) for f in files])
    environment = _open_to_all(app.environment, brought)
    found = placed(brought, environment, target or "")
    written = _texts(app, brought, found)
    lines = _snippet(app.environment, found)
    for one in brought:
        tell(app, one)
    if to is None:
        _print(app, written, lines)
    else:
        _write(app, Path(to).expanduser(), written, lines, Path(files[0]).stem, force)


def _open_to_all(environment: Environment, brought: list[Brought]) -> Environment:
    """As if every backend were there that the files want: what is missing is among the lines to add."""
    from mlchaos_dagster.domain.environment import Kubernetes
    from mlchaos_dagster.domain.faults import BROUGHT

    backends = dict(environment.backends)
    for kind in sorted({str(d.fault["kind"]) for one in brought for d in one.drafts}):
        if environment.backend_for(kind) is None:
            name = BROUGHT.get(kind, "kubernetes")
            backends[name] = (*backends.get(name, ()), kind)
    cluster = environment.kubernetes or Kubernetes(context="CONTEXT", namespace="default")
    return environment.model_copy(update={"backends": backends, "kubernetes": cluster, "sandbox": None})


def _texts(app: App, brought: list[Brought], found: list[Placed]) -> dict[str, str]:
    """Path in a library → what is written there."""
    from mlchaos_dagster.domain.manifests.drafts import body, name_of, spoken, suite_of, to_yaml

    known, suites = set(app.catalog.names("experiment")), set(app.catalog.names("suite"))
    written: dict[str, str] = {}
    left = list(found)
    for one in brought:
        names: list[str] = []
        for draft in one.drafts:
            placed_one = left.pop(0)
            name = name_of("brought", draft.name) if draft.name in known else draft.name
            values = {**body(draft, placed_one.environment, placed_one.experiment.target), "name": name}
            path = f"experiments/brought/{name}.yaml"
            if path in written:
                raise SpecError(
                    f'the experiment "{name}" comes from two files. Allowed: import them into two libraries.',
                    one.source,
                )
            written[path] = f"# {draft.what}, from {spoken(one.source)}\n{to_yaml(values)}"
            names.append(name)
        for suite in one.suites:
            if names:
                name = name_of("brought", suite.name) if suite.name in suites else suite.name
                written[f"suites/{name}.yaml"] = (
                    f"# from {spoken(one.source)}\n{to_yaml(suite_of(replace(suite, name=name), names))}"
                )
    return written


def _snippet(environment: Environment, found: list[Placed]) -> str:
    """What the environment's file needs besides what it has; empty: nothing."""
    from mlchaos_dagster.domain.faults import BROUGHT
    from mlchaos_dagster.domain.manifests.drafts import to_yaml

    needed: dict[str, Any] = {}
    for kind in sorted({p.experiment.fault.kind for p in found}):
        if environment.backend_for(kind) is None:
            name = BROUGHT.get(kind, "kubernetes")
            needed.setdefault("backends", {}).setdefault(name, []).append(kind)
    for one in found:
        for name, target in one.added.items():
            shown = target.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
            needed.setdefault("targets", {})[name] = shown
    return to_yaml(needed) if needed else ""


def _print(app: App, written: dict[str, str], lines: str) -> None:
    app.dump({"files": written, "environment": lines})
    for i, (path, text) in enumerate(written.items()):
        app.out(f"{'---' if i else ''}\n# {path}\n{text.rstrip()}".lstrip("\n"))
    if lines:
        shown = "\n".join(f"# {line}" for line in lines.rstrip().splitlines())
        app.out(f"\n# {_whose(app.environment)} needs, besides what it has:\n{shown}")


def _write(app: App, root: Path, written: dict[str, str], lines: str, stem: str, force: bool) -> None:
    from mlchaos_dagster.engine.files import write_atomic

    files = {root / path: text for path, text in written.items()}
    added: Path | None = None
    if lines:
        said = f"# What {_whose(app.environment)} needs, besides what it has, for {stem}.\n"
        added = root / f"add-to-environment-{stem}.txt"
        files[added] = said + lines
    there = [path for path in files if path.exists()]
    if there and not force:
        raise SpecError(f"{there[0]} is there already. Allowed: another folder, or --force.", "--to")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
    except OSError as e:
        raise StoreError(f"cannot write {root}: {e.strerror or e}") from e
    app.dump({"directory": str(root), "files": [str(p) for p in files]})
    for path in files:
        app.out(f"wrote {path}")
    if added:
        app.out(f"\nnext: add what {added} says to the environment's file")
    where = app.environment.name if app.environment.kubernetes is not None else "ENVIRONMENT"
    app.out(f"then: mlchaos check --library {root} -e {where}")


def _whose(environment: Environment) -> str:
    """Whom lines are for: without -e it may be one that has no cluster."""
    if environment.kubernetes is not None:
        return f"the environment {environment.name}"
    return "the environment of your cluster (-e NAME says which)"
