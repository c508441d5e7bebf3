"""What a planned window can see, and how long it must be to see what the hypothesis speaks of.

Minimum detectable effect at a fixed horizon: (z_{1−α} + z_{1−β}) · SE*, one-sided (2.49 · SE* at 5 % / 80 %), SE* the
standard error of during − baseline from a moving-block bootstrap of the baseline, resampled to the planned length.

A proportion with hardly any bad request in its baseline has no SE to speak of. There the rule is exact:
the fewest bad requests that Fisher's test would find too many, and the smallest true rate that brings so
many with the wanted power (Clopper & Pearson's bound turned round). All of it on effective sample sizes n / τ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.judgement._special import beta_quantile, fisher_tail, normal_quantile
from mlchaos_dagster.judgement.autocorrelation import FloatArray, as_series, block_length, integrated_time
from mlchaos_dagster.judgement.effects import FEW_BLOCKS, resampled_means, resampled_quantiles, widening

FEW_BAD = 10.0
"""Below so many independent bad samples in a baseline its proportion is planned by the exact rule."""
_RESAMPLES = 500
_CELLS = 50_000_000


@dataclass(frozen=True)
class Detectable:
    """The smallest worsening a planned window would find with the wanted power."""

    effect: float
    """Proportions 0 to 1, latencies in seconds; infinite when no effect could be seen."""
    se: float | None
    """Standard error of during − baseline; None under the exact rule."""
    n_baseline: int
    n_window: int
    tau: float
    alpha: float
    power: float
    method: str
    """`block-bootstrap` or `exact`."""
    reliable: bool
    why: str


@dataclass(frozen=True)
class Needed:
    """How long window and baseline must be to find a given worsening."""

    window_s: float
    """Infinite when no length up to the limit would do."""
    baseline_s: float
    n_window: int
    n_baseline: int
    effect: float
    reliable: bool
    why: str


def detectable_proportion(
    baseline_bad: npt.NDArray[Any],
    n_window: int,
    *,
    seed: int,
    n_baseline: int | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Detectable:
    """The smallest rise of a bad share (drop of availability) that a window of `n_window` requests would find.

    Args:
        baseline_bad: shape (n,), 0/1 in time order: `~requests.ok` of a baseline already seen.
        n_window: requests in the planned window.
        seed: of the resampling.
        n_baseline: requests in the planned baseline; default as many as seen.
        alpha: false-alarm probability, one-sided.
        power: probability of finding it.

    Raises:
        ValueError: nothing seen, nothing planned, or values other than 0 and 1.
    """
    x, n0 = _planned(baseline_bad, n_window, n_baseline)
    if not ((x == 0) | (x == 1)).all():
        raise ValueError("a proportion is made of 0 and 1")
    tau, share = integrated_time(x), float(x.mean())
    if share * len(x) / tau < FEW_BAD or share == 1.0:
        effect = _exact_rise(share, n0 / tau, n_window / tau, alpha, power)
        why = "" if math.isfinite(effect) else f"{n_window} requests are too few to show any rise"
        return Detectable(effect, None, n0, n_window, tau, alpha, power, "exact", not why, why)
    se0, se1 = _standard_errors(x, None, tau, n0, n_window, seed)
    effect = _rise(share, se0, se1, alpha, power)
    why = _doubts(x, tau)
    return Detectable(effect, math.hypot(se0, se1), n0, n_window, tau, alpha, power, "block-bootstrap", not why, why)


def detectable_shift(
    baseline: npt.NDArray[Any],
    n_window: int,
    *,
    seed: int,
    q: float | None = None,
    n_baseline: int | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Detectable:
    """The smallest rise of a mean (q None) or of the observed `q` quantile that a planned window would find.

    Args:
        baseline: shape (n,), in time order; finite for a mean, may hold +inf for a quantile.
        n_window: samples in the planned window.
        seed: of the resampling.
        q: which quantile; None for the mean.
        n_baseline: samples in the planned baseline; default as many as seen.
        alpha: false-alarm probability, one-sided.
        power: probability of finding it.

    Raises:
        ValueError: nothing seen, nothing planned, a NaN, or an infinite value under a mean.
    """
    x, n0 = _planned(baseline, n_window, n_baseline)
    tau = _tau(x, q)
    se = math.hypot(*_standard_errors(x, q, tau, n0, n_window, seed))
    why = _doubts(x, tau)
    if not math.isfinite(se):
        se, why = math.inf, "the baseline's quantile lies among failed requests"
    elif se == 0.0:
        why = "all values of the baseline are equal: any change would show, but that is no estimate"
    effect = (normal_quantile(1.0 - alpha) + normal_quantile(power)) * se
    return Detectable(effect, se, n0, n_window, tau, alpha, power, "block-bootstrap", not why, why)


def needed_for_proportion(
    baseline_bad: npt.NDArray[Any],
    effect: float,
    *,
    rate_per_s: float,
    seed: int,
    baseline_ratio: float = 1.0,
    alpha: float = 0.05,
    power: float = 0.8,
    limit_s: float = 86_400.0,
) -> Needed:
    """How long a window must be to find a rise of the bad share by `effect`.

    Args:
        baseline_bad: as in :func:`detectable_proportion`.
        effect: the rise to be seen, 0 to 1.
        rate_per_s: requests per second.
        seed: of the resampling.
        baseline_ratio: planned baseline length / window length.
        alpha: false-alarm probability, one-sided.
        power: probability of finding it.
        limit_s: give up beyond this.

    Raises:
        ValueError: an effect, a rate or a ratio that is not positive.
    """
    x = as_series(baseline_bad)
    _check_needed(x, effect, rate_per_s, baseline_ratio)
    tau, share = integrated_time(x), float(x.mean())
    exact = share * len(x) / tau < FEW_BAD
    unit = 0.0 if exact else _standard_errors(x, None, tau, len(x), len(x), seed)[0] * math.sqrt(len(x))

    def seen(n: int) -> float:
        n0 = max(1, round(n * baseline_ratio))
        if exact:
            return _exact_rise(share, n0 / tau, n / tau, alpha, power)
        return _rise(share, unit / math.sqrt(n0), unit / math.sqrt(n), alpha, power)

    most = math.ceil(limit_s * rate_per_s)
    low, high = 0, 1
    while high < most and seen(high) > effect:
        low, high = high, min(2 * high, most)
    if seen(high) > effect:
        return _never(effect, limit_s)
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if seen(middle) <= effect else (middle, high)
    return _needed(high, effect, rate_per_s, baseline_ratio, "" if exact else _doubts(x, tau))


def needed_for_shift(
    baseline: npt.NDArray[Any],
    effect: float,
    *,
    rate_per_s: float,
    seed: int,
    q: float | None = None,
    baseline_ratio: float = 1.0,
    alpha: float = 0.05,
    power: float = 0.8,
    limit_s: float = 86_400.0,
) -> Needed:
    """How long a window must be to find a rise of a mean (q None) or quantile by `effect` (seconds).

    The standard error falls with the root of the length: n = (σ z / effect)² (1 + 1 / baseline_ratio).

    Raises:
        ValueError: as :func:`needed_for_proportion` and :func:`detectable_shift`.
    """
    x = as_series(baseline)
    _check_needed(x, effect, rate_per_s, baseline_ratio)
    tau = _tau(x, q)
    unit = _standard_errors(x, q, tau, len(x), len(x), seed)[0] * math.sqrt(len(x))
    z = normal_quantile(1.0 - alpha) + normal_quantile(power)
    exactly = (unit * z / effect) ** 2 * (1.0 + 1.0 / baseline_ratio)
    if not exactly <= limit_s * rate_per_s:
        return _never(effect, limit_s)
    # No quantile is seen without samples beyond it, no mean without a few blocks.
    least = FEW_BLOCKS * tau / (min(q, 1.0 - q) if q else 1.0)
    return _needed(math.ceil(max(exactly, least)), effect, rate_per_s, baseline_ratio, _doubts(x, tau))


def _rise(share: float, se0: float, se1: float, alpha: float, power: float) -> float:
    """(z_{1−α} SE₀ + z_{1−β} SE₁), where under the effect the window's SE is that of the risen share."""
    z_alpha, z_beta = normal_quantile(1.0 - alpha), normal_quantile(power)
    rise = (z_alpha + z_beta) * math.hypot(se0, se1)
    for _ in range(50):
        risen = min(1.0, share + rise)
        scale = math.sqrt(max(risen * (1.0 - risen), 0.0) / (share * (1.0 - share)))
        rise = z_alpha * math.hypot(se0, se1) + z_beta * math.hypot(se0, se1 * scale)
    return rise if share + rise <= 1.0 else math.inf


