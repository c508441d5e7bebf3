"""The recovery of a run: from its record to seconds by part, and whether it came in time."""

from __future__ import annotations

import numpy as np

from mlchaos_dagster.domain.environment import SHIFT_MEASURES
from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.record import RecoveryResult, RunRecord, Samples, Span
from mlchaos_dagster.domain.spec import Objective
from mlchaos_dagster.domain.units import show_duration
from mlchaos_dagster.judgement.census import Requests
from mlchaos_dagster.judgement.measures import Phase, request_value, signal_name
from mlchaos_dagster.judgement.recovery import (
    Allowance,
    Moment,
    allowance,
    regained,
    split_recovery,
    steady_again,
    steady_from_evaluations,
)
from mlchaos_dagster.judgement.shift import Reference

READY = "ready_replicas"
RUNNING = "running_replicas"
LOST = "lost_replicas"
"""Signals that, where a platform offers them, split the recovery. `LOST` counts replicas taken away: one that is killed
before it runs makes neither of the others fall."""
_SHIFT_EVERY_S = 0.1
"""Between two looks for the end of a shift: it is known over windows only, so its end is no sharper."""


def recovery_words(recovery: RecoveryResult) -> str:
    """`detect 0.3 s · ready 2.1 s · steady > 30 s (not seen)`."""
    parts: list[str] = []
    for name in ("detect", "reschedule", "ready", "steady"):
        value: float | None = getattr(recovery, f"{name}_s")
        if value is not None:
            censored = name in recovery.censored
            parts.append(f"{name} {'> ' if censored else ''}{show_duration(value)}{' (not seen)' if censored else ''}")
    return " · ".join(parts) or "not measured"


def allowance_of(record: RunRecord, objective: Objective, requests: Requests) -> Allowance | None:
    """The objective request by request; None for means and signals, which have no such form."""
    measure = record.environment.slis[objective.sli].measure
    if measure is None:
        return None
    try:
        return allowance(measure, requests, **{objective.side: objective.limit.value})
    except ValueError:
        return None


def readings(steps: list[tuple[float, float]], span: Span | None) -> list[float]:
    """The readings inside a span."""
    return [] if span is None else [v for t, v in steps if span.start <= t <= span.end]


def recovery_of(record: RunRecord, samples: Samples, reference: Reference | None) -> RecoveryResult:
    """Every part of a recovery that the record tells of; a run without a window has none."""
    within = record.experiment.recovery.within
    none = RecoveryResult(within_s=within)
    if record.window is None or record.after is None or record.after.length <= 0 or record.baseline is None:
        return none
    origin, until = _origin(record, samples), record.after.end
    moments: dict[str, float | Moment | None] = {"steady": _steady(record, samples, reference, origin, until)}
    for part, signal in (("ready", READY), ("reschedule", RUNNING)):
        steps = samples.signal(signal)
        level = readings(steps, record.baseline)
        if steps and level:
            back = regained([t for t, _ in steps], [v for _, v in steps], max(level), origin_s=origin, until_s=until)
            if back.dropped_at_s is not None:
                moments[part] = back.at_s
    detected = _detected(record, samples)
    split = split_recovery(origin, until, moments)
    parts = [v for v in (split.ready_s, split.reschedule_s, split.steady_s) if v is not None]
    late = any(v > within for v in parts)
    open_ended = bool({"ready", "reschedule", "steady"} & set(split.censored))
    return RecoveryResult(
        detect_s=None if detected is None else max(0.0, detected - record.window.start),
        reschedule_s=split.reschedule_s,
        ready_s=split.ready_s,
        steady_s=split.steady_s,
        censored=split.censored,
        within_s=within,
        met=False if late else None if open_ended else True,
    )


def _origin(record: RunRecord, samples: Samples) -> float:
    """From when recovery counts: the word to recover; for kills, which are over at once, the last kill seen."""
    assert record.window is not None
    removed = record.moment("recover_requested")
    removed = record.window.end if removed is None else removed
    fault = record.experiment.fault
    if fault.kind != "pod_delete" and is_held(fault.kind, fault.params()):
        return removed
    for name in (LOST, RUNNING, READY):
        steps = [(t, -v if name == LOST else v) for t, v in samples.signal(name) if record.window.start <= t <= removed]
        drops = [t for (_, a), (t, b) in zip(steps, steps[1:], strict=False) if b < a]
        if drops:
            return drops[-1]
    return record.window.start


def _steady(record: RunRecord, samples: Samples, reference: Reference | None, origin: float, until: float) -> Moment:
    """When every objective holds again for the dwell time: the latest of all objectives."""
    assert record.baseline is not None
    environment, dwell = record.environment, record.experiment.recovery.dwell
    observed = Phase(samples, environment, Span(start=record.baseline.start, end=until), reference).requests
    before = observed.window(record.baseline.start, record.baseline.end)
    ok = before.select(before.ok)
    healthy = float(sorted(ok.latency_s)[len(ok) // 2]) if len(ok) else 0.0
    found: list[Moment] = []
    slos: list[Allowance] = []
    for objective in record.experiment.steady_state:
        slo = allowance_of(record, objective, observed)
        if slo is not None:
            slos.append(slo)
            continue
        sli = environment.slis[objective.sli]
        if sli.measure in SHIFT_MEASURES:
            found.append(_shift_back(objective, sli.measure, reference, observed, origin, until, dwell))
            continue
        steps = samples.signal(signal_name(objective.sli, sli))
        if steps:
            met = [objective.met_by(v) for _, v in steps]
            found.append(
                steady_from_evaluations([t for t, _ in steps], met, origin_s=origin, dwell_s=dwell, until_s=until)
            )
    while slos:
        moment = steady_again(observed, slos, origin_s=origin, dwell_s=dwell, until_s=until, healthy_latency_s=healthy)
        if moment.relapsed_at_s is None or moment.censored:
            found.append(moment)
            break
        # It held once and broke again: recovery counts from the *last* breach.
        origin = moment.relapsed_at_s
    if not found:
        return Moment(until, censored=True)
    latest = max(m.at_s for m in found)
    return Moment(latest, censored=any(m.censored for m in found))


def _shift_back(
    objective: Objective,
    measure: str,
    reference: Reference | None,
    observed: Requests,
    origin: float,
    until: float,
    dwell: float,
) -> Moment:
    """When the predictions are where they were, for the dwell time: each look is over what was due in the dwell after."""
    last = until - dwell
    for t in np.arange(origin, last + 1e-9, _SHIFT_EVERY_S):
        value = request_value(measure, observed.window(float(t), float(t) + dwell), reference)
        if value is not None and objective.met_by(value):
            return Moment(float(t), censored=False)
    return Moment(max(origin, last), censored=True)


def _detected(record: RunRecord, samples: Samples) -> float | None:
    """When the platform first acted on the fault: an expected signal moved, or a replica left the balance."""
    assert record.window is not None and record.baseline is not None
    names = [e.signal for e in record.experiment.expect if e.signal] or [READY]
    firsts: list[float] = []
    for name in names:
        steps = samples.signal(name)
        before = readings(steps, record.baseline)
        if before:
            moved = (t for t, v in steps if t >= record.window.start and not min(before) <= v <= max(before))
            at = next(moved, None)
            if at is not None and at <= record.window.end:
                firsts.append(at)
    return min(firsts, default=None)
