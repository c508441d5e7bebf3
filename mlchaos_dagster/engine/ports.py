"""The seams of the engine: time, backends, measurements, other processes.

Everything that is not arithmetic enters through here, so that the same engine runs an hour-long
experiment against a simulated target in milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence, Finding, RequestSample, SignalSample


class Clock(Protocol):
    """Time. The engine never asks anybody else what time it is."""

    def monotonic(self) -> float:
        """Seconds, never going back; the same origin for all processes of this host."""
        ...

    def wall(self) -> float:
        """Unix time."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class SystemClock:
    """The real one."""

    def monotonic(self) -> float:
        """`time.monotonic()`."""
        return time.monotonic()

    def wall(self) -> float:
        """`time.time()`."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Not at all when negative."""
        time.sleep(max(0.0, seconds))


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: a process, told apart from a later one with the same pid."""

    pid: int
    started: float
    """Start time of the process: seconds since boot on Linux (a clock step must not make a live owner look dead),
    else Unix seconds (psutil `create_time`). Only compared, by engine/processes.py."""
    boot_id: str
    host: str


@dataclass(frozen=True)
class Lease:
    """The right, and the duty, to take one fault away. Written and fsynced before any effect."""

    id: str
    """Object name and label at the backend, so that recovery needs nothing else."""
    run_id: str
    experiment: str
    environment: str
    driver: str
    kind: str
    targets: tuple[str, ...]
    """Frozen, resolved ids; the lock is on these."""
    params: dict[str, Any]
    undo: dict[str, Any]
    """All a driver needs to recover from another process."""
    duration_s: float
    """For how long the backend's own deadline lets the fault live, grace included."""
    opened_wall: float
    deadline_wall: float
    owner: Owner
    token: int = 0
    """Fencing token; grows with every take-over."""
    stop_requested: str = ""


class Step(Protocol):
    """What a verb that takes long calls between its batches, at least twice a second.

    It shows that the owner lives, tells progress, and during `undo` and `inject` looks whether somebody wants out.
    """

    def __call__(self, done: int, total: int) -> None:
        """So many of so many are done.

        Raises:
            Halted: stop at once and let it through; what was done so far is recovered.
            LeaseRefused: the lease is fenced; let it through.
        """
        ...


def no_step(done: int, total: int) -> None:
    """A step for whoever neither watches nor stops."""


@dataclass(frozen=True)
class Objection:
    """Why a backend would not make a fault now."""

    saw: str
    needs: str
    """What would let the run through."""


class Careful(Protocol):
    """A driver that looks, before anything is measured, whether the fault can be made and undone here."""

    def preflight(
        self, kind: str, targets: tuple[str, ...], existing: tuple[str, ...], params: dict[str, Any], *, target: Target
    ) -> tuple[Objection, ...]:
        """All objections; empty: none. Read-only.

        Raises:
            DriverUnavailable: the backend could not be asked.
        """
        ...


class Rechecking(Careful, Protocol):
    """A careful driver that looks once more right before the fault is made: at what may change during a baseline."""

    def recheck(
        self, kind: str, targets: tuple[str, ...], existing: tuple[str, ...], params: dict[str, Any], *, target: Target
    ) -> tuple[Objection, ...]:
        """As `preflight`, within a second; `existing` as of now."""
        ...


class Acting(Protocol):
    """A driver that also takes rollback actions: `undo`, `inject`, `recover` and `active` take their kinds, too."""

    actions: frozenset[str]

    def affected(self, kind: str, target: Target, params: dict[str, Any]) -> tuple[str, ...]:
        """Ids that the action would change now, the most pressing first; empty: nothing needs it. Read-only.

        Raises:
            DriverUnavailable: the backend could not be asked.
        """
        ...


class Judging(Protocol):
    """A driver whose backend has probes and a verdict of its own."""

    def findings(self, lease: Lease, step: Step = no_step) -> tuple[Finding, ...]:
        """What the backend judged. Called once, after a full window and before `recover`.

        May wait, bounded by itself, for a backend that needs a moment after its fault; empty where it judges nothing.

        Raises:
            DriverUnavailable: it could not be asked.
        """
        ...


