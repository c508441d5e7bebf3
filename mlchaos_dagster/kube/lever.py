"""The lever of a cluster: a ConfigMap; while it is there nothing starts, and everything that runs ends."""

from __future__ import annotations

from mlchaos_dagster.errors import DriverError, StoreError
from mlchaos_dagster.kube import labels
from mlchaos_dagster.kube.client import Cluster, Conflict
from mlchaos_dagster.kube.lease_objects import now
from mlchaos_dagster.kube.objects import text

NAME = "mlchaos-lever"
_UNSAID = "no reason was recorded"


class ClusterLever:
    """As `StopFiles`' lever, for every machine that works on the cluster."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self._all = f"/api/v1/namespaces/{namespace}/configmaps"

    def read(self) -> str | None:
        """The reason while pulled. Raises DriverError: the cluster did not tell."""
        found = self.cluster.get(f"{self._all}/{NAME}")
        return None if found is None else text(found, "data", "reason") or _UNSAID

    def pull(self, reason: str, who: str = "") -> None:
        """Stop everything in this cluster. Raises StoreError."""
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": NAME,
                "namespace": self.namespace,
                "labels": {labels.MANAGED_BY: labels.OURS, labels.COMPONENT: "lever"},
            },
            "data": {"reason": reason or _UNSAID, "who": who, "when": now()},
        }
        try:
            self.cluster.create(self._all, body)
        except Conflict:
            return  # somebody pulled it before
        except DriverError as e:
            raise StoreError(f"the lever of the cluster cannot be pulled: {e}") from e

    def release(self) -> bool:
        """Let runs in again; False when it was not pulled. Raises StoreError."""
        try:
            return self.cluster.delete(f"{self._all}/{NAME}")
        except DriverError as e:
            raise StoreError(f"the lever of the cluster cannot be released: {e}") from e
