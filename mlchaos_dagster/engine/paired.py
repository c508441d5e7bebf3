"""Two ledgers at once: the files of this machine, and for leases of a cluster the ledger in that cluster.

The files come first and are never waited for: watchdog, `stop` and `recover` work with them when the cluster does not
answer. The ledger in the cluster is what other machines and the in-cluster sweeper see.

    open    files ─ cluster        refused or unreachable there: the file goes again, nothing is injected
    renew   files now, cluster from a thread that renews only when the owner did: a hung owner looks hung there, too
    check   both
    fence   files ─ cluster        unreachable there: made up for before the next change
    close   cluster ─ files
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Clock, Lease, Watcher
from mlchaos_dagster.engine.sweep import SweepLedger
from mlchaos_dagster.errors import DriverError, LeaseRefused, MlChaosError, StoreError

Remote = Callable[[Lease], "SweepLedger | None"]
"""The ledger that a lease is kept in besides the files; None: in no other. Raises MlChaosError: it cannot be reached."""
RENEW_EVERY_S = 1.0
"""Between two renewals in the cluster."""
SHOWN_EVERY_S = 0.5
"""Between two renewals of the file while the owner waits for the cluster."""
ANSWERS_S = 60.0
"""So long at most: every call to a cluster is bounded, and opening a lease takes about fifteen. Then it hangs."""
RENEWED_WITHIN_S = 5.0
"""How long a renewal in the cluster may be asked for and not succeed, by default."""


class PairedLedger:
    """`ports.Ledger` and `sweep.SweepLedger`.

    Args:
        local: The files.
        remote: Which other ledger a lease is kept in.
        guard: A ledger whose unreadable leases keep runs out, too: that of the run's own cluster.
        renewed_within_s: See `RENEWED_WITHIN_S`; well under the time to live there, so that a run that cannot show that
            it lives ends before it is taken for dead.
    """

    def __init__(
        self,
        local: FileLedger,
        remote: Remote,
        *,
        guard: Callable[[], SweepLedger | None] = lambda: None,
        renewed_within_s: float = RENEWED_WITHIN_S,
    ) -> None:
        self.local, self.remote, self.guard = local, remote, guard
        self.renewed_within_s = renewed_within_s
        self._there: dict[str, Lease | None] = {}
        """Lease id → as opened or taken over in the cluster by us; None: it is not there (any more)."""
        self._keepers: dict[str, _Keeper] = {}

    # -- the owner's verbs ------------------------------------------------------------------------------------------

    def open(self, lease: Lease) -> Lease:
        """Both, or none. Raises as `Ledger.open`."""
        remote = self._remote_of(lease)
        opened = self.local.open(lease)
        if remote is None:
            return opened
        try:
            with self._waiting(opened):
                there = remote.open(opened)
        except BaseException as e:
            with contextlib.suppress(StoreError):  # else the watchdog closes it: nothing was injected
                self.local.close(opened, (f"nothing was injected: {e}",))
            if isinstance(e, DriverError):
                raise StoreError(str(e)) from e
            raise
        self._there[lease.id] = there
        self._keepers[lease.id] = _Keeper(remote, there, self.local.clock, self.renewed_within_s)
        return opened

    def renew(self, lease: Lease) -> None:
        """Count one renewal here, ask for one there.

        Raises:
            LeaseRefused: taken over, here or there.
            StoreError: it could not be counted here, or not there for `renewed_within_s` seconds.
        """
        self.local.renew(lease)
        if (keeper := self._keepers.get(lease.id)) is not None:
            keeper.ask()

    def check(self, lease: Lease) -> None:
        """Raises LeaseRefused: taken over or gone, here or there; StoreError: the cluster does not answer."""
        self.local.check(lease)
        remote = self._remote_of(lease)
        if remote is not None and (there := self._taken(remote, lease)) is not None:
            with self._waiting(lease):
                remote.check(there)

    def close(self, lease: Lease, evidence: Sequence[str]) -> None:
        """In the cluster first: as long as it is open there, somebody must know. Raises as `Ledger.close`."""
        remote = self._remote_of(lease)
        if remote is not None and (there := self._taken(remote, lease)) is not None:
            with self._waiting(lease):
                remote.close(there, evidence)
            self._there[lease.id] = None
        self._release(lease.id)
        self.local.close(lease, evidence)
        self._there.pop(lease.id, None)

    # -- the observers' verbs ---------------------------------------------------------------------------------------

    def fence(self, lease_id: str, by: str) -> Lease:
        """Here; and there, now or before the next change. Raises as `Ledger.fence`, for the files."""
        lease = self.local.fence(lease_id, by)
        self._release(lease_id)
        self._there.pop(lease_id, None)
        with contextlib.suppress(StoreError):  # `check` tries again
            remote = self._remote_of(lease)
            if remote is not None:
                there = self._taken(remote, lease, by)
                if there is not None and there.targets and not lease.targets:
                    return replace(there, token=lease.token)  # the file has lost its content; the cluster has not
        return lease

    @contextlib.contextmanager
    def recovering(self, lease_id: str, wait_s: float) -> Generator[bool, None, None]:
        """Be the only sweeper, here and there."""
        with self.local.recovering(lease_id, wait_s) as mine, contextlib.ExitStack() as stack:
            found = self.local.read(lease_id)
            remote = None
            if found is not None:
                with contextlib.suppress(StoreError):
                    remote = self._remote_of(found)
            yield mine if remote is None else stack.enter_context(remote.recovering(lease_id, wait_s)) and mine

    def unreadable(self) -> tuple[str, ...]:
        """Of the files, and of the run's own cluster. Raises StoreError: that does not tell."""
        with _as_store_error():
            guard = self.guard()
        return self.local.unreadable() + (() if guard is None else guard.unreadable())

    def elsewhere(self) -> tuple[Lease, ...]:
        """Open leases of the run's own cluster, of whatever machine. Raises StoreError: that does not tell."""
        with _as_store_error():
            guard = self.guard()
            return () if guard is None else guard.leases()

    def stub(self, path: Path | str) -> Lease | None:
        """As the files' ledger."""
        return self.local.stub(path)

    def leases(self) -> tuple[Lease, ...]:
        """Those of this machine; a stop that was asked for in the cluster is the cluster's `StopSource`'s."""
        return self.local.leases()

    def read(self, lease_id: str) -> Lease | None:
        """As the files' ledger."""
        return self.local.read(lease_id)

    def is_open(self, lease_id: str) -> bool:
        """As the files' ledger."""
        return self.local.is_open(lease_id)

    def overdue(self, lease: Lease) -> float:
        """As the files' ledger."""
        return self.local.overdue(lease)

    def beat(self, lease_id: str) -> int:
        """As the files' ledger."""
        return self.local.beat(lease_id)

    def request_stop(self, lease_id: str, reason: str) -> None:
        """As the files' ledger."""
        self.local.request_stop(lease_id, reason)

    def settled(self) -> bool:
        """As the files' ledger."""
        return self.local.settled()

    @property
    def directory(self) -> Path:
        """Of the files."""
        return self.local.directory

    # -- inside -----------------------------------------------------------------------------------------------------

    def _remote_of(self, lease: Lease) -> SweepLedger | None:
        with _as_store_error():
            return self.remote(lease)

    def _taken(self, remote: SweepLedger, lease: Lease, by: str = "") -> Lease | None:
        """The lease there, taken over now unless it is ours already; None when it is not there.

        Who comes here without having opened it has fenced the file: the owner there is the same, so it is fenced, too.
        Not there means closed by the sweeper, or never written: then the files alone decide.
        """
        if lease.id not in self._there:
            try:
                self._there[lease.id] = remote.fence(lease.id, by or "the holder of its file")
            except LeaseRefused:
                self._there[lease.id] = None
        return self._there[lease.id]

    @contextlib.contextmanager
    def _waiting(self, lease: Lease) -> Generator[None, None, None]:
        """While an answer of the cluster is waited for: who waits for a slow API server does not hang, and shows it."""
        over = threading.Event()

        def show() -> None:
            end = self.local.clock.monotonic() + ANSWERS_S
            while not over.wait(SHOWN_EVERY_S) and self.local.clock.monotonic() < end:
                with contextlib.suppress(StoreError):  # fenced, or a full disk: the next renewal of the loop tells
                    self.renew(lease)

        thread = threading.Thread(target=show, name=f"wait-{lease.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _release(self, lease_id: str) -> None:
        if (keeper := self._keepers.pop(lease_id, None)) is not None:
            keeper.end()


class PairedWatcher:
    """`ports.Watcher`: the watchdog of this machine and one in the cluster; both must live."""

    def __init__(self, local: Watcher, remote: Watcher) -> None:
        self.local, self.remote = local, remote

    def alive(self) -> bool:
        """Whether both are."""
        return self.local.alive() and self.remote.alive()

    @property
    def why_not(self) -> str:
        """What is wrong with the one in the cluster; empty where it is this machine's that is lost."""
        return "" if self.remote.alive() else str(getattr(self.remote, "why_not", ""))

    def close(self) -> None:
        """The run is over, for both."""
        self.remote.close()
        self.local.close()


class _Keeper:
    """Renews one lease in the cluster, from a thread: a slow API server must not slow the watch loop."""

    def __init__(self, ledger: SweepLedger, lease: Lease, clock: Clock, within_s: float) -> None:
        self.ledger, self.lease, self.clock, self.within_s = ledger, lease, clock, within_s
        self._asked, self._over = threading.Event(), threading.Event()
        self._waiting_since: float | None = None
        self._refused: LeaseRefused | None = None
        self._said = ""
        threading.Thread(target=self._run, name=f"renew-{lease.id}", daemon=True).start()

    def ask(self) -> None:
        """The owner lives. Raises LeaseRefused: taken over there; StoreError: not renewed there for too long."""
        if self._refused is not None:
            raise self._refused
        self._asked.set()  # in any case: when the cluster is back, the recovery goes on under a renewed lease
        now = self.clock.monotonic()
        waiting = self._waiting_since
        if waiting is None:
            self._waiting_since = now
        elif now - waiting > self.within_s:
            raise StoreError(
                f"the lease {self.lease.id} could not be renewed in the cluster for {now - waiting:.1f} s: "
                f"{self._said or 'no answer yet'}"
            )

    def end(self) -> None:
        """No more renewals; one that is under way may still end."""
        self._over.set()
        self._asked.set()

    def _run(self) -> None:
        while self._asked.wait() and not self._over.is_set():
            self._asked.clear()
            try:
                self.ledger.renew(self.lease)
                self._waiting_since, self._said = None, ""
            except LeaseRefused as e:
                self._refused = e
                return
            except MlChaosError as e:
                self._said = str(e)
            self._over.wait(RENEW_EVERY_S)


@contextlib.contextmanager
def _as_store_error() -> Generator[None, None, None]:
    try:
        yield
    except StoreError:
        raise
    except MlChaosError as e:
        raise StoreError(str(e)) from e