class Driver(Protocol):
    """Plain verbs on one backend. The scope (try/finally, shielding, order) is the engine's.

    Every call is bounded to a few seconds, well under the lease's time to live, or calls its `step` that often.
    """

    name: str
    faults: frozenset[str]
    self_limiting: frozenset[str]
    """Fault kinds that end by themselves at their deadline."""

    def resolve(self, target: Target) -> tuple[str, ...]:
        """All ids that the target's selector matches now, sorted. Read-only.

        Raises:
            DriverUnavailable: the backend could not be asked.
        """
        ...

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target,
        backup: Path,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """What recovery will need, read before the fault (pids, versions, addresses, checksums).

        Changes nothing at the target. Content that has no other copy is written to the directory `backup` (which may
        not exist yet), fsynced and read back; it is kept as long as the lease is open. The rest is returned, and may
        be megabytes of JSON.

        Raises:
            DriverUnavailable: the backend could not be asked.
            DriverError: it could not be undone, so it must not be done.
        """
        ...

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Make the fault. May die halfway; a fenced lease (older token) is refused at the target.

        Raises:
            InjectFailed: maybe partly there; recover follows.
            DriverUnavailable: nothing was touched.
        """
        ...

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Take the fault away. Idempotent, from any process, before or after inject; afterwards
        the target refuses a late inject of this lease.

        Raises:
            RecoverFailed: the fault may be live.
        """
        ...

    def active(self, lease: Lease) -> Evidence:
        """What of the fault is there, read from the target.

        Raises:
            DriverUnavailable: the target could not be asked; unknown is never clean.
        """
        ...


class RequestSource(Protocol):
    """The open-loop probe."""

    @property
    def alive(self) -> bool:
        """False once the measurer is gone; it then measures nothing more."""
        ...

    def start(self, zero: float) -> None:
        """Begin sending; times are monotonic minus `zero`. Raises ProbeError."""
        ...

    def drain(self) -> list[RequestSample]:
        """New samples since the last call; never blocks, never raises."""
        ...

    def stop(self) -> list[RequestSample]:
        """Stop sending; the rest. Bounded by the request timeout."""
        ...


class SignalSource(Protocol):
    """Gauges read beside the probe (ready replicas, breaker state, a PromQL query)."""

    def start(self, zero: float) -> None:
        """Begin reading; times are monotonic minus `zero`."""
        ...

    def drain(self) -> list[SignalSample]:
        """New readings since the last call; never blocks, never raises."""
        ...

    def stop(self) -> list[SignalSample]:
        """Stop reading; the rest."""
        ...


class StopSource(Protocol):
    """Somebody's word that the run must end: a signal, a stop file, the lever, Dagster's status."""

    def requested(self) -> tuple[str, str] | None:
        """(cause, reason) once asked; cheap enough for every tick. Cause as in `AbortFacts.cause`."""
        ...


class Watcher(Protocol):
    """The watchdog process, as its owner sees it."""

    def alive(self) -> bool:
        """Whether its heartbeat moved lately. Checked at every sample; lost → abort."""
        ...

    def close(self) -> None:
        """The run is over; the watchdog may go."""
        ...


@dataclass(frozen=True)
class Health:
    """System health score 0–1 and how it came about (R4-03)."""

    score: float
    detail: str


@dataclass(frozen=True)
class Budget:
    """Error budget left, 0–1 (negative: overspent), and how it was counted."""

    remaining: float
    detail: str


Event = tuple[str, dict[str, Any]]
Progress = Callable[[str, dict[str, Any]], None]
"""`progress(kind, data)`: kinds `phase`, `guard`, `moment`, `tick`, `incident`. Must not raise or block."""


class Ledger(Protocol):
    """Open leases, the lock on targets, fencing. The file form is engine/ledger.py."""

    def open(self, lease: Lease) -> Lease:
        """Write the lease durably and lock its targets; returns it with its token.

        Raises:
            LeaseRefused: another open lease holds a target (says which run), or the lever is pulled.
            StoreError: it could not be written; nothing may be injected.
        """
        ...

    def renew(self, lease: Lease) -> None:
        """Show that the owner lives. Raises LeaseRefused when fenced, StoreError when it cannot be written."""
        ...

    def check(self, lease: Lease) -> None:
        """Before every mutation. Raises LeaseRefused when the lease is fenced, closed or gone."""
        ...

    def fence(self, lease_id: str, by: str) -> Lease:
        """Take the lease over: its token grows, its owner's checks fail from now on. Returns the new lease."""
        ...

    def close(self, lease: Lease, evidence: Sequence[str]) -> None:
        """Only after `active` is false. Works on a full disk."""
        ...

    def leases(self) -> tuple[Lease, ...]:
        """All open leases that can be read."""
        ...

    def unreadable(self) -> tuple[str, ...]:
        """Files that should be leases and cannot be read: guards refuse while there are any."""
        ...

    def beat(self, lease_id: str) -> int:
        """The renewal counter, as an observer sees it."""
        ...
