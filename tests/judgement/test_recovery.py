"""Recovery against a truth log: within one sample, whatever the fault did to requests, and never clipped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlchaos_dagster.judgement.census import Requests
from mlchaos_dagster.judgement.recovery import (
    Moment,
    Recovery,
    allowance,
    first_bad,
    regained,
    split_recovery,
    steady_again,
    steady_from_evaluations,
)

HEALTHY_S = 0.03


def traffic(rate, end_s, fault, *, seed=0, noise=0.0):
    """Open-loop requests; `fault(rng, due)` gives (ok, latency_s) while the service is broken, else None."""
    rng = np.random.default_rng(seed)
    due = np.arange(0.0, end_s, 1.0 / rate)
    ok, latency = np.ones(len(due), dtype=bool), rng.lognormal(np.log(HEALTHY_S), 0.2, len(due))
    for i, t in enumerate(due):
        hit = fault(rng, t)
        if hit is not None:
            ok[i], latency[i] = hit
        elif rng.random() < noise:
            ok[i] = False
    return Requests.of(due, due + latency, ok)


def slos(requests):
    return [
        allowance("availability", requests, at_least=0.99),
        allowance("latency_p95", requests, below=0.3),
    ]


def steady(requests, *, origin_s=5.0, until_s=30.0, dwell_s=2.0, **more):
    return steady_again(
        requests,
        slos(requests),
        origin_s=origin_s,
        dwell_s=dwell_s,
        until_s=until_s,
        healthy_latency_s=HEALTHY_S,
        **more,
    )


FAULTS = {
    "fails fast": lambda back: lambda rng, t: (False, 0.002) if 5.0 <= t < back else None,
    "times out": lambda back: lambda rng, t: (False, 2.0) if 5.0 <= t < back else None,
    "is slow": lambda back: lambda rng, t: (True, 0.8) if 5.0 <= t < back else None,
    "hangs, then serves what waits": lambda back: (
        lambda rng, t: ((True, back + 0.03 - t) if back - t < 2.0 else (False, 2.0)) if 5.0 <= t < back else None
    ),
}


@pytest.mark.parametrize("rate", [50, 100, 200])
@pytest.mark.parametrize("name", FAULTS)
def test_steady_agrees_with_the_truth_within_50_ms(name, rate):
    for seed, back in enumerate((6.003, 9.417, 13.731, 17.777)):
        found = steady(traffic(rate, 30.0, FAULTS[name](back), seed=seed))
        assert not found.censored
        assert abs(found.at_s - back) <= 0.05, (back, found)


def test_what_waited_may_be_served_in_any_order():
    """The queue is drained newest first: the oldest good answer comes well after the service did."""

    def newest_first(rng, t):
        return (True, 0.03 + 1.5 * (9.5 - t)) if 9.5 - 0.18 < t < 9.5 else (False, 2.0) if 5.0 <= t < 9.5 else None

    assert steady(traffic(200, 30.0, newest_first)).at_s == pytest.approx(9.5, abs=0.01)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_partial_loss_ends_within_a_few_samples(share):
    def fault(rng, t):
        return (False, 0.002) if 5.0 <= t < 12.0 and rng.random() < share else None

    errors = [steady(traffic(200, 30.0, fault, seed=s, noise=0.001)).at_s - 12.0 for s in range(12)]
    assert np.median(np.abs(errors)) <= 0.05
    assert max(np.abs(errors)) <= 0.2


def test_the_allowance_does_not_hide_an_outages_end():
    """p95 alone, 10 of 200 slow allowed: an outage's last 100 ms would fit into the allowance."""
    requests = traffic(100, 30.0, FAULTS["is slow"](9.5))
    found = steady_again(
        requests, [allowance("latency_p95", requests, below=0.3)], origin_s=5.0, dwell_s=2.0, until_s=30.0
    )
    assert found.at_s >= 9.5


