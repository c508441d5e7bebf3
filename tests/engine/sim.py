"""A simulated world: a clock that only moves when somebody sleeps, a service, a driver, a probe.

The engine, the file ledger, the guards, the watch loop, the window and the judgement are the real
ones. Simulated are time, the service and the backend. `Crash` is raised instead of a port call to
play the loss of the process: nothing after it may run but what another process would do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Environment, Target
from mlchaos_dagster.domain.record import Evidence, Finding, RequestSample, SignalSample
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.active import ActiveRuns
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Budget, Health, Lease, Owner, Step, no_step
from mlchaos_dagster.engine.run import Kit, Run, quiet
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed
from mlchaos_dagster.settings import Home

ENVIRONMENT: dict[str, Any] = {
    "schema": "mlchaos/v1",
    "name": "sim",
    "backends": {"fake": ["pod_failure", "pod_delete", "network_latency"]},
    "targets": {"prediction-service": {"select": "replica-*"}},
    "probe": {"url": "http://sim/predict", "rate": 50, "timeout": "1s"},
    "slis": {
        "availability": {"measure": "availability"},
        "error_rate": {"measure": "error_rate"},
        "latency_p95": {"measure": "latency_p95"},
        "ready_replicas": {"signal": "ready_replicas", "reduce": "min"},
    },
    "signals": ["ready_replicas"],
    "sampling": {"baseline": "5s"},
    "limits": {"abort": [{"sli": "error_rate", "above": "50%", "for": "2s"}]},
}
EXPERIMENT: dict[str, Any] = {
    "schema": "mlchaos/v1",
    "name": "sim-pod-failure",
    "title": "t",
    "hypothesis": "h",
    "area": "serving",
    "owner": "ml-platform@example.com",
    "target": "prediction-service",
    "fault": {"kind": "pod_failure"},
    "blast_radius": {"fraction": "34%"},
    "duration": "10s",
    "steady_state": [{"sli": "availability", "at_least": "99%"}, {"sli": "latency_p95", "below": "300ms"}],
    "expect": [{"signal": "ready_replicas", "drops": True}],
    "recovery": {"within": "10s"},
}


class Crash(BaseException):
    """The process is gone: no `except` of ours may run on after it, so it is no Exception."""


class SimClock:
    """Moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.t = 1000.0

    def monotonic(self) -> float:
        return self.t

    def wall(self) -> float:
        return 1.7e9 + self.t

    def sleep(self, seconds: float) -> None:
        self.t += max(seconds, 1e-6)


@dataclass
class World:
    """The service and everything that may happen to it."""

    clock: SimClock = field(default_factory=SimClock)
    replicas: int = 3
    faults: dict[str, Lease] = field(default_factory=dict)
    fenced: set[str] = field(default_factory=set)
    errors_during: float = 0.0
    """Share of requests that fail while a fault is on."""
    errors_always: float = 0.0
    latency_during_s: float = 0.03
    effective: bool = True
    """Whether the fault has its effect."""
    heal_after_s: float = 0.5
    watchdog_alive: bool = True
    stop: tuple[str, str] | None = None
    late_s: float = 0.0
    items: int = 0
    """Bodies of the probe; 0: none."""
    score: Callable[[int, int], float] | None = None
    """The number in the answer to an item, given (item, request's number); None: answers carry none."""
    score_during: Callable[[int, int], float] | None = None
    """The same while a fault is on; None: as always."""
    wrong_for_s: float = 0.0
    """How long the answers stay wrong after the fault is gone."""
    mute_from: float | None = None
    """From then on the probe measures nothing."""
    injections: list[str] = field(default_factory=list)
    calls: int = 0
    crash_at: int | None = None
    fail_at: int | None = None
    """The k-th driver call raises an error instead."""
    driver_calls: int = 0
    at: dict[float, Callable[[World], None]] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    """Verb (`undo`, `inject`, `recover`) → in how many batches of 0.4 s it does its work."""
    batches_done: dict[str, int] = field(default_factory=dict)
    cannot_undo: bool = False
    judged: Finding | Exception | None = None
    """What the backend judged by itself; None: it does not judge."""
    judging_s: float = 0.0
    """How long it needs for that, in batches of 0.4 s."""
    asked: list[bool] = field(default_factory=list)
    """At every question for it: whether the fault was on."""
    _recovered: float = -1e9
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def call(self, driver: bool = False) -> None:
        """Every port call of the owner passes here; only drivers may raise errors (the contract of the ports)."""
        self.calls += 1
        if self.crash_at is not None and self.calls == self.crash_at:
            raise Crash(f"at call {self.calls}")
        self.driver_calls += driver
        if driver and self.driver_calls == self.fail_at:
            raise DriverUnavailable("no answer", driver="fake", verb=f"call {self.calls}")
        for when in [w for w in self.at if w <= self.clock.t]:
            self.at.pop(when)(self)

    @property
    def ready(self) -> float:
        down = len({t for lease in self.faults.values() for t in lease.targets}) if self.effective else 0
        healing = self.clock.t - self._recovered < self.heal_after_s
        return float(self.replicas - (down or (1 if healing and self.effective else 0)))


