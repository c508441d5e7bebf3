"""Schedules and Workflows of Chaos Mesh: their single experiments, in order, and a suite of them.

A suite runs one experiment after the other, each with its own guards and verdict. What a workflow does besides (at the same
time, waiting, checks, tasks, branches) is said in a note, since it is not done.
"""

from __future__ import annotations

from mlchaos_dagster.domain.manifests.chaos_mesh import KINDS, resource
from mlchaos_dagster.domain.manifests.drafts import Brought, SuiteDraft, name_of
from mlchaos_dagster.domain.manifests.schedules import cron_schedule
from mlchaos_dagster.domain.manifests.shapes import Looker, at, go_seconds, text_at
from mlchaos_dagster.domain.nodes import Node, Path
from mlchaos_dagster.domain.parsing import nearest

_MOST = 100
"""Steps of one workflow."""


def schedule(look: Looker, brought: Brought, name: str) -> None:
    """A Schedule: its experiment, or those of its workflow, and when."""
    pair = look.document.root.pair("spec")
    if pair is None or pair[1].kind != "mapping":
        look.problem((), "missing field spec.")
        return
    when = cron_schedule(look, pair[1], ("spec",))
    _scheduled(look, brought, pair[1], ("spec",), name, f"Schedule {name}", None)
    brought.suites.append(SuiteDraft(name_of(name), f"From Schedule {name}", when))


def workflow(look: Looker, brought: Brought, name: str) -> None:
    """A Workflow: the faults of its templates, from `entry` on."""
    pair = look.document.root.pair("spec")
    if pair is None or pair[1].kind != "mapping":
        look.problem((), "missing field spec.")
        return
    _Walk(look, brought, pair[1], ("spec",), f"Workflow {name}", name).go()
    brought.suites.append(SuiteDraft(name_of(name), f"From Workflow {name}", None))


def _scheduled(
    look: Looker, brought: Brought, node: Node, path: Path, name: str, of: str, within: float | None
) -> None:
    kind = text_at(node, "type")
    if kind not in (*KINDS, "Workflow"):
        near = nearest(kind, [*KINDS, "Workflow"]) if kind else None
        hint = f' Did you mean "{near}"?' if near else ""
        look.problem(
            (*path, "type"), f'"{kind[:60]}" is not a kind of Chaos Mesh.{hint} Allowed: {", ".join(KINDS)}, Workflow.'
        )
        return
    key, found = _section(node, kind)
    if found is None:
        look.problem(path, f"type is {kind}, and there is no {key}.")
    elif kind == "Workflow":
        _Walk(look, brought, found, (*path, key), of, name).go()
    else:
        resource(look, kind, found, (*path, key), brought, name=name, of=of, within=within)


def _section(node: Node, kind: str) -> tuple[str, Node | None]:
    """A kind's spec inside a schedule or template: `networkChaos`, in whatever case it was written."""
    right = (
        kind[0].lower() + kind[1:]
        if not kind.startswith(("IO", "DNS", "AWS", "GCP", "HTTP", "JVM"))
        else (kind.removesuffix("Chaos").lower() + "Chaos")
    )
    if kind == "PhysicalMachineChaos":
        right = "physicalmachineChaos"
    for name in node.value:
        if name.lower() == kind.lower():
            return name, at(node, name)
    return right, None


