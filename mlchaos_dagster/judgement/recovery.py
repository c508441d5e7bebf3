"""How long the system took to come back, split into parts, and never shorter than what was seen.

A *breach* is a stretch in which some SLO does not hold. **Steady again** is the earliest moment from which
every SLO holds for a dwell time, found on raw requests at full resolution (a sliding window's own length
never enters the answer):

* Each SLO is an allowed share of bad requests: availability ≥ 99 % allows 1 % failed, p95 < 300 ms allows 5 %
  failed or slower. Bad shares are counted over [t, t + dwell], t being the due time of a request.
* The request at t is itself good, and no beginning of the dwell holds more bad requests than the allowed
  rate would produce by chance (99 % binomial bound). Else an outage's last moments would hide in the allowance:
  10 of 200 requests of a p95 are 100 ms at 100 requests/s.
* The moment told is when the service was first *seen* to work: the first good request's due time, or, for one
  that waited for the service to come back, its completion less a healthy request's latency. So the answer is
  within one sample of the truth whether requests failed, were slow, or hung and were then served.
* A stretch without samples proves nothing: no dwell time spans it.

What the observation's end cut off is *censored*: the value is then a lower bound, and its name is listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.judgement._special import binomial_cdf
from mlchaos_dagster.judgement.autocorrelation import FloatArray
from mlchaos_dagster.judgement.census import BoolArray, Requests, quantile_of

PARTS = ("detect", "reschedule", "ready", "steady")
_CHANCE = 0.99
_GAP_FLOOR_S = 0.25
_EPSILON = 1e-9


@dataclass(frozen=True, eq=False)
class Allowance:
    """One SLO as the requests that count against it and how many of them it tolerates."""

    name: str
    bad: BoolArray
    """Shape (n,): whether each request counts against the SLO."""
    allowed_ratio: float
    """Largest share of bad requests with which the SLO holds, 0 to 1."""


@dataclass(frozen=True)
class Moment:
    """When something was first seen, or how far the observation reached without it."""

    at_s: float
    """The moment; when censored, it did not happen before this."""
    censored: bool
    relapsed_at_s: float | None = None
    """First bad request of the next dwell time over which an SLO did not hold; None when there was none."""


@dataclass(frozen=True)
class Recovery:
    """Seconds from the origin (the fault's effect or its removal) to each part; None = not applicable."""

    detect_s: float | None
    """Until the system noticed."""
    reschedule_s: float | None
    """Until a replacement was started."""
    ready_s: float | None
    """Until the replicas were ready again."""
    steady_s: float | None
    """Until every SLO held for the dwell time (the dwell itself is not counted)."""
    censored: tuple[str, ...] = ()
    """Names of the parts whose value is only a lower bound: the observation ended first."""

    def within(self, limit_s: float) -> bool | None:
        """Whether steady came within the limit; None when the observation cannot tell."""
        if self.steady_s is None:
            return None
        if "steady" in self.censored:
            return False if self.steady_s > limit_s else None
        return self.steady_s <= limit_s


def allowance(
    measure: str, requests: Requests, *, at_least: float | None = None, below: float | None = None
) -> Allowance:
    """An SLO over requests as an :class:`Allowance`.

    Args:
        measure: `availability` with `at_least`; `error_rate` or `fallback_rate` with `below`; `latency_pNN`
            with `below` in seconds.

    Raises:
        ValueError: the measure has no per-request form (a mean, a gauge: see :func:`steady_from_evaluations`),
            or not exactly the objective that fits it.
    """
    q = quantile_of(measure)
    if measure == "availability" and at_least is not None and below is None:
        return Allowance(measure, ~requests.ok, 1.0 - at_least)
    if measure == "error_rate" and below is not None and at_least is None:
        return Allowance(measure, ~requests.ok, below)
    if measure == "fallback_rate" and below is not None and at_least is None:
        return Allowance(measure, requests.ok & (requests.path == "cache"), below)
    if q is not None and below is not None and at_least is None:
        return Allowance(measure, requests.ranked_latency_s >= below, 1.0 - q)
    raise ValueError(f"{measure} at_least={at_least} below={below} cannot be judged request by request")


def steady_again(
    requests: Requests,
    slos: Sequence[Allowance],
    *,
    origin_s: float,
    dwell_s: float,
    until_s: float,
    healthy_latency_s: float = 0.0,
    max_gap_s: float | None = None,
    minimum: int = 1,
) -> Moment:
    """The earliest moment at or after `origin_s` from which every SLO holds for `dwell_s`.

    Args:
        requests: on time ones only, with the arrays that `slos` were made of.
        slos: at least one.
        origin_s: nothing before it counts. Where an effect shows late, pass the first breach seen.
        dwell_s: how long all SLOs must hold.
        until_s: end of the observation: requests due up to it were waited for.
        healthy_latency_s: the baseline's median latency.
        max_gap_s: longest stretch without samples that still counts as observed; default five times the
            median spacing, at least 0.25 s.
        minimum: fewest requests in a dwell time.

    Returns:
        The moment; censored when the observation ends before a dwell time was complete: then its time is the
        earliest that is still possible.

    Raises:
        ValueError: no SLO, lengths that do not fit, or a dwell time that is not positive.
    """
    if not slos or any(slo.bad.shape != requests.due_s.shape for slo in slos):
        raise ValueError("steady_again needs at least one SLO, each over these very requests")
    if dwell_s <= 0.0:
        raise ValueError("the dwell time must be positive")
    seen = (requests.due_s >= origin_s) & (requests.due_s <= until_s)
    due = requests.due_s[seen]
    bads = [slo.bad[seen] for slo in slos]
    n = len(due)
    if n == 0:
        return Moment(max(origin_s, until_s), censored=True)
    if max_gap_s is None:
        max_gap_s = max(_GAP_FLOOR_S, 5.0 * float(np.median(np.diff(due)))) if n > 1 else _GAP_FLOOR_S
    ends = np.searchsorted(due, due + dwell_s, side="right")
    counts = ends - np.arange(n)
    holds = np.ones(n, dtype=np.bool_)
    for slo, bad in zip(slos, bads, strict=True):
        total = np.concatenate([[0], np.cumsum(bad)])
        holds &= (total[ends] - total[:-1]) <= slo.allowed_ratio * counts + _EPSILON
    gaps = np.concatenate([[0], np.cumsum(np.diff(np.append(due, until_s)) > max_gap_s)])
    # The dwell is complete when it ends inside the observation; gap i lies after sample i.
    complete = (due + dwell_s <= until_s + _EPSILON) & (counts >= minimum)
    unbroken = gaps[ends - 1] - gaps[:-1] == 0
    next_due = np.append(due, until_s)[ends]
    unbroken &= (next_due - due[ends - 1] <= max_gap_s) | ~complete
    good = ~np.logical_or.reduce(bads)
    limits = [_chance_limits(slo.allowed_ratio, int(counts.max())) for slo in slos]
    served = np.where(good, np.maximum(due, requests.done_s[seen] - healthy_latency_s), np.inf)
    first_served = np.minimum.accumulate(served[::-1])[::-1]

    def starts_well(i: int) -> bool:
        return all(
            bool((np.cumsum(bad[i : ends[i]]) <= limit[: ends[i] - i]).all())
            for bad, limit in zip(bads, limits, strict=True)
        )

    for i in np.flatnonzero(good & unbroken & (holds | ~complete)):
        if not starts_well(int(i)):
            continue
        if not complete[i]:
            # Too short a rest to prove it: from here on it is only still possible.
            return Moment(min(float(first_served[i]), until_s), censored=True)
        relapse = np.flatnonzero(~holds[i:] & complete[i:])
        broken = i + int(relapse[0]) if len(relapse) else n
        relapsed_at = float(due[broken:][~good[broken:]][0]) if broken < n else None
        return Moment(float(first_served[i]), censored=False, relapsed_at_s=relapsed_at)
    return Moment(max(origin_s, until_s), censored=True)


def first_bad(requests: Requests, slos: Sequence[Allowance], *, origin_s: float) -> float | None:
    """Due time of the first request at or after `origin_s` that counts against any SLO; None when none does."""
    bad = np.logical_or.reduce([slo.bad for slo in slos]) & (requests.due_s >= origin_s)
    hits = np.flatnonzero(bad)
    return float(requests.due_s[hits[0]]) if len(hits) else None


def steady_from_evaluations(
    times_s: npt.ArrayLike, met: npt.ArrayLike, *, origin_s: float, dwell_s: float, until_s: float
) -> Moment:
    """The same for SLOs known only as evaluations (Prometheus, a mean, a gauge), at their own resolution.

    Args:
        times_s, met: shape (n,), in time order; each evaluation stands until the next.

    Returns:
        The first evaluation at or after `origin_s` that is met, as are all within `dwell_s` of it. Censored
        when the observation ends first.

    Raises:
        ValueError: unequal lengths or times out of order.
    """
    t, good = np.asarray(times_s, dtype=np.float64), np.asarray(met, dtype=np.bool_)
    if t.shape != good.shape or t.ndim != 1 or (np.diff(t) < 0).any():
        raise ValueError("evaluations need as many times as answers, in time order")
    seen = (t >= origin_s) & (t <= until_s)
    t, good = t[seen], good[seen]
    bad_times = t[~good]
    for at in t[good]:
        later = bad_times[bad_times > at]
        if len(later) and later[0] <= at + dwell_s:
            continue
        if at + dwell_s > until_s + _EPSILON:
            return Moment(float(at), censored=True)
        return Moment(float(at), censored=False, relapsed_at_s=float(later[0]) if len(later) else None)
    return Moment(max(origin_s, until_s), censored=True)


@dataclass(frozen=True)
class Regained:
    """A signal that fell below its level and came back."""

    dropped_at_s: float | None
    """None when it never fell: there is nothing to come back from."""
    at_s: float | None
    """When it was back for good; None when it was not, before the observation ended."""


def regained(
    times_s: npt.ArrayLike, values: npt.ArrayLike, at_least: float, *, origin_s: float, until_s: float
) -> Regained:
    """When a stepwise signal (ready replicas) fell below `at_least` after `origin_s`, and when it was back to stay.

    The value that stood at `origin_s` counts. Back to stay: the start of the last stretch at or above the level
    that reaches the end of the observation.

    Args:
        times_s, values: shape (n,), steps in time order.
    """
    t, v = np.asarray(times_s, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.shape != v.shape or t.ndim != 1 or (np.diff(t) < 0).any():
        raise ValueError("a signal needs as many times as values, in time order")
    begin = max(0, int(np.searchsorted(t, origin_s, side="right")) - 1)
    end = int(np.searchsorted(t, until_s, side="right"))
    t, v = np.maximum(t[begin:end], origin_s), v[begin:end]
    low = np.flatnonzero(v < at_least)
    if len(low) == 0:
        return Regained(None, None)
    last = int(low[-1])
    return Regained(float(t[low[0]]), float(t[last + 1]) if last + 1 < len(t) else None)


def split_recovery(origin_s: float, until_s: float, moments: Mapping[str, float | Moment | None]) -> Recovery:
    """Put the moments of a recovery together, as seconds from the origin.

    Args:
        origin_s: when the fault's effect began, or when it was removed.
        until_s: end of the observation.
        moments: by name of :data:`PARTS`. A name left out does not apply; None was not seen before `until_s`.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := set(moments) - set(PARTS):
        raise ValueError(f"no such part of a recovery: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    values: dict[str, float | None] = dict.fromkeys(PARTS)
    censored: list[str] = []
    for part in PARTS:
        if part not in moments:
            continue
        moment = moments[part]
        at_s = until_s if moment is None else moment.at_s if isinstance(moment, Moment) else moment
        if moment is None or (isinstance(moment, Moment) and moment.censored):
            censored.append(part)
        values[part] = max(0.0, at_s - origin_s)
    return Recovery(
        detect_s=values["detect"],
        reschedule_s=values["reschedule"],
        ready_s=values["ready"],
        steady_s=values["steady"],
        censored=tuple(censored),
    )


def _chance_limits(allowed: float, size: int) -> FloatArray:
    """For k = 1 … size: the most bad ones among k that the allowed rate explains in 99 of 100 cases."""
    if allowed >= 1.0:
        return np.full(size, math.inf)
    limits = np.zeros(size)
    if allowed <= 0.0:
        return limits
    limit = 0
    for k in range(1, size + 1):
        while limit < k and binomial_cdf(limit, k, allowed) < _CHANCE:
            limit += 1
        limits[k - 1] = limit
    return limits
