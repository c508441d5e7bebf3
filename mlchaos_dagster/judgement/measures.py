"""An environment's SLIs on raw samples: the one place where an SLI's name becomes a number.

The watch loop, the steady-state check and the verdict all ask here, so they never disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mlchaos_dagster.domain.environment import SHIFT_MEASURES, VALUE_MEASURES, Environment, Sli
from mlchaos_dagster.domain.record import STATUS_UNSENT, RequestSample, Samples, Span
from mlchaos_dagster.domain.spec import Experiment, Objective
from mlchaos_dagster.domain.units import show_value
from mlchaos_dagster.judgement.census import Requests, gauge_census, measure
from mlchaos_dagster.judgement.golden import shift_words, wrong_words
from mlchaos_dagster.judgement.shift import Reference


def requests_of(samples: Iterable[RequestSample]) -> Requests:
    """The probe's samples as columns, by due time."""
    rows = list(samples)
    return Requests.of(
        [r.due_s for r in rows],
        [r.done_s for r in rows],
        np.array([r.ok for r in rows], dtype=np.bool_),
        sent_s=[r.sent_s for r in rows],
        path=np.array([r.path for r in rows], dtype=np.str_),
        item=np.array([r.item for r in rows], dtype=np.int64),
        value=np.array([r.value for r in rows], dtype=np.float64),
    )


def reference_of(samples: Samples, environment: Environment, baseline: Span) -> Reference | None:
    """What the baseline answered to each item; None when the probe reads no numbers."""
    probe = environment.probe
    if probe.value is None:
        return None
    requests = Phase(samples, environment, baseline).requests
    return Reference.of(requests, baseline.start, baseline.end, tolerance=probe.golden_tolerance, declared=probe.golden)


def request_value(
    name: str, requests: Requests, reference: Reference | None, *, penalty_s: float = math.inf
) -> float | None:
    """A request measure over requests on time, held against the reference where it needs one; None: unknown."""
    if name not in SHIFT_MEASURES:
        return measure(name, requests, penalty_s=penalty_s)
    if reference is None:
        return None
    shift = reference.shift(requests)
    return shift.psi if name == "prediction_psi" else shift.ks


def signal_name(name: str, sli: Sli) -> str:
    """The series an SLI is read from: its signal, or `sli:NAME` for a PromQL query."""
    return sli.signal or f"sli:{name}"


