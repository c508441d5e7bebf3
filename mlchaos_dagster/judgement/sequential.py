"""The anytime-valid guard in flight: is it worse than the baseline, looked at as often as one likes.

Two tests, each with a streaming `update` and one `alarm` at level α over the whole window:

* :class:`RateGuard`, for error rates: an e-process that compares the window's errors with a finished baseline.
* :class:`MeanGuard`, for any metric bounded by declared limits: the empirical-Bernstein confidence sequence
  of Waudby-Smith & Ramdas (JRSS-B 2024) on batch means, baseline against window.

:class:`RatioProcess` is the count e-process of Lindon & Malek (NeurIPS 2022) for a *concurrent* control arm.

Requests share their fate, so one by one they raise false alarms at many times α. Batches of
`autocorrelation.batch_length(tau)` are declared before the window opens; counts are divided by τ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.judgement._special import log_beta
from mlchaos_dagster.judgement.autocorrelation import as_series


@dataclass(frozen=True)
class GuardState:
    """What a guard knows after an update."""

    samples: int
    """Samples of the window taken in so far."""
    batches: int
    """Complete batches among them: what was judged."""
    baseline: float
    """The baseline's mean."""
    during: float | None
    """The window's mean so far; None before the first batch."""
    low: float
    """Lower end of the confidence sequence of during − baseline (−inf where the guard has none)."""
    high: float
    evidence: float
    """ln E of an e-process (alarm at ln 1/α), or how far the sequence lies beyond the margin; −inf at first."""
    alarm: bool
    """Once true, stays true."""
    alarm_at_sample: int | None
    """Number of samples taken in when it first rang."""


class EmpiricalBernstein:
    """The predictable plug-in empirical-Bernstein confidence sequence of a mean of values in [0, 1].

    μ̂_t = (½ + Σx)/(t+1), σ̂²_t = (¼ + Σ(x_i − μ̂_i)²)/(t+1), λ_t = min{½, √(2 ln(2/α) / (t ln(1+t) σ̂²_{t−1}))};
    C_t = Σλx/Σλ ± [ln(2/α) + Σ (x_i − μ̂_{i−1})² ψ(λ_i)]/Σλ, ψ(λ) = −ln(1−λ) − λ. Intersected over time.
    """

    def __init__(self, alpha: float) -> None:
        _check_alpha(alpha)
        self._log = math.log(2.0 / alpha)
        self.t = 0
        self.low, self.high = 0.0, 1.0
        self._sum = self._squares = self._weight = self._weighted = self._cost = 0.0

    def update(self, x: float) -> None:
        """Take in the next value.

        Raises:
            ValueError: a value outside [0, 1].
        """
        if not 0.0 <= x <= 1.0:
            raise ValueError(f"{x} lies outside the declared bounds")
        before_mean = (0.5 + self._sum) / (self.t + 1)
        before_variance = (0.25 + self._squares) / (self.t + 1)
        self.t += 1
        bet = min(0.5, math.sqrt(2.0 * self._log / (self.t * math.log1p(self.t) * before_variance)))
        self._weight += bet
        self._weighted += bet * x
        self._cost += (x - before_mean) ** 2 * (-math.log1p(-bet) - bet)
        self._sum += x
        self._squares += (x - (0.5 + self._sum) / (self.t + 1)) ** 2
        centre, margin = self._weighted / self._weight, (self._log + self._cost) / self._weight
        self.low, self.high = max(self.low, centre - margin), min(self.high, centre + margin)


