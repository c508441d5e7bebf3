"""One run, from guards to record. `run_experiment` is the order; Dagster's ops call the same methods."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import (
    AbortFacts,
    ActionFacts,
    CleanFacts,
    FaultFacts,
    Finding,
    GuardResult,
    Moment,
    RunRecord,
    Samples,
    Span,
)
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.active import BASELINE, ENDED, FAULT, ActiveRuns
from mlchaos_dagster.engine.findings import patience_s
from mlchaos_dagster.engine.guards import GUARDS
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import (
    Budget,
    Clock,
    Driver,
    Health,
    Ledger,
    Owner,
    RequestSource,
    SignalSource,
    StopSource,
    Watcher,
)
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.engine.watch import Watch
from mlchaos_dagster.engine.window import open_fault_window
from mlchaos_dagster.errors import MlChaosError, StoreError
from mlchaos_dagster.judgement.measures import Phase, reference_of, signals_needed, steady

SETTLE_S = 0.25
"""After the last request's deadline: its timeout must come through as well."""
WARM_UP_S = 0.5
"""Requests before the baseline: connections are made, caches and breakers settle. Not judged."""


def quiet(kind: str, data: dict[str, Any]) -> None:
    """Progress that nobody watches."""


def _harmless(progress: Callable[[str, dict[str, Any]], None]) -> Callable[[str, dict[str, Any]], None]:
    """Progress that may break, once, without disturbing the run: it is told in the middle of a recovery, too."""
    broken = False

    def tell(kind: str, data: dict[str, Any]) -> None:
        nonlocal broken
        if not broken:
            try:
                progress(kind, data)
            except Exception:  # noqa: BLE001  a display must never keep a fault alive
                broken = True

    return tell


@dataclass
class Kit:
    """Everything a run touches, behind ports; built by `wiring.py`, or simulated by tests."""

    clock: Clock
    driver: Driver
    requests: RequestSource
    signals: SignalSource
    ledger: Ledger
    start_watcher: Callable[[], Watcher]
    owner: Owner
    health: Callable[[], Health]
    store: RecordStore
    incidents: IncidentLog
    gate: Path
    active: ActiveRuns
    stop_files: StopFiles
    backups: Path
    """Where drivers keep content that has no other copy, by lease; the ledger removes it with the lease."""
    budget: Callable[[], Budget] | None = None
    stops: Sequence[StopSource] = ()
    signals_deferred: Callable[[], AbstractContextManager[StopSource]] | None = None
    """Turns SIGINT and SIGTERM into a stop request while it is entered (main thread)."""
    background: Callable[[Callable[[], Any]], Callable[[], tuple[bool, Any]]] | None = None
    """Runs a slow read beside the watch loop: returns a poll → (done, result or exception)."""
    versions: dict[str, str] = field(default_factory=lambda: dict[str, str]())


