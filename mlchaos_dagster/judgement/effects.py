"""By how much a window is worse than the baseline, and how surely.

Effect = during − baseline, of a proportion, a mean or a quantile, with an interval that knows that
neighbouring requests share their fate: a moving-block bootstrap (Künsch 1989), percentile interval,
widened by the two shortfalls of blocks that are known in closed form (:func:`widening`).

Where a proportion has next to no events in a window (all requests succeeded), resampling it gives
the same value for ever, a certainty nobody has. Then each window's interval is exact (Clopper & Pearson
1934) on its effective sample size, and the two are combined as Newcombe does (Statistics in Medicine
1998, method 10; Zou & Donner's MOVER): 500 of 500 good, twice, is 0 ± 0.7 percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.judgement._special import beta_quantile, normal_quantile
from mlchaos_dagster.judgement.autocorrelation import FloatArray, as_series, block_length, integrated_time
from mlchaos_dagster.judgement.census import quantile_rank

FEW_EVENTS = 5.0
"""Below so many independent events on either side a proportion's bootstrap is not trusted."""
FEW_BLOCKS = 10
"""Below so many blocks a window is too short for its own autocorrelation."""
_CELLS = 2_000_000
"""Array cells held at once while resampling (16 MB of floats)."""
_WORK = 200_000_000
"""Cells partitioned in all for a quantile's resamples: about a second; more samples, fewer resamples."""
_LEAST_RESAMPLES = 400


@dataclass(frozen=True)
class Effect:
    """during − baseline with its interval; latencies in seconds, proportions 0 to 1."""

    baseline: float
    during: float
    effect: float
    """May be infinite when a quantile lies among failed requests; NaN when it does in both windows."""
    ci_low: float
    ci_high: float
    confidence: float
    n_baseline: int
    n_during: int
    tau_baseline: float
    """Integrated autocorrelation time, in samples."""
    tau_during: float
    block: int
    """The longer of the two block lengths, in samples; 0 when nothing was resampled."""
    resamples: int
    method: str
    """`block-bootstrap`, `exact` or `none`."""
    reliable: bool
    why: str
    """Why the interval is not to be relied on, in words; empty when it is."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.ci_low > 0.0 or self.ci_high < 0.0


def proportion_effect(
    baseline: npt.NDArray[Any],
    during: npt.NDArray[Any],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Effect:
    """Difference of two shares of True (availability: `requests.ok`; error rate: `~requests.ok`).

    Args:
        baseline: shape (n,) of bool or 0/1, in time order.
        during: the same of the window.
        seed: of the resampling; equal seeds give equal results.
        confidence: of the interval.
        resamples: how many, at most.

    Raises:
        ValueError: an empty window, or a value other than 0 and 1.
    """
    x, y = _windows(baseline, during)
    if not (((x == 0) | (x == 1)).all() and ((y == 0) | (y == 1)).all()):
        raise ValueError("a proportion is made of 0 and 1")
    tau_x, tau_y = integrated_time(x), integrated_time(y)
    if min(_events(x, tau_x), _events(y, tau_y)) >= FEW_EVENTS:
        result = _bootstrap(x, y, (tau_x, tau_y), resampled_means, _mean, seed, confidence, resamples, [])
        return replace(result, ci_low=max(-1.0, result.ci_low), ci_high=min(1.0, result.ci_high))
    # A window without a single event cannot show its autocorrelation: it borrows the other's.
    tau_x, tau_y = (tau_y if np.ptp(x) == 0 else tau_x), (tau_x if np.ptp(y) == 0 else tau_y)
    p0, p1 = float(x.mean()), float(y.mean())
    low0, high0 = _exact(x, tau_x, confidence)
    low1, high1 = _exact(y, tau_y, confidence)
    d = p1 - p0
    why = _too_short(x, tau_x, "baseline", 0) + _too_short(y, tau_y, "window", 0)
    return Effect(
        baseline=p0,
        during=p1,
        effect=d,
        ci_low=max(-1.0, d - math.hypot(p1 - low1, high0 - p0)),
        ci_high=min(1.0, d + math.hypot(high1 - p1, p0 - low0)),
        confidence=confidence,
        n_baseline=len(x),
        n_during=len(y),
        tau_baseline=tau_x,
        tau_during=tau_y,
        block=0,
        resamples=0,
        method="exact",
        reliable=not why,
        why="; ".join(why),
    )


def mean_effect(
    baseline: npt.NDArray[Any],
    during: npt.NDArray[Any],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Effect:
    """Difference of two means.

    Args:
        baseline: shape (n,), in time order. An infinite value (a failed request without a penalty) makes
            the mean infinite and the interval unbounded, and the result says so.
        during: the same of the window.
        seed: of the resampling.
        confidence: of the interval.
        resamples: how many, at most.

    Raises:
        ValueError: an empty window or a NaN.
    """
    x, y = _windows(baseline, during)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        before, after = float(x.mean()), float(y.mean())
        why = "a failed request has no finite latency: give it a penalty to compare means"
        effect = after - before if math.isfinite(before) or math.isfinite(after) else math.nan
        return Effect(
            before, after, effect, -math.inf, math.inf, confidence, len(x), len(y), 1.0, 1.0, 0, 0, "none", False, why
        )
    why = [f"all {len(v)} values of the {name} are equal" for v, name in ((x, "baseline"), (y, "window"))
           if np.ptp(v) == 0]  # fmt: skip
    taus = (integrated_time(x), integrated_time(y))
    return _bootstrap(x, y, taus, resampled_means, _mean, seed, confidence, resamples, why)


def quantile_effect(
    baseline: npt.NDArray[Any],
    during: npt.NDArray[Any],
    q: float,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Effect:
    """Difference of two observed quantiles (latency: `requests.ranked_latency_s`, failures infinite).

    The block length follows the autocorrelation of "slower than the quantile", which is what a quantile
    depends on and which infinite values do not disturb.

    Args:
        baseline: shape (n,), in time order; may hold +inf.
        during: the same of the window.
        q: in (0, 1).
        seed: of the resampling.
        confidence: of the interval.
        resamples: how many, at most.

    Raises:
        ValueError: an empty window, a NaN, or q outside (0, 1).
    """
    if not 0.0 < q < 1.0:
        raise ValueError(f"a quantile lies between 0 and 1, not at {q}")
    x, y = _windows(baseline, during)

    def estimate(values: FloatArray) -> float:
        rank = quantile_rank(len(values), q)
        return float(np.partition(values, rank)[rank])

    def draw(values: FloatArray, length: int, block: int, count: int, rng: np.random.Generator) -> FloatArray:
        return resampled_quantiles(values, q, length, block, count, rng)

    taus = (integrated_time(x > estimate(x)), integrated_time(y > estimate(y)))
    why: list[str] = []
    for values, tau, name in ((x, taus[0], "baseline"), (y, taus[1], "window")):
        beyond = len(values) * min(q, 1.0 - q) / tau
        if beyond < FEW_EVENTS:
            why.append(f"only {beyond:.1f} independent samples of the {name} lie beyond its p{100 * q:g}")
    count = max(_LEAST_RESAMPLES, min(resamples, _WORK // (len(x) + len(y))))
    return _bootstrap(x, y, taus, draw, estimate, seed, confidence, min(resamples, count), why)


def clopper_pearson(events: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval for a proportion (Clopper & Pearson 1934); `events` and `n` may be effective counts, not whole."""
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if events <= 0 else beta_quantile(tail, events, n - events + 1.0)
    high = 1.0 if events >= n else beta_quantile(1.0 - tail, events + 1.0, n - events)
    return low, high


