"""What these tests hold fixed: every random number comes from a seed named in the test, no clock, no files.

Series whose truth is known: AR(1) noise and the sticky coin of `facts/statistics.md` (with probability ρ the
last outcome is repeated), both of integrated autocorrelation time (1 + ρ) / (1 − ρ).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

Series = Callable[..., npt.NDArray[np.float64]]


def ar1(rng: np.random.Generator, n: int, rho: float) -> npt.NDArray[np.float64]:
    """Stationary AR(1), mean 0, variance 1."""
    noise = rng.standard_normal(n) * np.sqrt(1.0 - rho**2)
    out = np.empty(n)
    last = rng.standard_normal()
    for i, step in enumerate(noise):
        last = out[i] = rho * last + step
    return out


def sticky(rng: np.random.Generator, n: int, p: float, rho: float) -> npt.NDArray[np.bool_]:
    """Bernoulli(p) that repeats itself with probability rho."""
    fresh, keep = rng.random(n) < p, rng.random(n) < rho
    origin = np.maximum.accumulate(np.where(keep, 0, np.arange(n)))
    return fresh[origin]


@pytest.fixture(name="ar1")
def ar1_fixture() -> Series:
    return ar1


@pytest.fixture(name="sticky")
def sticky_fixture() -> Callable[..., npt.NDArray[np.bool_]]:
    return sticky
