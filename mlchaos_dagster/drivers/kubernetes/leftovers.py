"""Everything of ours in a cluster, found by the cluster's own word: labels, annotations, names of helper containers.

Knows no lease file and no ledger: it finds what they lost, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mlchaos_dagster.agent.network_plan import short_name
from mlchaos_dagster.drivers.kubernetes.faults.model_file import helper_prefix
from mlchaos_dagster.drivers.kubernetes.faults.network_policy import LABEL as FAULT
from mlchaos_dagster.kube.client import ApiRefused, Cluster
from mlchaos_dagster.kube.labels import COMPONENT, LEASE, OPT_IN, OURS_SELECTOR
from mlchaos_dagster.kube.objects import Object, items, text, words
from mlchaos_dagster.kube.refs import PATHS, collection
from mlchaos_dagster.kube.rollouts import GROUP

HELPER_PREFIX = "mlchaos-"
"""Of the names of ephemeral containers."""
_EXTRA = re.compile(r"-[cdeq]?\d{1,2}$")
"""What a second container of a lease in the same pod has more."""
_MARKED = ("pod", "deployment", "statefulset", "secret")
"""Namespaced kinds that a fault changes in place."""
_EXTENSIONS = {"rollout": f"/apis/{GROUP}/v1alpha1"}
"""The same, of kinds that not every cluster knows → the API that knows them."""
_TOOLS = ("/apis/litmuschaos.io/", "/apis/chaos-mesh.org/")
"""Where an object that is being deleted is a fault that somebody still has to take away."""
_SHADOWS = frozenset(
    {"events", "endpoints", "endpointslices", "replicasets", "controllerrevisions", "componentstatuses"}
)
"""Kinds that another object's controller makes and removes."""


@dataclass(frozen=True, order=True)
class Leftover:
    """One object that is ours, or that carries a mark of ours."""

    how: str
    """`object` (ours: it can be deleted), `mark` (changed by us), `helper` (a container of ours that runs in a pod)."""
    kind: str
    namespace: str
    name: str
    path: str
    uid: str
    lease: str
    """Empty for what belongs to the installation, not to an experiment."""
    detail: str = ""

    @property
    def is_lease(self) -> bool:
        """Whether it is the Lease object of a ledger: a fault may be live as long as it is there."""
        return self.how == "object" and self.kind == "lease" and bool(self.lease)

    @property
    def shown(self) -> str:
        """One line for people."""
        where = f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"
        said = {"object": "", "mark": ", changed", "helper": f", container {self.detail} runs in it"}[self.how]
        return f"{where}{said}" + (f" (lease {self.lease})" if self.lease else " (installation)")


def find(cluster: Cluster) -> Iterator[Leftover]:
    """All of it, the faults of other tools first, the installation last.

    Raises:
        DriverUnavailable: the cluster did not answer; an incomplete list would look clean.
        ApiRefused: a kind may not be listed; the message says which.
    """
    spaces = [text(n, "metadata", "name") for n in cluster.list("/api/v1/namespaces", labels=f"{OPT_IN}=true")]
    ours = sorted([*_labelled(cluster), *_cuts(cluster)])
    tools = [o for o in ours if o.lease and o.path.startswith(_TOOLS)]
    yield from tools  # who makes the fault, before what it left at the pods
    # A mark has the whole id of its lease, by which a helper is told to end; a helper's name has a part of it.
    yield from sorted(_marked(cluster, spaces), key=lambda o: (o.how == "helper", o))
    yield from (o for o in ours if o.lease and o not in tools)
    yield from (o for o in ours if not o.lease)


def is_of(found: Leftover, leases: Collection[str]) -> bool:
    """Whether it belongs to one of these leases. (`lease` of a helper is its container's name, made from the id.)"""
    if found.how == "helper":
        return _EXTRA.sub("", found.lease) in {name for lease in leases for name in _helpers(lease)}
    return found.lease in leases


def _helpers(lease: str) -> tuple[str, ...]:
    """Names of the helper containers of a lease, without their numbers: kill, network, files."""
    return (lease, f"{HELPER_PREFIX}{short_name(lease)}", helper_prefix(lease).rstrip("-"))


def _labelled(cluster: Cluster) -> Iterator[Leftover]:
    seen: set[str] = set()
    for kind, path in _collections(cluster):
        for found in cluster.list(path, labels=OURS_SELECTOR):
            uid = text(found, "metadata", "uid")
            going = text(found, "metadata", "deletionTimestamp") and not path.startswith(_TOOLS)
            if uid in seen or going:  # one object in two API groups
                continue
            if items(found, "metadata", "ownerReferences"):  # goes with its owner
                continue
            seen.add(uid)
            yield _leftover("object", kind, found, path, text(found, "metadata", "labels", LEASE))


def _cuts(cluster: Cluster) -> Iterator[Leftover]:
    """NetworkPolicies that Litmus made for a lease: they carry its engine's uid, and select what only a lease marks."""
    path = "/apis/networking.k8s.io/v1/networkpolicies"
    for found in cluster.list(path, labels="chaosUID"):
        lease = text(found, "spec", "podSelector", "matchLabels", FAULT)
        if lease and text(found, "metadata", "labels", LEASE) != lease:
            yield _leftover("object", "networkpolicy", found, path, lease)


def _marked(cluster: Cluster, spaces: list[str]) -> Iterator[Leftover]:
    known = [*_MARKED, *(kind for kind, api in _EXTENSIONS.items() if cluster.get(api) is not None)]
    places = [(kind, collection(kind, space)) for space in spaces for kind in known] + [("node", PATHS["node"])]
    for kind, path in places:
        for found in cluster.list(path):
            lease = text(found, "metadata", "annotations", LEASE) or text(found, "metadata", "labels", FAULT)
            if lease and text(found, "metadata", "labels", LEASE) != lease:
                yield _leftover("mark", kind, found, path, lease)
            for status in items(found, "status", "ephemeralContainerStatuses"):
                name = text(status, "name")
                if name.startswith(HELPER_PREFIX) and "running" in (status.get("state") or {}):
                    yield _leftover("helper", kind, found, path, name, name)


def _leftover(how: str, kind: str, found: Object, path: str, lease: str, detail: str = "") -> Leftover:
    name, namespace = text(found, "metadata", "name"), text(found, "metadata", "namespace")
    if namespace:  # a list over all namespaces was asked
        path = path if f"/namespaces/{namespace}/" in path else _within(path, namespace)
    component = text(found, "metadata", "labels", COMPONENT)
    return Leftover(
        how, kind, namespace, name, f"{path}/{name}", text(found, "metadata", "uid"), lease, detail or component
    )


def _within(path: str, namespace: str) -> str:
    base, _, plural = path.rpartition("/")
    return f"{base}/namespaces/{namespace}/{plural}"


def _collections(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """(kind, path) of every kind that can be listed and deleted, in the version that the server prefers."""
    places = ["/api/v1"]
    for group in items(cluster.get("/apis"), "groups"):
        places.append(f"/apis/{text(group, 'preferredVersion', 'groupVersion')}")
    for place in places:
        try:
            resources = items(cluster.get(place), "resources")
        except ApiRefused as e:
            if e.code == 503:  # an aggregated API (metrics) that is down keeps no objects of ours
                continue
            raise
        for resource in resources:
            name, verbs = text(resource, "name"), words(resource, "verbs")
            if "/" not in name and name not in _SHADOWS and {"list", "delete"} <= set(verbs):
                yield text(resource, "kind").lower(), f"{place}/{name}"
