"""Absolute SLOs as a census: exact counts over the requests the probe really sent.

The honest rules, decided here and nowhere else:

* A request sent later than the bound is the probe's fault: it is excluded, and counted.
* Latency is corrected for coordinated omission: from the moment a request was *due* until it was done.
* A failed request ranks as infinitely slow in every quantile, however fast it failed: nobody got an
  answer. With more than 5 % failures, p95 is infinite, as it is for the user. A quantile is an
  observed value (the smallest with at least the share q at or below it), never an interpolation, so
  that `latency_p95 < x` says exactly "at most 5 % of requests failed or took x or longer".
* A mean cannot rank: there a failed request counts as the probe's timeout (`penalty_s`), or its own
  duration when longer. Without a penalty the mean of a window with failures is infinite.
* No samples is `None`, never 0 or 1.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.judgement.autocorrelation import FloatArray

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
TextArray = npt.NDArray[np.str_]

_QUANTILE = re.compile(r"latency_p(\d{1,2}(?:\.\d+)?)")
MEASURES = (
    "availability", "error_rate", "fallback_rate", "golden_error_rate",
    "latency_mean", "latency_p50", "latency_p95", "latency_p99",
)  # fmt: skip
"""Named measures; any other `latency_pNN` (0 < NN < 100) is understood as well."""


@dataclass(frozen=True, eq=False)
class Requests:
    """What the probe sent, one entry per request, ordered by due time. Build with :meth:`of`."""

    due_s: FloatArray
    """When it should have been sent, by the fixed schedule."""
    sent_s: FloatArray
    """When it was sent."""
    done_s: FloatArray
    """When its answer was complete, or the probe gave up."""
    ok: BoolArray
    """Whether it was answered well."""
    path: TextArray
    """Which path answered: `model`, `cache`, or empty."""
    item: IntArray
    """Which of the probe's bodies it carried; −1: none."""
    value: FloatArray
    """The number in the answer; NaN: none."""
    compared: BoolArray
    """Whether its answer was held against a golden prediction (`shift.Reference.judged`); False until then."""
    wrong: BoolArray
    """Of these, whether it differs."""

    @classmethod
    def of(
        cls,
        due_s: npt.ArrayLike,
        done_s: npt.ArrayLike,
        ok: npt.ArrayLike,
        *,
        sent_s: npt.ArrayLike | None = None,
        path: npt.ArrayLike | None = None,
        item: npt.ArrayLike | None = None,
        value: npt.ArrayLike | None = None,
    ) -> Requests:
        """Sort by due time and check.

        Args:
            due_s: shape (n,), as all of them; when each request was due.
            done_s: when it was answered or given up.
            ok: whether it was answered well.
            sent_s: when it was sent; default: when due.
            path: which path answered; default: unknown.
            item: which body it carried; default: −1, none.
            value: the number in the answer, NaN where there is none; default: none anywhere.

        Raises:
            ValueError: unequal lengths, or a time that is not finite.
        """
        due, done = np.asarray(due_s, dtype=np.float64), np.asarray(done_s, dtype=np.float64)
        sent = due if sent_s is None else np.asarray(sent_s, dtype=np.float64)
        good = np.asarray(ok, dtype=np.bool_)
        by = np.full(due.shape, "", dtype=np.str_) if path is None else np.asarray(path, dtype=np.str_)
        which = np.full(due.shape, -1, dtype=np.int64) if item is None else np.asarray(item, dtype=np.int64)
        number = np.full(due.shape, np.nan) if value is None else np.asarray(value, dtype=np.float64)
        if due.ndim != 1 or any(part.shape != due.shape for part in (done, sent, good, by, which, number)):
            raise ValueError("requests need arrays of one length: due, sent, done, ok, path, item, value")
        if not (np.isfinite(due).all() and np.isfinite(sent).all() and np.isfinite(done).all()):
            raise ValueError("a request's times must be finite: one that never ended is done when the probe gave up")
        order = np.argsort(due, kind="stable")
        no = np.zeros(due.shape, dtype=np.bool_)
        return cls(due[order], sent[order], done[order], good[order], by[order], which[order], number[order], no, no)

    def __len__(self) -> int:
        return len(self.due_s)

    @property
    def latency_s(self) -> FloatArray:
        """Corrected latency: done − due, seconds; of failed requests too."""
        return self.done_s - self.due_s

    @property
    def lateness_s(self) -> FloatArray:
        """How late the probe sent: sent − due, seconds."""
        return self.sent_s - self.due_s

    @property
    def ranked_latency_s(self) -> FloatArray:
        """Corrected latency with failed requests infinite: what quantiles are taken of."""
        return np.where(self.ok, self.latency_s, np.inf)

    def penalised_latency_s(self, penalty_s: float = math.inf) -> FloatArray:
        """Corrected latency with failed requests at `penalty_s` (or their own, if longer): what means are taken of."""
        return np.where(self.ok, self.latency_s, np.maximum(self.latency_s, penalty_s))

    def select(self, mask: npt.NDArray[Any]) -> Requests:
        """The requests where `mask` (shape (n,), bool) holds."""
        return Requests(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    def with_answers(self, *, compared: BoolArray, wrong: BoolArray) -> Requests:
        """The same requests, held against golden predictions."""
        return replace(self, compared=compared, wrong=wrong)

    def window(self, start_s: float, end_s: float) -> Requests:
        """The requests due in [start_s, end_s)."""
        return self.select((self.due_s >= start_s) & (self.due_s < end_s))

    def on_time(self, late_after_s: float) -> Requests:
        """The requests sent at most `late_after_s` late."""
        return self.select(self.lateness_s <= late_after_s)


@dataclass(frozen=True)
class Census:
    """Exact counts of one window. Values are None when there was nothing to count."""

    n: int
    """Requests counted (late ones are not)."""
    late: int
    """Requests excluded because the probe sent them too late."""
    failed: int
    fallback: int
    """Answered from the cache."""
    availability: float | None
    error_rate: float | None
    fallback_rate: float | None
    """Share of the *answered* requests that the cache answered."""
    latency_mean_s: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    enough: bool
    """Whether n reaches the minimum asked for."""
    why: str
    """Why not, in words; empty when enough."""

    @property
    def late_ratio(self) -> float:
        """Share of all requests sent that were late, 0 when none was sent."""
        return self.late / (self.n + self.late) if self.n + self.late else 0.0


def take_census(
    requests: Requests, *, late_after_s: float = math.inf, minimum: int = 1, penalty_s: float = math.inf
) -> Census:
    """Count one window.

    Args:
        requests: of this window only.
        late_after_s: lateness above it excludes a request.
        minimum: fewest requests that allow a verdict (see :func:`minimum_samples`).
        penalty_s: what a failed request adds to the mean latency: the probe's timeout.
    """
    counted = requests.on_time(late_after_s)
    n, failed = len(counted), int((~counted.ok).sum())
    late = len(requests) - n
    why = "" if n >= minimum else f"{n} requests counted ({late} late ones excluded), at least {minimum} are needed"
    return Census(
        n=n,
        late=late,
        failed=failed,
        fallback=int((counted.ok & (counted.path == "cache")).sum()),
        availability=measure("availability", counted),
        error_rate=measure("error_rate", counted),
        fallback_rate=measure("fallback_rate", counted),
        latency_mean_s=measure("latency_mean", counted, penalty_s=penalty_s),
        latency_p50_s=measure("latency_p50", counted),
        latency_p95_s=measure("latency_p95", counted),
        latency_p99_s=measure("latency_p99", counted),
        enough=n >= minimum,
        why=why,
    )


def measure(name: str, requests: Requests, *, penalty_s: float = math.inf) -> float | None:
    """The value of a named measure (:data:`MEASURES`, or any `latency_pNN`) over requests already on time.

    Returns:
        A share 0 to 1, or seconds (may be infinite); None when there is nothing to measure.

    Raises:
        ValueError: no such measure.
    """
    n = len(requests)
    if name in ("availability", "error_rate"):
        good = int(requests.ok.sum())
        return None if n == 0 else (good if name == "availability" else n - good) / n
    if name == "fallback_rate":
        answered = int(requests.ok.sum())
        return None if answered == 0 else int((requests.ok & (requests.path == "cache")).sum()) / answered
    if name == "golden_error_rate":
        compared = int(requests.compared.sum())
        return None if compared == 0 else int(requests.wrong.sum()) / compared
    if name == "latency_mean":
        return None if n == 0 else float(requests.penalised_latency_s(penalty_s).mean())
    q = quantile_of(name)
    if q is None:
        raise ValueError(f"no such measure: {name!r}; there are {', '.join(MEASURES)} and latency_pNN")
    return observed_quantile(requests.ranked_latency_s, q)


def quantile_of(name: str) -> float | None:
    """0.95 for `latency_p95`; None when the name is not a latency quantile."""
    found = _QUANTILE.fullmatch(name)
    q = float(found[1]) / 100.0 if found else 0.0
    return q if 0.0 < q < 1.0 else None


def observed_quantile(values: FloatArray, q: float) -> float | None:
    """The smallest observed value with at least the share `q` at or below it; None of an empty array."""
    if len(values) == 0:
        return None
    rank = quantile_rank(len(values), q)
    return float(np.partition(values, rank)[rank])


def quantile_rank(n: int, q: float) -> int:
    """Index of the observed `q` quantile among `n` sorted values (inverted empirical distribution)."""
    return min(n, max(1, math.ceil(q * n - 1e-9))) - 1


def minimum_samples(allowed_bad_ratio: float) -> int:
    """Fewest samples at which an objective that allows this share of bad ones can tell one bad from too many.

    ⌈1 / allowed⌉: 100 for availability ≥ 99 %, 20 for p95. 1 when nothing bad is allowed (a single bad
    sample breaks it at any size).
    """
    return 1 if allowed_bad_ratio <= 0.0 else math.ceil(1.0 / allowed_bad_ratio - 1e-9)


@dataclass(frozen=True)
class GaugeCensus:
    """A stepwise signal (ready replicas) over one window. Values are None when it was never known."""

    mean: float | None
    """Weighted by how long each value stood."""
    min: float | None
    max: float | None
    covered_s: float
    """Seconds of the window in which the value was known."""


def gauge_census(times_s: npt.ArrayLike, values: npt.ArrayLike, start_s: float, end_s: float) -> GaugeCensus:
    """Time-weighted mean, least and greatest value of a step function over [start_s, end_s].

    A value stands from its time until the next one; before the first it is unknown and left out.

    Args:
        times_s: shape (n,), any order.
        values: shape (n,); of two at one time the later listed stands.
        start_s: start of the window.
        end_s: its end.

    Raises:
        ValueError: unequal lengths, or a NaN.
    """
    t, v = np.asarray(times_s, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.shape != v.shape or t.ndim != 1:
        raise ValueError("a gauge needs as many times as values")
    if np.isnan(t).any() or np.isnan(v).any():
        raise ValueError("a gauge may not hold NaN: leave the step out")
    order = np.argsort(t, kind="stable")
    t, v = t[order], v[order]
    begin = np.minimum(np.maximum(t, start_s), end_s)
    stood = np.append(begin[1:], end_s) - begin if len(t) else np.empty(0)
    last_at_time = np.append(np.diff(t) > 0, True) if len(t) else np.empty(0, dtype=np.bool_)
    inside = last_at_time & ((stood > 0) | ((t >= start_s) & (t <= end_s)))
    if end_s < start_s or not inside.any():
        return GaugeCensus(None, None, None, 0.0)
    seen, covered = v[inside], float(stood[inside].sum())
    mean = float((seen * stood[inside]).sum()) / covered if covered > 0 else float(seen[-1])
    return GaugeCensus(mean, float(seen.min()), float(seen.max()), covered)


def time_weighted_mean(times_s: npt.ArrayLike, values: npt.ArrayLike, start_s: float, end_s: float) -> float | None:
    """Mean of a step function over [start_s, end_s], weighted by time; None when never known."""
    return gauge_census(times_s, values, start_s, end_s).mean


def time_min(times_s: npt.ArrayLike, values: npt.ArrayLike, start_s: float, end_s: float) -> float | None:
    """Least value of a step function over [start_s, end_s]; None when never known."""
    return gauge_census(times_s, values, start_s, end_s).min


def time_max(times_s: npt.ArrayLike, values: npt.ArrayLike, start_s: float, end_s: float) -> float | None:
    """Greatest value of a step function over [start_s, end_s]; None when never known."""
    return gauge_census(times_s, values, start_s, end_s).max
