"""The verdict: a pure function of the stored record.

HELD needs everything to have been *seen*: the fault confirmed, enough requests, sent in time, no gap,
every objective met, every expectation seen, recovery within its limit, and the target proven clean.
What was not seen is INCONCLUSIVE, never a pass; what was seen to break is DEVIATED.
"""

from __future__ import annotations

from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import (
    ExpectationResult,
    RecoveryResult,
    RunRecord,
    Samples,
    SliResult,
    Span,
    Verdict,
)
from mlchaos_dagster.domain.spec import Expectation, Objective
from mlchaos_dagster.domain.units import show_duration, show_percent, show_value
from mlchaos_dagster.judgement.census import Requests
from mlchaos_dagster.judgement.measures import Phase, describe, signal_name, steady
from mlchaos_dagster.judgement.recovery import (
    Allowance,
    Moment,
    allowance,
    first_bad,
    regained,
    split_recovery,
    steady_again,
    steady_from_evaluations,
)
from mlchaos_dagster.judgement.results import sli_results

JUDGED_BY = "mlchaos/judgement/v1"
READY = "ready_replicas"
RUNNING = "running_replicas"
"""Signals that, where a platform offers them, split the recovery."""


def judge(record: RunRecord, samples: Samples) -> Verdict:
    """Judge a record. The same record gives the same verdict (seeded by the run)."""
    environment = record.environment
    phases = {
        name: Phase(samples, environment, span, with_open_requests=name == "during")
        if span is not None and span.length > 0
        else None
        for name, span in (("baseline", record.baseline), ("during", record.window), ("after", record.after))
    }
    baseline, during, after = phases["baseline"], phases["during"], phases["after"]
    slis = sli_results(record, baseline, during, after)
    expectations = tuple(_expectation(e, record, samples, slis) for e in record.experiment.expect)
    recovery = _recovery(record, samples)
    steady_before, why_unsteady = (
        steady(baseline, record.experiment.steady_state) if baseline is not None else (None, ())
    )
    outcome, reasons, advice = _decide(
        record, baseline, during, slis, expectations, recovery, steady_before, why_unsteady, samples
    )
    measured = [s.met for s in slis.values() if s.slo]
    return Verdict(
        outcome=outcome,
        reasons=tuple(reasons),
        slis=slis,
        expectations=expectations,
        recovery=recovery,
        fault_fired=bool(record.fault and record.fault.confirmed),
        steady_before=steady_before,
        held=None if during is None or any(m is None for m in measured) else all(measured),
        advice=advice,
        judged_by=JUDGED_BY,
    )


def _decide(
    record: RunRecord,
    baseline: Phase | None,
    during: Phase | None,
    slis: dict[str, SliResult],
    expectations: tuple[ExpectationResult, ...],
    recovery: RecoveryResult,
    steady_before: bool | None,
    why_unsteady: tuple[str, ...],
    samples: Samples,
) -> tuple[Outcome, list[str], str]:
    """Outcome, reasons (the decisive one first) and advice. The order of the questions is the rule."""
    if record.fault is not None and (record.clean is None or not record.clean.proven):
        said = record.clean.evidence[0] if record.clean and record.clean.evidence else "nothing could be read back"
        return (
            Outcome.UNCLEAN,
            [f"The target was not proven clean: {said}"],
            record.clean.command if record.clean else "",
        )
    if record.error:
        also = [] if record.abort is None else [_abort_words(record)]
        return Outcome.ERROR, [record.error, *also], ""
    refused = [g for g in record.guards if not g.passed]
    if refused:
        needs = refused[0].needs
        return Outcome.REFUSED, [f"{g.name}: {g.saw}" for g in refused], f"It needs {needs}." if needs else ""
    if record.abort is not None:
        return Outcome.ABORTED, [_abort_words(record)], ""
    if baseline is None:
        return Outcome.REFUSED, ["No baseline was measured."], ""
    if steady_before is not True and record.fault is not None:
        return Outcome.INCONCLUSIVE, [f"The steady state did not hold before the fault: {w}" for w in why_unsteady], ""
    if steady_before is not True:
        return (
            Outcome.REFUSED,
            [f"The steady state did not hold before: {w}" for w in why_unsteady],
            ("Nothing was injected. Find out why the target is not steady, or measure longer."),
        )
    if during is None or record.fault is None:
        return Outcome.INCONCLUSIVE, ["No fault window was measured."], ""
    unseen = _unseen(record, during, samples)
    if unseen:
        return Outcome.INCONCLUSIVE, unseen, _advice(record, during)
    deviations = _deviations(record, during, slis, () if record.shadow else expectations, recovery)
    if deviations:
        return Outcome.DEVIATED, deviations, ""
    missing = [f"{e.expected}: {e.saw}" for e in expectations if e.seen is None and not record.shadow]
    missing += [f"{s.slo} could not be measured during the fault" for s in slis.values() if s.slo and s.met is None]
    if recovery.met is None:
        missing.append("whether the target came back in time could not be seen")
    if missing:
        return Outcome.INCONCLUSIVE, missing, _advice(record, during)
    if record.shadow:
        return Outcome.HELD, ["Nothing was injected (shadow); every objective held."], ""
    evidence = record.fault.evidence[0] if record.fault.evidence else "seen at the target"
    return (
        Outcome.HELD,
        [f"The fault fired ({evidence}) and every objective held{_afterwards(record, slis, recovery)}."],
        "",
    )


