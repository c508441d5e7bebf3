"""Effects: coverage against simulated truth, exact where resampling knows nothing, honest about short windows."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlchaos_dagster.judgement.effects import (
    clopper_pearson,
    mean_effect,
    proportion_effect,
    quantile_effect,
    resampled_means,
    resampled_quantiles,
    widening,
)

RUNS = 250


def covered(effects, truth=0.0):
    return float(np.mean([e.ci_low <= truth <= e.ci_high for e in effects]))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_the_interval_of_a_mean_covers_the_truth_on_ar1(ar1, rho):
    rng = np.random.default_rng(int(10 * rho))
    effects = [mean_effect(ar1(rng, 600, rho), 1.0 + ar1(rng, 600, rho), seed=i, resamples=400) for i in range(RUNS)]
    assert 0.91 <= covered(effects, 1.0) <= 0.995


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_the_interval_of_a_proportion_covers_the_truth_on_a_sticky_coin(sticky, rho):
    rng = np.random.default_rng(20 + int(10 * rho))
    effects = [
        proportion_effect(sticky(rng, 800, 0.95, rho), sticky(rng, 800, 0.9, rho), seed=i, resamples=400)
        for i in range(RUNS)
    ]
    assert 0.91 <= covered(effects, -0.05) <= 0.995


def test_the_interval_of_a_p95_covers_the_truth(ar1):
    rng = np.random.default_rng(3)
    effects = [
        quantile_effect(np.exp(ar1(rng, 600, 0.5)), np.exp(ar1(rng, 600, 0.5)), 0.95, seed=i, resamples=400)
        for i in range(RUNS)
    ]
    assert 0.91 <= covered(effects) <= 0.995


def test_treating_samples_as_independent_would_not_cover(ar1):
    """The test above can fail: with blocks of one sample the same data are covered in half the cases."""
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(150):
        x, y = ar1(rng, 600, 0.8), ar1(rng, 600, 0.8)
        drawn = resampled_means(y, 600, 1, 300, rng) - resampled_means(x, 600, 1, 300, rng)
        low, high = np.quantile(drawn, [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 150 < 0.75


def test_all_success_is_no_certainty():
    good = np.ones(500, dtype=bool)
    effect = proportion_effect(good, good, seed=1)
    assert effect.effect == 0.0
    # Clopper-Pearson for 0 of 500 is [0, 1 − 0.025^(1/500)] = [0, 0.00735]
    assert (effect.ci_low, effect.ci_high) == pytest.approx((-0.00735, 0.00735), abs=1e-5)
    assert effect.method == "exact"


def test_an_outage_after_a_flawless_baseline():
    during = np.ones(500, dtype=bool)
    during[::10] = False
    effect = proportion_effect(np.ones(500, dtype=bool), during, seed=1)
    assert effect.effect == pytest.approx(-0.1)
    assert -0.14 < effect.ci_low < effect.effect < effect.ci_high < -0.06
    assert effect.excludes_zero


def test_both_windows_widen_the_exact_interval():
    """0 of 20 is [0, 0.1684] and 1 of 29 [0.0009, 0.1776] (Newcombe's table): combined by Newcombe's method 10."""
    during = np.zeros(29)
    during[14] = 1
    effect = proportion_effect(np.zeros(20), during, seed=1)
    p = 1 / 29
    assert effect.ci_low == pytest.approx(p - math.hypot(p - 0.0009, 0.1684), abs=2e-4)
    assert effect.ci_high == pytest.approx(p + (0.1776 - p), abs=2e-4)


def test_the_exact_interval_covers_rare_failures():
    rng = np.random.default_rng(5)
    effects = [proportion_effect(rng.random(500) < 0.998, rng.random(500) < 0.996, seed=i) for i in range(300)]
    assert {e.method for e in effects} == {"exact"}
    assert covered(effects, -0.002) >= 0.94


@pytest.mark.parametrize(
    ("events", "n", "low", "high"),
    # Newcombe (Statistics in Medicine 1998, 17:857), Table I: Clopper-Pearson ("exact").
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_clopper_pearson_gives_the_published_limits(events, n, low, high):
    assert clopper_pearson(events, n) == pytest.approx((low, high), abs=6e-5)


def test_a_window_too_short_for_its_autocorrelation_says_so(ar1):
    rng = np.random.default_rng(2)
    effect = mean_effect(ar1(rng, 2_000, 0.0), ar1(rng, 60, 0.97), seed=1)
    assert not effect.reliable
    assert "window is too short" in effect.why
    assert "baseline" not in effect.why


def test_a_quantile_without_samples_beyond_it_says_so():
    x = np.random.default_rng(2).random(100)
    effect = quantile_effect(x, x, 0.99, seed=1)
    assert not effect.reliable
    assert "p99" in effect.why


def test_a_p95_among_failures_is_infinitely_worse():
    rng = np.random.default_rng(4)
    before, after = rng.random(500), rng.random(500)
    after[rng.random(500) < 0.2] = np.inf
    effect = quantile_effect(before, after, 0.95, seed=1)
    assert effect.effect == effect.ci_high == effect.ci_low == math.inf
    both = quantile_effect(after, after, 0.95, seed=1)
    assert math.isnan(both.effect)
    assert (both.ci_low, both.ci_high) == (-math.inf, math.inf)
    assert not both.reliable


def test_an_infinite_mean_has_no_interval():
    effect = mean_effect(np.array([0.1, 0.2]), np.array([0.1, np.inf]), seed=1)
    assert effect.effect == math.inf
    assert (effect.ci_low, effect.reliable) == (-math.inf, False)
    assert "penalty" in effect.why


def test_equal_values_are_no_evidence():
    effect = mean_effect(np.full(500, 0.03), np.full(500, 0.03), seed=1)
    assert not effect.reliable
    assert "equal" in effect.why


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(1).random(700)
    for call in (
        lambda seed: mean_effect(x, x[::-1], seed=seed),
        lambda seed: quantile_effect(x, x[::-1], 0.9, seed=seed),
        lambda seed: proportion_effect(x > 0.2, x > 0.3, seed=seed),
    ):
        assert call(11) == call(11)
        assert call(11) != call(12)


def test_ten_minutes_at_200_per_second_stay_within_memory():
    x = np.random.default_rng(1).lognormal(-3, 0.4, 120_000)
    tracemalloc.start()
    effect = quantile_effect(x, x, 0.95, seed=1)
    mean_effect(x, x, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 400 <= effect.resamples < 2000
    assert peak < 150e6


def test_resamples_are_blocks_of_what_was_seen():
    """Block sums and gathered blocks are the same resample: a block as long as the series is the series."""
    x = np.arange(100.0)
    rng = np.random.default_rng(1)
    assert resampled_means(x, 100, 100, 5, rng) == pytest.approx(np.full(5, 49.5))
    assert resampled_quantiles(x, 0.95, 100, 100, 5, rng).tolist() == [94.0] * 5
    assert resampled_means(x, 1_000, 7, 2_000, rng).mean() == pytest.approx(49.5, abs=1.0)


def test_widening_shrinks_to_one_with_data():
    assert widening(10**9, 1.0, 1_000) == pytest.approx(1.0, abs=1e-4)
    assert widening(500, 9.0, 25) > 1.1


@pytest.mark.parametrize("call", [proportion_effect, mean_effect])
def test_empty_windows_are_refused(call):
    with pytest.raises(ValueError, match="both windows"):
        call(np.array([]), np.array([1.0]), seed=1)


def test_a_proportion_is_made_of_zero_and_one():
    with pytest.raises(ValueError, match="0 and 1"):
        proportion_effect(np.array([0.5]), np.array([1.0]), seed=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile_effect(np.array([0.5]), np.array([1.0]), 1.0, seed=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=80),
    st.lists(st.booleans(), min_size=1, max_size=80),
    st.integers(0, 2**32),
)
def test_a_proportions_interval_holds_its_estimate_and_has_width(before, during, seed):
    effect = proportion_effect(np.array(before), np.array(during), seed=seed, resamples=200)
    assert -1.0 <= effect.ci_low <= effect.effect + 1e-9
    assert effect.effect - 1e-9 <= effect.ci_high <= 1.0
    assert effect.ci_high > effect.ci_low