class FakeDriver:
    """A backend that keeps tombstones, as a real one must."""

    name = "fake"
    faults = frozenset({"pod_failure", "pod_delete", "network_latency"})
    self_limiting = faults

    def __init__(self, world: World) -> None:
        self.world = world

    def resolve(self, target: Target) -> tuple[str, ...]:
        self.world.call(driver=True)
        return tuple(f"replica-{i}" for i in range(1, self.world.replicas + 1))

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
        self.world.call(driver=True)
        backup.mkdir(parents=True)
        (backup / "before").write_text(str(targets))
        self._work("undo", step)
        if self.world.cannot_undo:
            raise DriverError("there is no room for a copy", driver="fake", verb="undo")
        return {"before": list(targets), "backup": str(backup)}

    def _work(self, verb: str, step: Step) -> None:
        total = self.world.batches.get(verb, 0)
        for done in range(total):
            self.world.clock.sleep(0.4)
            step(done, total)
            self.world.batches_done[verb] = done + 1

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        self.world.call(driver=True)
        if lease.id in self.world.fenced:
            raise InjectFailed("fenced", driver="fake", verb="inject", lease_id=lease.id)
        self.world.injections.append(lease.id)
        self.world.faults[lease.id] = lease
        self._work("inject", step)
        self.world.call(driver=True)  # may be lost after the effect, before the reply

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        self.world.call(driver=True)
        self.world.fenced.add(lease.id)
        self._work("recover", step)
        if self.world.faults.pop(lease.id, None):
            self.world._recovered = self.world.clock.t
        self.world.call(driver=True)

    def active(self, lease: Lease) -> Evidence:
        self.world.call(driver=True)
        present = lease.id in self.world.faults
        return Evidence(
            present=present, effective=present and self.world.effective, lines=("on" if present else "nothing left",)
        )


class JudgingDriver(FakeDriver):
    """Of a backend with a judgement of its own."""

    def findings(self, lease: Lease, step: Step = no_step) -> tuple[Finding, ...]:
        world = self.world
        world.asked.append(lease.id in world.faults)
        for k in range(int(world.judging_s / 0.4)):
            world.clock.sleep(0.4)
            step(k, 0)
        if isinstance(world.judged, Exception):
            raise world.judged
        return () if world.judged is None else (world.judged,)


class SimRequests:
    """The open-loop probe, without a network."""

    alive = True

    def __init__(self, world: World, rate: float = 50.0) -> None:
        self.world, self.rate, self.k, self.zero, self.begun = world, rate, 0, 0.0, 0.0

    def start(self, zero: float) -> None:
        self.world.call()
        self.zero, self.begun = zero, self.world.clock.t

    def drain(self) -> list[RequestSample]:
        self.world.call()
        world, found = self.world, list[RequestSample]()
        while (due := self.begun + self.k / self.rate) <= world.clock.t - 0.03:
            k = self.k
            self.k += 1
            if world.mute_from is not None and due >= world.mute_from:
                continue
            on = bool(world.faults) and world.effective
            latency = world.latency_during_s if on else 0.03
            ok = world.rng.random() >= (world.errors_during if on else world.errors_always)
            item = k % world.items if world.items else -1
            lasting = bool(world._recovered > 0) and due < world._recovered + world.wrong_for_s
            score = world.score_during if (on or lasting) and world.score_during else world.score
            t = due - self.zero
            found.append(
                RequestSample(
                    t,
                    t + world.late_s,
                    t + world.late_s + latency,
                    200 if ok else 503,
                    ok,
                    "model" if ok else "error",
                    "",
                    item,
                    score(item, k) if ok and score else math.nan,
                )
            )
        return found

    def stop(self) -> list[RequestSample]:
        return self.drain()


class SimSignals:
    """Ready replicas, every 100 ms of simulated time."""

    def __init__(self, world: World) -> None:
        self.world, self.zero, self.last = world, 0.0, -1e9

    def start(self, zero: float) -> None:
        self.zero = zero

    def drain(self) -> list[SignalSample]:
        if self.world.clock.t - self.last < 0.1:
            return []
        self.last = self.world.clock.t
        return [SignalSample(self.last - self.zero, "ready_replicas", self.world.ready)]

    def stop(self) -> list[SignalSample]:
        return self.drain()


class SimWatcher:
    def __init__(self, world: World) -> None:
        self.world = world

    def alive(self) -> bool:
        return self.world.watchdog_alive

    def close(self) -> None:
        pass


class SimStop:
    def __init__(self, world: World) -> None:
        self.world = world

    def requested(self) -> tuple[str, str] | None:
        return self.world.stop


def build(
    tmp_path: Path,
    world: World,
    *,
    experiment: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    run_id: str = "run-1",
    shadow: bool = False,
    budget: float | None = None,
    health: float = 1.0,
    progress: Callable[[str, dict[str, Any]], None] = quiet,
) -> Run:
    """A run in this world, with a real file ledger and record store under `tmp_path`."""
    clock = world.clock
    kit = Kit(
        clock=clock,
        driver=FakeDriver(world) if world.judged is None else JudgingDriver(world),
        requests=SimRequests(world),
        signals=SimSignals(world),
        ledger=FileLedger(tmp_path / "ledger", clock),
        start_watcher=lambda: SimWatcher(world),
        owner=Owner(pid=2**22 + 1, started=1.0, boot_id="sim", host="sim"),
        health=lambda: Health(health, "simulated"),
        budget=None if budget is None else (lambda: Budget(budget, "simulated")),
        store=RecordStore(tmp_path / "records"),
        incidents=IncidentLog(tmp_path / "incidents.jsonl", clock),
        gate=tmp_path / "gates" / "sim.json",
        active=ActiveRuns(tmp_path / "active", clock),
        stop_files=StopFiles(Home(tmp_path)),
        backups=tmp_path / "ledger" / "backups",
        stops=[SimStop(world)],
    )
    return Run(
        run_id,
        Experiment.model_validate({**EXPERIMENT, **(experiment or {})}),
        Environment.model_validate({**ENVIRONMENT, **(environment or {})}),
        kit,
        shadow=shadow,
        progress=progress,
    )
