"""The ledger and the lever of a cluster as whoever stops everything needs them: asked in a thread, within a bound.

Always second to what is on this machine: a cluster that does not answer is said, and keeps nothing waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from mlchaos_dagster.errors import LeaseRefused, MlChaosError

if TYPE_CHECKING:
    from mlchaos_dagster.engine.ports import Lease
    from mlchaos_dagster.kube.leases import ClusterLedger

T = TypeVar("T")
ANSWERS_S = 10.0
"""How long to wait for the cluster, from the first question on."""
GONE_S = 30.0
"""How long runs of other machines, and then the sweeper, may take to take their faults away."""
_POLL_S = 0.5


class Answer(Generic[T]):
    """What the cluster says, asked in a thread."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._began = time.monotonic()
        self._box: list[T] = []
        self._said = f"no answer within {ANSWERS_S:g} s"
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True)
        self._thread.start()

    def wait(self) -> tuple[T | None, str]:
        """The answer, or None and why there is none."""
        self._thread.join(max(0.0, self._began + ANSWERS_S - time.monotonic()))
        return (self._box[0], "") if self._box else (None, self._said)

    def _run(self, ask: Callable[[], T]) -> None:
        try:
            self._box.append(ask())
        except MlChaosError as e:
            self._said = " ".join(str(e).split())


class RemoteLedger:
    """The ledger of a cluster, reached when it is first asked.

    Args:
        connect: how; raises MlChaosError when it cannot be reached.
        user: who pulls its lever.
    """

    def __init__(self, connect: Callable[[], ClusterLedger], user: str) -> None:
        self._connect, self._user = connect, user
        self._ledger: ClusterLedger | None = None
        self._lock = threading.Lock()

    def ask(self, what: Callable[[ClusterLedger], T]) -> Answer[T]:
        """Begin asking."""
        return Answer(lambda: what(self.connected()))

    def pull(self, reason: str) -> Answer[tuple[Lease, ...]]:
        """Pull the cluster's lever; the leases that were open then."""

        def act(ledger: ClusterLedger) -> tuple[Lease, ...]:
            ledger.lever.pull(reason, self._user)
            return ledger.leases()

        return self.ask(act)

    def release(self) -> str:
        """Let runs in again; what came of it, in words."""
        released, said = self.ask(lambda ledger: ledger.lever.release()).wait()
        if released is None:
            return f"the lever of the cluster is NOT released: {said}"
        return "the lever of the cluster is released" if released else "the lever of the cluster was not pulled"

    def stop(self, leases: Sequence[Lease], reason: str) -> None:
        """Ask the owners of leases of other machines to stop. Raises StoreError."""
        ledger = self.connected()
        for lease in leases:
            try:
                ledger.request_stop(lease.id, reason)
            except LeaseRefused:
                continue  # it has ended meanwhile

    def until_gone(self, leases: Sequence[Lease]) -> list[tuple[Lease, float, str]]:
        """Wait until they are closed: lease, seconds, why not (empty: it is closed, which needs the proof)."""
        began, left = time.monotonic(), {x.id: x for x in leases}
        found: list[tuple[Lease, float, str]] = []
        said = "its run has not ended, and no sweeper took it away"
        while left:
            try:
                still = {h.id for h in self.connected().heads()}
                for lease_id in left.keys() - still:
                    found.append((left.pop(lease_id), time.monotonic() - began, ""))
            except MlChaosError as e:
                said = str(e)
            if time.monotonic() - began >= GONE_S:
                break
            if left:
                time.sleep(_POLL_S)
        return found + [(x, time.monotonic() - began, said) for x in left.values()]

    def connected(self) -> ClusterLedger:
        """Its ledger. Raises MlChaosError: it cannot be reached."""
        with self._lock:
            if self._ledger is None:
                self._ledger = self._connect()
            return self._ledger
