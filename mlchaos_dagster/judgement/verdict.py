"""The verdict: a pure function of the stored record.

HELD needs everything to have been *seen*: the fault confirmed, enough requests, sent in time, no gap,
every objective met, every expectation seen, recovery within its limit, and the target proven clean; and where the
backend has probes and a verdict of its own, these too.
What was not seen is INCONCLUSIVE, never a pass; what was seen to break is DEVIATED.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mlchaos_dagster.domain.environment import VALUE_MEASURES
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
from mlchaos_dagster.judgement.comeback import allowance_of, readings, recovery_of, recovery_words
from mlchaos_dagster.judgement.measures import Phase, describe, reference_of, steady
from mlchaos_dagster.judgement.recovery import first_bad
from mlchaos_dagster.judgement.results import sli_results
from mlchaos_dagster.judgement.shift import Reference

_NOISE = 3.0
"""Standard deviations of the baseline beyond its extremes: twice as many readings of mere noise exceed its maximum in two of
three runs, but that plus this in none of thousands."""

_SEEN_LATE_S = 2.0
"""How long before we saw it a fault may have come that a slow backend made: what it breaks at once falls into this time."""

JUDGED_BY = "mlchaos/judgement/v2"


def judge(record: RunRecord, samples: Samples) -> Verdict:
    """Judge a record. The same record gives the same verdict (seeded by the run)."""
    environment = record.environment
    reference = None if record.baseline is None else reference_of(samples, environment, record.baseline)
    phases = {
        name: Phase(samples, environment, span, reference, with_open_requests=name == "during")
        if span is not None and span.length > 0
        else None
        for name, span in (("baseline", record.baseline), ("during", record.tested), ("after", record.after))
    }
    baseline, during, after = phases["baseline"], phases["during"], phases["after"]
    slis = sli_results(record, baseline, during, after)
    expectations = tuple(_expectation(e, record, samples, slis) for e in record.experiment.expect)
    recovery = recovery_of(record, samples, reference)
    steady_before, why_unsteady = (
        steady(baseline, record.experiment.steady_state) if baseline is not None else (None, ())
    )
    outcome, reasons, advice = _decide(
        record, baseline, during, slis, expectations, recovery, steady_before, why_unsteady, samples
    )
    measured = [s.met for s in slis.values() if s.slo]
    elsewhere, _ = _meanwhile(record, slis, samples, reference)
    return Verdict(
        outcome=outcome,
        reasons=tuple(reasons),
        slis=slis,
        expectations=expectations,
        recovery=recovery,
        fault_fired=bool(record.fault and record.fault.confirmed),
        steady_before=steady_before,
        held=None if during is None or any(m is None for m in measured) else all(measured) and not elsewhere,
        golden=None if reference is None else reference.facts(during.requests if during else None),
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
    failed = [f"{f.name} did not pass: {f.saw}" for f in record.findings if f.passed is False]
    unseen = _unseen(record, during, samples)
    if unseen:
        return Outcome.INCONCLUSIVE, unseen + failed, _advice(record, during)
    deviations = _deviations(record, during, slis, () if record.shadow else expectations, recovery) + failed
    broken, unmeasured = _meanwhile(record, slis, samples, during.reference)
    deviations += broken
    if deviations:
        return Outcome.DEVIATED, deviations, ""
    missing = [f"{e.expected}: {e.saw}" for e in expectations if e.seen is None and not record.shadow]
    missing += _too_few_answers(record, during, slis)
    missing += [f"{s.slo} could not be measured during the fault" for s in slis.values() if s.slo and s.met is None]
    missing += unmeasured
    if recovery.met is None:
        missing.append("whether the target came back in time could not be seen")
    missing += [f"{f.name} is not known: {f.saw}" for f in record.findings if f.passed is None]
    if missing:
        return Outcome.INCONCLUSIVE, missing, _advice(record, during)
    if record.shadow:
        return Outcome.HELD, ["Nothing was injected (shadow); every objective held."], ""
    evidence = record.fault.evidence[0] if record.fault.evidence else "seen at the target"
    return (
        Outcome.HELD,
        [
            f"The fault fired ({evidence}) and every objective held{_afterwards(record, slis, recovery)}.",
            *_agreed(record),
        ],
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


def _agreed(record: RunRecord) -> list[str]:
    """That the backend's own judgement is the same."""
    passed = [f.name for f in record.findings]
    return [f"{record.fault.backend} judged the same: {', '.join(passed)}."] if passed and record.fault else []


