"""Taking away what others left behind: fence → kill → recover → prove → close, for every lease that is due.

One function for all who do it: watchdog, `mlchaos recover`, `stop --all`, the sweeper sensor. Two at once are safe. A
lease whose owner lives and renews is never touched, unless forced or long past its deadline. Knows the ports only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import Clock, Driver, Lease, Ledger, Owner
from mlchaos_dagster.engine.processes import Processes, SystemProcesses, current_owner
from mlchaos_dagster.errors import DriverError, LeaseRefused, StoreError

Drivers = Callable[[str, str], Driver]
"""`drivers(driver_name, environment)`; environment is empty for an unreadable lease. May raise."""

OVERDUE_S = 60.0
"""How long past its deadline a lease of a live owner is left alone: its own recovery may take that long."""
PROOF_S = 10.0
"""For how long one sweep tries to prove one lease clean; at least two attempts."""
OTHER_SWEEPER_S = 15.0
"""How long to wait for another sweeper of the same lease, before taking it for stuck."""


class SweepLedger(Ledger, Protocol):
    """What sweeping needs beyond `ports.Ledger`."""

    def is_open(self, lease_id: str) -> bool:
        """Whether there is an open lease of this id, readable or not."""
        ...

    def stub(self, path: str) -> Lease | None:
        """An unreadable lease, as far as its name tells."""
        ...

    def overdue(self, lease: Lease) -> float:
        """Seconds past the deadline, by a clock shared with the owner; -inf when there is none."""
        ...

    def recovering(self, lease_id: str, wait_s: float) -> AbstractContextManager[bool]:
        """Be the only sweeper of this lease."""
        ...


@dataclass(frozen=True)
class SweepResult:
    """What became of one lease."""

    lease: Lease
    why: str
    """Why it was due."""
    action: Literal["recovered", "would recover", "failed", "left"]
    clean: bool
    """The target itself said that nothing is there."""
    evidence: tuple[str, ...] = ()
    seconds: float = 0.0
    """Decision → proven clean, or given up."""
    error: str = ""
    command: str = ""
    """What to type when it is not clean."""

    def to_json(self) -> dict[str, Any]:
        """For `--output json` and Dagster metadata."""
        lease = self.lease
        return {
            "lease": lease.id,
            "run_id": lease.run_id,
            "experiment": lease.experiment,
            "environment": lease.environment,
            "driver": lease.driver,
            "kind": lease.kind,
            "targets": list(lease.targets),
            "why": self.why,
            "action": self.action,
            "clean": self.clean,
            "evidence": list(self.evidence),
            "seconds": round(self.seconds, 3),
            "error": self.error,
            "command": self.command,
        }


@dataclass
class _Seen:
    beat: int
    since: float
    moved: bool = False


class RenewalObserver:
    """Sees whether owners renew, by looking: on its own clock, never on somebody else's.

    Args:
        ledger: Whose beats are watched.
        clock: The observer's own.
        ttl_s: Silence, in seconds, after which an owner counts as hung.
        max_gap_s: Longest time between two looks that counts as looking. After a longer one the observer itself was
            paused, perhaps with everybody else (a suspended laptop), and all counts start again.
    """

    def __init__(self, ledger: Ledger, clock: Clock, ttl_s: float, max_gap_s: float | None = None) -> None:
        self.ledger, self.clock, self.ttl_s = ledger, clock, ttl_s
        self.max_gap_s = max(1.0, ttl_s / 2) if max_gap_s is None else max_gap_s
        self._seen: dict[str, _Seen] = {}
        self._last = float("-inf")

    def look(self, leases: Sequence[Lease]) -> None:
        """One look; call it more often than `max_gap_s`."""
        now = self.clock.monotonic()
        paused = now - self._last > self.max_gap_s
        self._last = now
        seen: dict[str, _Seen] = {}
        for lease in leases:
            beat, before = self.ledger.beat(lease.id), self._seen.get(lease.id)
            if before is None or beat != before.beat:
                seen[lease.id] = _Seen(beat, now, before is not None)
            else:
                seen[lease.id] = replace(before, since=now) if paused else before
        self._seen = seen

    def silent(self, lease: Lease) -> bool:
        """No renewal for `ttl_s`, as of the last look."""
        seen = self._seen.get(lease.id)
        return seen is not None and self._last - seen.since >= self.ttl_s

    def moved(self, lease: Lease) -> bool:
        """A renewal was seen since the first look."""
        seen = self._seen.get(lease.id)
        return seen is not None and seen.moved

    def watch(self, leases: Sequence[Lease], poll_s: float = 0.1) -> set[str]:
        """Look until every lease has renewed or was silent for `ttl_s`; the ids of the silent ones.

        Takes no time when the looks so far tell; `ttl_s` and little more at most (unless paused).
        """
        end = self.clock.monotonic() + 10 * self.ttl_s  # for an observer so starved that it never gets to look
        while True:
            self.look(leases)
            silent = {x.id for x in leases if self.silent(x)}
            told = all(x.id in silent or self.moved(x) for x in leases)
            if told or self.clock.monotonic() >= end:
                return silent
            self.clock.sleep(poll_s)

    def still_silent(self, lease: Lease) -> bool:
        """The last thing before taking it over: nothing moved since the verdict."""
        seen = self._seen.get(lease.id)
        return seen is not None and self.ledger.beat(lease.id) == seen.beat


def clear_command(lease_id: str) -> str:
    """The exact command that clears one lease."""
    return f"mlchaos recover {lease_id}"


def sweep(
    ledger: SweepLedger,
    drivers: Drivers,
    clock: Clock,
    incidents: IncidentLog,
    *,
    only: Collection[str] | None = None,
    dry_run: bool = False,
    force: str = "",
    mine: Owner | None = None,
    observer: RenewalObserver | None = None,
    overdue_s: float = OVERDUE_S,
    by: str = "sweeper",
    processes: Processes | None = None,
    known: Mapping[str, Lease] | None = None,
    proof_s: float = PROOF_S,
) -> list[SweepResult]:
    """Take away the fault of every open lease that is due, and close it.

    Due is a lease whose owner is dead, or hung (`observer` saw no renewals), or `overdue_s` past its deadline.

    Args:
        ledger: The leases.
        drivers: Builds the driver of a lease; a failure concerns that lease only.
        clock: The sweeper's own.
        incidents: One line per fencing, recovery and failure.
        only: Lease ids to look at; None: all.
        dry_run: Only say what would be done.
        force: Reason in words; makes every lease due, whoever owns it (`stop --all`, `recover`, the watchdog).
        mine: This process: its leases are left alone unless forced, and it is never killed. Default: the caller.
        observer: Without one, a lease of a running owner is never taken for hung.
        overdue_s: See above.
        by: Who sweeps, for the log and for the owner that wakes up fenced.
        processes: Whether owners run, and how to end them.
        known: Leases as they were when they could still be read, to recover unreadable ones with their undo data.
        proof_s: Seconds of trying per lease.

    Returns:
        One result per lease that was due, and per unreadable file.

    Raises:
        StoreError: the ledger's directory cannot be read.

    On failure of one: its lease stays open, the result says so with the command; the others go on.
    """
    sweeper = _Sweeper(
        ledger=ledger,
        drivers=drivers,
        clock=clock,
        incidents=incidents,
        mine=current_owner() if mine is None else mine,
        observer=observer,
        overdue_s=overdue_s,
        by=by,
        processes=processes or SystemProcesses(),
        known=known or {},
        proof_s=proof_s,
    )
    return sweeper.run(only, force, dry_run)


@dataclass
class _Sweeper:
    ledger: SweepLedger
    drivers: Drivers
    clock: Clock
    incidents: IncidentLog
    mine: Owner
    observer: RenewalObserver | None
    overdue_s: float
    by: str
    processes: Processes
    known: Mapping[str, Lease]
    proof_s: float
    results: list[SweepResult] = field(default_factory=list[SweepResult])

    def run(self, only: Collection[str] | None, force: str, dry_run: bool) -> list[SweepResult]:
        leases = list(self.ledger.leases())
        unreadable: set[str] = set()
        for path in self.ledger.unreadable():
            stub = self.ledger.stub(path)
            if stub is None:
                self._hopeless(path, only)
            else:
                leases.append(stub)
                unreadable.add(stub.id)
        leases = [x for x in leases if only is None or x.id in only]
        due = self._due(leases, unreadable, force)
        for lease in leases:
            if lease.id in due and dry_run:
                command = clear_command(lease.id)
                self.results.append(SweepResult(lease, due[lease.id], "would recover", False, command=command))
            elif lease.id in due:
                self.results.append(self._take_over(lease, due[lease.id], force))
            elif lease.id in unreadable:
                error = "its file is unreadable, and nothing shows that its owner is gone"
                command = clear_command(lease.id)
                self.results.append(SweepResult(lease, "unreadable", "left", False, error=error, command=command))
        return self.results

    def _due(self, leases: Sequence[Lease], unreadable: set[str], force: str) -> dict[str, str]:
        """Lease id → why."""
        if force:
            return {x.id: force for x in leases}
        due: dict[str, str] = {}
        undecided: list[Lease] = []
        for lease in leases:
            if lease.id in unreadable:
                undecided.append(lease)
            elif lease.owner == self.mine:
                continue
            elif not self.processes.is_running(lease.owner):
                due[lease.id] = f"its owner, process {lease.owner.pid}, is gone"
            elif (over := self.ledger.overdue(lease)) > self.overdue_s:
                due[lease.id] = f"it is {over:.0f} s past its deadline"
            else:
                undecided.append(lease)
        if self.observer is not None and undecided:
            for lease_id in self.observer.watch(undecided):
                due[lease_id] = f"no renewal was seen for {self.observer.ttl_s:g} s"
        return due

    def _take_over(self, lease: Lease, why: str, force: str) -> SweepResult:
        start = self.clock.monotonic()
        with self.ledger.recovering(lease.id, OTHER_SWEEPER_S):
            # Ours now, or its other sweeper is stuck: fencing makes that one's checks fail.
            hung = not force and self.observer is not None and why.startswith("no renewal")
            if hung and self.observer is not None and not self.observer.still_silent(lease):
                return SweepResult(lease, why, "left", False, error="its owner renewed it after all")
            evidence: list[str] = []
            fenced = None
            try:
                if not self.ledger.is_open(lease.id):
                    return SweepResult(lease, why, "recovered", True, ("somebody else closed it meanwhile",))
                fenced = self.ledger.fence(lease.id, self.by)
                # An unreadable lease is better remembered than rebuilt from its name.
                lease = replace(self.known.get(lease.id, lease), token=fenced.token) if not fenced.targets else fenced
            except LeaseRefused:
                return SweepResult(lease, why, "recovered", True, ("somebody else closed it meanwhile",))
            except StoreError as e:  # cannot be fenced: then killing the owner is the fence, and the fault goes anyway
                evidence.append(str(e))
            self.incidents.write("fenced", f"lease {lease.id}: {why}", lease=lease.id, by=self.by, token=lease.token)
            evidence += self._kill(lease)
            return self._recover(lease, why, evidence, start, check=fenced is not None)

    def _kill(self, lease: Lease) -> list[str]:
        owner = lease.owner
        if owner.pid == 0 or owner == self.mine or not self.processes.is_local(owner):
            return []
        if not self.processes.is_running(owner):
            return []
        if self.processes.kill(owner):
            return [f"its owner, process {owner.pid}, was killed"]
        return [f"its owner, process {owner.pid}, could not be killed"]

    def _recover(self, lease: Lease, why: str, evidence: list[str], start: float, *, check: bool) -> SweepResult:
        pause, attempt, said = 0.02, 0, ""
        while True:
            attempt += 1
            try:
                if check:
                    self.ledger.check(lease)
                driver = self.drivers(lease.driver, lease.environment)
                driver.recover(lease)
                seen = driver.active(lease)
                if not seen.present:
                    evidence += seen.lines
                    break
                said = "still there: " + "; ".join(seen.lines)
            except LeaseRefused as e:
                if not self.ledger.is_open(lease.id):
                    return SweepResult(lease, why, "recovered", True, ("somebody else closed it meanwhile",))
                return self._failed(lease, why, evidence, start, f"another sweeper has it now: {e}")
            except Exception as e:  # noqa: BLE001 - a crashing driver is one failed attempt; other leases go on
                said = str(e) if isinstance(e, DriverError) else f"{type(e).__name__}: {e}"
            if attempt >= 2 and self.clock.monotonic() - start >= self.proof_s:
                return self._failed(lease, why, evidence, start, said)
            self.clock.sleep(pause)
            pause = min(pause * 2, 1.0)
        seconds = self.clock.monotonic() - start
        error = ""
        try:
            self.ledger.close(lease, (*evidence, f"swept by {self.by}: {why}"))
        except StoreError as e:
            if isinstance(e, LeaseRefused) and not self.ledger.is_open(lease.id):
                return SweepResult(lease, why, "recovered", True, ("somebody else closed it meanwhile",))
            error = f"the fault is gone, but the lease stays open: {e}"
        self.incidents.write(
            "recovered", f"lease {lease.id}: {why}", lease=lease.id, by=self.by, seconds=round(seconds, 3), error=error
        )
        command = clear_command(lease.id) if error else ""
        return SweepResult(lease, why, "recovered", True, tuple(evidence), seconds, error, command)

    def _failed(self, lease: Lease, why: str, evidence: list[str], start: float, error: str) -> SweepResult:
        seconds, command = self.clock.monotonic() - start, clear_command(lease.id)
        what = f"lease {lease.id} on {', '.join(lease.targets) or 'unknown targets'} may be live: {error}"
        self.incidents.write("unclean", what, lease=lease.id, by=self.by, command=command)
        return SweepResult(lease, why, "failed", False, tuple(evidence), seconds, error, command)

    def _hopeless(self, path: str, only: Collection[str] | None) -> None:
        if only is not None:
            return
        owner = Owner(pid=0, started=0.0, boot_id="", host="")
        lease = Lease(path, "", "", "", "", "", (), {}, {}, 0.0, 0.0, 0.0, owner)
        error = "its name tells neither lease nor driver: look at it, then move it out of the ledger"
        self.results.append(SweepResult(lease, "unreadable", "left", False, error=error, command=f"cat {path}"))