def _afterwards(record: RunRecord, slis: dict[str, SliResult], recovery: RecoveryResult) -> str:
    """What broke once the fault was gone, although it came back in time: people must not have to look for it."""
    broken = [
        f"{o.sli} {show_value(slis[o.sli].after, slis[o.sli].unit)}"
        for o in record.experiment.steady_state
        if (value := slis[o.sli].after) is not None and not o.met_by(value)
    ]
    if not broken:
        return ""
    return (
        f" during it; after it {' and '.join(broken)}, steady again after {show_duration(recovery.steady_s)} "
        f"(limit {show_duration(recovery.within_s)})"
    )


def _unseen(record: RunRecord, during: Phase, samples: Samples) -> list[str]:
    """What a verdict needs and was not seen."""
    reasons: list[str] = []
    fault, sampling = record.fault, record.environment.sampling
    assert fault is not None
    if not fault.confirmed and not record.shadow:
        seen = f": {fault.evidence[0]}" if fault.evidence else ""
        reasons.append(f"The fault's effect was not seen at the target{seen}.")
    n, late = len(during.requests), during.late
    if n + late and late / (n + late) > sampling.max_late_fraction:
        reasons.append(
            f"{late} of {n + late} requests ({show_percent(late / (n + late), 0)}) were sent more than "
            f"{show_duration(sampling.max_lateness)} late: the probe itself was slowed down "
            f"(at most {show_percent(sampling.max_late_fraction, 0)} may be)."
        )
    if n < sampling.min_samples:
        reasons.append(f"{n} requests were measured during the fault; at least {sampling.min_samples} are needed.")
    gaps = [g for g in samples.gaps if g.end > during.span.start and g.start < during.span.end]
    if gaps:
        reasons.append(f"Nothing was measured for {show_duration(max(g.length for g in gaps))} of the window.")
    return reasons


def _deviations(
    record: RunRecord,
    during: Phase,
    slis: dict[str, SliResult],
    expectations: tuple[ExpectationResult, ...],
    recovery: RecoveryResult,
) -> list[str]:
    """Every promise that broke: which, by how much, when."""
    reasons: list[str] = []
    for objective in record.experiment.steady_state:
        result = slis[objective.sli]
        if result.met is False:
            was = show_value(result.during, result.unit)
            before = show_value(result.baseline, result.unit)
            began = _first_bad(record, during, objective)
            when = "" if began is None else f", first {show_duration(began)} into the window"
            reasons.append(f"{describe(objective)} broke: {was} during the fault ({before} before{when}).")
    for e in expectations:
        if e.seen is False:
            reasons.append(f"Expected and not seen: {e.expected}; {e.saw}.")
    if recovery.met is False:
        reasons.append(f"recovery took too long: {recovery_words(recovery)}; the limit is {recovery.within_s:g} s.")
    return reasons


def recovery_words(recovery: RecoveryResult) -> str:
    """`detect 0.3 s · ready 2.1 s · steady > 30 s (not seen)`."""
    parts: list[str] = []
    for name in ("detect", "reschedule", "ready", "steady"):
        value: float | None = getattr(recovery, f"{name}_s")
        if value is not None:
            censored = name in recovery.censored
            parts.append(f"{name} {'> ' if censored else ''}{show_duration(value)}{' (not seen)' if censored else ''}")
    return " · ".join(parts) or "not measured"


def _abort_words(record: RunRecord) -> str:
    abort = record.abort
    assert abort is not None
    if record.fault is None:
        return f"Stopped before anything was injected: {abort.reason}"
    gone = "not proven" if abort.seconds is None else f"{abort.seconds:.2f} s after the decision"
    return f"{abort.reason}; fault proven gone {gone}"


def _advice(record: RunRecord, during: Phase) -> str:
    sampling = record.environment.sampling
    needed = sampling.min_samples / record.environment.probe.rate
    if len(during.sent) < sampling.min_samples:
        return (
            f"A window of {show_duration(max(needed * 1.2, 1.0))} would give {sampling.min_samples} requests "
            f"(mlchaos plan {record.experiment.name})."
        )
    if record.fault is not None and not record.fault.confirmed:
        return "Look at the backend: the fault was asked for and its effect was not there."
    return f"mlchaos plan {record.experiment.name} tells what would be seen."


def _first_bad(record: RunRecord, during: Phase, objective: Objective) -> float | None:
    slo = _allowance(record, objective, during.requests)
    if slo is None:
        return None
    at = first_bad(during.requests, [slo], origin_s=during.span.start)
    return None if at is None else at - during.span.start


