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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.judgement._special import binomial_cdf
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
    strict: bool = False
    """Whether the SLO is broken at exactly that share (`error_rate below 1 %`)."""
    among: BoolArray | None = None
    """Shape (n,): the requests the share is taken of (answered ones, for a fallback rate); None = all."""


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
    measure: str,
    requests: Requests,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Allowance:
    """An objective over requests as an :class:`Allowance`.

    Args:
        measure: `availability`, `error_rate`, `fallback_rate`, `golden_error_rate` or `latency_pNN`.
        requests: on time ones only.
        at_least: limit of an availability, 0 to 1; or `above`.
        above: the same, itself not enough.
        at_most: limit of a rate (0 to 1) or latency (seconds); or `below`.
        below: the same, itself too much.

    Raises:
        ValueError: the measure has no per-request form (a mean, a gauge: see :func:`steady_from_evaluations`),
            or not exactly one limit that fits it.
    """
    given = [v for v in (at_least, above, at_most, below) if v is not None]
    q = quantile_of(measure)
    if len(given) == 1:
        limit, floor = given[0], at_least is not None or above is not None
        strict = above is not None or below is not None
        if measure == "availability" and floor:
            return Allowance(measure, ~requests.ok, 1.0 - limit, strict)
        if measure == "error_rate" and not floor:
            return Allowance(measure, ~requests.ok, limit, strict)
        if measure == "fallback_rate" and not floor:
            return Allowance(measure, requests.ok & (requests.path == "cache"), limit, strict, among=requests.ok)
        if measure == "golden_error_rate" and not floor:
            return Allowance(measure, requests.wrong, limit, strict, among=requests.compared)
        if q is not None and not floor:
            latency = requests.ranked_latency_s
            return Allowance(measure, latency >= limit if strict else latency > limit, 1.0 - q)
    raise ValueError(f"{measure} with this limit cannot be judged request by request")


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
    n = len(due)
    if n == 0:
        return Moment(max(origin_s, until_s), censored=True)
    if max_gap_s is None:
        max_gap_s = max(_GAP_FLOOR_S, 5.0 * float(np.median(np.diff(due)))) if n > 1 else _GAP_FLOOR_S
    ends = np.searchsorted(due, due + dwell_s, side="right")
    counted = [_Counted.of(slo, seen) for slo in slos]
    holds = np.all([slo.holds(ends) for slo in counted], axis=0)
    good = ~np.any([slo.bad for slo in counted], axis=0)
    # A dwell is complete when it ends inside the observation, and unbroken when no gap lies in it or at its end.
    complete = (due + dwell_s <= until_s + _EPSILON) & (ends - np.arange(n) >= minimum)
    gap_after = np.diff(np.append(due, until_s)) > max_gap_s
    gaps_before = np.concatenate([[0], np.cumsum(gap_after)])
    unbroken = (gaps_before[ends - 1] == gaps_before[:-1]) & ~(gap_after[ends - 1] & complete)
    served = np.where(good, np.maximum(due, requests.done_s[seen] - healthy_latency_s), np.inf)
    first_served = np.minimum.accumulate(served[::-1])[::-1]
    for i in np.flatnonzero(good & unbroken & (holds | ~complete)):
        if not all(slo.starts_well(int(i), int(ends[i])) for slo in counted):
            continue
        if not complete[i]:  # what is left is too short to prove it: from here on it is only still possible
            return Moment(min(float(first_served[i]), until_s), censored=True)
        broken = np.flatnonzero(~holds[i:] & complete[i:])
        relapsed_at = float(due[i + broken[0] :][~good[i + broken[0] :]][0]) if len(broken) else None
        return Moment(float(first_served[i]), censored=False, relapsed_at_s=relapsed_at)
    return Moment(max(origin_s, until_s), censored=True)


def first_bad(requests: Requests, slos: Sequence[Allowance], *, origin_s: float) -> float | None:
    """Due time of the first request at or after `origin_s` that counts against any SLO; None when none does."""
    bad = np.any([slo.bad for slo in slos], axis=0) & (requests.due_s >= origin_s)
    hits = np.flatnonzero(bad)
    return float(requests.due_s[hits[0]]) if len(hits) else None


def steady_from_evaluations(
    times_s: npt.ArrayLike, met: npt.ArrayLike, *, origin_s: float, dwell_s: float, until_s: float
) -> Moment:
    """The same for SLOs known only as evaluations (Prometheus, a mean, a gauge), at their own resolution.

    Args:
        times_s: shape (n,), in time order.
        met: shape (n,): whether the SLO held; each evaluation stands until the next.
        origin_s: nothing before it counts.
        dwell_s: how long it must hold.
        until_s: end of the observation.

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
        times_s: shape (n,), steps in time order.
        values: shape (n,).
        at_least: the level.
        origin_s: nothing before it counts, but the value that stood then.
        until_s: end of the observation.
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


@dataclass(frozen=True, eq=False)
class _Counted:
    """An allowance over the observed requests, with its running counts."""

    bad: BoolArray
    among: BoolArray
    allowed_ratio: float
    strict: bool
    limits: list[int]
    """limits[k]: the most bad ones among k that chance explains; extended as needed."""

    @classmethod
    def of(cls, slo: Allowance, seen: BoolArray) -> _Counted:
        bad = slo.bad[seen]
        among = np.ones(len(bad), dtype=np.bool_) if slo.among is None else slo.among[seen]
        return cls(bad & among, among, slo.allowed_ratio, slo.strict, [0])

    def holds(self, ends: npt.NDArray[np.int64]) -> BoolArray:
        """Per request i, whether the SLO holds over requests i … ends[i] − 1."""
        bad, among = (np.concatenate([[0], np.cumsum(x)]) for x in (self.bad, self.among))
        counts, allowed = bad[ends] - bad[:-1], self.allowed_ratio * (among[ends] - among[:-1])
        return (counts < allowed - _EPSILON) | (counts == 0) if self.strict else counts <= allowed + _EPSILON

    def starts_well(self, first: int, end: int) -> bool:
        """Whether no beginning of the requests first … end − 1 holds more bad ones than chance explains."""
        bad = np.cumsum(self.bad[first:end][self.among[first:end]])
        for k in range(len(self.limits), len(bad) + 1):
            limit = self.limits[-1]
            while limit < k and binomial_cdf(limit, k, min(1.0, self.allowed_ratio)) < _CHANCE:
                limit += 1
            self.limits.append(limit)
        return bool((bad <= np.asarray(self.limits[1 : len(bad) + 1])).all())
