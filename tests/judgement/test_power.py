"""Plans are kept: what is called detectable is found in about the promised share of simulated windows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlchaos_dagster.judgement._special import fisher_tail, normal_quantile
from mlchaos_dagster.judgement.power import (
    detectable_proportion,
    detectable_shift,
    needed_for_proportion,
    needed_for_shift,
)


def test_a_mean_matches_the_closed_form():
    x = np.random.default_rng(1).standard_normal(20_000)
    found = detectable_shift(x, 400, n_baseline=800, seed=1)
    z = normal_quantile(0.95) + normal_quantile(0.8)
    assert z == pytest.approx(2.486, abs=1e-3)
    assert found.effect == pytest.approx(z * math.sqrt(1 / 400 + 1 / 800), rel=0.15)
    assert found.reliable


def test_autocorrelation_costs_its_root(ar1):
    rng = np.random.default_rng(2)
    alone = detectable_shift(ar1(rng, 4_000, 0.0), 1_000, seed=1).effect
    shared = detectable_shift(ar1(rng, 4_000, 0.8), 1_000, seed=1).effect
    assert shared / alone == pytest.approx(3.0, rel=0.25)


def test_what_is_called_detectable_is_found_in_about_80_percent(ar1):
    rng = np.random.default_rng(3)
    found = 0
    for i in range(120):
        baseline = ar1(rng, 1_000, 0.5)
        plan = detectable_shift(baseline, 800, seed=i)
        during = ar1(rng, 800, 0.5) + plan.effect
        found += (during.mean() - baseline.mean()) > normal_quantile(0.95) * plan.se
    assert 0.68 <= found / 120 <= 0.92


def test_no_failure_seen_is_planned_exactly():
    found = detectable_proportion(np.zeros(500), 500, seed=1)
    # Fisher: 0 of 500 against 5 of 500 gives p = 0.031, 4 gives 0.062. P(Bin(500, p) ≥ 5) = 0.8 at p = 0.01342.
    assert fisher_tail(5, 500, 0, 500) == pytest.approx(0.0308, abs=2e-4)
    assert fisher_tail(4, 500, 0, 500) > 0.05
    assert found.method == "exact"
    assert found.effect == pytest.approx(0.01342, abs=2e-4)
    rng = np.random.default_rng(1)
    assert np.mean(rng.binomial(500, found.effect, 20_000) >= 5) == pytest.approx(0.8, abs=0.01)


def test_fisher_agrees_with_scipy():
    from scipy.stats import fisher_exact

    for table in ([[7, 93], [2, 98]], [[3, 20], [0, 40]]):
        (a, b), (c, d) = table
        assert fisher_tail(a, a + b, c, c + d) == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


def test_a_window_too_short_to_show_anything_says_so():
    found = detectable_proportion(np.zeros(500), 2, n_baseline=3, seed=1)
    assert found.effect == math.inf
    assert not found.reliable


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05])
def test_longer_windows_see_less_and_the_inverse_agrees(share):
    bad = np.random.default_rng(4).random(2_000) < share
    effects = [detectable_proportion(bad, n, n_baseline=n, seed=1).effect for n in (200, 800, 3_200)]
    assert effects[0] > effects[1] > effects[2]
    need = needed_for_proportion(bad, 0.02, rate_per_s=50.0, seed=1)
    assert need.n_window == pytest.approx(need.window_s * 50.0)
    check = detectable_proportion(bad, need.n_window, n_baseline=need.n_baseline, seed=1)
    assert check.effect == pytest.approx(0.02, rel=0.2)


def test_the_drop_is_planned_with_the_variance_it_will_have():
    """From 1 % bad a rise to 5 % quintuples the variance: ignoring it would promise too much."""
    bad = np.zeros(3_000)
    bad[::100] = 1
    plan = detectable_proportion(bad, 300, seed=1)
    assert plan.method == "block-bootstrap"
    assert plan.effect > 1.05 * (normal_quantile(0.95) + normal_quantile(0.8)) * plan.se


def test_a_window_longer_than_what_was_seen_falls_with_the_root():
    x = np.random.default_rng(7).standard_normal(1_000)
    seen = detectable_shift(x, 1_000, n_baseline=1_000, seed=1).effect
    longer = detectable_shift(x, 16_000, n_baseline=16_000, seed=1).effect
    assert seen / longer == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("q", [None, 0.95])
def test_needed_for_a_shift_is_the_inverse(q):
    x = np.random.default_rng(5).lognormal(math.log(0.03), 0.3, 3_000)
    need = needed_for_shift(x, 0.004, rate_per_s=100.0, seed=1, q=q)
    check = detectable_shift(x, need.n_window, n_baseline=need.n_baseline, seed=1, q=q)
    assert check.effect <= 0.004 * 1.25
    if q is not None:
        assert check.effect == pytest.approx(0.004, rel=0.3)


def test_never_is_said():
    noisy = np.random.default_rng(6).random(500)
    need = needed_for_shift(noisy, 1e-9, rate_per_s=1.0, seed=1)
    assert (need.window_s, need.reliable) == (math.inf, False)
    assert needed_for_proportion(np.zeros(50), 1e-7, rate_per_s=1.0, seed=1).window_s == math.inf


def test_a_baseline_among_failures_cannot_be_planned_from():
    x = np.full(200, np.inf)
    x[:100] = 0.1
    assert detectable_shift(x, 100, q=0.95, seed=1).effect == math.inf


@pytest.mark.parametrize("bad", [np.array([0.5, 0.5]), np.array([0.0])])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match="0 and 1|at least 2"):
        detectable_proportion(bad, 10, seed=1)
    with pytest.raises(ValueError, match="above 0|at least 2"):
        needed_for_proportion(bad, 0.0, rate_per_s=1.0, seed=1)
