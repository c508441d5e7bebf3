"""How well the targets of an environment are, in one look, before anything starts."""

from __future__ import annotations

from collections.abc import Iterable

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.errors import DriverError, ProbeError
from mlchaos_dagster.kube.client import Cluster, Forbidden, Permission, Site
from mlchaos_dagster.kube.objects import Object, part, text
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.kube.selecting import is_there, near
from mlchaos_dagster.probes.kubernetes import written
from mlchaos_dagster.probes.kubernetes_pods import Owner, is_ready, owner_of

_WORKLOADS = {"Deployment": "deployment", "StatefulSet": "statefulset", "Rollout": "rollout"}


def replicas_ready(cluster: Cluster, options: Kubernetes, targets: Iterable[Target]) -> tuple[float, str]:
    """Ready replicas as a share of those that there should be, 0 to 1, of the worst workload; and in words.

    What is to be watched in the run may be watched: a permission that is missing is told here, not in the window.

    Raises:
        ProbeError: the cluster could not be asked, or says no; with the rule to add.
    """
    site = Site(cluster, options)
    try:
        shares: dict[str, tuple[int, int]] = {}
        for namespace, labels in sorted({place for t in targets for place in _places(site, t)}):
            _permitted(site, namespace)
            shares |= _shares(site, namespace, labels)
    except Forbidden as e:
        raise ProbeError(f"health of the targets: {e}") from e
    except DriverError as e:
        raise ProbeError(f"health of the targets: {e}") from e
    if not shares:
        return 1.0, "no workload among the targets"
    worst = min(shares, key=lambda name: _share(shares[name]))
    ready, wanted = shares[worst]
    return _share(shares[worst]), f"{ready} of {wanted} replicas of {worst} ready"


def _share(counts: tuple[int, int]) -> float:
    ready, wanted = counts
    return min(1.0, ready / wanted)


def _places(site: Site, target: Target) -> list[tuple[str, str]]:
    """(namespace, selector) of the pods that a target's health is."""
    objects = target.kubernetes
    namespace = objects.namespace or site.options.namespace
    if objects.replicas:
        return [(namespace, objects.replicas)]
    if objects.kind == "Pod":
        return [(namespace, near(target.select))]
    if objects.kind.lower() not in _WORKLOADS.values():
        return []
    found = site.cluster.list(collection(objects.kind.lower(), namespace), labels=near(target.select))
    return [(namespace, written(part(one, "spec", "selector") or {})) for one in found]


def _permitted(site: Site, namespace: str) -> None:
    for verb in ("list", "watch"):
        permission = Permission(verb, "pods", namespace)
        if not site.cluster.allowed(permission):
            raise ProbeError(f"no permission to {verb} pods, which the signals need; add {permission.rule}")


def _shares(site: Site, namespace: str, labels: str) -> dict[str, tuple[int, int]]:
    """Workload → its ready pods, and how many it should have. Jobs come and go, and are not counted."""
    pods: dict[Owner | None, list[Object]] = {}
    for pod in site.cluster.list(collection("pod", namespace), labels=labels):
        if is_there(pod):
            pods.setdefault(owner_of(pod), []).append(pod)
    found: dict[str, tuple[int, int]] = {}
    for owner, those in pods.items():
        if owner is not None and owner.kind == "Job":
            continue
        ready, wanted = sum(map(is_ready, those)), len(those)
        name = text(those[0], "metadata", "name")
        if owner is not None:
            name = owner.name
            if owner.kind in _WORKLOADS:
                workload = site.cluster.get(f"{collection(_WORKLOADS[owner.kind], namespace)}/{owner.name}")
                wanted = int(part(workload, "spec", "replicas") or 0)
        if wanted:
            found[f"{namespace}/{name}"] = (ready, wanted)
    return found