def _allowance(record: RunRecord, objective: Objective, requests: Requests) -> Allowance | None:
    """The objective request by request; None for means and signals, which have no such form."""
    measure = record.environment.slis[objective.sli].measure
    if measure is None:
        return None
    try:
        return allowance(measure, requests, **{objective.side: objective.limit.value})
    except ValueError:
        return None


# ---- expectations


def _expectation(
    expected: Expectation, record: RunRecord, samples: Samples, slis: dict[str, SliResult]
) -> ExpectationResult:
    words = str(expected)
    if expected.sli is not None:
        return _expected_sli(expected, words, slis.get(expected.sli))
    assert expected.signal is not None
    steps = samples.signal(expected.signal)
    before = _values(steps, record.baseline)
    during = _values(steps, record.window)
    if not during or not before:
        return ExpectationResult(expected=words, seen=None, saw=f"{expected.signal} was not measured")
    low, high = min(during), max(during)
    saw = f"{expected.signal} was {_range(before)} before and {_range(during)} during the fault"
    if expected.drops:
        seen = low < min(before)
    elif expected.rises:
        seen = high > max(before)
    elif expected.reaches is not None:
        if max(before) >= expected.reaches.value:
            return ExpectationResult(expected=words, seen=None, saw=f"{saw}: it was there without the fault")
        seen = high >= expected.reaches.value
    else:
        assert expected.stays is not None
        seen = low == high == expected.stays.value
    return ExpectationResult(expected=words, seen=seen, saw=saw)


def _expected_sli(expected: Expectation, words: str, result: SliResult | None) -> ExpectationResult:
    if result is None or result.during is None or result.baseline is None or result.effect is None:
        return ExpectationResult(expected=words, seen=None, saw=f"{expected.sli} was not measured")
    before, during = show_value(result.baseline, result.unit), show_value(result.during, result.unit)
    saw = f"{expected.sli} was {before} before and {during} during the fault"
    low = result.effect if result.ci_low is None else result.ci_low
    high = result.effect if result.ci_high is None else result.ci_high
    if expected.drops:
        seen = high < 0
    elif expected.rises:
        seen = low > 0
    elif expected.reaches is not None:
        if result.baseline >= expected.reaches.value:
            return ExpectationResult(expected=words, seen=None, saw=f"{saw}: it was there without the fault")
        seen = result.during >= expected.reaches.value
    else:
        assert expected.stays is not None
        seen = result.during == expected.stays.value
    return ExpectationResult(expected=words, seen=seen, saw=saw)


def _values(steps: list[tuple[float, float]], span: Span | None) -> list[float]:
    return [] if span is None else [v for t, v in steps if span.start <= t <= span.end]


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# ---- recovery


def _recovery(record: RunRecord, samples: Samples) -> RecoveryResult:
    within = record.experiment.recovery.within
    none = RecoveryResult(within_s=within)
    if record.window is None or record.after is None or record.after.length <= 0 or record.baseline is None:
        return none
    origin, until = _origin(record, samples), record.after.end
    moments: dict[str, float | Moment | None] = {"steady": _steady(record, samples, origin, until)}
    for part, signal in (("ready", READY), ("reschedule", RUNNING)):
        steps = samples.signal(signal)
        level = _values(steps, record.baseline)
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
    for name in (RUNNING, READY):
        steps = [(t, v) for t, v in samples.signal(name) if record.window.start <= t <= removed]
        drops = [t for (_, a), (t, b) in zip(steps, steps[1:], strict=False) if b < a]
        if drops:
            return drops[-1]
    return record.window.start


def _steady(record: RunRecord, samples: Samples, origin: float, until: float) -> Moment:
    """When every objective holds again for the dwell time: the latest of all objectives."""
    assert record.baseline is not None
    environment, dwell = record.environment, record.experiment.recovery.dwell
    observed = Phase(samples, environment, Span(start=record.baseline.start, end=until)).requests
    before = observed.window(record.baseline.start, record.baseline.end)
    ok = before.select(before.ok)
    healthy = float(sorted(ok.latency_s)[len(ok) // 2]) if len(ok) else 0.0
    found: list[Moment] = []
    slos: list[Allowance] = []
    for objective in record.experiment.steady_state:
        slo = _allowance(record, objective, observed)
        if slo is not None:
            slos.append(slo)
            continue
        sli = environment.slis[objective.sli]
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


def _detected(record: RunRecord, samples: Samples) -> float | None:
    """When the platform first acted on the fault: an expected signal moved, or a replica left the balance."""
    assert record.window is not None and record.baseline is not None
    names = [e.signal for e in record.experiment.expect if e.signal] or [READY]
    firsts: list[float] = []
    for name in names:
        steps = samples.signal(name)
        before = _values(steps, record.baseline)
        if before:
            moved = (t for t, v in steps if t >= record.window.start and not min(before) <= v <= max(before))
            at = next(moved, None)
            if at is not None and at <= record.window.end:
                firsts.append(at)
    return min(firsts, default=None)
