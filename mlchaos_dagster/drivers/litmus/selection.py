"""Whom an experiment hits, in the words that Litmus understands."""

from __future__ import annotations

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Request
from mlchaos_dagster.drivers.litmus import faults
from mlchaos_dagster.drivers.litmus.faults import Selection
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import Ref, collection
from mlchaos_dagster.kube.selecting import is_there


def select(site: Site, request: Request) -> Selection:
    """The frozen targets. Their owners are looked up only where Litmus must know them."""
    refs, container = request.refs, request.target.kubernetes.container
    if refs[0].kind == "node":
        return Selection("", nodes=tuple(ref.name for ref in refs))
    namespace, names = refs[0].namespace, tuple(ref.name for ref in refs)
    experiment = faults.experiment_of(request.kind, request.params)
    plain = Selection(namespace, names, container=container)
    if experiment == faults.PARTITION:
        return Selection(namespace, names, kind=next(iter(kinds(site, refs)), ""), container=container)
    if not faults.repeats(request.kind, request.params):
        return plain
    pods = {ref: found for ref, found in frozen.read_all(site, refs).items() if found is not None}
    owners = {_workload(site, namespace, pod) for pod in pods.values()}
    if owners and all(kind == "statefulset" for kind, _ in owners):
        return Selection(namespace, names, stable=True, kind="statefulset", container=container)
    if all(kind and name for kind, name in owners) and _all_of(site, namespace, refs, list(pods.values())):
        return Selection(namespace, names, workloads=tuple(sorted(owners)), container=container)
    return plain


def kinds(site: Site, refs: tuple[Ref, ...]) -> list[str]:
    """Kinds of what owns the pods, in lower case; `""` for a pod that nothing owns."""
    pods = [found for found in frozen.read_all(site, refs).values() if found is not None]
    return sorted({_workload(site, refs[0].namespace, pod)[0] for pod in pods})


def _workload(site: Site, namespace: str, pod: Object) -> tuple[str, str]:
    """(kind, name) of the workload behind a pod, in lower case."""
    owner = frozen.controller(pod)
    if text(owner, "kind") == "ReplicaSet":
        behind = site.cluster.get(f"/apis/apps/v1/namespaces/{namespace}/replicasets/{text(owner, 'name')}")
        owner = frozen.controller(behind) or owner
    return text(owner, "kind").lower(), text(owner, "name")


def _all_of(site: Site, namespace: str, refs: tuple[Ref, ...], pods: list[Object]) -> bool:
    """Whether the frozen pods are all that their owners have."""
    owners = {text(frozen.controller(pod), "uid") for pod in pods}
    there = [p for p in site.cluster.list(collection("pod", namespace)) if is_there(p)]
    theirs = {text(p, "metadata", "uid") for p in there if text(frozen.controller(p), "uid") in owners}
    return theirs == {ref.uid for ref in refs}
