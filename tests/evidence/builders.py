"""Synthetic runs with the shape of real ones: one per outcome, seeded, with raw samples that fit their verdict."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import (
    STATUS_TIMEOUT,
    AbortFacts,
    CleanFacts,
    ExpectationResult,
    FaultFacts,
    GuardResult,
    Moment,
    RecoveryResult,
    RequestSample,
    RunRecord,
    Samples,
    SignalSample,
    SliResult,
    Span,
    Verdict,
)
from mlchaos_dagster.domain.spec import Experiment

ZERO_WALL = 1_763_704_800.0  # 2025-11-21 06:00:00 UTC
RATE = 50


class Run(NamedTuple):
    record: RunRecord
    samples: Samples
    verdict: Verdict


def experiment(**changes: Any) -> Experiment:
    raw: dict[str, Any] = {
        "schema": "mlchaos/v1",
        "name": "serving-pod-failure",
        "title": "The prediction service survives losing 30 % of its pods",
        "hypothesis": "It keeps 99 % availability, through recreation and load balancing.",
        "area": "serving",
        "owner": "ml-platform@example.com",
        "target": "prediction-service",
        "fault": {"kind": "pod_failure"},
        "blast_radius": {"fraction": "34%", "max_targets": 10},
        "duration": "10m",
        "steady_state": [{"sli": "availability", "at_least": "99%"}, {"sli": "latency_p95", "below": "300ms"}],
        "expect": [{"signal": "ready_replicas", "drops": True}],
        "recovery": {"within": "30s"},
        "abort": [{"sli": "error_rate", "above": "1%", "for": "3s"}],
        "teeth": {"mechanism": "restart", "breaks": "recovery"},
        "prerequisites": ["At least three replicas are ready", "Nobody is deploying"],
    }
    return Experiment.model_validate(raw | changes)


def environment(**changes: Any) -> Environment:
    raw: dict[str, Any] = {
        "schema": "mlchaos/v1",
        "name": "sandbox",
        "title": "The embedded platform on this machine",
        "backends": {"sandbox": ["pod_delete", "pod_failure", "network_latency", "network_partition"]},
        "targets": {
            "prediction-service": {"select": "inference-*", "describe": "the model servers"},
            "feature-store": {"select": "gateway->feature-store"},
        },
        "probe": {"url": "{gateway}/predict", "rate": RATE, "headers": {"Authorization": "Bearer s3cr3t-value-42"}},
        "slis": {
            "availability": {"measure": "availability"},
            "error_rate": {"measure": "error_rate"},
            "latency_p95": {"measure": "latency_p95"},
        },
        "signals": ["ready_replicas", "breaker_state", "fallback_total"],
        "limits": {"abort": [{"sli": "error_rate", "above": "20%", "for": "2s"}]},
        "duration_scale": 0.025,
    }
    return Environment.model_validate(raw | changes)


def requests(
    start: float,
    end: float,
    *,
    seed: int = 1,
    latency_s: float = 0.03,
    fail: float = 0.0,
    cache: float = 0.0,
    timeout: bool = False,
) -> list[RequestSample]:
    rng = random.Random(seed)
    rows: list[RequestSample] = []
    for i in range(round((end - start) * RATE)):
        due = start + i / RATE
        sent = due + rng.random() * 0.002
        bad = rng.random() < fail
        took = rng.lognormvariate(0, 0.25) * latency_s
        if bad:
            done, status, path = sent + (2.0 if timeout else 0.01), STATUS_TIMEOUT if timeout else 503, "error"
        else:
            done, status, path = sent + took, 200, "cache" if rng.random() < cache else "model"
        rows.append(RequestSample(due, sent, done, status, not bad, path, f"inference-{i % 3 + 1}"))
    return rows


def signals(steps: dict[str, list[tuple[float, float]]], start: float, end: float) -> list[SignalSample]:
    """Step functions read every 0.2 s."""
    out: list[SignalSample] = []
    for name, changes in steps.items():
        t = start
        while t < end:
            value = next((v for at, v in reversed(changes) if at <= t), changes[0][1])
            out.append(SignalSample(round(t, 3), name, value))
            t += 0.2
    out.sort(key=lambda s: s.t)
    return out


GUARDS = (
    GuardResult(name="health", passed=True, saw="0.99", needs="≥ 0.80"),
    GuardResult(name="error budget", passed=True, saw="84 % left", needs="≥ 10 % left"),
    GuardResult(name="freeze", passed=True, saw="no freeze"),
    GuardResult(name="target free", passed=True, saw="no open lease on inference-1"),
    GuardResult(name="watcher", passed=True, saw="alive, 0.1 s ago"),
)

FAULT = FaultFacts(
    kind="pod_failure",
    backend="sandbox",
    targets=("inference-1",),
    existing=3,
    confirmed=True,
    evidence=("inference-1 (pid 4711) is gone", "the supervisor holds it down"),
    lease_id="mlchaos-7f3a91c2",
    token=1,
)
CLEAN = CleanFacts(
    proven=True,
    evidence=("3 of 3 replicas ready", "no rule on any proxy", "lease closed 0.02 s after recover"),
)


def moment(name: Any, t: float, note: str = "") -> Moment:
    return Moment(name=name, t=t, note=note)


def base(**changes: Any) -> dict[str, Any]:
    return {
        "run_id": "7f3a91c2",
        "experiment": experiment(),
        "environment": environment(),
        "seed": 42,
        "started_by": "ada@laptop",
        "versions": {"mlchaos-dagster": "0.1.0", "python": "3.11.7", "dagster": "1.13.27"},
        "zero_mono": 1234.5,
        "zero_wall": ZERO_WALL,
        "window_s": 15.0,
        "guards": GUARDS,
        "guards_s": 0.21,
    } | changes


def held(*, shadow: bool = False) -> Run:
    moments = [
        moment("baseline_started", 0.3),
        moment("baseline_ended", 10.3),
        moment("inject_requested", 10.31),
        moment("injected", 10.32),
        moment("confirmed", 10.36, "inference-1 gone"),
        moment("first_bad", 10.42),
        moment("recover_requested", 25.32),
        moment("window_ended", 25.32),
        moment("proven_clean", 25.34),
        moment("steady_again", 27.92),
        moment("observation_ended", 31.0),
    ]
    fault: FaultFacts | None = FAULT
    rows = (
        requests(0.3, 10.32, seed=1)
        + requests(10.32, 11.1, seed=2, latency_s=0.05, fail=0.06)
        + requests(11.1, 25.34, seed=3, latency_s=0.037, fail=0.002)
        + requests(25.34, 31.0, seed=4, latency_s=0.031)
    )
    steps = {
        "ready_replicas": [(0.0, 3.0), (10.6, 2.0), (27.4, 3.0)],
        "breaker_state": [(0.0, 0.0)],
        "fallback_total": [(0.0, 0.0), (10.5, 3.0), (11.0, 5.0)],
    }
    if shadow:
        moments = [m for m in moments if m.name not in ("injected", "inject_requested", "confirmed", "first_bad")]
        fault = FAULT.model_copy(update={"confirmed": False, "evidence": (), "lease_id": ""})
        rows, steps = requests(0.3, 31.0, seed=9), {"ready_replicas": [(0.0, 3.0)]}
    record = RunRecord(
        **base(
            shadow=shadow,
            moments=tuple(moments),
            baseline=Span(start=0.3, end=10.3),
            window=Span(start=10.32, end=25.32),
            after=Span(start=25.34, end=31.0),
            fault=fault,
            clean=CLEAN if not shadow else CleanFacts(proven=True, evidence=("nothing was injected",)),
        )
    )
    slis = {
        "availability": SliResult(
            unit="ratio", baseline=1.0, during=0.994, after=1.0, effect=-0.006, ci_low=-0.012, ci_high=-0.001,
            samples=750, late=2, detectable=0.009, slo="availability ≥ 99 %", met=True,
        ),
        "latency_p95": SliResult(
            unit="s", baseline=0.031, during=0.044, after=0.032, effect=0.013, ci_low=0.006, ci_high=0.024,
            samples=750, late=2, detectable=0.015, slo="latency_p95 < 300 ms", met=True,
        ),
    }  # fmt: skip
    if shadow:
        verdict = Verdict(
            outcome=Outcome.HELD,
            reasons=("Nothing was injected; every objective held, as it should.",),
            slis=slis,
            fault_fired=False,
            steady_before=True,
            held=True,
            judged_by="1",
        )
    else:
        verdict = Verdict(
            outcome=Outcome.HELD,
            reasons=("The fault fired (inference-1 gone after 0.04 s) and every SLO held.",),
            slis=slis,
            expectations=(ExpectationResult(expected="ready_replicas drops", seen=True, saw="3 before, 2 during"),),
            recovery=RecoveryResult(detect_s=0.3, reschedule_s=0.8, ready_s=2.1, steady_s=2.6, within_s=30.0, met=True),
            fault_fired=True,
            steady_before=True,
            held=True,
            judged_by="1",
        )
    return Run(record, Samples(rows, signals(steps, 0.3, 31.0)), verdict)


def deviated() -> Run:
    """The feature store is cut off and the breaker never opens; recovery is not seen before the observation ends."""
    spec = experiment(
        name="feature-store-partition",
        title="Predictions survive a feature store that is cut off",
        hypothesis="The breaker opens within seconds and cached features answer.",
        target="feature-store",
        fault={"kind": "network_partition"},
        steady_state=[{"sli": "availability", "at_least": "95%"}, {"sli": "latency_p95", "below": "300ms"}],
        expect=[{"signal": "breaker_state", "reaches": 2}, {"sli": "error_rate", "rises": True}],
        abort=[],
        teeth={"mechanism": "breaker", "breaks": "breaker_state"},
    )
    moments = (
        moment("baseline_started", 0.2),
        moment("baseline_ended", 10.2),
        moment("inject_requested", 10.21),
        moment("injected", 10.22),
        moment("confirmed", 10.31, "gateway->feature-store: no byte passes"),
        moment("first_bad", 10.5),
        moment("recover_requested", 25.22),
        moment("window_ended", 25.22),
        moment("proven_clean", 25.25),
        moment("observation_ended", 55.25),
    )
    rows = (
        requests(0.2, 10.22, seed=1)
        + requests(10.22, 25.22, seed=2, fail=0.41, cache=0.3, timeout=True, latency_s=0.06)
        + requests(25.22, 55.2, seed=3, fail=0.06, latency_s=0.05)
    )
    steps = {
        "ready_replicas": [(0.0, 3.0)],
        "breaker_state": [(0.0, 0.0)],
        "fallback_total": [(0.0, 0.0)] + [(10.3 + i / 4, i * 4.0) for i in range(1, 60)],
    }
    record = RunRecord(
        **base(
            run_id="ab12cd34",
            experiment=spec,
            moments=moments,
            baseline=Span(start=0.2, end=10.2),
            window=Span(start=10.22, end=25.22),
            after=Span(start=25.25, end=55.25),
            fault=FaultFacts(
                kind="network_partition", backend="sandbox", targets=("gateway->feature-store",), existing=1,
                confirmed=True, evidence=("proxy gateway->feature-store: rule partition in force",),
                lease_id="mlchaos-ab12cd34", token=1,
            ),
            clean=CleanFacts(proven=True, evidence=("no rule on any proxy", "lease closed")),
        )
    )  # fmt: skip
    verdict = Verdict(
        outcome=Outcome.DEVIATED,
        reasons=("availability was 59.1 % during the fault; promised: ≥ 95 %",),
        slis={
            "availability": SliResult(
                unit="ratio", baseline=1.0, during=0.591, after=0.942, effect=-0.409, ci_low=-0.447, ci_high=-0.371,
                samples=750, detectable=0.031, met=False,
            ),
            "latency_p95": SliResult(
                unit="s", baseline=0.044, during=float("inf"), after=float("inf"), effect=None, reliable=False,
                why="more than 5 % of the requests have no answer", samples=750, met=False,
            ),
            "error_rate": SliResult(
                unit="ratio", baseline=0.0, during=0.409, after=0.058, effect=0.409, ci_low=0.371, ci_high=0.447,
                samples=750,
            ),
        },
        expectations=(
            ExpectationResult(expected="breaker_state reaches 2", seen=False, saw="stayed closed for 15 s"),
            ExpectationResult(expected="error_rate rises", seen=True, saw="0.0 % before, 40.9 % during"),
        ),
        recovery=RecoveryResult(
            detect_s=15.0, ready_s=0.0, steady_s=30.0, censored=("detect", "steady"), within_s=30.0, met=False
        ),
        fault_fired=True,
        steady_before=True,
        held=False,
        judged_by="1",
    )  # fmt: skip
    return Run(record, Samples(rows, signals(steps, 0.2, 55.2)), verdict)


def aborted() -> Run:
    moments = (
        moment("baseline_started", 0.2),
        moment("baseline_ended", 10.2),
        moment("inject_requested", 10.21),
        moment("injected", 10.22),
        moment("confirmed", 10.27, "inference-1 gone"),
        moment("first_bad", 11.0),
        moment("breach", 14.1, "error_rate > 5 % for 3 s"),
        moment("recover_requested", 14.11),
        moment("window_ended", 14.11),
        moment("proven_clean", 14.52),
        moment("steady_again", 16.9),
        moment("observation_ended", 20.0),
    )
    rows = requests(0.2, 10.22, seed=1) + requests(10.22, 14.52, seed=2, fail=0.3) + requests(16.5, 20.0, seed=3)
    record = RunRecord(
        **base(
            run_id="ee00ee00",
            moments=moments,
            baseline=Span(start=0.2, end=10.2),
            window=Span(start=10.22, end=14.11),
            after=Span(start=14.52, end=20.0),
            fault=FAULT,
            abort=AbortFacts(
                cause="limit",
                reason="error_rate was 31 %, above 5 % for 3 s",
                first_bad_at=11.0,
                breach_at=14.1,
                clean_at=14.52,
            ),
            clean=CLEAN,
            incidents=("abort: error_rate was 31 %, above 5 % for 3 s",),
        )
    )
    verdict = Verdict(
        outcome=Outcome.ABORTED,
        reasons=("error_rate was 31 %, above 5 % for 3 s",),
        slis={
            "availability": SliResult(
                unit="ratio", baseline=1.0, during=0.70, after=1.0, effect=-0.30, ci_low=-0.36, ci_high=-0.24,
                samples=195, met=False,
            )
        },
        recovery=RecoveryResult(detect_s=0.4, ready_s=2.0, steady_s=2.38, within_s=30.0, met=True),
        fault_fired=True,
        steady_before=True,
        held=False,
        judged_by="1",
    )  # fmt: skip
    steps = {"ready_replicas": [(0.0, 3.0), (10.5, 2.0), (16.5, 3.0)]}
    return Run(record, Samples(rows, signals(steps, 0.2, 20.0), [Span(start=14.52, end=16.5)]), verdict)


def refused_unsteady() -> Run:
    record = RunRecord(
        **base(
            run_id="00ff00ff",
            moments=(
                moment("baseline_started", 0.2),
                moment("baseline_ended", 10.2),
                moment("observation_ended", 10.2),
            ),
            baseline=Span(start=0.2, end=10.2),
            incidents=("refusal: the steady state does not hold before the fault",),
        )
    )
    verdict = Verdict(
        outcome=Outcome.REFUSED,
        reasons=("The baseline is not steady: availability ≥ 99 % does not hold: 94.2 %",),
        slis={
            "availability": SliResult(unit="ratio", baseline=0.942, during=None, after=None, met=None),
            "latency_p95": SliResult(unit="s", baseline=0.041, during=None, after=None, met=None),
        },
        steady_before=False,
        advice="Mend the service first, or run mlchaos doctor; a baseline above 99 % lets the run through.",
        judged_by="1",
    )
    return Run(record, Samples(requests(0.2, 10.2, fail=0.06), []), verdict)


def refused_guard() -> Run:
    guards = (
        *GUARDS[:1],
        GuardResult(name="error budget", passed=False, saw="4 % left", needs="at least 10 % left"),
        *GUARDS[2:],
    )
    record = RunRecord(**base(run_id="0badbad0", guards=guards, incidents=("refusal: error budget: 4 % left",)))
    verdict = Verdict(outcome=Outcome.REFUSED, reasons=("error budget: 4 % left",), judged_by="1")
    return Run(record, Samples(), verdict)


def inconclusive() -> Run:
    run = held()
    assert run.record.fault
    fault = run.record.fault.model_copy(update={"confirmed": False, "evidence": ()})
    moments = tuple(m for m in run.record.moments if m.name not in ("confirmed", "first_bad"))
    record = run.record.model_copy(update={"fault": fault, "moments": moments, "run_id": "1dea1dea"})
    verdict = run.verdict.model_copy(
        update={
            "outcome": Outcome.INCONCLUSIVE,
            "reasons": ("The fault's effect was not seen: inference-1 answered all the time.",),
            "fault_fired": False,
            "held": None,
            "advice": "mlchaos plan serving-pod-failure: a window of 90 s would do",
            "recovery": RecoveryResult(),
        }
    )
    return Run(record, run.samples, verdict)


def unclean() -> Run:
    run = held()
    clean = CleanFacts(
        proven=False,
        evidence=("inference-1: still held down by the supervisor",),
        command="mlchaos recover --environment sandbox",
    )
    moments = tuple(m for m in run.record.moments if m.name not in ("proven_clean", "steady_again"))
    record = run.record.model_copy(
        update={"clean": clean, "moments": moments, "after": None, "error": "sandbox.recover: timed out after 15 s"}
    )
    verdict = run.verdict.model_copy(
        update={
            "outcome": Outcome.UNCLEAN,
            "reasons": ("The target was not proven clean within 15 s.",),
            "held": None,
            "recovery": RecoveryResult(detect_s=0.3, ready_s=5.7, censored=("ready",), within_s=30.0),
        }
    )
    return Run(record, run.samples, verdict)


def error() -> Run:
    run = held()
    record = run.record.model_copy(update={"error": "StoreError: cannot write the record: No space left on device"})
    return Run(record, run.samples, Verdict(outcome=Outcome.ERROR, reasons=(), judged_by="1"))


def all_runs() -> dict[str, Run]:
    return {
        "held": held(),
        "deviated": deviated(),
        "aborted": aborted(),
        "refused_unsteady": refused_unsteady(),
        "refused_guard": refused_guard(),
        "inconclusive": inconclusive(),
        "unclean": unclean(),
        "shadow": held(shadow=True),
        "error": error(),
    }
