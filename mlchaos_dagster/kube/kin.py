"""What a fault on some objects excludes: the objects themselves, and faults on what they are part of.

A Deployment that is scaled to nothing and a fault on one of its pods would each measure the other's effect, and undo it:
so a lease holds its targets, and is within their owners and nodes. Others may be within the same, nobody may hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.kube.lease_objects import key
from mlchaos_dagster.kube.objects import items, text
from mlchaos_dagster.kube.refs import Ref, collection

_ONE_BY_ONE = 10
"""So many pods of a namespace are read singly; more are listed."""


def held(targets: Iterable[str]) -> dict[str, str]:
    """Key → target, of what a lease on these targets holds."""
    found: dict[str, str] = {}
    for target in targets:
        found.update((key(word), target) for word in _words(target))
    return found


def held_later(lease: Lease) -> dict[str, str]:
    """Key → what, of the controllers whose new pods a fault at an interval hits, too: nobody else may test one of those."""
    if not lease.params.get("interval_s"):
        return {}
    owners: dict[str, str] = lease.undo.get("fault", {}).get("owners", {})
    return {key(uid): "every pod of a controller that is hit at an interval" for uid in owners.values() if uid}


def within(cluster: Cluster, targets: Sequence[str]) -> frozenset[str]:
    """Keys of the workloads and nodes that the targets are part of.

    Raises:
        DriverError: the cluster did not tell.
    """
    pods: dict[str, list[Ref]] = {}
    for ref in filter(None, map(_ref, targets)):
        if ref.kind == "pod":
            pods.setdefault(ref.namespace, []).append(ref)
    found: set[str] = set()
    for namespace, refs in pods.items():
        sets: dict[str, list[str]] = {}
        for pod in _read(cluster, namespace, refs):
            if node := text(pod, "spec", "nodeName"):
                found.add(f"node/{node}")
            for owner in _owners(pod):
                found.add(text(owner, "uid"))
                if text(owner, "kind") == "ReplicaSet":
                    name = text(owner, "name")
                    if name not in sets:
                        path = f"/apis/apps/v1/namespaces/{namespace}/replicasets/{name}"
                        sets[name] = [text(o, "uid") for o in _owners(cluster.get(path))]
                    found.update(sets[name])
    return frozenset(key(word) for word in found)


def _read(cluster: Cluster, namespace: str, refs: list[Ref]) -> Iterator[dict[str, Any]]:
    if len(refs) <= _ONE_BY_ONE:
        yield from filter(None, (cluster.get(ref.path) for ref in refs))
        return
    uids = {ref.uid for ref in refs}
    yield from (p for p in cluster.list(collection("pod", namespace)) if text(p, "metadata", "uid") in uids)


def _owners(found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return items(found, "metadata", "ownerReferences")


def _words(target: str) -> list[str]:
    ref = _ref(target)
    if ref is None:
        return [target]
    return [ref.uid, f"node/{ref.name}"] if ref.kind == "node" else [ref.uid]


def _ref(target: str) -> Ref | None:
    try:
        return Ref.parse(target)
    except DriverError:
        return None
