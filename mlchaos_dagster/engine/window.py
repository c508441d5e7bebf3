"""The fault window: the only place where a fault is made, and the place where it is taken away.

    lease written ─ inject ─ confirm ─ watch ─┐
                                              ├─ recover ─ read back ─ close the lease ─ sample the recovery
    anything at all goes wrong ───────────────┘

Signals are deferred by the caller (`Run.fault_window`), so nothing is raised between `inject` and the
proof of clean; the stop request is seen at the next look. Three rings stand behind this `finally`:
the backend's own deadline, the watchdog process, and the sweeper.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlchaos_dagster.domain.record import AbortFacts, CleanFacts, Evidence, FaultFacts, Span
from mlchaos_dagster.engine.actions import Rollback
from mlchaos_dagster.engine.active import RESTORING
from mlchaos_dagster.engine.confirmation import LAST_LOOK_S, Confirmation
from mlchaos_dagster.engine.degradation import Degradation
from mlchaos_dagster.engine.findings import patience_s, take_findings
from mlchaos_dagster.engine.guards import changed_since, occupied
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.engine.renewal import Kept, Renewal, renew_anyway
from mlchaos_dagster.engine.steadiness import sample_recovery
from mlchaos_dagster.engine.watch import Tracker
from mlchaos_dagster.errors import DriverError, DriverUnavailable, Halted, LeaseRefused, MlChaosError, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run


def open_fault_window(run: Run) -> None:
    """Run the window of `run` and leave its facts there. Never raises for aborts or backend errors.

    On failure: the fault is taken away, or `run.clean.proven` is False and the lease stays open for
    the watchdog and the sweeper.
    """
    if _stopped(run):
        assert run.abort is not None
        run.incident("abort", f"before the fault: {run.abort.reason}", cause=run.abort.cause)
        return
    lease = _write_lease(run)
    if lease is None:
        return
    _note_fault(run, lease)
    try:
        _inject_and_watch(run, lease)
    except Halted:
        pass  # `run.abort` says why
    except LeaseRefused as e:
        run.abort = run.abort or _abort(run, "fenced", str(e))
    except StoreError as e:
        run.abort = run.abort or _abort(run, "error", f"the ledger cannot be written: {e}")
    except MlChaosError as e:
        run.abort = run.abort or _abort(run, "error", str(e))
    except BaseException as e:
        # A bug of ours, or an interrupt that got past the deferral: the fault goes first, then it is told.
        run.error = run.error or f"{type(e).__name__}: {e}"
        raise
    finally:
        _take_away(run, lease)
    if run.abort is not None:
        clean_at = run.moment_of("proven_clean")
        run.abort = run.abort.model_copy(update={"clean_at": clean_at})
        run.incident(
            "abort",
            run.abort.reason,
            cause=run.abort.cause,
            breach_to_clean_s=None if run.abort.seconds is None else round(run.abort.seconds, 3),
        )
    rollback = Rollback(run)
    try:
        rollback.after_breach()
        sample_recovery(run, rollback)
    finally:
        rollback.undo()


def _stopped(run: Run) -> bool:
    """Whether somebody said stop since the last look; the abort is noted."""
    run.abort = run.watch.stop_asked(run.watch.now)
    if run.abort is not None:
        _mark_breach(run, run.abort)
    return run.abort is not None


def _write_lease(run: Run) -> Lease | None:
    kit, environment = run.kit, run.environment
    kind, params = run.experiment.fault.kind, run.experiment.fault.params()
    lifetime = run.window_s + environment.safety.confirm_within + environment.safety.deadline_grace
    # Unique over processes and reruns with one seed: it must never meet an earlier lease's tombstone.
    lease_id = f"mlchaos-{run.experiment.name[:30]}-{uuid.uuid4().hex[:10]}"
    backup = kit.backups / lease_id
    try:
        if said := changed_since(run):
            run.refuse("target as chosen", said)
            return None
        lease = Lease(
            id=lease_id,
            run_id=run.run_id,
            experiment=run.experiment.name,
            environment=environment.name,
            driver=kit.driver.name,
            kind=kind,
            targets=run.targets,
            params=params,
            undo=kit.driver.undo(
                kind,
                run.targets,
                params,
                target=environment.targets[run.experiment.target],
                backup=backup,
                step=_watchful(run, "preparing"),
            ),
            duration_s=lifetime,
            opened_wall=kit.clock.wall(),
            deadline_wall=kit.clock.wall() + lifetime + patience_s(kit.driver),
            owner=kit.owner,
        )
        lease = kit.ledger.open(lease)
        # Of two machines that open at the same time each sees the other's lease now: then neither begins.
        if not (said := occupied(run)):
            return lease
        run.refuse("environment free", said)
        kit.ledger.close(lease, (f"nothing was injected: {said}",))
    except Halted as e:
        assert run.abort is not None
        run.incident("abort", f"before the fault: {e}", cause=run.abort.cause)
    except LeaseRefused as e:
        run.refuse("target free", str(e))
    except StoreError as e:
        run.refuse("ledger writable", str(e))
    except DriverError as e:
        run.refuse("backend reachable", str(e))
    shutil.rmtree(backup, ignore_errors=True)
    return None


def _watchful(
    run: Run, what: str, renew: Renewal | None = None, trackers: Sequence[Tracker] = (), *, stoppable: bool = True
) -> Step:
    """The step of a driver's long verb: measurements are taken in, the lease renewed, the limits looked at."""

    def step(done: int, total: int) -> None:
        t = run.watch.pump()
        if renew is not None:
            renew.look(t)
        if total:
            run.tell("progress", {"what": what, "done": done, "total": total})
        if not stoppable:
            return
        if run.abort is None:
            run.abort = run.watch.wants_out(t, trackers, run.watcher)
            if run.abort is not None:
                _mark_breach(run, run.abort)
        if run.abort is not None:  # also when a driver steps on while its last requests end
            raise Halted(run.abort.reason)

    return step


