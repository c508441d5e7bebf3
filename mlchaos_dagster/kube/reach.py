"""Where the sweeper could take a fault away. It says so itself, beside its heartbeat: nobody else may ask what it may.

A namespace can opt in (a label) without its rights being bound: then a run could make a fault there that nobody but the run
and its machine could take away.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from mlchaos_dagster.engine.ports import Clock
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Cluster, Permission
from mlchaos_dagster.kube.labels import OPT_IN
from mlchaos_dagster.kube.leases import SWEEPER, collection
from mlchaos_dagster.kube.objects import mapping, text

REACHES = "mlchaos.dev/reaches"
"""Annotation of the sweeper's Lease: namespaces, a space between."""
REACHES_TOOLS = "mlchaos.dev/reaches-tools"
"""The same of NAMESPACE/BACKEND: where it could take away what another tool makes for us. Older sweepers do not tell."""
TOOLS = {
    "litmus": Permission("delete", "chaosengines", group="litmuschaos.io"),
    "chaos_mesh": Permission("delete", "podchaos", group="chaos-mesh.org"),
}
"""Backend → what stands for its rights; they are bound together (manifests/rbac)."""
EVERY_S = 3.0
"""Between two looks of the sweeper."""
_TOLD_WITHIN_S = 2 * EVERY_S + 2.0
_POLL_S = 0.5


class Reach:
    """The sweeper's half."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self.cluster, self.clock = cluster, clock
        self._known, self._tools, self._looked_at = "", "", float("-inf")

    def told(self) -> str:
        """Namespaces that opted in and in which this process may mend pods. Never raises; as before when it cannot be told."""
        if self.clock.monotonic() - self._looked_at >= EVERY_S:
            self._looked_at = self.clock.monotonic()
            try:
                spaces = self.cluster.list("/api/v1/namespaces", labels=f"{OPT_IN}=true")
                names = sorted(text(s, "metadata", "name") for s in spaces)
                known = [n for n in names if self.cluster.allowed(Permission("patch", "pods", n))]
                tools = [f"{n}/{t}" for n in known for t, p in TOOLS.items() if self._may(p, n)]
                self._known, self._tools = " ".join(known), " ".join(tools)
            except DriverError:  # an outage takes no rights away; without a heartbeat runs refuse in any case
                pass
        return self._known

    def _may(self, permission: Permission, namespace: str) -> bool:
        return self.cluster.allowed(replace(permission, namespace=namespace))

    def annotations(self) -> dict[str, str]:
        """For its Lease."""
        return {REACHES: self.told(), REACHES_TOOLS: self._tools}


def beyond(
    cluster: Cluster, control_namespace: str, namespaces: Collection[str], backend: str = "kubernetes"
) -> set[str]:
    """Of these, where the sweeper could not take a fault away that `backend` makes; empty where there is no sweeper
    (another guard says so).

    What was bound a moment ago is waited for, a few seconds.
    """
    end = time.monotonic() + _TOLD_WITHIN_S
    while True:
        found = cluster.get(f"{collection(control_namespace)}/{SWEEPER}")
        marks = mapping(found, "metadata", "annotations")
        told = set(str(marks.get(REACHES, "")).split())
        if backend in TOOLS and REACHES_TOOLS in marks:
            told &= {
                n for n, _, tool in (w.partition("/") for w in str(marks[REACHES_TOOLS]).split()) if tool == backend
            }
        missing = set(namespaces) - told
        if found is None or not missing or time.monotonic() > end:
            return set() if found is None else missing
        time.sleep(_POLL_S)
