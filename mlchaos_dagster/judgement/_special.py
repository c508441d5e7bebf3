"""The few distribution functions the package needs, typed.

`scipy.special` only, imported on first use: `scipy.stats` costs half a second at start.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def normal_quantile(p: float) -> float:
    """The standard normal quantile of `p` in (0, 1)."""
    return NormalDist().inv_cdf(p)


def beta_quantile(p: float, a: float, b: float) -> float:
    """The `p` quantile of Beta(a, b), a and b > 0."""
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return float(special.betaincinv(a, b, p))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X ≤ k) for X ~ Binomial(n, p)."""
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return float(special.bdtr(float(k), n, p))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def log_beta(a: float, b: float) -> float:
    """Logarithm of B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def log_choose(n: int, k: int) -> float:
    """Logarithm of the binomial coefficient; -inf outside 0 ≤ k ≤ n."""
    if k < 0 or k > n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def fisher_tail(bad_during: int, n_during: int, bad_baseline: int, n_baseline: int) -> float:
    """One-sided Fisher exact p: so many bad samples or more fall into `during` when both rates are equal."""
    bad, total = bad_during + bad_baseline, n_during + n_baseline
    whole = log_choose(total, bad)
    terms = [
        log_choose(n_during, k) + log_choose(n_baseline, bad - k) - whole
        for k in range(bad_during, min(bad, n_during) + 1)
    ]
    return min(1.0, math.fsum(math.exp(term) for term in terms))
