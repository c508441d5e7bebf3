"""The guard that needs no limit: abort once the target is surely worse than its own baseline.

Looking at every sample inflates the false alarms of an ordinary test without bound; a confidence
sequence (judgement/sequential.py) holds its level however often one looks. Per objective it follows
the share of requests that count against it (failed, or slower than the limit), baseline against window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlchaos_dagster.domain.record import STATUS_UNSENT, AbortFacts
from mlchaos_dagster.domain.spec import Objective
from mlchaos_dagster.domain.units import show_percent
from mlchaos_dagster.judgement.autocorrelation import batch_length, integrated_time
from mlchaos_dagster.judgement.measures import Phase, describe, requests_of
from mlchaos_dagster.judgement.recovery import Allowance, allowance
from mlchaos_dagster.judgement.sequential import MeanGuard

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run
    from mlchaos_dagster.judgement.census import Requests


class Degradation:
    """One guard per objective that can be told request by request; none when the experiment asks for none."""

    def __init__(self, run: Run, since: float) -> None:
        self.run, self.since = run, since
        self.seen = len(run.watch.requests)
        self.guards: list[tuple[Objective, MeanGuard]] = []
        asked = run.experiment.degradation
        if asked is None or run.baseline is None:
            return
        self.reference = run.watch.live.reference
        baseline = Phase(run.samples, run.environment, run.baseline, self.reference).requests
        told = [(o, a) for o in run.experiment.steady_state if (a := self._bad(o, baseline)) is not None]
        for objective, allowed in told:
            bad = allowed.bad.astype(np.float64)
            # Declared before the window, from the baseline alone; the level is shared among the objectives.
            batch = min(batch_length(integrated_time(bad)), len(bad))
            guard = MeanGuard(bad, batch=batch, alpha=asked.alpha / len(told), margin=asked.margin)
            self.guards.append((objective, guard))

    def look(self, t: float) -> AbortFacts | None:
        """Take in what was answered since the last look; the alarm, once it rings."""
        if not self.guards:
            return None
        fresh = self.run.watch.requests[self.seen :]
        self.seen += len(fresh)
        late = self.run.environment.sampling.max_lateness
        requests = requests_of(
            r for r in fresh if r.status != STATUS_UNSENT and r.due_s >= self.since and r.sent_s - r.due_s <= late
        )
        if not len(requests):
            return None
        if self.reference is not None:
            requests = self.reference.judged(requests)
        for objective, guard in self.guards:
            allowed = self._bad(objective, requests)
            state = guard.update(allowed.bad.astype(np.float64)) if allowed is not None else guard.state
            if state.alarm:
                return AbortFacts(
                    cause="limit",
                    reason=f"{describe(objective)}: the share of requests that break it is surely more than "
                    f"{show_percent(guard.margin, 0)} above the baseline ({show_percent(state.baseline)} before, "
                    f"{show_percent(state.during)} during; confidence sequence over {state.samples} requests)",
                    first_bad_at=None,
                    breach_at=t,
                )
        return None

    def _bad(self, objective: Objective, requests: Requests) -> Allowance | None:
        measure = self.run.environment.slis[objective.sli].measure
        if measure is None:
            return None
        try:
            return allowance(measure, requests, **{objective.side: objective.limit.value})
        except ValueError:
            return None
