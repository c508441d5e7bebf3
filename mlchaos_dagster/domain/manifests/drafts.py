"""What another tool's file means: experiments to be, for whatever environment they are then placed in.

A draft knows its fault, how much of what is hit, and for how long. The environment adds what must hold meanwhile, and says by
which name its target goes; a target that it does not have is added to a copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import yaml

from mlchaos_dagster.domain.checks import check_experiment
from mlchaos_dagster.domain.environment import Environment, KubernetesObjects, Target
from mlchaos_dagster.domain.faults import BROUGHT
from mlchaos_dagster.domain.nodes import Document, Node, resolve_plain
from mlchaos_dagster.domain.parsing import one_line, validate
from mlchaos_dagster.domain.spec import MAX_DURATION_S, Experiment, Suite
from mlchaos_dagster.errors import Problem, SpecError

DEFAULT_S = 30.0
"""Length of a fault whose file names none: as with `mlchaos run --type`."""
AREA = "brought"
_MOST = 63


@dataclass(frozen=True)
class Selection:
    """Which objects a file hits."""

    kind: str = "Pod"
    """Pod, or Node."""
    namespace: str = ""
    """Empty: that of the environment."""
    select: str = ""
    """Label selector; empty: the file does not say, and a target must be named."""
    container: str = ""
    path: str = ""
    """The file inside the container that is hit, where the fault is on a file."""
    why_none: str = ""
    """Why `select` is empty."""


@dataclass(frozen=True)
class Draft:
    """One experiment to be."""

    name: str
    what: str
    """A few words: `pod-delete of ChaosEngine api-gateway-chaos`."""
    fault: Mapping[str, Any]
    """As in an experiment's `fault`."""
    duration_s: float
    radius: Mapping[str, Any]
    """As in an experiment's `blast_radius`."""
    selection: Selection
    where: str
    """`file:line:column`."""
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class SuiteDraft:
    """Drafts that run together, and when."""

    name: str
    title: str
    schedule: Mapping[str, Any] | None
    """As in a suite's `schedule`; None: by hand."""


@dataclass
class Brought:
    """All that a file holds."""

    source: str
    drafts: list[Draft] = field(default_factory=list[Draft])
    suites: list[SuiteDraft] = field(default_factory=list[SuiteDraft])
    notes: list[Problem] = field(default_factory=list[Problem])
    """Warnings: what was put right, left out, or is not as its author may think."""
    hints: list[str] = field(default_factory=list[str])
    """What else could be done."""
    problems: list[Problem] = field(default_factory=list[Problem])
    """Why it cannot be run."""

    def named(self) -> None:
        """Every draft gets a name of its own: the second `x` is `x-2`."""
        taken: set[str] = set()
        for i, draft in enumerate(self.drafts):
            name, n = draft.name, 1
            while name in taken:
                n += 1
                name = f"{draft.name[: _MOST - 4].rstrip('-')}-{n}"
            taken.add(name)
            if name != draft.name:
                self.drafts[i] = replace(draft, name=name)


@dataclass(frozen=True)
class Placed:
    """A draft in an environment."""

    experiment: Experiment
    environment: Environment
    """With the target, if it had none that fits."""
    added: Mapping[str, Target] = field(default_factory=dict[str, Target])
    """The target that was added, by name."""