def test_background_failures_within_the_slo_do_not_delay_it():
    errors = [steady(traffic(100, 30.0, FAULTS["fails fast"](9.5), seed=s, noise=0.002)).at_s - 9.5 for s in range(20)]
    assert np.median(np.abs(errors)) <= 0.05


def test_a_short_good_spell_is_not_recovery():
    requests = traffic(100, 30.0, lambda rng, t: (False, 0.01) if 5 <= t < 8 or 9 <= t < 12 else None)
    assert steady(requests).at_s == pytest.approx(12.0, abs=0.05)
    early = steady(requests, dwell_s=0.5)
    assert early.at_s == pytest.approx(8.0, abs=0.05)
    assert early.relapsed_at_s == pytest.approx(9.0, abs=0.05)


def test_a_system_that_never_broke_is_steady_at_once():
    found = steady(traffic(100, 30.0, lambda rng, t: None))
    assert found == Moment(pytest.approx(5.0, abs=0.05), censored=False)


def test_an_outage_without_end_is_censored_at_the_end():
    assert steady(traffic(100, 30.0, FAULTS["fails fast"](99.0))) == Moment(30.0, censored=True)


def test_an_unfinished_dwell_is_censored_at_the_earliest_moment_still_possible():
    found = steady(traffic(100, 10.0, FAULTS["fails fast"](9.0)), until_s=10.0)
    assert found.censored
    assert found.at_s == pytest.approx(9.0, abs=0.05)


def test_a_blind_probe_proves_nothing():
    whole = traffic(100, 30.0, FAULTS["fails fast"](8.0))
    blind = whole.select((whole.due_s < 8.5) | (whole.due_s >= 14.0))
    assert steady(blind).at_s == pytest.approx(14.0, abs=0.05)
    assert steady(whole.select(whole.due_s < 8.5)) == Moment(30.0, censored=True)
    assert steady(whole.select(whole.due_s < 2.0)) == Moment(30.0, censored=True)
    assert steady(whole, minimum=1_000).censored


def test_first_bad():
    requests = traffic(100, 30.0, FAULTS["is slow"](9.0))
    assert first_bad(requests, slos(requests), origin_s=3.0) == pytest.approx(5.0, abs=0.011)
    assert first_bad(requests, slos(requests), origin_s=9.1) is None


def test_strict_limits_and_answered_only():
    due = np.arange(0.0, 10.0, 0.01)
    ok = np.ones(1_000, dtype=bool)
    ok[::100] = False
    requests = Requests.of(due, due + 0.01, ok)

    def held(**limit):
        slo = allowance("error_rate", requests, **limit)
        return not steady_again(requests, [slo], origin_s=0.0, dwell_s=4.0 - 0.005, until_s=10.0).censored

    assert held(at_most=0.01)
    assert not held(below=0.01)
    cached = Requests.of(due, due + 0.01, due >= 5.0, path=np.where(due >= 5.0, "cache", ""))
    slo = allowance("fallback_rate", cached, at_most=0.6)
    assert slo.among is not None
    assert slo.among.sum() == slo.bad.sum() == 500


@pytest.mark.parametrize(
    ("measure", "limit"),
    [
        ("latency_mean", {"below": 0.3}),
        ("availability", {"below": 0.99}),
        ("latency_p95", {"at_least": 0.3}),
        ("availability", {}),
        ("availability", {"at_least": 0.99, "above": 0.9}),
    ],
)
def test_what_has_no_per_request_form_is_refused(measure, limit):
    with pytest.raises(ValueError, match="request by request"):
        allowance(measure, traffic(10, 1.0, lambda rng, t: None), **limit)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("gggggbs"), min_size=5, max_size=120), st.data())