def _meanwhile(
    record: RunRecord, slis: dict[str, SliResult], samples: Samples, reference: Reference | None
) -> tuple[list[str], list[str]]:
    """What broke only in another cut of the window, and what could not be measured there: no harm is thinned out.

    The numbers are those of the window from the word to inject to the proof of clean. In it a backend that needs seconds to
    make its fault has healthy ones, and the wait for its judgement is left out. Too few requests neither make nor break a pass.
    """
    cuts: list[tuple[Span, str, str]] = []
    if record.full is not None:
        cuts.append((record.full, "while the fault was on", "from injected to the end of the window"))
        begun = record.full.start - _SEEN_LATE_S
        if record.window is not None and begun > record.window.start:
            since = f"from {show_duration(_SEEN_LATE_S)} before it was seen to the end of the window"
            cuts.append((Span(start=begun, end=record.full.end), "while the fault was on", since))
    if record.window is not None and record.tested != record.window:
        cuts.append((record.window, "before the fault was taken away", "with the wait for what the backend judged"))
    said: dict[str, str] = {}
    unknown: dict[tuple[str, str], str] = {}
    fewest = record.environment.sampling.min_samples
    for span, when, cut in cuts:
        phase = Phase(samples, record.environment, span, reference, with_open_requests=True)
        few = len(phase.requests) < fewest
        if few:
            few_words = f"{len(phase.requests)} requests were measured {when}; at least {fewest} are needed"
            unknown.setdefault(("", when), few_words)
        for o in record.experiment.steady_state:
            if not slis[o.sli].met or o.sli in said or (few and record.environment.slis[o.sli].measure is not None):
                continue
            value = phase.value(o.sli)
            if value is None:
                unknown.setdefault((o.sli, when), f"{describe(o)} could not be measured {when}")
            elif not o.met_by(value):
                said[o.sli] = f"{describe(o)} broke {when}: {show_value(value, slis[o.sli].unit)} {cut}."
    return list(said.values()), list(unknown.values())


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
    inside = [min(g.end, during.span.end) - max(g.start, during.span.start) for g in samples.gaps]
    if (longest := max(inside, default=0.0)) > sampling.blind_for:
        reasons.append(f"Nothing was measured for {show_duration(longest)} of the window.")
    return reasons


def _too_few_answers(record: RunRecord, during: Phase, slis: dict[str, SliResult]) -> list[str]:
    """Objectives on answered numbers that were met by too few of them: a pass needs as many as any other."""
    environment = record.environment
    fewest = environment.sampling.min_samples
    return [
        f"{s.slo}: only {s.samples} of {len(during.requests)} answers could be compared with the baseline; "
        f"at least {fewest} are needed"
        for name, s in slis.items()
        if environment.slis[name].measure in VALUE_MEASURES and s.slo and s.met and s.samples < fewest
    ]


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
            said = f"{describe(objective)} broke: {was} during the fault ({before} before{when})"
            more = during.explain(objective.sli)
            reasons.append(f"{said}: {more}." if more else f"{said}.")
    for e in expectations:
        if e.seen is False:
            reasons.append(f"Expected and not seen: {e.expected}; {e.saw}.")
    if recovery.met is False:
        reasons.append(f"recovery took too long: {recovery_words(recovery)}; the limit is {recovery.within_s:g} s.")
    return reasons


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
    slo = allowance_of(record, objective, during.requests)
    if slo is None:
        return None
    at = first_bad(during.requests, [slo], origin_s=during.span.start)
    return None if at is None else at - during.span.start


# ---- expectations


def _expectation(
    expected: Expectation, record: RunRecord, samples: Samples, slis: dict[str, SliResult]
) -> ExpectationResult:
    words = str(expected)
    if expected.sli is not None:
        return _expected_sli(expected, words, slis.get(expected.sli))
    assert expected.signal is not None
    steps = samples.signal(expected.signal)
    before = readings(steps, record.baseline)
    during = readings(steps, record.tested)
    if not during or not before:
        return ExpectationResult(expected=words, seen=None, saw=f"{expected.signal} was not measured")
    low, high = min(during), max(during)
    noise = _NOISE * _jitter(before)
    saw = f"{expected.signal} was {_range(before)} before and {_range(during)} during the fault"
    if expected.drops:
        seen = low < min(before) - noise or _lasting([-v for v in before], [-v for v in during])
    elif expected.rises:
        seen = high > max(before) + noise or _lasting(before, during)
    elif expected.reaches is not None:
        if max(before) >= expected.reaches.value:
            return ExpectationResult(expected=words, seen=None, saw=f"{saw}: it was there without the fault")
        seen = high >= expected.reaches.value
    else:
        assert expected.stays is not None
        seen = low == high == expected.stays.value
    return ExpectationResult(expected=words, seen=seen, saw=saw)


def _lasting(before: Sequence[float], during: Sequence[float]) -> bool:
    """Whether half of the window is above 95 % of the baseline, and above where the baseline ended.

    Half of a window is no chance, and no single spike of the baseline hides it; what a counter did just before the window
    is not the window's doing.
    """
    middle = statistics.median(during)
    return middle > sorted(before)[min(len(before) - 1, int(0.95 * len(before)))] and middle > max(before[-3:])


def _jitter(values: Sequence[float]) -> float:
    """Standard deviation of the noise in a series, from its successive differences (von Neumann 1941).

    Unlike the standard deviation it is small for what only grows or falls, such as an age.
    """
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    return math.sqrt(sum(step * step for step in steps) / (2 * len(steps))) if steps else 0.0


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


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
