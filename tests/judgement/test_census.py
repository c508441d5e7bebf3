"""The census counts exactly, ranks failures as infinitely slow, and never gets better through worse samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlchaos_dagster.judgement.census import (
    Requests,
    gauge_census,
    measure,
    minimum_samples,
    observed_quantile,
    quantile_of,
    take_census,
    time_max,
    time_min,
    time_weighted_mean,
)


def requests(latency_s, ok=None, *, lateness_s=0.0, path=None):
    latency = np.asarray(latency_s, dtype=float)
    due = np.arange(len(latency)) * 0.02
    good = np.ones(len(latency), dtype=bool) if ok is None else ok
    return Requests.of(due, due + latency, good, sent_s=due + lateness_s, path=path)


def test_counts_are_exact():
    census = take_census(requests([0.1] * 8 + [0.5] * 2, [True] * 9 + [False], path=["model"] * 6 + ["cache"] * 4))
    assert (census.n, census.failed, census.late, census.fallback) == (10, 1, 0, 3)
    assert (census.availability, census.error_rate) == (0.9, 0.1)
    assert census.fallback_rate == pytest.approx(3 / 9)
    assert census.latency_p50_s == pytest.approx(0.1)


def test_a_fast_failure_is_not_a_fast_answer():
    refused = requests([0.05] * 90 + [0.001] * 10, [True] * 90 + [False] * 10)
    census = take_census(refused, penalty_s=2.0)
    assert census.latency_p95_s == math.inf
    assert census.latency_p50_s == pytest.approx(0.05)
    assert census.latency_mean_s == pytest.approx(0.9 * 0.05 + 0.1 * 2.0)
    assert take_census(refused).latency_mean_s == math.inf


@pytest.mark.parametrize(("failed", "infinite"), [(5, False), (6, True)])
def test_p95_is_infinite_exactly_above_five_percent_failures(failed, infinite):
    p95 = take_census(requests([0.05] * 100, [True] * (100 - failed) + [False] * failed)).latency_p95_s
    assert math.isinf(p95) is infinite


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.99])
def test_quantile_below_means_at_most_the_allowed_share_of_slow(q):
    for n in range(1, 250):
        allowed = math.floor((1 - q) * n + 1e-9)
        for slow in {allowed, min(n, allowed + 1)}:
            value = observed_quantile(np.array([1.0] * (n - slow) + [2.0] * slow), q)
            assert (value < 2.0) == (slow <= allowed), (n, slow)


def test_latency_is_corrected_for_coordinated_omission():
    held_back = Requests.of([0.0], [1.1], [True], sent_s=[1.0])
    assert measure("latency_p50", held_back) == pytest.approx(1.1)


def test_late_requests_are_excluded_and_counted():
    sent = requests([0.1] * 10, [True] * 5 + [False] * 5, lateness_s=np.array([0.0] * 5 + [0.2] * 5))
    census = take_census(sent, late_after_s=0.05, minimum=8)
    assert (census.n, census.late, census.availability, census.late_ratio) == (5, 5, 1.0, 0.5)
    assert not census.enough
    assert "5 requests" in census.why
    assert "8" in census.why


def test_nothing_measured_is_none_not_zero():
    census = take_census(requests([]))
    assert census.n == 0
    assert census.availability is census.error_rate is census.latency_p95_s is census.latency_mean_s is None
    assert not census.enough
    assert census.late_ratio == 0.0
    assert measure("fallback_rate", requests([0.1], [False])) is None


def test_windows_are_half_open_and_requests_are_sorted():
    sent = Requests.of([2.0, 0.0, 1.0], [2.3, 0.1, 1.2], [False, True, True])
    assert sent.latency_s == pytest.approx([0.1, 0.2, 0.3])
    assert sent.window(0.0, 2.0).ok.tolist() == [True, True]


@pytest.mark.parametrize("name", ["latency_p0", "latency_p100", "latency_p", "p95", "throughput"])
def test_unknown_measures_are_refused(name):
    assert quantile_of(name) is None
    with pytest.raises(ValueError, match="no such measure"):
        measure(name, requests([0.1]))


def test_half_a_request_is_refused():
    with pytest.raises(ValueError, match="one length"):
        Requests.of([0.0, 1.0], [0.1], [True])
    with pytest.raises(ValueError, match="finite"):
        Requests.of([0.0], [math.inf], [False])


def test_minimum_samples():
    assert [minimum_samples(a) for a in (0.01, 0.05, 0.001, 0.0)] == [100, 20, 1000, 1]


COLUMN = st.lists(st.tuples(st.floats(0.0, 5.0), st.booleans()), min_size=1, max_size=60)


@given(COLUMN, st.data())
def test_worse_samples_never_improve_a_census(column, data):
    latency, ok = np.array([c[0] for c in column]), np.array([c[1] for c in column])
    at = data.draw(st.integers(0, len(column) - 1))
    slower, fewer = latency.copy(), ok.copy()
    slower[at] += data.draw(st.floats(0.0, 10.0))
    fewer[at] = False
    before = take_census(requests(latency, ok), penalty_s=5.0)
    for worse in (requests(slower, ok), requests(latency, fewer), requests(slower, fewer)):
        after = take_census(worse, penalty_s=5.0)
        assert after.availability <= before.availability
        assert after.error_rate >= before.error_rate
        for name in ("latency_p50_s", "latency_p95_s", "latency_p99_s"):
            assert getattr(after, name) >= getattr(before, name)
        assert after.latency_mean_s >= before.latency_mean_s - 1e-9


def test_a_gauge_is_weighted_by_time():
    times, values = [0.0, 4.0, 5.0], [3, 1, 3]
    assert time_weighted_mean(times, values, 0.0, 10.0) == pytest.approx(2.8)
    assert time_min(times, values, 0.0, 10.0) == 1
    assert time_min(times, values, 6.0, 10.0) == 3  # the value that stood before the window counts
    assert time_max(times, values, 4.2, 4.8) == 1


def test_a_gauge_before_its_first_step_is_unknown():
    census = gauge_census([5.0], [2.0], 0.0, 10.0)
    assert (census.mean, census.covered_s) == (2.0, 5.0)
    assert gauge_census([11.0], [2.0], 0.0, 10.0).mean is None
    assert gauge_census([], [], 0.0, 10.0).min is None


def test_of_two_values_at_one_time_the_later_stands():
    assert time_min([0.0, 0.0], [0.0, 3.0], 0.0, 1.0) == 3.0