def test_one_more_bad_sample_never_makes_recovery_earlier(kinds, data):
    due = np.arange(len(kinds)) * 0.05
    ok = np.array([k != "b" for k in kinds])
    latency = np.array([1.0 if k == "s" else 0.02 for k in kinds])
    until = len(kinds) * 0.05

    def found(good):
        requests = Requests.of(due, due + latency, good)
        limits = [allowance("availability", requests, at_least=0.9), allowance("latency_p95", requests, below=0.3)]
        return steady_again(requests, limits, origin_s=0.0, dwell_s=1.0, until_s=until, healthy_latency_s=0.01)

    worse = ok.copy()
    worse[data.draw(st.integers(0, len(kinds) - 1))] = False
    before, after = found(ok), found(worse)
    assert after.at_s >= before.at_s
    assert after.censored or not before.censored


@settings(max_examples=150, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_one_more_unmet_evaluation_never_makes_recovery_earlier(met, data):
    times = np.arange(len(met)) * 1.0
    worse = list(met)
    worse[data.draw(st.integers(0, len(met) - 1))] = False
    before, after = (
        steady_from_evaluations(times, m, origin_s=2.0, dwell_s=3.0, until_s=len(met) - 1.0) for m in (met, worse)
    )
    assert after.at_s >= before.at_s


def test_evaluations_at_their_own_resolution():
    times, met = np.arange(0.0, 20.0), np.array([True] * 5 + [False] * 4 + [True] * 11)
    assert steady_from_evaluations(times, met, origin_s=5.0, dwell_s=3.0, until_s=19.0) == Moment(9.0, False)
    assert steady_from_evaluations(times, met, origin_s=5.0, dwell_s=12.0, until_s=19.0) == Moment(9.0, True)
    assert steady_from_evaluations(times, met, origin_s=0.0, dwell_s=3.0, until_s=19.0) == Moment(0.0, False, 5.0)
    assert steady_from_evaluations(times, met, origin_s=0.0, dwell_s=7.0, until_s=19.0) == Moment(9.0, False)
    assert steady_from_evaluations(times, ~met, origin_s=9.0, dwell_s=3.0, until_s=19.0) == Moment(19.0, True)


def test_a_signal_is_regained_when_it_stays():
    times, ready = [0.0, 5.2, 6.0, 6.5, 8.1], [3, 2, 3, 2, 3]
    back = regained(times, ready, 3, origin_s=5.0, until_s=30.0)
    assert (back.dropped_at_s, back.at_s) == (5.2, 8.1)
    assert regained(times, ready, 3, origin_s=5.0, until_s=7.0).at_s is None
    assert regained(times, ready, 3, origin_s=9.0, until_s=30.0).dropped_at_s is None
    assert regained(times, ready, 3, origin_s=5.5, until_s=30.0).dropped_at_s == 5.5  # already down


def test_the_split_keeps_what_was_not_seen_as_a_lower_bound():
    split = split_recovery(10.0, 40.0, {"detect": 10.3, "ready": None, "steady": Moment(38.0, censored=True)})
    assert split == Recovery(pytest.approx(0.3), None, 30.0, 28.0, ("ready", "steady"))
    assert split.within(20.0) is False  # the lower bound is already too long
    assert split.within(35.0) is None
    assert split_recovery(10.0, 40.0, {"steady": Moment(12.0, False)}).within(3.0) is True
    assert split_recovery(10.0, 40.0, {"steady": 12.0}).within(1.0) is False
    assert split_recovery(10.0, 40.0, {}).within(3.0) is None


def test_bad_arguments_are_refused():
    requests = traffic(10, 1.0, lambda rng, t: None)
    with pytest.raises(ValueError, match="at least one SLO"):
        steady_again(requests, [], origin_s=0.0, dwell_s=1.0, until_s=1.0)
    with pytest.raises(ValueError, match="positive"):
        steady(requests, dwell_s=0.0)
    with pytest.raises(ValueError, match="no such part"):
        split_recovery(0.0, 1.0, {"steadyy": 1.0})


def test_a_latency_at_its_limit():
    requests = Requests.of([0.0, 1.0, 2.0], [0.25, 1.5, 2.75], [True] * 3)
    assert allowance("latency_p95", requests, below=0.5).bad.tolist() == [False, True, True]
    assert allowance("latency_p95", requests, at_most=0.5).bad.tolist() == [False, False, True]
