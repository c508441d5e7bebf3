"""Golden predictions and prediction shift against truths computed elsewhere: by hand, by scipy, by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlchaos_dagster.judgement.census import Requests, measure
from mlchaos_dagster.judgement.recovery import allowance
from mlchaos_dagster.judgement.shift import (
    FEWEST_VALUES,
    Reference,
    kolmogorov_smirnov,
    population_stability,
)

pytestmark = pytest.mark.req("RX-03")
ITEMS = 100
TRUTH = np.random.default_rng(7).beta(2, 5, ITEMS)


def requests(items: Any, values: Any, *, start: float = 0.0, ok: Any = None) -> Requests:
    items = np.asarray(items)
    due = start + 0.01 * np.arange(len(items))
    good = np.ones(len(items), dtype=bool) if ok is None else ok
    return Requests.of(due, due + 0.005, good, item=items, value=values)


def reference(items: Any, values: Any, **kwargs: Any) -> Reference:
    baseline = requests(items, values)
    return Reference.of(baseline, 0.0, 50.0, tolerance=kwargs.pop("tolerance", 1e-6), **kwargs)


def healthy(times: int = 2) -> Reference:
    items = np.arange(ITEMS * times) % ITEMS
    return reference(items, TRUTH[items])


# ---- golden predictions


def test_each_answer_is_held_against_the_golden_number_of_its_own_item() -> None:
    ref = healthy()
    items = np.arange(200) % ITEMS
    values = TRUTH[items].copy()
    values[[3, 17, 150]] += 0.2
    seen = ref.judged(requests(items, values, start=100))
    assert int(seen.compared.sum()) == 200
    assert np.flatnonzero(seen.wrong).tolist() == [3, 17, 150]
    assert measure("golden_error_rate", seen) == 3 / 200
    facts = ref.facts(seen)
    assert (facts.compared, facts.wrong, facts.without_number, facts.first_item) == (200, 3, 0, 3)
    assert facts.first_value == pytest.approx(TRUTH[3] + 0.2) and facts.first_golden == TRUTH[3]


def test_the_tolerance_is_the_largest_difference_that_is_no_error() -> None:
    ref = reference([0, 1], [0.5, 0.25], tolerance=0.125)
    seen = ref.judged(requests([0, 0, 1, 1], [0.625, 0.6251, 0.125, 0.1249], start=100))
    assert seen.wrong.tolist() == [False, True, False, True]


def test_an_answer_without_a_number_is_wrong_and_a_failed_request_is_not_compared() -> None:
    ref = healthy()
    seen = ref.judged(
        requests([0, 1, 2, 9999], [math.nan, TRUTH[1], 0.9, math.nan], start=100, ok=[True, True, False, True])
    )
    assert seen.compared.tolist() == [True, True, False, True]
    assert seen.wrong.tolist() == [True, False, False, True]
    assert ref.facts(seen).without_number == 2


def test_an_item_that_the_baseline_never_answered_is_unknown_not_right() -> None:
    seen = healthy().judged(requests([9999] * 5, [0.3] * 5, start=100))
    assert not seen.compared.any() and measure("golden_error_rate", seen) is None


def test_items_whose_baseline_disagrees_are_left_out_of_the_window_and_counted_in_the_baseline() -> None:
    items = np.tile(np.arange(10), 5)
    values = TRUTH[items].copy()
    values[4] = 0.99  # item 4: 1 of 5 answers differs
    values[[7, 17]] = 0.98  # item 7: 2 of 5
    ref = reference(items, values)
    facts = ref.facts(None)
    assert facts.unstable == (4, 7) and facts.items == 8
    # The minority that disagrees with the median is what the baseline had wrong.
    assert measure("golden_error_rate", ref.judged(requests(items, values))) == pytest.approx(3 / 50)
    later = ref.judged(requests(np.arange(10), np.full(10, 0.5), start=100))
    assert np.flatnonzero(~later.compared).tolist() == [4, 7]
    assert measure("golden_error_rate", later) == 1.0


def test_of_two_answers_that_disagree_one_is_golden() -> None:
    ref = reference([0, 0], [0.2, 0.8])
    assert measure("golden_error_rate", ref.judged(requests([0, 0], [0.2, 0.8]))) == 0.5


def test_declared_golden_numbers_judge_the_baseline_too() -> None:
    ref = reference([0, 1, 2], [0.1, 0.2, 0.7], declared=(0.1, 0.2, 0.3))
    assert measure("golden_error_rate", ref.judged(requests([0, 1, 2], [0.1, 0.2, 0.7]))) == pytest.approx(1 / 3)
    assert ref.facts(None).declared and ref.facts(None).items == 3


def test_a_probe_without_bodies_asks_one_thing() -> None:
    ref = reference([-1] * 60, [0.5] * 60)
    seen = ref.judged(requests([-1] * 60, [0.5] * 59 + [0.6], start=100))
    assert measure("golden_error_rate", seen) == pytest.approx(1 / 60)
    assert reference([-1], [0.5], declared=(0.5,)).judged(requests([-1], [0.4], start=100)).wrong.tolist() == [True]


def test_the_digest_names_the_golden_numbers() -> None:
    assert healthy().digest == healthy(3).digest
    noisy = np.tile(TRUTH, 2) + 1e-10
    items = np.arange(2 * ITEMS) % ITEMS
    other = np.tile(TRUTH, 2)
    other[[5, 105]] += 0.01
    assert reference(items, noisy, tolerance=1e-3).digest == reference(items, np.tile(TRUTH, 2), tolerance=1e-3).digest
    assert reference(items, other).digest != healthy().digest
    assert len(healthy().digest) == 64


def test_recovery_counts_wrong_answers_among_those_that_were_compared() -> None:
    items = np.arange(200) % ITEMS
    values = np.where(np.arange(200) < 100, 0.999, TRUTH[items])
    seen = healthy().judged(requests(items, values, start=100))
    slo = allowance("golden_error_rate", seen, at_most=0.005)
    assert slo.bad.sum() == 100 and slo.among is not None and slo.among.all()
    with pytest.raises(ValueError, match="request by request"):
        allowance("golden_error_rate", seen, at_least=0.5)


# ---- population stability index


def test_index_of_known_histograms() -> None:
    # By hand: 0.1 · ln(0.6/0.5) − 0.1 · ln(0.4/0.5).
    assert population_stability([0.5, 0.5], [0.6, 0.4], smooth=0) == pytest.approx(0.0405465108, abs=1e-9)
    # Ten deciles of which one takes over half of another's: 0.05 · ln(0.15/0.1) − 0.05 · ln(0.05/0.1).
    now = [0.15, 0.05, *[0.1] * 8]
    assert population_stability([0.1] * 10, now, smooth=0) == pytest.approx(0.05 * math.log(3), abs=1e-12)
    assert population_stability([10, 20], [10, 20]) == 0.0
    assert population_stability([7, 3], [3, 7]) == population_stability([3, 7], [7, 3])
    assert math.isfinite(population_stability([100, 0], [0, 100]))


def test_index_of_two_samples_of_one_distribution_is_as_large_as_chance_makes_it() -> None:
    rng = np.random.default_rng(3)
    n, m, bins = 2000, 1000, 10
    found = [
        population_stability(rng.multinomial(n, [0.1] * bins), rng.multinomial(m, [0.1] * bins)) for _ in range(400)
    ]
    assert np.mean(found) == pytest.approx((bins - 1) * (1 / n + 1 / m), rel=0.1)


@pytest.mark.parametrize("sides", [([1, 2], [1, 2, 3]), ([], [])])
def test_index_needs_two_histograms_over_the_same_bins(sides: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="same bins"):
        population_stability(*sides)


@pytest.mark.parametrize("first", [0, 13, 77])
def test_an_unchanged_service_is_at_distance_zero_in_any_window(first: int) -> None:
    """Other items than the baseline's average are no shift: 60 neighbouring items have other deciles than all 100."""
    items = (first + np.arange(60)) % ITEMS
    shift = healthy().shift(requests(items, TRUTH[items], start=100))
    assert (shift.psi, shift.ks, shift.values, shift.items) == (0.0, 0.0, 60, 60)


