"""The lease ledger of a cluster: who may fault what in it, who took over from whom, seen from every machine."""

from __future__ import annotations

from typing import Any

from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import LeaseRefused
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.lease_objects import head, identity, object_name

KEPT = "ledger"
"""Key in `Lease.undo`: which ledger keeps the lease; absent: the cluster's."""
NOWHERE = "nowhere"
"""Value of `KEPT` of a lease that no ledger knows: for tests of single handlers, set by the test itself."""


def collection(namespace: str) -> str:
    """Path of the Lease objects of a namespace."""
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


def held(site: Site, lease: Lease) -> None:
    """Look, right before something is changed, whether the lease still is its owner's.

    A lease that the cluster does not know is refused. The one exception is a lease that says of itself that no ledger
    keeps it: `lease.undo["ledger"] == "nowhere"`. Only tests of handlers write that; runs never do.

    Raises:
        LeaseRefused: closed, gone, or taken over: change nothing.
        DriverUnavailable: the cluster did not answer: change nothing.
    """
    if lease.undo.get(KEPT) == NOWHERE:
        return
    found: dict[str, Any] | None = site.cluster.get(
        f"{collection(site.options.control_namespace)}/{object_name(lease.id)}"
    )
    if found is None:
        raise LeaseRefused(f"lease {lease.id} is not open in the cluster: closed or gone")
    now = head(found)
    if now.taken_by or now.holder != identity(lease.owner):
        raise LeaseRefused(f"lease {lease.id} was taken over by {now.taken_by or now.holder or 'somebody'}")