def _note_fault(run: Run, lease: Lease) -> None:
    run.fault = FaultFacts(
        kind=lease.kind,
        backend=lease.driver,
        targets=lease.targets,
        existing=len(run.existing),
        params={k: v for k, v in lease.params.items() if v is not None},
        lease_id=lease.id,
        token=lease.token,
    )


def _inject_and_watch(run: Run, lease: Lease) -> None:
    kit = run.kit
    run.tell("phase", {"name": "fault", "seconds": run.window_s, "targets": lease.targets, "kind": lease.kind})
    renew = Renewal(run, lease)
    run.mark("inject_requested")
    start = run.watch.now
    run.window = Span(start=start, end=start)
    # The lease is visible now. Who said stop and saw no lease of this run said it before this look.
    if _stopped(run):
        return
    trackers = [Tracker(c) for c in (*run.environment.limits.abort, *run.experiment.abort)]
    kit.ledger.check(lease)
    if not run.shadow:
        kit.driver.inject(lease, _watchful(run, "injecting", renew, trackers))
    injected = run.mark("injected", "shadow: nothing was injected" if run.shadow else "")
    confirm = Confirmation(run, lease)

    degradation = Degradation(run, since=injected)

    def each(t: float) -> AbortFacts | None:
        renew.look(t)
        confirm.look(t)
        confirm.at_the_end(t, end)
        return degradation.look(t)

    end = injected + run.window_s
    run.abort = run.watch.until(end, "fault", trackers=trackers, each=each, watcher=run.watcher, start=injected)
    if run.abort is not None:
        _mark_breach(run, run.abort)
    else:
        run.mark("window_ended")
        confirm.still_there(lambda: renew.look(run.watch.now))
        judging = _watchful(run, "judging", renew, trackers)
        run.abort = take_findings(run, lease, judging, renew, trackers, degradation)
        if run.abort is not None:
            _mark_breach(run, run.abort)