class Run:
    """The state of one run. Methods are called once, in the order of `run_experiment`."""

    def __init__(
        self,
        run_id: str,
        experiment: Experiment,
        environment: Environment,
        kit: Kit,
        *,
        shadow: bool = False,
        seed: int | None = None,
        started_by: str = "",
        progress: Callable[[str, dict[str, Any]], None] = quiet,
    ) -> None:
        self.run_id, self.experiment, self.environment, self.kit = run_id, experiment, environment, kit
        self.shadow, self.started_by, self.tell = shadow, started_by, _harmless(progress)
        self.seed = seed if seed is not None else int(hashlib.sha256(run_id.encode()).hexdigest()[:8], 16)
        self.zero_wall = kit.clock.wall()
        self.stops: list[StopSource] = list(kit.stops)
        needed = signals_needed(experiment, environment)
        self.watch = Watch(environment, kit.clock, kit.requests, kit.signals, self.stops, self.tell, needed)
        self.window_s = environment.scaled(experiment.duration)
        self.guards: tuple[GuardResult, ...] = ()
        self.guards_s = 0.0
        self.moments: list[Moment] = []
        self.existing: tuple[str, ...] = ()
        self.targets: tuple[str, ...] = ()
        self.watcher: Watcher | None = None
        self.baseline: Span | None = None
        self.window: Span | None = None
        self.after: Span | None = None
        self.fault: FaultFacts | None = None
        self.abort: AbortFacts | None = None
        self.clean: CleanFacts | None = None
        self.actions: list[ActionFacts] = []
        self.findings: tuple[Finding, ...] = ()
        self.error = ""
        self.stopped_late = ""
        """Somebody's word that came when the fault was gone: the verdict stands, but nothing more may start."""
        self.incidents: list[str] = []
        self._record: RunRecord | None = None

    # ---- facts the phases share

    @property
    def longest_s(self) -> float:
        """Upper bound of the whole run, seconds: what a freeze window is compared with."""
        sampling = self.environment.sampling
        waits = patience_s(self.kit.driver)
        return sampling.baseline + self.window_s + waits + sampling.recovery_timeout + 30.0

    @property
    def may_inject(self) -> bool:
        """Every guard passed and nothing has stopped or ended the run."""
        passed = bool(self.guards) and all(g.passed for g in self.guards)
        return passed and self.abort is None and not self.error and self._record is None

    @property
    def samples(self) -> Samples:
        """What was measured so far."""
        return Samples(self.watch.requests, self.watch.signals, self.watch.gaps)

    @property
    def stop_reason(self) -> str:
        """Why the run was stopped early; empty when it was not."""
        return self.abort.reason if self.abort else ""

    def mark(self, name: str, note: str = "", t: float | None = None) -> float:
        """Record an instant; returns it."""
        t = self.watch.now if t is None else t
        self.moments.append(Moment(name=name, t=round(t, 4), note=note))  # type: ignore[arg-type]
        self.tell("moment", {"name": name, "t": t, "note": note})
        return t

    def moment_of(self, name: str) -> float | None:
        """The first instant with this name."""
        return next((m.t for m in self.moments if m.name == name), None)

    def refuse(self, guard: str, saw: str) -> None:
        """A refusal found only when the window was about to open."""
        self.guards += (GuardResult(name=guard, passed=False, saw=saw, needs="another moment"),)
        self.incident("refusal", f"{guard}: {saw}")

    def incident(self, kind: Any, what: str, **facts: Any) -> None:
        """One line in the incident log, the record, and the progress."""
        line = self.kit.incidents.write(
            kind, what, run_id=self.run_id, experiment=self.experiment.name, environment=self.environment.name, **facts
        )
        self.incidents.append(line)
        self.tell("incident", {"text": line})

    def freeze_targets(self, existing: tuple[str, ...]) -> None:
        """Choose, by the run's seed, which of the existing targets are hit. Raises ValueError."""
        count = self.experiment.blast_radius.take(len(existing))
        self.existing = existing
        self.targets = tuple(sorted(random.Random(self.seed).sample(sorted(existing), count)))

    def start_watcher(self) -> Watcher:
        """The watchdog of this run, started once."""
        if self.watcher is None:
            self.watcher = self.kit.start_watcher()
        return self.watcher

    # ---- phases

    def check_guards(self) -> tuple[GuardResult, ...]:
        """Announce the run, ask every guard; the first that refuses ends the check. A crashing guard refuses."""
        begun = self.watch.now
        self.tell("phase", {"name": "guards", "seconds": 0.0, "run_id": self.run_id})
        results: list[GuardResult] = []
        for guard in (_announced, *GUARDS):
            try:
                result = guard(self)
            except Exception as e:  # noqa: BLE001  the guard boundary: unknown is never safe
                name = guard.__name__.replace("_", " ")
                result = GuardResult(
                    name=name, passed=False, saw=f"could not be checked: {e}", needs="a guard that works"
                )
            if guard is _announced and result.passed:
                continue  # a matter of course; people read the list of guards
            results.append(result)
            self.tell("guard", {"name": result.name, "passed": result.passed, "saw": result.saw})
            if not result.passed:
                self.incident("refusal", f"{result.name}: {result.saw}")
                break
        self.guards = tuple(results)
        self.guards_s = self.watch.now - begun
        return self.guards

    def measure_baseline(self) -> Span | None:
        """Start the probes and measure the steady state. None when the run was stopped meanwhile."""
        if not self.may_inject:
            return None
        length = self.environment.sampling.baseline
        self.kit.active.note(self.run_id, BASELINE)
        self.tell("phase", {"name": "baseline", "seconds": length})
        with self._deferred():
            try:
                self.watch.start()
            except MlChaosError as e:
                self.error = f"the probe could not start: {e}"
                return None
            start = self.watch.now + WARM_UP_S
            self.abort = self.watch.until(start, "baseline")
            if self.abort is None:
                self.mark("baseline_started", t=start)
                self.abort = self.watch.until(start + length, "baseline", start=start)
            if self.abort is not None:
                self.incident("abort", f"during the baseline: {self.abort.reason}", cause=self.abort.cause)
                return None
            # Requests due up to here are in the census; their answers may come a little later.
            end = self.mark("baseline_ended", t=start + length)
            self.baseline = Span(start=start, end=end)
            settle = end + self.environment.probe.timeout + SETTLE_S
            self.abort = self.watch.until(settle, "baseline", each=lambda t: self._answered())
            self.watch.live.reference = reference_of(self.samples, self.environment, self.baseline)
        return self.baseline

    def _answered(self) -> bool:
        """Whether every request of the baseline is known, slow ones too: a target that begins to hang is not steady."""
        assert self.baseline is not None
        due = int(self.environment.probe.rate * self.baseline.length)
        recent = self.watch.requests[-2 * due - 200 :]
        return sum(self.baseline.start <= r.due_s < self.baseline.end for r in recent) >= due

    def steady_before(self) -> tuple[bool, str]:
        """Whether the steady state holds now; nothing is injected into a system that already fails."""
        if self.baseline is None:
            return False, self.stop_reason or "no baseline was measured"
        phase = Phase(self.samples, self.environment, self.baseline, self.watch.live.reference)
        ok, why = steady(phase, self.experiment.steady_state)
        if ok is not True:
            self.incident("refusal", f"steady state before: {'; '.join(why)}")
        return ok is True, "; ".join(why) or "every objective holds"

    def fault_window(self) -> None:
        """Inject, confirm, watch, recover, prove clean, sample the recovery. See engine/window.py."""
        if not self.may_inject or self.baseline is None:
            return
        self.kit.active.note(self.run_id, FAULT)
        with self._deferred():
            open_fault_window(self)

    def finish(self) -> RunRecord:
        """Stop the probes, let the watchdog go, save, and be known as active no more.

        Idempotent; call it on every path.
        """
        if self._record is None:
            self.kit.active.note(self.run_id, ENDED)
            try:
                self._record = self._save()
            finally:
                # Whoever stops writes the request only while the run is listed: so the list goes first.
                self.kit.active.forget(self.run_id)
                self.kit.stop_files.forget(self.run_id)
        return self._record

    def _save(self) -> RunRecord:
        self.watch.stop()
        if self.watcher is not None:
            self.watcher.close()
        record = RunRecord(
            run_id=self.run_id,
            experiment=self.experiment,
            environment=self.environment,
            seed=self.seed,
            shadow=self.shadow,
            started_by=self.started_by,
            versions=self.kit.versions,
            zero_mono=self.watch.zero,
            zero_wall=self.zero_wall,
            window_s=self.window_s,
            guards=self.guards,
            guards_s=self.guards_s,
            moments=tuple(self.moments),
            baseline=self.baseline,
            window=self.window,
            after=self.after,
            fault=self.fault,
            abort=self.abort,
            clean=self.clean,
            actions=tuple(self.actions),
            findings=self.findings,
            error=self.error,
            incidents=tuple(self.incidents),
        )
        try:
            record = self.kit.store.save(record, self.samples)
        except StoreError as e:
            # The target is clean by now; the result is told, and the run is not called a pass.
            record = record.model_copy(update={"error": f"the record could not be saved: {e}"})
        return record

    def _deferred(self) -> AbstractContextManager[Any]:
        return _Deferred(self)


