"""What a run must know of its cluster all the time: the lever, stop requests, and whether the sweeper's heart beats.

Read by a thread of its own; asking costs nothing. The thread ends when nobody asks any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from mlchaos_dagster.engine.ports import Clock
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.kube.leases import INSTALL, SWEEPER, collection
from mlchaos_dagster.kube.lever import ClusterLever
from mlchaos_dagster.kube.objects import text

POLL_S = 0.5
_UNASKED_S = 20.0
"""A run asks at every sample."""


class Pulse:
    """`StopSource`, and half of a `Watcher`.

    Args:
        cluster: The API server.
        namespace: The control namespace.
        clock: The run's.
        ttl_s: Silence of the sweeper, in seconds, after which it counts as gone.
        stop: The stop request that was seen at a renewal of the run's own leases; empty: none.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        clock: Clock,
        ttl_s: float,
        stop: Callable[[], str] = lambda: "",
    ) -> None:
        self.namespace, self.clock, self.ttl_s, self.stop = namespace, clock, ttl_s, stop
        self.cluster, self.lever = cluster, ClusterLever(cluster, namespace)
        self._pulled: str | None = None
        self._known = False
        """Whether the lever was ever read."""
        self._version = ""
        self._moved_at = float("-inf")
        self._said = "it was not looked for yet"
        self._asked_at = float("-inf")
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def requested(self) -> tuple[str, str] | None:
        """(`lever` | `stop`, reason) once asked. The first call waits for the cluster; unknown counts as pulled."""
        self._ask()
        if not self._known:
            return ("lever", f"whether the lever of the cluster is pulled cannot be told: {self._said}")
        if self._pulled is not None:
            return ("lever", self._pulled)
        return ("stop", reason) if (reason := self.stop()) else None

    def alive(self) -> bool:
        """Whether the sweeper's heart was seen to beat within `ttl_s`."""
        self._ask()
        return self.clock.monotonic() - self._moved_at <= self.ttl_s

    @property
    def why_not(self) -> str:
        """What is wrong with the sweeper, and what to type."""
        return f"the sweeper in namespace {self.namespace}: {self._said}; {INSTALL}"

    def close(self) -> None:
        """Stop reading."""
        self._over.set()

    def _ask(self) -> None:
        self._asked_at = self.clock.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._over.clear()
            if not self._known:
                self._look()
            self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(POLL_S):
            if self.clock.monotonic() - self._asked_at > _UNASKED_S:
                return
            self._look()

    def _look(self) -> None:
        """One look; what the cluster does not tell stays as it was, and the renewals end the run."""
        try:
            self._pulled, self._known = self.lever.read(), True
            found = self.cluster.get(f"{collection(self.namespace)}/{SWEEPER}")
        except DriverError as e:
            self._said = str(e)
            return
        version = text(found, "metadata", "resourceVersion")
        if found is None:
            self._said = "there is none"
        elif version != self._version:
            if self._version:
                self._moved_at, self._said = self.clock.monotonic(), "its heart beats"
            else:
                self._said = "no heartbeat seen yet"
        elif self.clock.monotonic() - self._moved_at > self.ttl_s:
            self._said = f"no heartbeat ({text(found, 'spec', 'holderIdentity') or 'nobody'})"
        self._version = version