def _mark_breach(run: Run, abort: AbortFacts) -> None:
    if abort.first_bad_at is not None:
        run.mark("first_bad", t=abort.first_bad_at)
    run.mark("breach" if abort.cause in ("limit", "blind") else "stop_requested", abort.reason, t=abort.breach_at)


def _abort(run: Run, cause: Any, reason: str) -> AbortFacts:
    abort = AbortFacts(cause=cause, reason=reason, breach_at=run.watch.now)
    _mark_breach(run, abort)
    return abort


def _take_away(run: Run, lease: Lease) -> None:
    """Recover until the target itself says that nothing is left; bounded by `recover_timeout`."""
    kit = run.kit
    renew_anyway(run, lease)
    kit.active.note(run.run_id, RESTORING)
    requested = run.mark("recover_requested")
    run.tell("phase", {"name": "recovery", "seconds": run.experiment.recovery.within})
    end = kit.clock.monotonic() + run.environment.safety.recover_timeout
    pause, said, evidence = 0.02, "", Evidence(present=True, effective=False)
    step = _watchful(run, "restoring", Kept(run, lease), stoppable=False)
    while True:
        try:
            kit.driver.recover(lease, step)
            evidence = _read_back(run, lease, step, end)
            said = "; ".join(evidence.lines)
        except Exception as e:  # noqa: BLE001  a crashing driver is one failed attempt, not the end of the recovery
            said = str(e) if isinstance(e, DriverError) else f"{type(e).__name__}: {e}"
        if not evidence.present:
            break
        if kit.clock.monotonic() >= end:
            _end_window(run, run.watch.now)
            _unclean(run, lease, said)
            return
        run.watch.pump()
        renew_anyway(run, lease)
        kit.clock.sleep(pause)
        pause = min(pause * 2, 0.5)
    clean_at = run.mark("proven_clean")
    _end_window(run, clean_at)
    lines = list(evidence.lines)
    try:
        kit.ledger.close(lease, evidence.lines)
        lines.append(f"lease {lease.id} closed {run.watch.now - requested:.2f} s after recover")
    except StoreError as e:
        lines.append(f"lease {lease.id} is left for the sweeper: {e}")
        run.incident("error", f"lease {lease.id} could not be closed: {e}")
    run.clean = CleanFacts(proven=True, evidence=tuple(lines))
    run.after = Span(start=clean_at, end=clean_at)


def _end_window(run: Run, t: float) -> None:
    """The census of the window reaches from the word to inject to the proof of clean: no harm falls between phases."""
    if run.window is not None:
        run.window = Span(start=run.window.start, end=max(t, run.window.start))


def _read_back(run: Run, lease: Lease, step: Step, end: float) -> Evidence:
    """What the target says, while measurements and renewals go on: to read it may take seconds."""
    if run.kit.background is None:
        return run.kit.driver.active(lease)
    poll = run.kit.background(lambda: run.kit.driver.active(lease))
    end = max(end, run.kit.clock.monotonic() + LAST_LOOK_S)
    while not (found := poll())[0]:
        if run.kit.clock.monotonic() >= end:  # a target that never answers must not keep UNCLEAN from being told
            raise DriverUnavailable("the target did not say in time", driver=lease.driver, verb="active")
        step(0, 0)
        run.kit.clock.sleep(0.005)
    if isinstance(found[1], Exception):
        raise found[1]
    return found[1]


def _unclean(run: Run, lease: Lease, said: str) -> None:
    command = f"mlchaos recover {lease.id}"
    run.clean = CleanFacts(proven=False, evidence=(said,), command=command)
    run.incident(
        "unclean", f"{lease.kind} on {', '.join(lease.targets)} may be live: {said}", lease=lease.id, command=command
    )
