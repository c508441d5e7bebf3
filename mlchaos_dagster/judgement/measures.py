"""An environment's SLIs on raw samples: the one place where an SLI's name becomes a number.

The watch loop, the steady-state check and the verdict all ask here, so they never disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mlchaos_dagster.domain.environment import Environment, Sli
from mlchaos_dagster.domain.record import RequestSample, Samples, Span
from mlchaos_dagster.domain.spec import Objective
from mlchaos_dagster.domain.units import show_value
from mlchaos_dagster.judgement.census import Requests, gauge_census, measure


def requests_of(samples: Iterable[RequestSample]) -> Requests:
    """The probe's samples as columns, by due time."""
    rows = list(samples)
    return Requests.of(
        [r.due_s for r in rows],
        [r.done_s for r in rows],
        np.array([r.ok for r in rows], dtype=np.bool_),
        sent_s=[r.sent_s for r in rows],
        path=np.array([r.path for r in rows], dtype=np.str_),
    )


def signal_name(name: str, sli: Sli) -> str:
    """The series an SLI is read from: its signal, or `sli:NAME` for a PromQL query."""
    return sli.signal or f"sli:{name}"


class Phase:
    """All measurements of one phase of a run."""

    def __init__(self, samples: Samples, environment: Environment, span: Span) -> None:
        self.environment, self.span, self.samples = environment, span, samples
        self.sent = requests_of(samples.requests_due(span))
        self.requests = self.sent.on_time(environment.sampling.max_lateness)

    @property
    def late(self) -> int:
        """Requests excluded because the probe sent them too late."""
        return len(self.sent) - len(self.requests)

    def value(self, name: str) -> float | None:
        """One SLI over the phase; None when there is nothing to measure. A latency may be infinite."""
        sli = self.environment.slis[name]
        if sli.measure is not None:
            return measure(sli.measure, self.requests, penalty_s=self.environment.probe.timeout)
        steps = self.samples.signal(signal_name(name, sli))
        if not steps:
            return None
        census = gauge_census([t for t, _ in steps], [v for _, v in steps], self.span.start, self.span.end)
        return {"mean": census.mean, "min": census.min, "max": census.max}[sli.reduce]

    def count(self, name: str) -> int:
        """How many requests or readings the SLI rests on."""
        sli = self.environment.slis[name]
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
        value, n = phase.value(objective.sli), phase.count(objective.sli)
        if value is None or (sli.measure is not None and n < needed):
            late = f", {phase.late} more were sent too late" if phase.late else ""
            missing.append(f"{objective.sli}: {n} samples, at least {needed} are needed{late}")
        elif not objective.met_by(value):
            broken.append(f"{describe(objective)} does not hold: {show_value(value, sli.shown_unit)}")
    if broken:
        return False, tuple(broken + missing)
    return (None, tuple(missing)) if missing else (True, ())


def describe(objective: Objective) -> str:
    """`availability ≥ 99.0 %`."""
    sign = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}[objective.side]
    return f"{objective.sli} {sign} {show_value(objective.limit.value, objective.limit.unit)}"
