"""Integrated autocorrelation time against series whose τ is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from mlchaos_dagster.judgement.autocorrelation import batch_length, block_length, effective_size, integrated_time


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.9])
def test_tau_of_ar1_is_one_plus_rho_over_one_minus_rho(ar1, rho):
    rng = np.random.default_rng(7)
    found = np.mean([integrated_time(ar1(rng, 5_000, rho)) for _ in range(12)])
    assert found == pytest.approx((1 + rho) / (1 - rho), rel=0.15)


def test_tau_of_a_sticky_coin(sticky):
    rng = np.random.default_rng(8)
    found = np.mean([integrated_time(sticky(rng, 5_000, 0.1, 0.8)) for _ in range(20)])
    assert found == pytest.approx(9.0, rel=0.15)


def test_tau_is_never_below_one_and_the_same_at_any_scale():
    alternating = np.tile([0.0, 1.0], 100)
    assert integrated_time(alternating) == 1.0
    x = np.cumsum(np.random.default_rng(0).standard_normal(300))
    assert integrated_time(x) == pytest.approx(integrated_time(1e-300 * x + 0.0))
    assert integrated_time(x) > 20


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
def test_a_series_that_cannot_tell_has_tau_one(values):
    assert integrated_time(np.array(values)) == 1.0


@pytest.mark.parametrize("values", [[1.0, np.nan], [1.0, np.inf, 2.0, 3.0], [[1.0, 2.0]]])
def test_gaps_and_infinities_are_refused(values):
    with pytest.raises(ValueError, match="NaN|finite|dimension"):
        integrated_time(np.array(values))


def test_block_length_is_at_least_tau_and_the_cube_root_of_n():
    assert block_length(1_000, 1.0) == 10
    assert block_length(1_000, 40.0) >= 40
    # Politis & White's optimum for AR(1), ρ = 0.8, n = 3,000: (1.5 (2ρ/(1−ρ²))² n)^(1/3) = 44.6
    assert block_length(3_000, 9.0) == 45
    assert block_length(5, 100.0) == 5
    assert block_length(0, 1.0) == 1


def test_effective_size_and_batches():
    assert effective_size(900, 9.0) == 100.0
    assert batch_length(1.0) == 1
    assert batch_length(9.0) == 27
    assert batch_length(1.0, minimum=25) == 25
