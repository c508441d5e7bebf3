"""Any file → what it brings, or one clear line about it."""

from __future__ import annotations

from mlchaos_dagster.domain.manifests import chaos_mesh, litmus, schedules, workflows
from mlchaos_dagster.domain.manifests.drafts import Brought, name_of
from mlchaos_dagster.domain.manifests.shapes import Looker, text_at
from mlchaos_dagster.domain.nodes import Document, read_documents
from mlchaos_dagster.domain.parsing import nearest, one_line
from mlchaos_dagster.errors import Problem

LITMUS, CHAOS_MESH = "litmuschaos.io", "chaos-mesh.org"
_VERSION = "v1alpha1"
_OF_LITMUS = {
    "ChaosExperiment": "tells Litmus of a fault, and is none itself: apply it, and run a ChaosEngine of it",
    "ChaosResult": "what Litmus found, no fault",
}
_ANSWERED = {
    "experiment_template": "an experiment in sentences: no field of it names a fault, a target or a limit. Write it as an "
    "experiment (mlchaos init DIR); mlchaos describe serving-half-killed shows the like",
    "rollback_triggers": "rollback is said in each experiment, or for all in an environment: its limits under abort: (such as {sli: "
    "error_rate, above: 5%}), its actions under rollback: (scale_up, restart_unhealthy); the fault itself is always taken away",
    "rollback_actions": "rollback is said in each experiment: its actions under rollback: (scale_up, restart_unhealthy)",
    "game_days": "a game day is a suite of experiments, without dates and participants: mlchaos run --suite game-day",
    "chaos_metrics": "a list of wishes, no experiment: what was measured is in mlchaos history and in each run's report",
    "dashboard": "a dashboard of Grafana, no experiment: import it there",
}
"""Files that people have beside their experiments → what we say of them."""


def bring(text: str | bytes, source: str) -> Brought | None:
    """What a file of another tool brings; None where it is none, but (if anything) one of ours.

    Raises:
        SpecError: it cannot be read as YAML.
    """
    documents = read_documents(text, source)
    if not any(_is_theirs(d) for d in documents):
        return None
    brought = Brought(source)
    for document in documents:
        look = Looker(document, problems=list(document.problems))
        _one(look, brought)
        brought.notes += look.notes
        brought.problems += look.problems
    brought.named()
    if not brought.drafts and not brought.problems:
        last = brought.notes.pop() if brought.notes else Problem(f"{source}:1:1", "nothing to run.")
        brought.problems.append(last)
    return brought


def _is_theirs(document: Document) -> bool:
    root = document.root
    if root.kind == "list":
        return bool(root.value) and all(e.kind == "mapping" and {"name", "spec"} <= e.value.keys() for e in root.value)
    if root.kind != "mapping":
        return False
    return ("apiVersion" in root.value and "kind" in root.value) or any(name in root.value for name in _ANSWERED)


def _one(look: Looker, brought: Brought) -> None:
    root = look.document.root
    if root.kind == "list":
        litmus.fragment(look, root, brought)
        return
    if root.kind != "mapping":
        look.note((), "a single value: left out.")
        return
    group, kind = text_at(root, "apiVersion"), text_at(root, "kind")
    if not group or not kind:
        key = next((name for name in _ANSWERED if name in root.value), "")
        what = _ANSWERED.get(key, "no resource of Kubernetes, and an experiment of ours has a file of its own")
        look.problem((key,) if key else (), f"{what}.", key=True)
        return
    name = text_at(root, "metadata", "name") or text_at(root, "metadata", "generateName").rstrip("-")
    if LITMUS in group or kind in ("ChaosEngine", "ChaosSchedule"):
        _litmus(look, brought, group, kind, name)
    elif CHAOS_MESH in group or kind in chaos_mesh.KINDS:
        _chaos_mesh(look, brought, group, kind, name)
    else:
        _other(look, group, kind)


def _other(look: Looker, group: str, kind: str) -> None:
    if group.startswith("argoproj.io") and "Workflow" in kind:
        look.problem(
            ("kind",), "a workflow of Argo, such as the ChaosCenter writes: run the ChaosEngine that is in it."
        )
    else:
        look.note(("kind",), f"a {kind[:60]} is no fault: apply it with kubectl.")


def _version(look: Looker, group: str, right: str) -> bool:
    wanted = f"{right}/{_VERSION}"
    if group == wanted:
        return True
    look.problem(("apiVersion",), one_line(f'"{group[:80]}" is not known. Did you mean "{wanted}"? Allowed: {wanted}.'))
    return False


def _litmus(look: Looker, brought: Brought, group: str, kind: str, name: str) -> None:
    right = _version(look, group, LITMUS)
    spec = look.document.root.pair("spec")
    if kind == "ChaosEngine":
        if spec is None:
            look.problem((), "missing field spec.")
        else:
            litmus.engine(look, spec[1], brought, ("spec",), name or "chaos-engine")
    elif kind == "ChaosSchedule":
        schedules.chaos_schedule(look, brought, name or "chaos-schedule")
    elif kind in _OF_LITMUS and right:
        look.note(("kind",), f"{kind} {_OF_LITMUS[kind]}.")
    else:
        _unknown_kind(look, kind, ("ChaosEngine", "ChaosSchedule", *_OF_LITMUS))


def _chaos_mesh(look: Looker, brought: Brought, group: str, kind: str, name: str) -> None:
    right = _version(look, group, CHAOS_MESH)
    spec = look.document.root.pair("spec")
    if kind in chaos_mesh.KINDS:
        if spec is None:
            look.problem((), "missing field spec.")
        else:
            name = name_of(name or kind.lower())
            chaos_mesh.resource(look, kind, spec[1], ("spec",), brought, name=name)
    elif kind == "Schedule":
        workflows.schedule(look, brought, name or "schedule")
    elif kind == "Workflow":
        workflows.workflow(look, brought, name or "workflow")
    elif kind in chaos_mesh.NO_FAULTS and right:
        look.note(("kind",), f"{kind}: {chaos_mesh.NO_FAULTS[kind]}.")
    else:
        _unknown_kind(look, kind, (*chaos_mesh.KINDS, "Schedule", "Workflow", *chaos_mesh.NO_FAULTS))


def _unknown_kind(look: Looker, kind: str, allowed: tuple[str, ...]) -> None:
    near = nearest(kind, allowed)
    hint = f' Did you mean "{near}"?' if near else ""
    look.problem(("kind",), f'"{kind[:60]}" is not known.{hint} Allowed: {", ".join(allowed)}.')