def test_noise_within_the_tolerance_is_no_shift() -> None:
    items = np.arange(ITEMS)
    constant = reference(items, np.full(ITEMS, 0.5))
    shift = constant.shift(requests(items, np.full(ITEMS, 0.5 - 1e-9), start=100))
    assert (shift.psi, shift.ks) == (0.0, 0.0)


@pytest.mark.parametrize("now", [0.2, 0.8])
def test_a_service_that_always_said_the_same_and_now_says_something_else_has_moved(now: float) -> None:
    items = np.arange(ITEMS)
    shift = reference(items, np.full(ITEMS, 0.5)).shift(requests(items, np.full(ITEMS, now), start=100))
    assert shift.psi is not None and shift.psi > 1 and shift.ks == 1.0


def test_a_shifted_service_is_seen_and_by_how_much() -> None:
    items = np.arange(500) % ITEMS
    moved = np.clip(TRUTH[items] + 0.15, 0, 1)
    shift = healthy().shift(requests(items, moved, start=100))
    deciles = np.quantile(np.tile(TRUTH, 2), np.arange(1, 10) / 10, method="inverted_cdf")
    counts = [np.bincount(np.searchsorted(deciles, v), minlength=10) for v in (TRUTH[items], moved)]
    assert shift.psi == pytest.approx(population_stability(*counts), abs=1e-12)
    assert shift.psi > 0.25 and shift.items == ITEMS
    assert shift.mean_now == pytest.approx(moved.mean()) and shift.mean_before == pytest.approx(TRUTH.mean())


def test_an_item_that_scatters_keeps_its_scatter() -> None:
    rng = np.random.default_rng(5)
    ref = reference([-1] * 1000, rng.normal(size=1000))
    same, wider = (ref.shift(requests([-1] * 1000, s * rng.normal(size=1000), start=100)) for s in (1.0, 2.0))
    assert same.psi is not None and wider.psi is not None and same.psi < 0.05 < 0.25 < wider.psi


def test_too_few_numbers_are_no_distance() -> None:
    items = np.arange(FEWEST_VALUES)
    ref = healthy()
    assert ref.shift(requests(items, TRUTH[items], start=100)).psi == 0.0
    few = ref.shift(requests(items[:-1], TRUTH[items[:-1]], start=100))
    assert few.psi is None and few.ks is None and few.values == FEWEST_VALUES - 1
    assert ref.shift(requests(items, np.full(len(items), math.nan), start=100)).psi is None
    assert reference([], []).shift(requests(items, TRUTH[items], start=100)).psi is None


# ---- Kolmogorov-Smirnov


def test_distance_equals_scipys() -> None:
    from scipy.stats import ks_2samp  # pyright: ignore[reportMissingTypeStubs]

    rng = np.random.default_rng(11)
    for n, m in ((50, 50), (60, 333), (1000, 1)):
        for draw in (rng.normal, lambda size: rng.integers(0, 4, size).astype(float)):
            x, y = draw(size=n), draw(size=m) + 0.3
            expected = ks_2samp(x, y, method="asymp").statistic
            assert kolmogorov_smirnov(x, y) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="both sides"):
        kolmogorov_smirnov(np.empty(0), np.ones(3))