def _exact_rise(share: float, n0: float, n1: float, alpha: float, power: float) -> float:
    """The smallest rise found with `power` by Fisher's exact test, the baseline's bad count being as expected."""
    size0, size1 = max(1, round(n0)), max(1, round(n1))
    bad0 = round(share * size0)
    if fisher_tail(size1, size1, bad0, size0) > alpha:
        return math.inf
    low, high = -1, size1  # found at `high`, not at `low`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fisher_tail(middle, size1, bad0, size0) <= alpha else (middle, high)
    risen = 1.0 if high > size1 else beta_quantile(power, high, size1 - high + 1.0)
    return max(0.0, risen - share)


def _standard_errors(x: FloatArray, q: float | None, tau: float, n0: int, n1: int, seed: int) -> tuple[float, float]:
    """Standard errors of the statistic at the two planned lengths, block-bootstrapped from what was seen."""
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for length in (n0, n1):
        # More samples than were seen add nothing to the shape: the error then falls with the root.
        size = min(length, len(x))
        block = block_length(size, tau)
        if q is None:
            drawn = resampled_means(x, size, block, _RESAMPLES, rng)
        else:
            drawn = resampled_quantiles(x, q, size, block, max(100, min(_RESAMPLES, _CELLS // size)), rng)
        spread = float(drawn.std()) if np.isfinite(drawn).all() else math.nan
        found.append(spread * widening(size, tau, block) * math.sqrt(size / length))
    return found[0], found[1]


def _tau(x: FloatArray, q: float | None) -> float:
    return integrated_time(x) if q is None else integrated_time(x > np.quantile(x, q, method="inverted_cdf"))


def _planned(baseline: npt.NDArray[Any], n_window: int, n_baseline: int | None) -> tuple[FloatArray, int]:
    x = as_series(baseline)
    n0 = len(x) if n_baseline is None else n_baseline
    if len(x) < 2 or n_window < 1 or n0 < 1:
        raise ValueError("a plan needs at least 2 samples seen and at least 1 planned on each side")
    return x, n0


def _check_needed(x: FloatArray, effect: float, rate_per_s: float, baseline_ratio: float) -> None:
    if len(x) < 2 or not (effect > 0.0 and rate_per_s > 0.0 and baseline_ratio > 0.0):
        raise ValueError("a plan needs at least 2 samples seen, and an effect, a rate and a ratio above 0")


def _doubts(x: FloatArray, tau: float) -> str:
    needed = FEW_BLOCKS * block_length(len(x), tau)
    if len(x) >= needed:
        return ""
    return f"planned from {len(x)} samples worth {len(x) / tau:.0f} independent ones; {needed} would do"


def _needed(n: int, effect: float, rate_per_s: float, ratio: float, why: str) -> Needed:
    n0 = max(1, math.ceil(n * ratio))
    return Needed(n / rate_per_s, n0 / rate_per_s, n, n0, effect, not why, why)


def _never(effect: float, limit_s: float) -> Needed:
    return Needed(math.inf, math.inf, 0, 0, effect, False, f"no window up to {limit_s:g} s would show it")
