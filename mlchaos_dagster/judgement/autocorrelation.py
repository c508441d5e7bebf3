"""How much a run's samples repeat each other: integrated autocorrelation time and what follows from it.

Owns the one answer to "how many independent samples are these worth", which blocks (effects, power)
and batches (sequential) are derived from. Knows nothing of requests or SLOs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def integrated_time(values: npt.NDArray[Any]) -> float:
    """Integrated autocorrelation time τ = 1 + 2 Σ ρ_k of a series in time order, in samples, at least 1.

    The sum ends where Geyer's initial positive sequence does (Practical Markov Chain Monte Carlo,
    Statistical Science 1992): at the first pair ρ_2k + ρ_2k+1 that is not positive, pairs being made
    non-increasing. Negative correlation is not taken as a gift: τ never falls below 1.

    Args:
        values: shape (n,), finite, in time order. Booleans count as 0 and 1.

    Returns:
        τ in samples, at most n. 1.0 for fewer than 4 samples or a constant series, whose τ is unknown.

    Raises:
        ValueError: a value is NaN or infinite, or the shape is not (n,).
    """
    x = as_series(values)
    if not np.isfinite(x).all():
        raise ValueError("autocorrelation needs finite values; rank or clip infinite latencies first")
    n = len(x)
    if n < 4 or float(np.ptp(x)) == 0.0:
        return 1.0
    x = (x - x.mean()) / np.abs(x).max()
    size = 1 << (2 * n - 1).bit_length()  # zero-padded, so that the FFT's circle does not wrap around
    spectrum = np.fft.rfft(x, size)
    covariance = np.fft.irfft(spectrum * np.conj(spectrum), size)[:n]
    if covariance[0] <= 0.0:
        return 1.0
    rho = covariance / covariance[0]
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0.0)
    positive = pairs[: int(ends[0])] if len(ends) else pairs
    tau = -1.0 + 2.0 * float(np.minimum.accumulate(positive).sum()) if len(positive) else 1.0
    return float(min(max(tau, 1.0), n))


def effective_size(n: int, tau: float) -> float:
    """How many independent samples `n` samples with integrated time `tau` are worth: n / τ."""
    return n / max(tau, 1.0)


def block_length(n: int, tau: float) -> int:
    """Block length, in samples, for a moving-block bootstrap of `n` samples.

    The largest of τ, n^(1/3), and the length that minimises the error of the bootstrap variance,
    (3/2 (G/g)² n)^(1/3) (Politis & White 2004, corrected by Patton, Politis & White 2009), where
    G/g = (τ − 1/τ) / 2 for the AR(1) series that has this τ. Never more than n.
    """
    if n < 1:
        return 1
    tau = max(tau, 1.0)
    optimal = (1.5 * ((tau - 1.0 / tau) / 2.0) ** 2 * n) ** (1.0 / 3.0)
    return max(1, min(n, math.ceil(max(tau, n ** (1.0 / 3.0), optimal) - 1e-9)))


def batch_length(tau: float, *, factor: float = 3.0, minimum: int = 1) -> int:
    """Samples per batch of a sequential test: `factor` times τ, declared before the window opens.

    A batch of exactly τ leaves neighbouring batch means correlated (0.26 to 0.35 for an AR(1) series);
    three times τ brings that under 0.15.
    """
    return max(minimum, math.ceil(factor * max(tau, 1.0)) if tau > 1.0 else 1)


def as_series(values: npt.NDArray[Any]) -> FloatArray:
    """`values` as float64 of shape (n,).

    Raises:
        ValueError: more than one dimension, or a NaN.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"a series has one dimension, not {x.ndim}")
    if np.isnan(x).any():
        raise ValueError("a series may not hold NaN: a gap is left out, not a number")
    return x