def widening(n: int, tau: float, block: int, confidence: float = 0.95) -> float:
    """By what factor a moving-block percentile interval must be widened about its estimate, at least 1.

    Blocks of length b cut the correlations between them: the resampled variance misses the share
    (τ − 1/τ) / 2b of an AR(1) series' (the bootstrap's bias: each lag k is weighted 1 − k/b). And it is itself estimated from
    n / b blocks only: Student's quantile in place of the normal one (Cornish-Fisher's first term).
    Measured on AR(1) and sticky Bernoulli series: tests/judgement/test_effects.py.
    """
    missed = min(0.75, (tau - 1.0 / tau) / (2.0 * block))
    z = normal_quantile(0.5 + confidence / 2.0)
    student = 1.0 + (z * z + 1.0) / (4.0 * max(1.0, n / block - 1.0))
    return student / math.sqrt(1.0 - missed)


def resampled_means(values: FloatArray, length: int, block: int, count: int, rng: np.random.Generator) -> FloatArray:
    """Means of `count` moving-block resamples of `length` samples each, shape (count,).

    A mean needs only each block's sum, taken from cumulative sums: `count × length / block` look-ups.
    """
    n = len(values)
    block = min(block, n, length)
    total = np.concatenate([[0.0], np.cumsum(values)])
    whole, rest = divmod(length, block)
    sums = total[block:] - total[:-block]
    tails = total[rest : n + 1] - total[: n + 1 - rest]
    out = np.empty(count)
    for at, size in _chunks(count, whole + 1):
        drawn = sums[rng.integers(0, len(sums), size=(size, whole))].sum(axis=1)
        if rest:
            drawn += tails[rng.integers(0, len(sums), size=size)]
        out[at : at + size] = drawn / length
    return out