class MeanGuard:
    """Alarms when a bounded mean is higher than the baseline's by more than a margin.

    For what is worse when lower (availability) pass its complement. Latency: pass clipped values with declared
    bounds, or the indicator "slower than the SLO" with bounds (0, 1). The difference is
    [L₁ − U₀, U₁ − L₀], each side at α/2.

    Args:
        baseline: shape (n,), in time order, complete.
        batch: samples per batch, declared: `autocorrelation.batch_length(integrated_time(baseline))`.
        bounds: declared lower and upper limit of a value; values are clipped to them.
        alpha: false-alarm probability over the whole window.
        margin: a rise up to this is tolerated (same unit as the values).

    Raises:
        ValueError: bounds, batch or alpha that make no sense, or a baseline without one full batch.
    """

    def __init__(
        self,
        baseline: npt.NDArray[Any],
        *,
        batch: int,
        alpha: float,
        bounds: tuple[float, float] = (0.0, 1.0),
        margin: float = 0.0,
    ) -> None:
        _check_alpha(alpha)
        if batch < 1 or not (math.isfinite(bounds[0]) and bounds[0] < bounds[1] < math.inf):
            raise ValueError("a batch holds at least one sample, and bounds are finite and ascending")
        self._batch, self._floor, self._scale = batch, bounds[0], bounds[1] - bounds[0]
        self.margin = margin
        """The rise that is tolerated."""
        self._before, self._during = EmpiricalBernstein(alpha / 2.0), EmpiricalBernstein(alpha / 2.0)
        x = as_series(baseline)
        if len(x) < batch:
            raise ValueError(f"a baseline of {len(x)} samples holds no batch of {batch}")
        whole = np.reshape(x[: len(x) - len(x) % batch], (-1, batch))
        for mean in self._scaled(whole).mean(axis=1):
            self._before.update(float(mean))
        self._mean = float(whole.mean())
        self._rest: list[float] = []
        self._samples, self._total = 0, 0.0
        self._alarm_at: int | None = None

    def update(self, values: npt.NDArray[Any]) -> GuardState:
        """Take in the next samples, shape (k,), k ≥ 0; an incomplete batch waits for the next call."""
        for value in as_series(values):
            self._rest.append(float(value))
            self._samples += 1
            if len(self._rest) == self._batch:
                mean = float(self._scaled(np.asarray(self._rest)).mean())
                self._during.update(mean)
                self._total += mean
                self._rest.clear()
                if self._alarm_at is None and self._low() > self.margin:
                    self._alarm_at = self._samples
        return self.state

    @property
    def state(self) -> GuardState:
        """As of the last update."""
        t = self._during.t
        return GuardState(
            samples=self._samples,
            batches=t,
            baseline=self._mean,
            during=self._floor + self._scale * self._total / t if t else None,
            low=self._low(),
            high=self._scale * (self._during.high - self._before.low),
            evidence=self._low() - self.margin if t else -math.inf,
            alarm=self._alarm_at is not None,
            alarm_at_sample=self._alarm_at,
        )

    def _low(self) -> float:
        return self._scale * (self._during.low - self._before.high)

    def _scaled(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.minimum(np.maximum((values - self._floor) / self._scale, 0.0), 1.0)


class RateGuard:
    """Alarms when a bad share is higher than in a finished baseline.

    The e-process sets a beta-binomial mixture for each side (Jeffreys' prior, Beta(½, ½)) against the best common rate:

        E_t = B(½+s₀, ½+f₀) B(½+s₁, ½+f₁) / B(½, ½)² / [p̂^{s₀+s₁} (1−p̂)^{f₀+f₁}],  p̂ the pooled share.

    The denominator is at least the truth's likelihood whatever the common rate, so P(ever E ≥ 1/α) ≤ α when the
    rates are equal (universal inference: Wasserman, Ramdas & Balakrishnan, PNAS 2020). Unlike the ratio form
    it does not need the baseline to be concurrent. One-sided: it rings only when the window is the worse one.

    Overdispersion: counts are divided by `tau` (a tempered likelihood), so that a burst counts as about one event.
    Limit: a baseline with next to no bad requests cannot show how they cluster, its τ comes out near 1, and
    the first burst may ring (measured at α = 5 %: 9 % false alarms for bursts of 5 at 0.3 % bad; else ≤ 3 %, and
    7 % at 2 % bad, ρ = 0.8). Declare a larger τ where bursts are known to be part of normal life.

    Args:
        baseline_bad: shape (n,), 0/1 in time order.
        tau: integrated autocorrelation time of the baseline's bad indicator, at least 1.
        alpha: false-alarm probability over the whole window.
        batch: samples per look; an incomplete one waits.

    Raises:
        ValueError: an empty baseline, values other than 0 and 1, or an alpha, tau or batch that makes no sense.
    """

    def __init__(self, baseline_bad: npt.NDArray[Any], *, tau: float, alpha: float, batch: int = 1) -> None:
        _check_alpha(alpha)
        x = as_series(baseline_bad)
        if len(x) == 0 or tau < 1.0 or batch < 1:
            raise ValueError("a rate guard needs a baseline, tau ≥ 1 and batches of at least one sample")
        _check_bad(x)
        self._tau, self._batch, self._threshold = tau, batch, math.log(1.0 / alpha)
        self._bad0, self._n0 = int(x.sum()), len(x)
        self._prior = log_beta(0.5, 0.5)
        s, f = self._bad0 / tau, (self._n0 - self._bad0) / tau
        self._baseline_mixture = log_beta(0.5 + s, 0.5 + f) - self._prior
        self._rest: list[float] = []
        self._samples = self._batches = self._bad1 = 0
        self._log_e = -math.inf
        self._alarm_at: int | None = None

    def update(self, bad: npt.NDArray[Any]) -> GuardState:
        """Take in the next samples, shape (k,) of 0/1, k ≥ 0."""
        x = as_series(bad)
        _check_bad(x)
        for value in x:
            self._rest.append(float(value))
            self._samples += 1
            if len(self._rest) == self._batch:
                self._bad1 += int(sum(self._rest))
                self._batches += 1
                self._rest.clear()
                self._log_e = self._evidence()
                if self._alarm_at is None and self._log_e >= self._threshold:
                    self._alarm_at = self._samples
        return self.state

    @property
    def state(self) -> GuardState:
        """As of the last update."""
        judged = self._batches * self._batch
        return GuardState(
            samples=self._samples,
            batches=self._batches,
            baseline=self._bad0 / self._n0,
            during=self._bad1 / judged if judged else None,
            low=-math.inf,
            high=math.inf,
            evidence=self._log_e,
            alarm=self._alarm_at is not None,
            alarm_at_sample=self._alarm_at,
        )

    def _evidence(self) -> float:
        n1 = self._batches * self._batch
        if self._bad1 * self._n0 <= self._bad0 * n1:
            return -math.inf
        s, f = self._bad1 / self._tau, (n1 - self._bad1) / self._tau
        mixture = self._baseline_mixture + log_beta(0.5 + s, 0.5 + f) - self._prior
        bad, n = self._bad0 + self._bad1, self._n0 + n1
        share = bad / n
        pooled = bad * math.log(share) + (n - bad) * math.log1p(-share) if 0 < bad < n else 0.0
        return mixture - pooled / self._tau


class RatioProcess:
    """Count e-process for two *concurrent* arms: does an error fall into the fault arm more often than its share?

    E = B(a+n₁, b+n₀) / [B(a, b) q^{n₁} (1−q)^{n₀}], q = e₁/(e₀+e₁) under equal rates, a = b = 1 (Lindon & Malek,
    NeurIPS 2022). Common drift cancels. One-sided: it rings only when the fault arm has more than its share.

    Args:
        exposure_during: requests (or seconds) per interval in the fault arm.
        exposure_control: the same in the control arm; their ratio must not change.
        alpha: false-alarm probability.
        tau: counts are divided by it.

    Raises:
        ValueError: exposures, tau or alpha that make no sense.
    """

    def __init__(self, *, exposure_during: float, exposure_control: float, alpha: float, tau: float = 1.0) -> None:
        _check_alpha(alpha)
        if exposure_during <= 0.0 or exposure_control <= 0.0 or tau < 1.0:
            raise ValueError("exposures must be positive and tau at least 1")
        self._q = exposure_during / (exposure_during + exposure_control)
        self._tau, self._threshold = tau, math.log(1.0 / alpha)
        self.bad_during = self.bad_control = 0
        self.log_e = 0.0
        self.alarm = False

    def update(self, bad_during: int, bad_control: int) -> bool:
        """Take in the errors of one more interval of both arms; whether the alarm has rung so far."""
        self.bad_during += bad_during
        self.bad_control += bad_control
        n1, n0 = self.bad_during / self._tau, self.bad_control / self._tau
        self.log_e = log_beta(1.0 + n1, 1.0 + n0) - n1 * math.log(self._q) - n0 * math.log1p(-self._q)
        if self.log_e >= self._threshold and n1 > self._q * (n0 + n1):
            self.alarm = True
        return self.alarm


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha lies between 0 and 1, not at {alpha}")


def _check_bad(x: npt.NDArray[np.float64]) -> None:
    if not ((x == 0) | (x == 1)).all():
        raise ValueError("a bad indicator is made of 0 and 1")