class Phase:
    """All measurements of one phase of a run."""

    def __init__(
        self,
        samples: Samples,
        environment: Environment,
        span: Span,
        reference: Reference | None = None,
        *,
        with_open_requests: bool = False,
    ) -> None:
        """Take the requests due in the span.

        Args:
            samples: of the whole run.
            environment: how to measure.
            span: the phase.
            reference: what the baseline answered; without it SLIs of answered numbers are unknown.
            with_open_requests: also those due before the span and still unanswered when it began: what was under
                way when a process was killed belongs to the fault.
        """
        self.environment, self.span, self.samples = environment, span, samples
        due = samples.requests_open_or_due(span) if with_open_requests else samples.requests_due(span)
        sent = [r for r in due if r.status != STATUS_UNSENT]
        self.unsent = len(due) - len(sent)
        self.reference = reference
        self.sent = requests_of(sent) if reference is None else reference.judged(requests_of(sent))
        self.requests = self.sent.on_time(environment.sampling.max_lateness)

    @property
    def late(self) -> int:
        """Requests excluded because the probe sent them too late, or not at all: its failure, not the target's."""
        return self.unsent + len(self.sent) - len(self.requests)

    def value(self, name: str) -> float | None:
        """One SLI over the phase; None when there is nothing to measure. A latency may be infinite."""
        sli = self.environment.slis[name]
        if sli.measure is not None:
            penalty = self.environment.probe.timeout
            return request_value(sli.measure, self.requests, self.reference, penalty_s=penalty)
        steps = self.samples.signal(signal_name(name, sli))
        if self._blind(steps):
            return None
        census = gauge_census([t for t, _ in steps], [v for _, v in steps], self.span.start, self.span.end)
        return {"mean": census.mean, "min": census.min, "max": census.max}[sli.reduce]

    def explain(self, name: str) -> str:
        """What stands behind an SLI of answered numbers: how many were wrong, the first of them; else empty."""
        sli = self.environment.slis[name]
        if self.reference is None or sli.measure is None or sli.measure not in VALUE_MEASURES:
            return ""
        if sli.measure in SHIFT_MEASURES:
            return shift_words(self.reference.shift(self.requests))
        return wrong_words(self.reference.facts(self.requests), self.environment.probe)

    def _blind(self, steps: list[tuple[float, float]]) -> bool:
        """A signal is known only where it was read: a value from before a silence says nothing of the silence."""
        times = [t for t, _ in steps if self.span.start <= t <= self.span.end]
        edges = [self.span.start, *times, self.span.end]
        longest = max(b - a for a, b in zip(edges, edges[1:], strict=False))
        return not times or longest > self.environment.sampling.blind_for

    def count(self, name: str) -> int:
        """How many requests or readings the SLI rests on."""
        sli = self.environment.slis[name]
        if sli.measure is not None and sli.measure in VALUE_MEASURES:
            if self.reference is None:
                return 0
            shifted = sli.measure in SHIFT_MEASURES
            return self.reference.shift(self.requests).values if shifted else int(self.requests.compared.sum())
        if sli.measure is not None:
            return len(self.requests)
        steps = self.samples.signal(signal_name(name, sli))
        return sum(self.span.start <= t <= self.span.end for t, _ in steps)


def steady(
    phase: Phase, objectives: Sequence[Objective], minimum: int | None = None
) -> tuple[bool | None, tuple[str, ...]]:
    """Whether every objective holds over the phase, and why not.

    Args:
        phase: what was measured.
        objectives: all must hold.
        minimum: fewest requests that count; default the environment's `min_samples`.

    Returns:
        (True, ()) all hold; (False, reasons) one does not; (None, reasons) too little was measured.
    """
    missing: list[str] = []
    broken: list[str] = []
    needed = phase.environment.sampling.min_samples if minimum is None else minimum
    for objective in objectives:
        sli = phase.environment.slis[objective.sli]
        value = phase.value(objective.sli)
        # A minimum that is asked for is of requests: how many of them could be compared is the environment's matter.
        n = phase.count(objective.sli) if minimum is None or sli.measure is None else len(phase.requests)
        if value is None or (sli.measure is not None and n < needed):
            late = f", {phase.late} more were sent too late" if phase.late else ""
            missing.append(f"{objective.sli}: {n} samples, at least {needed} are needed{late}")
        elif not objective.met_by(value):
            more = phase.explain(objective.sli)
            said = f"{describe(objective)} does not hold: {show_value(value, sli.shown_unit)}"
            broken.append(f"{said}: {more}" if more else said)
    if broken:
        return False, tuple(broken + missing)
    return (None, tuple(missing)) if missing else (True, ())


def signals_needed(experiment: Experiment, environment: Environment) -> frozenset[str]:
    """Signals that an objective, an abort limit or an expectation of this experiment rests on."""
    slis = {o.sli for o in experiment.steady_state} | {e.sli for e in experiment.expect if e.sli}
    slis |= {c.sli for c in (*experiment.abort, *environment.limits.abort)}
    read = {signal_name(n, s) for n, s in environment.slis.items() if n in slis and s.measure is None}
    return frozenset(read | {e.signal for e in experiment.expect if e.signal})


def describe(objective: Objective) -> str:
    """`availability ≥ 99.0 %`."""
    sign = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}[objective.side]
    return f"{objective.sli} {sign} {show_value(objective.limit.value, objective.limit.unit)}"