def resampled_quantiles(
    values: FloatArray, q: float, length: int, block: int, count: int, rng: np.random.Generator
) -> FloatArray:
    """Observed `q` quantiles of `count` moving-block resamples of `length` samples each, shape (count,)."""
    n = len(values)
    block = min(block, n, length)
    blocks = -(-length // block)
    rank = quantile_rank(length, q)
    windows = np.lib.stride_tricks.sliding_window_view(values, block)
    out = np.empty(count)
    for at, size in _chunks(count, blocks * block):
        starts = rng.integers(0, n - block + 1, size=(size, blocks))
        drawn = np.reshape(windows[starts], (size, blocks * block))[:, :length]
        out[at : at + size] = np.partition(drawn, rank, axis=1)[:, rank]
    return out


_Draw = Callable[[FloatArray, int, int, int, np.random.Generator], FloatArray]


def _widen(drawn: FloatArray, estimate: float, factor: float) -> FloatArray:
    return estimate + factor * (drawn - estimate) if math.isfinite(estimate) else drawn


def _mean(values: FloatArray) -> float:
    return float(values.mean())


def _bootstrap(
    x: FloatArray,
    y: FloatArray,
    taus: tuple[float, float],
    draw: _Draw,
    estimate: Callable[[FloatArray], float],
    seed: int,
    confidence: float,
    resamples: int,
    doubts: list[str],
) -> Effect:
    """Percentile interval of the difference of two independently resampled windows."""
    rng = np.random.default_rng(seed)
    blocks = block_length(len(x), taus[0]), block_length(len(y), taus[1])
    before, after = estimate(x), estimate(y)
    drawn0 = _widen(
        draw(x, len(x), blocks[0], resamples, rng), before, widening(len(x), taus[0], blocks[0], confidence)
    )
    drawn1 = _widen(draw(y, len(y), blocks[1], resamples, rng), after, widening(len(y), taus[1], blocks[1], confidence))
    with np.errstate(invalid="ignore"):
        drawn = drawn1 - drawn0
        effect = float(np.float64(after) - np.float64(before))
    tail = (1.0 - confidence) / 2.0
    # inf − inf is unknown: it widens the interval on both sides.
    low = np.sort(np.where(np.isnan(drawn), -np.inf, drawn))[quantile_rank(resamples, tail)]
    high = np.sort(np.where(np.isnan(drawn), np.inf, drawn))[quantile_rank(resamples, 1.0 - tail)]
    why = [*doubts, *_too_short(x, taus[0], "baseline", blocks[0]), *_too_short(y, taus[1], "window", blocks[1])]
    if math.isnan(effect):
        why.append("in both windows the quantile lies among failed requests")
    return Effect(
        baseline=before,
        during=after,
        effect=effect,
        ci_low=float(low),
        ci_high=float(high),
        confidence=confidence,
        n_baseline=len(x),
        n_during=len(y),
        tau_baseline=taus[0],
        tau_during=taus[1],
        block=max(blocks),
        resamples=resamples,
        method="block-bootstrap",
        reliable=not why,
        why="; ".join(why),
    )


def _too_short(values: FloatArray, tau: float, name: str, block: int) -> list[str]:
    block = block or block_length(len(values), tau)
    if len(values) >= FEW_BLOCKS * block:
        return []
    return [
        f"the {name} is too short for its autocorrelation: {len(values)} samples are worth "
        f"{len(values) / tau:.0f} independent ones; {FEW_BLOCKS * block} would do"
    ]


def _events(values: FloatArray, tau: float) -> float:
    ones = float(values.sum())
    return min(ones, len(values) - ones) / tau


def _exact(values: FloatArray, tau: float, confidence: float) -> tuple[float, float]:
    n = max(1.0, len(values) / tau)
    return clopper_pearson(float(values.mean()) * n, n, confidence)


def _windows(baseline: npt.NDArray[Any], during: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    x, y = as_series(baseline), as_series(during)
    if len(x) == 0 or len(y) == 0:
        raise ValueError("an effect needs samples in both windows")
    return x, y


def _chunks(count: int, cells_each: int) -> list[tuple[int, int]]:
    """(first, size) of the chunks in which `count` resamples of so many cells are drawn."""
    step = max(1, _CELLS // max(1, cells_each))
    return [(at, min(step, count - at)) for at in range(0, count, step)]
