"""After the fault: sampling goes on until the target is steady again for the dwell time, or the observation ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlchaos_dagster.domain.record import Samples, Span
from mlchaos_dagster.engine.actions import Rollback
from mlchaos_dagster.engine.active import RECOVERY
from mlchaos_dagster.judgement.measures import Phase, steady

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run


def sample_recovery(run: Run, rollback: Rollback) -> None:
    """Go on sampling until everything is steady again for the dwell time, or the observation's limit."""
    if run.clean is None or not run.clean.proven or run.after is None:
        return
    run.kit.active.note(run.run_id, RECOVERY)
    sampling, recovery = run.environment.sampling, run.experiment.recovery
    start = run.after.start
    end = start + min(sampling.recovery_timeout, recovery.within + recovery.dwell + 1.0)
    if run.abort is not None and not rollback.acted:
        # Somebody wants out: look only long enough to show the way back.
        end = min(end, start + 3 * recovery.dwell)
    steadiness = Steadiness(run, start)

    def each(t: float) -> bool:
        rollback.look(t, start)
        return steadiness.look(t)

    ended = run.watch.until(end, "recovery", each=each, start=start)
    if ended is not None and run.abort is None and ended.cause != "blind":
        # The fault is gone already and its outcome stands; but nothing more may start.
        run.stopped_late = ended.reason
    run.after = Span(start=start, end=run.mark("observation_ended"))


class Steadiness:
    """Whether the target is back, from what was due after the fault was proven gone."""

    def __init__(self, run: Run, start: float) -> None:
        self.run, self.start = run, start
        self.before = _ready(run, run.baseline) if run.baseline else None
        self.next_look = start

    def look(self, t: float) -> bool:
        """True once every objective held over the last dwell time and as many replicas are ready as before."""
        dwell = self.run.experiment.recovery.dwell
        # One request timeout behind: what was due just now may still be unanswered.
        if t < self.next_look or t - self.start < dwell:
            return False
        self.next_look = t + 0.25
        lag = min(self.run.environment.probe.timeout, 0.5)
        span = Span(start=max(self.start, t - lag - dwell), end=t - lag)
        # Requests still unanswered are missing from the samples; too many missing is not steady.
        expected = int(0.9 * self.run.environment.probe.rate * dwell)
        if span.length < dwell * 0.99:
            return False
        holds, _ = steady(self._phase(span), self.run.experiment.steady_state, minimum=max(1, expected))
        ready = self.run.watch.live.signals.get("ready_replicas")
        return holds is True and (self.before is None or ready is None or ready >= self.before)

    def _phase(self, span: Span) -> Phase:
        recent = [r for r in self.run.watch.requests[-20000:] if r.due_s >= span.start]
        signals = [s for s in self.run.watch.signals[-5000:] if s.t >= span.start]
        return Phase(Samples(recent, signals), self.run.environment, span, self.run.watch.live.reference)


def _ready(run: Run, span: Span) -> float | None:
    values = [v for t, v in run.samples.signal("ready_replicas") if span.start <= t <= span.end]
    return max(values) if values else None
