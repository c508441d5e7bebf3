"""Before, during, after: every SLI of a run with its effect, interval and what could have been seen."""

from __future__ import annotations

import math

import numpy as np

from mlchaos_dagster.domain.environment import SHIFT_MEASURES, Sli
from mlchaos_dagster.domain.record import RunRecord, SliResult
from mlchaos_dagster.domain.spec import Objective
from mlchaos_dagster.judgement.census import Requests, quantile_of
from mlchaos_dagster.judgement.effects import Effect, mean_effect, proportion_effect, quantile_effect
from mlchaos_dagster.judgement.measures import Phase, describe
from mlchaos_dagster.judgement.power import Detectable, detectable_proportion, detectable_shift


def sli_results(
    record: RunRecord, baseline: Phase | None, during: Phase | None, after: Phase | None
) -> dict[str, SliResult]:
    """One result per SLI of the environment; a phase that was not measured is None everywhere."""
    objectives = {o.sli: o for o in record.experiment.steady_state}
    return {
        name: _result(record, name, sli, objectives.get(name), baseline, during, after)
        for name, sli in record.environment.slis.items()
    }


def _result(
    record: RunRecord,
    name: str,
    sli: Sli,
    objective: Objective | None,
    baseline: Phase | None,
    during: Phase | None,
    after: Phase | None,
) -> SliResult:
    values = [phase.value(name) if phase is not None else None for phase in (baseline, during, after)]
    timeout = record.environment.probe.timeout
    notes: list[str] = []
    if sli.measure is None and any(v is not None and math.isinf(v) for v in values):
        values = [None if v is not None and math.isinf(v) else v for v in values]
        notes.append("an infinite reading is no number")
    if any(v is not None and math.isinf(v) for v in values):
        notes.append("it lies among failed requests and is shown as the probe's timeout")
    shown = [timeout if v is not None and math.isinf(v) else v for v in values]
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    reliable = True
    detectable: float | None = None
    if baseline is not None and during is not None and shown[0] is not None and shown[1] is not None:
        effect = shown[1] - shown[0]
        if sli.measure is None:
            reliable = False
            notes.append("a signal has no interval")
        elif sli.measure in SHIFT_MEASURES:
            reliable = False
            notes.append(f"a distance between distributions has no interval here; {_rests_on(during)}")
        else:
            found = _effect(sli.measure, baseline.requests, during.requests, record.seed, timeout)
            if found is not None:
                low, high = (_finite(end, timeout, shown[0], shown[1]) for end in (found.ci_low, found.ci_high))
                if sli.shown_unit == "ratio" and low is not None and high is not None:
                    # A share cannot rise above all nor fall below none: no interval may say so.
                    low, high = max(low, -shown[0]), min(high, 1.0 - shown[0])
                reliable = found.reliable
                if found.why:
                    notes.append(found.why)
            if objective is not None:
                smallest = _detectable(sli.measure, baseline.requests, len(during.requests), record.seed)
                detectable = smallest.effect if smallest is not None and math.isfinite(smallest.effect) else None
    met = None
    counted_value = values[1]
    if objective is not None and counted_value is not None:
        met = objective.met_by(counted_value)
    counted = during or baseline
    return SliResult(
        unit=sli.shown_unit,
        baseline=shown[0],
        during=shown[1],
        after=shown[2],
        effect=effect,
        ci_low=low,
        ci_high=high,
        reliable=reliable,
        why="; ".join(notes),
        samples=counted.count(name) if counted is not None else 0,
        late=counted.late if counted is not None and sli.measure is not None else 0,
        detectable=detectable,
        slo=describe(objective) if objective is not None else "",
        met=met,
    )


def _rests_on(phase: Phase) -> str:
    assert phase.reference is not None
    shift = phase.reference.shift(phase.requests)
    return f"it rests on {shift.values} answers of {shift.items} different items"


def _finite(value: float, timeout: float, baseline: float, during: float) -> float | None:
    """An interval's end; one among failed requests is shown as the effect that the timeout would be."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return timeout - baseline if value > 0 else during - timeout
    return value


def _effect(measure: str, baseline: Requests, during: Requests, seed: int, timeout: float) -> Effect | None:
    if not len(baseline) or not len(during):
        return None
    if measure == "availability":
        return proportion_effect(baseline.ok, during.ok, seed=seed)
    if measure == "error_rate":
        return proportion_effect(~baseline.ok, ~during.ok, seed=seed)
    if measure == "fallback_rate":
        b, d = baseline.select(baseline.ok), during.select(during.ok)
        if not len(b) or not len(d):
            return None
        return proportion_effect(b.path == "cache", d.path == "cache", seed=seed)
    if measure == "golden_error_rate":
        b, d = baseline.select(baseline.compared), during.select(during.compared)
        return proportion_effect(b.wrong, d.wrong, seed=seed) if len(b) and len(d) else None
    if measure == "latency_mean":
        return mean_effect(baseline.penalised_latency_s(timeout), during.penalised_latency_s(timeout), seed=seed)
    q = quantile_of(measure)
    assert q is not None
    return quantile_effect(baseline.ranked_latency_s, during.ranked_latency_s, q, seed=seed)


def _detectable(measure: str, baseline: Requests, planned: int, seed: int) -> Detectable | None:
    """Smallest harmful change a window of `planned` requests would have shown, from this baseline."""
    if not len(baseline) or planned < 1 or measure in SHIFT_MEASURES:
        return None
    if measure == "golden_error_rate":
        compared = baseline.select(baseline.compared)
        return detectable_proportion(compared.wrong, planned, seed=seed) if len(compared) else None
    if measure in ("availability", "error_rate"):
        return detectable_proportion(~baseline.ok, planned, seed=seed)
    if measure == "fallback_rate":
        return detectable_proportion(np.asarray(baseline.path == "cache"), planned, seed=seed)
    if measure == "latency_mean":
        finite = baseline.latency_s
        return detectable_shift(finite, planned, seed=seed)
    return detectable_shift(baseline.ranked_latency_s, planned, seed=seed, q=quantile_of(measure))