def spoken(text: str) -> str:
    """A few words of somebody else's file, fit for a title, a line of a terminal and a comment."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:160]


def name_of(*words: str) -> str:
    """A name as ours are: lower-case letters, digits and dashes."""
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(w for w in words if w).lower()).strip("-")
    text = text if text[:1].isalpha() else f"x-{text}".rstrip("-")
    return text[:_MOST].rstrip("-")


def place(draft: Draft, environment: Environment, target: str = "") -> Placed:
    """The experiment that a draft is in an environment.

    Args:
        draft: what a file means.
        environment: where it is to run.
        target: name of a target there to use instead of what the file selects.

    Raises:
        SpecError: the environment has no such target, backend or objective; or the file names no target.
    """
    name, added = _target(draft, environment, target)
    _backend(draft, environment)
    if added:
        environment = environment.model_copy(update={"targets": {**environment.targets, **added}})
    experiment = _experiment(draft, environment, name)
    if problems := check_experiment(experiment, environment):
        raise SpecError([Problem(draft.where, p.what) for p in problems])
    return Placed(experiment, environment, added)


def _target(draft: Draft, environment: Environment, name: str) -> tuple[str, dict[str, Target]]:
    chosen = draft.selection
    if name:
        return _named(name, chosen, environment)
    if not chosen.select:
        targets = ", ".join(environment.targets)
        what = f"{draft.what}: {chosen.why_none}. Allowed: --target with one of {environment.name}'s: {targets}."
        raise SpecError(one_line(what), draft.where)
    if environment.kubernetes is None:
        what = f"{draft.what}: it is for a cluster, and environment {environment.name} has none. Allowed: -e of one with kubernetes:."
        raise SpecError(one_line(what), draft.where)
    own = environment.kubernetes.namespace
    for known, target in environment.targets.items():
        objects = target.kubernetes
        if (
            objects.kind == chosen.kind
            and (chosen.kind == "Node" or (objects.namespace or own) == (chosen.namespace or own))
            and _same(target.select, chosen.select)
            and chosen.container in ("", objects.container)
            and chosen.path == objects.path
        ):
            return known, {}
    objects = KubernetesObjects.model_validate(
        {"kind": chosen.kind, "namespace": chosen.namespace, "container": chosen.container, "path": chosen.path}
    )
    added = Target(select=chosen.select, kubernetes=objects, describe=f"From {draft.what}"[:200])
    values = re.findall(r"=\s*([^,=]+)", chosen.select) or [chosen.select]
    base = name_of("" if chosen.namespace == own else chosen.namespace, *values)
    name, n = base, 1
    while name in environment.targets:
        n += 1
        name = f"{base[: _MOST - 4].rstrip('-')}-{n}"
    return name, {name: added}


def _named(name: str, chosen: Selection, environment: Environment) -> tuple[str, dict[str, Target]]:
    """A target by its name; with the container and the file of the draft, where it names them and the target others."""
    known = environment.targets.get(name)
    objects = known.kubernetes if known is not None and environment.kubernetes is not None else None
    wanted = {k: v for k, v in (("container", chosen.container), ("path", chosen.path)) if v}
    if known is None or objects is None or all(getattr(objects, k) == v for k, v in wanted.items()):
        return name, {}
    changed = known.model_copy(update={"kubernetes": objects.model_copy(update=wanted)})
    return (other := name_of(name, "as-written")), {other: changed}


def _same(one: str, other: str) -> bool:
    """Two label selectors that are written with other spaces or another order."""
    if "(" in one or "(" in other:
        return one.replace(" ", "") == other.replace(" ", "")
    parts = [sorted(p.strip().replace("==", "=") for p in s.split(",")) for s in (one, other)]
    return parts[0] == parts[1]


def _backend(draft: Draft, environment: Environment) -> None:
    kind = str(draft.fault["kind"])
    if environment.backend_for(kind) is None and kind in BROUGHT:
        there = environment.backends.get(BROUGHT[kind], ())
        line = f"backends: {{{BROUGHT[kind]}: [{', '.join((*there, kind))}]}}"
        what = f"{draft.what}: environment {environment.name} does not let {BROUGHT[kind]} run it. To allow it, add to its file: {line}."
        raise SpecError(one_line(what), draft.where)


def body(draft: Draft, environment: Environment, target: str) -> dict[str, Any]:
    """The experiment as it is written.

    Raises:
        SpecError: the environment has no SLI by which it could be judged.
    """
    if "availability" not in environment.slis:
        what = (
            f"the environment {environment.name} has no SLI availability to judge by. Allowed: an environment with one."
        )
        raise SpecError(what, draft.where)
    objective = environment.error_budget.objective if environment.error_budget else 0.95
    return {
        "schema": "mlchaos/v1",
        "name": draft.name,
        "title": draft.what[:200],
        "hypothesis": f"{target} keeps {objective * 100:g} % availability under {draft.what}."[:2000],
        "area": AREA,
        "owner": "command-line",
        "target": target,
        "fault": dict(draft.fault),
        "blast_radius": dict(draft.radius),
        "duration": f"{draft.duration_s:g}s",
        "steady_state": [{"sli": "availability", "at_least": f"{objective * 100:g}%"}],
        **({"tags": dict(draft.tags)} if draft.tags else {}),
    }


def _experiment(draft: Draft, environment: Environment, target: str) -> Experiment:
    if draft.duration_s > MAX_DURATION_S:
        raise SpecError(f"{draft.what}: it lasts more than a week. Allowed: at most 7d.", draft.where)
    try:
        return validate(Document(draft.where, tree(body(draft, environment, target))), Experiment).value
    except SpecError as e:
        raise SpecError([Problem(draft.where, p.what) for p in e.problems]) from e


def suite_of(draft: SuiteDraft, names: list[str]) -> dict[str, Any]:
    """A suite as it is written."""
    written: dict[str, Any] = {
        "schema": "mlchaos/v1",
        "name": draft.name,
        "title": draft.title[:200],
        "experiments": names,
    }
    if draft.schedule is not None:
        written["schedule"] = dict(draft.schedule)
    validate(Document(draft.name, tree(written)), Suite)
    return written


def tree(value: Any) -> Node:
    """Plain values as a tree of nodes without places."""
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return Node({str(k): (Node(str(k), 1, 1), tree(v)) for k, v in pairs}, 1, 1, "mapping")
    if isinstance(value, (list, tuple)):
        return Node([tree(v) for v in cast("list[Any]", value)], 1, 1, "list")
    return Node(value, 1, 1)


class _Dumper(yaml.SafeDumper):
    """Text that our reader would take for something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Everything is written in full."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = '"' if not isinstance(resolve_plain(value), str) else ("|" if "\n" in value else None)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(str, _text)


def to_yaml(value: Mapping[str, Any]) -> str:
    """Plain values as YAML that our reader reads as the same."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