def _announced(run: Run) -> GuardResult:
    """The run can be found by who wants to stop it. Before the other guards: they look for the lever and stop files."""
    try:
        run.kit.active.announce(
            run.run_id, run.experiment.name, run.environment.name, run.kit.owner, run.zero_wall, run.longest_s
        )
    except StoreError as e:
        return GuardResult(
            name="can be stopped",
            passed=False,
            saw=f"the run cannot be announced: {e}",
            needs="a state directory that can be written; nobody could stop this run by name",
        )
    return GuardResult(name="can be stopped", passed=True, saw="announced")


class _Deferred:
    """While entered, SIGINT and SIGTERM are stop requests instead of exceptions."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.context = run.kit.signals_deferred() if run.kit.signals_deferred else None
        self.source: StopSource | None = None

    def __enter__(self) -> None:
        if self.context is not None:
            self.source = self.context.__enter__()
            self.run.stops.append(self.source)

    def __exit__(self, *exc: Any) -> None:
        if self.context is not None:
            self.context.__exit__(*exc)


def run_experiment(run: Run) -> RunRecord:
    """The order of a run.

    spec → guards → baseline → steady? → fault window → record. Judgement and report follow from the record.
    """
    try:
        run.check_guards()
        run.measure_baseline()
        if run.may_inject and run.steady_before()[0]:
            run.fault_window()
    finally:
        record = run.finish()
    return record
