"""Who else would be at work on a target: chaos of other tools, and controllers that undo what we do.

States of the other tools' resources: facts of Litmus's and Chaos Mesh's own sources (`status.engineStatus`,
`status.experiment.desiredPhase` and `containerRecords`), read as plain objects; a tool that is not installed has none.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlchaos_dagster.drivers.cluster.handler import Request
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.kube.client import Forbidden, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text, words

_LITMUS, _CHAOS_MESH = "litmuschaos.io", "chaos-mesh.org"
_NO_FAULT = frozenset({"schedules", "workflows", "workflownodes", "statuschecks", "remoteclusters", "podiochaos"})
"""Kinds of Chaos Mesh that are no running fault of a target themselves: their experiments are listed, too."""
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
    """Chaos of other tools on the targets, and controllers that would fight the fault."""
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
    if site.cluster.get(f"/apis/{_LITMUS}/v1alpha1") is None:
        return
    for engine in _all(site, _LITMUS, "chaosengines"):
        if isinstance(engine, Objection):
            yield engine
            continue
        over = text(engine, "status", "engineStatus") in ("completed", "stopped")
        stopped = text(engine, "spec", "engineState") == "stop" and not text(engine, "status", "engineStatus")
        at = text(engine, "spec", "appinfo", "appns") or text(engine, "metadata", "namespace")
        if not over and not stopped and at in spaces:
            yield _active("ChaosEngine", engine)


def _chaos_mesh(site: Site, spaces: set[str], names: set[tuple[str, str]]) -> Iterator[Objection]:
    group = site.cluster.get(f"/apis/{_CHAOS_MESH}/v1alpha1")
    for resource in items(group, "resources"):
        plural = text(resource, "name")
        if "/" in plural or plural in _NO_FAULT or "list" not in words(resource, "verbs"):
            continue
        for chaos in _all(site, _CHAOS_MESH, plural):
            if isinstance(chaos, Objection):
                yield chaos
            elif _runs(chaos) and _hits(chaos, spaces, names):
                yield _active(text(resource, "kind"), chaos)


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
    return bool((there or {text(chaos, "metadata", "namespace")}) & spaces)


def _all(site: Site, group: str, plural: str) -> list[Object | Objection]:
    """All objects of the cluster; where they may not be seen, nobody knows whether they are on our target."""
    try:
        return [*site.cluster.list(f"/apis/{group}/v1alpha1/{plural}")]
    except Forbidden:
        permission = Permission("list", plural, group=group)
        return [Objection(f"no permission to list {plural}, which may be at work on the target", permission.rule)]


def _active(kind: str, found: Object) -> Objection:
    place = f"{text(found, 'metadata', 'namespace')}/{text(found, 'metadata', 'name')}"
    return Objection(f"{kind} {place} is at work on the target", "its end, or its deletion")