class _Walk:
    """Through the templates of one workflow."""

    def __init__(self, look: Looker, brought: Brought, node: Node, path: Path, of: str, name: str) -> None:
        self.look, self.brought, self.node, self.path, self.of, self.name = look, brought, node, path, of, name
        self.templates: dict[str, tuple[int, Node]] = {}
        self.done: list[str] = []
        self.steps = 0

    def go(self) -> None:
        """From the entry on; templates that nothing leads to are named."""
        templates = at(self.node, "templates")
        entry = text_at(self.node, "entry")
        if templates is None or templates.kind != "list" or not templates.value:
            self.look.problem(self.path, "missing field templates.")
            return
        for i, template in enumerate(templates.value):
            name = text_at(template, "name") if template.kind == "mapping" else ""
            if not name:
                self.look.problem((*self.path, "templates", i), "missing field name.")
            elif name in self.templates:
                self.look.problem((*self.path, "templates", i, "name"), f'a second template "{name[:60]}".')
            else:
                self.templates[name] = (i, template)
        before = len(self.brought.drafts)
        self._step(entry, (*self.path, "entry"), ())
        if left := [n for n in self.templates if n not in self.done]:
            self.look.note((*self.path, "templates"), f"nothing leads to {', '.join(left)}: left out.")
        if len(self.brought.drafts) == before and not self.look.problems:
            self.look.problem(self.path, "no step of it is a fault.")

    def _step(self, name: str, where: Path, above: tuple[str, ...]) -> None:
        if name not in self.templates:
            near = nearest(name, self.templates)
            hint = f' Did you mean "{near}"?' if near else ""
            self.look.problem(where, f'no template "{name[:60]}".{hint} Allowed: {", ".join(self.templates)}.')
            return
        self.steps += 1
        if name in above:
            self.look.problem(where, f'"{name}" leads to itself. Allowed: no circle.')
            return
        if self.steps > _MOST:
            if self.steps == _MOST + 1:
                self.look.problem(where, f"more than {_MOST} steps. Allowed: at most {_MOST}.")
            return
        self.done.append(name)
        i, node = self.templates[name]
        path = (*self.path, "templates", i)
        kind = text_at(node, "templateType")
        deadline = self._deadline(node, path)
        if kind in KINDS:
            key, spec = _section(node, kind)
            if spec is None:
                self.look.problem(path, f"templateType is {kind}, and there is no {key}.")
            else:
                resource(
                    self.look,
                    kind,
                    spec,
                    (*path, key),
                    self.brought,
                    name=f"{self.name}-{name}",
                    of=self.of,
                    within=deadline,
                )
        elif kind == "Schedule":
            self._schedule(node, path, name, deadline)
        else:
            self._control(kind, node, path, name, (*above, name))

    def _deadline(self, node: Node, path: Path) -> float | None:
        text = text_at(node, "deadline")
        seconds = go_seconds(text) if text else None
        if text and (seconds is None or seconds <= 0):
            self.look.problem((*path, "deadline"), f'"{text[:40]}" is not a duration. Allowed: such as 30s.')
            return None
        return seconds

    def _schedule(self, node: Node, path: Path, name: str, deadline: float | None) -> None:
        found = at(node, "schedule")
        if found is None or found.kind != "mapping":
            self.look.problem(path, "templateType is Schedule, and there is no schedule.")
            return
        often = text_at(found, "schedule")
        self.look.note(path, f'"{name}" repeats its fault ({often[:40]}) within the workflow: run once.')
        _scheduled(self.look, self.brought, found, (*path, "schedule"), f"{self.name}-{name}", self.of, deadline)

    def _control(self, kind: str, node: Node, path: Path, name: str, above: tuple[str, ...]) -> None:
        notes = {
            "Parallel": "its children run at the same time: here one after the other, each judged by itself.",
            "Suspend": "waits: left out, each experiment waits for its own recovery.",
            "StatusCheck": "left out: what must hold is the steady state of each experiment; add it there.",
            "Task": "left out: no container of a workflow is run.",
        }
        if kind in notes:
            self.look.note(
                path,
                f'"{name}" is a {kind}, which {notes[kind]}'
                if kind == "Suspend"
                else f'"{name}" is a {kind}: {notes[kind]}',
            )
        elif kind != "Serial":
            allowed = [*KINDS, "Schedule", "Serial", *notes]
            near = nearest(kind, allowed) if kind else None
            hint = f' Did you mean "{near}"?' if near else ""
            self.look.problem(
                (*path, "templateType"), f'"{kind[:60]}" is not known.{hint} Allowed: {", ".join(allowed)}.'
            )
            return
        children = at(node, "children")
        for j, child in enumerate(children.value if children is not None and children.kind == "list" else []):
            self._step(str(child.value) if child.kind == "scalar" else "", (*path, "children", j), above)
        branches = at(node, "conditionalBranches")
        if branches is not None and branches.kind == "list" and branches.value:
            what = f'which branch is taken, "{name}" would have said: each is taken, in order.'
            self.look.note((*path, "conditionalBranches"), what)
            for j, branch in enumerate(branches.value):
                target = text_at(branch, "target") if branch.kind == "mapping" else ""
                self._step(target, (*path, "conditionalBranches", j, "target"), above)
