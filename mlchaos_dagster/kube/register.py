"""Which leases won their targets: one ConfigMap, changed only by compare-and-swap.

Whoever opens first writes the Lease object, then reads this register, then the Leases that it names, and if none is in
the way adds its own id, on condition that the register is unchanged. Of two that want one target the second sees the
first, however they interleave; and that takes as many calls for a thousand targets as for one. An id whose Lease is
gone means nothing, and is dropped by the next one who writes: so the Lease object alone decides whether a target is held.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from mlchaos_dagster.engine.ports import Clock
from mlchaos_dagster.errors import LeaseRefused, StoreError
from mlchaos_dagster.kube import labels
from mlchaos_dagster.kube.client import Cluster, Conflict
from mlchaos_dagster.kube.lease_objects import Head
from mlchaos_dagster.kube.objects import Object, text

NAME = "mlchaos-ledger"
_TRIES = 50


def enter(
    cluster: Cluster,
    namespace: str,
    lease_id: str,
    heads: Callable[[], Sequence[Head]],
    clash: Callable[[Head], str],
    clock: Clock,
) -> None:
    """Win the targets of a lease whose object is there already.

    Args:
        cluster: Where.
        namespace: Of the register.
        lease_id: Ours.
        heads: Reads all Lease objects anew.
        clash: What is in the way of ours in another lease, in words; empty: nothing.
        clock: For the pause between two tries.

    Raises:
        LeaseRefused: another lease holds a target.
        StoreError: others were always faster.
        DriverError: the cluster did not answer; ours may be entered.
    """
    collection = f"/api/v1/namespaces/{namespace}/configmaps"
    for attempt in range(_TRIES):
        register = cluster.get(f"{collection}/{NAME}")
        others = {h.id: h for h in heads() if h.id != lease_id}
        if register is None:  # the first use, or somebody deleted it: who was ever renewed has won
            won = {x for x, other in others.items() if other.beat}
        else:
            won = {x for x in text(register, "data", "open").split() if x in others}
        for other in sorted(won):
            if said := clash(others[other]):
                raise LeaseRefused(said)
        try:
            if register is None:
                cluster.create(collection, _body(namespace, {*won, lease_id}))
            else:
                body = _body(namespace, {*won, lease_id})
                body["metadata"]["resourceVersion"] = text(register, "metadata", "resourceVersion")
                cluster.replace(f"{collection}/{NAME}", body)
            return
        except Conflict:
            clock.sleep(random.uniform(0.0, 0.02 * min(attempt + 1, 10)))
    raise StoreError(f"the ledger of the cluster is busy: {_TRIES} others were faster; nothing was injected")


def _body(namespace: str, ids: Collection[str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            "labels": {labels.MANAGED_BY: labels.OURS, labels.COMPONENT: "ledger"},
        },
        "data": {"open": " ".join(sorted(ids))},
    }
