"""Who else would be at work on a target: chaos that is not ours, and controllers that undo what we do.

What an open lease of ours made is no rival: the ledger keeps two leases off one target. What a lease left that is open no
more is told, with the command that takes it away.

States of the other tools' resources: facts of Litmus's and Chaos Mesh's own sources (`status.engineStatus`,
`status.experiment.desiredPhase` and `containerRecords`), read as plain objects; a tool that is not installed has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

from mlchaos_dagster.drivers.cluster import planned
from mlchaos_dagster.drivers.cluster.handler import Request
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Forbidden, Permission, Site
from mlchaos_dagster.kube.labels import LEASE, MANAGED_BY, OURS
from mlchaos_dagster.kube.lease_objects import object_name
from mlchaos_dagster.kube.objects import Object, items, mapping, text, words

_LITMUS, _CHAOS_MESH = "litmuschaos.io", "chaos-mesh.org"
_NO_FAULT = frozenset({"statuschecks", "remoteclusters", "physicalmachines", "workflownodes"})
"""Kinds of Chaos Mesh that make no fault themselves."""
_IN_PODS = {
    "podnetworkchaos": ("ipsets", "iptables", "tcs"),
    "podiochaos": ("actions",),
    "podhttpchaos": ("rules",),
}
"""Kinds that say what lies in one pod, by its name; they stay, empty, when it is gone. Each entry names its `source`."""
GITOPS = {
    "argocd-controller": "Argo CD",
    "argocd-application-controller": "Argo CD",
    "kustomize-controller": "Flux",
    "helm-controller": "Flux",
    "keda-operator": "KEDA",
    "external-secrets": "External Secrets",
    "sealed-secrets-controller": "Sealed Secrets",
}
"""Field manager → who it is; each puts an object back as it was."""
_MARKS = {
    "argocd.argoproj.io/tracking-id": "Argo CD",
    "argocd.argoproj.io/instance": "Argo CD",
    "kustomize.toolkit.fluxcd.io/name": "Flux",
    "helm.toolkit.fluxcd.io/name": "Flux",
    "scaledobject.keda.sh/name": "KEDA",
}
"""Labels and annotations that say the same."""


def objections(site: Site, request: Request) -> Iterator[Objection]:
    """Chaos of others on the targets, now or soon, and controllers that would fight the fault."""
    spaces = {ref.namespace for ref in request.refs if ref.namespace}
    names = {(ref.namespace, ref.name) for ref in request.refs}
    yield from _litmus(site, spaces)
    yield from _chaos_mesh(site, spaces, names)
    for ref in request.refs:
        if ref.kind in ("pod", "node"):
            continue  # a GitOps tool applies workloads; it neither sees their pods nor the nodes
        for who in sorted(controllers(site.cluster.get(ref.path))):
            yield Objection(f"{who} keeps {ref.shown} as it is and would fight the fault", f"{who} paused for it")


def controllers(found: Object | None) -> set[str]:
    """Names of the GitOps tools and operators that keep this object as they want it."""
    there = {GITOPS[m] for f in items(found, "metadata", "managedFields") if (m := text(f, "manager")) in GITOPS}
    marks = {*mapping(found, "metadata", "labels"), *mapping(found, "metadata", "annotations")}
    return there | {who for mark, who in _MARKS.items() if mark in marks}


def _litmus(site: Site, spaces: set[str]) -> Iterator[Objection]:
    group = site.cluster.get(f"/apis/{_LITMUS}/v1alpha1")
    for resource in items(group, "resources"):
        kind, plural = text(resource, "kind"), text(resource, "name")
        if plural not in ("chaosengines", "chaosschedules"):
            continue
        for found in _all(site, _LITMUS, plural):
            if isinstance(found, Objection):
                yield found
            elif plural == "chaosengines" and _engine_runs(found) and _engine_at(found, "spec") & spaces:
                yield from _active(site, kind, found)
            elif plural == "chaosschedules" and _engine_at(found, "spec", "engineTemplateSpec") & spaces:
                if planned.chaos_schedule_is_near(found, _now()):
                    stop = _patched("chaosschedule", found, '{"spec":{"scheduleState":"halt"}}')
                    yield Objection(f"{kind} {_place(found)} may start chaos on the target within the hour", stop)


def _engine_runs(engine: Object) -> bool:
    status = text(engine, "status", "engineStatus")
    if text(engine, "metadata", "deletionTimestamp"):  # its finalizer holds it: something of it is still there
        return True
    return status not in ("completed", "stopped") and not (text(engine, "spec", "engineState") == "stop" and not status)


def _engine_at(found: Object, *spec: str) -> set[str]:
    """Namespaces of what it hits."""
    chosen = [o for kind in ("pods", "workloads") for o in items(found, *spec, "selectors", kind)]
    named = {text(found, *spec, "appinfo", "appns"), *(text(o, "namespace") for o in chosen)} - {""}
    return named or {_space(found)}


def _chaos_mesh(site: Site, spaces: set[str], names: set[tuple[str, str]]) -> Iterator[Objection]:
    group = site.cluster.get(f"/apis/{_CHAOS_MESH}/v1alpha1")
    there: set[str] = set()
    in_pods: list[Object] = []
    for resource in items(group, "resources"):
        kind, plural = text(resource, "kind"), text(resource, "name")
        if "/" in plural or plural in _NO_FAULT or "list" not in words(resource, "verbs"):
            continue
        for chaos in _all(site, _CHAOS_MESH, plural):
            if isinstance(chaos, Objection):
                yield chaos
            elif plural == "schedules":
                if _selects(_inner(chaos, "spec"), _space(chaos), spaces) and planned.schedule_is_near(chaos, _now()):
                    pause = (
                        f"kubectl annotate schedules.{_CHAOS_MESH} {_named(chaos)} experiment.{_CHAOS_MESH}/pause=true"
                    )
                    yield Objection(f"Schedule {_place(chaos)} may start chaos on the target within the hour", pause)
            elif plural == "workflows":
                if _workflow_runs(chaos) and _selects(_inner(chaos, "spec"), _space(chaos), spaces):
                    yield from _active(site, kind, chaos)
            elif plural in _IN_PODS:
                if (_space(chaos), text(chaos, "metadata", "name")) in names:
                    in_pods.append(chaos)
            else:
                there.add(_place(chaos))
                if _runs(chaos) and _hits(chaos, spaces, names):
                    yield from _active(site, kind, chaos)
    for chaos in in_pods:
        for source in sorted(_sources(chaos) - there):
            yield Objection(
                f"{source}, which is deleted, has left its fault in pod {_place(chaos)}",
                f"kubectl delete pod {_named(chaos)}",
            )


def _sources(chaos: Object) -> set[str]:
    """NAMESPACE/NAME of whoever put a fault into this pod."""
    lists = (items(chaos, "spec", key) for keys in _IN_PODS.values() for key in keys)
    return {text(entry, "source") for entries in lists for entry in entries} - {""}


def _workflow_runs(workflow: Object) -> bool:
    return not any(
        text(c, "type") == "Accomplished" and text(c, "status") == "True"
        for c in items(workflow, "status", "conditions")
    )


def _inner(found: Object, *keys: str) -> list[Object]:
    """Specs of the chaos inside a Schedule, a Workflow or a template of one: their keys are named after the kinds."""
    spec = mapping(found, *keys)
    names = [key for key in spec if key.endswith("Chaos") or key == "schedule"]
    inner = [mapping(spec, key) for key in names if not isinstance(spec[key], str)]  # a cron line
    templates = items(spec, "workflow", "templates") if "workflow" in spec else items(spec, "templates")
    return inner + [one for template in templates for one in _inner(template)]


def _selects(specs: list[Object], own: str, spaces: set[str]) -> bool:
    """Whether one of them may hit pods there; one that names no namespace means its own."""
    for spec in specs:
        nested, selector = _inner(spec), mapping(spec, "selector")
        there = {*words(selector, "namespaces"), *mapping(selector, "pods")} or {own}
        if _selects(nested, own, spaces) if nested else bool(there & spaces):
            return True
    return False


def _runs(chaos: Object) -> bool:
    """Injected and not recovered (also while it is being deleted), or about to be."""
    records = items(chaos, "status", "experiment", "containerRecords")
    if any(text(r, "phase").startswith("Injected") for r in records):
        return not _one_shot(chaos)
    return text(chaos, "status", "experiment", "desiredPhase") in ("Run", "") and not records


def _one_shot(chaos: Object) -> bool:
    return text(chaos, "spec", "action") in ("pod-kill", "container-kill")


def _hits(chaos: Object, spaces: set[str], names: set[tuple[str, str]]) -> bool:
    records = items(chaos, "status", "experiment", "containerRecords")
    if records:
        ids = [text(r, "id").split("/") for r in records]
        return any(tuple(i[:2]) in names for i in ids) or any(("", i[0]) in names for i in ids)
    selector = mapping(chaos, "spec", "selector")
    there = {*words(selector, "namespaces"), *mapping(selector, "pods")}
    return bool((there or {_space(chaos)}) & spaces)


def _all(site: Site, group: str, plural: str) -> list[Object | Objection]:
    """All objects of the cluster; where they may not be seen, nobody knows whether they are on our target."""
    try:
        return [*site.cluster.list(f"/apis/{group}/v1alpha1/{plural}")]
    except Forbidden:
        permission = Permission("list", plural, group=group)
        return [Objection(f"no permission to list {plural}, which may be at work on the target", permission.rule)]


def _active(site: Site, kind: str, found: Object) -> Iterator[Objection]:
    lease = text(found, "metadata", "labels", LEASE)
    if lease and text(found, "metadata", "labels", MANAGED_BY) == OURS:
        path = f"{leases.collection(site.options.control_namespace)}/{object_name(lease)}"
        if site.cluster.get(path) is None:
            yield Objection(f"{kind} {_place(found)} was left by lease {lease}, which is open no more", "mlchaos clean")
        return
    yield Objection(f"{kind} {_place(found)} is at work on the target", "its end, or its deletion")


def _space(found: Object) -> str:
    return text(found, "metadata", "namespace")


def _place(found: Object) -> str:
    return f"{_space(found)}/{text(found, 'metadata', 'name')}"


def _named(found: Object) -> str:
    return f"{text(found, 'metadata', 'name')} -n {_space(found)}"


def _patched(kind: str, found: Object, patch: str) -> str:
    return f"kubectl patch {kind} {_named(found)} --type merge -p '{patch}'"


def _now() -> datetime:
    return datetime.now(timezone.utc)
