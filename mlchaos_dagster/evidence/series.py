"""Raw samples as time-binned series for plotting.

Bins start at the injection, so that no bin mixes what was before the fault with what came after. Requests that the
probe sent too late are left out, as they are in the judgement: the picture and the table show the same census.
"""

# matplotlib and numpy type parts of themselves as unknown; what is ours is still checked.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.domain.environment import SHIFT_MEASURES, VALUE_MEASURES
from mlchaos_dagster.domain.record import RequestSample, RunRecord, Samples, Span
from mlchaos_dagster.judgement.measures import Phase, reference_of, request_value
from mlchaos_dagster.judgement.shift import FEWEST_VALUES

FloatArray: TypeAlias = npt.NDArray[np.float64]

PATHS = ("model", "cache", "error")
"""Every answer is counted under one of these; an unknown path of a good answer counts as `model`."""

_WIDTHS_S = (1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_MAX_BINS = 180
"""More bars than this are thinner than a few pixels."""


@dataclass(frozen=True, eq=False)
class RequestSeries:
    """Requests per bin. Rates are per second whatever the bin's width; empty bins are NaN where a ratio is."""

    edges: FloatArray
    """Shape (n + 1,), seconds on the run's clock."""
    ok_per_s: FloatArray
    failed_per_s: FloatArray
    availability: FloatArray
    """0–1; NaN in a bin without requests."""
    p50_s: FloatArray
    p95_s: FloatArray
    """A failed request ranks as infinitely slow, as in the judgement; NaN in a bin without requests."""
    paths_per_s: dict[str, FloatArray]
    late: int
    """Requests left out because they were sent too late."""

    @property
    def error_rate(self) -> FloatArray:
        """0–1; NaN in a bin without requests."""
        return 1.0 - self.availability

    @property
    def centres(self) -> FloatArray:
        """The middle of each bin."""
        return (self.edges[:-1] + self.edges[1:]) / 2


def extent(record: RunRecord, samples: Samples) -> Span:
    """All that was observed, from the first to the last instant anything is known of."""
    times = [m.t for m in record.moments]
    times += [t for s in (record.baseline, record.window, record.after) if s for t in (s.start, s.end)]
    if samples.requests:
        times += [min(r.due_s for r in samples.requests), max(r.due_s for r in samples.requests)]
    if samples.signals:
        times += [samples.signals[0].t, samples.signals[-1].t]
    times = [t for t in times if math.isfinite(t)]
    if not times:
        return Span(start=0.0, end=1.0)
    return Span(start=min(times), end=max(max(times), min(times) + 1.0))


def bin_width(length_s: float) -> float:
    """One second, or the next round width that keeps the bars wide enough to see."""
    return next((w for w in _WIDTHS_S if length_s / w <= _MAX_BINS), _WIDTHS_S[-1])


def request_series(
    requests: Sequence[RequestSample],
    span: Span,
    *,
    anchor_s: float,
    max_lateness_s: float,
    width_s: float | None = None,
) -> RequestSeries:
    """Count and rank requests per bin.

    Args:
        requests: any order.
        span: what to cover.
        anchor_s: a bin edge lies here.
        max_lateness_s: a request sent later than this after its time is left out and counted in `late`.
        width_s: of a bin; default `bin_width`.
    """
    width = width_s or bin_width(span.length)
    first = anchor_s - math.ceil((anchor_s - span.start) / width - 1e-9) * width
    n = max(1, math.ceil((span.end - first) / width - 1e-9))
    edges: FloatArray = first + width * np.arange(n + 1, dtype=np.float64)
    due = np.array([r.due_s for r in requests], dtype=np.float64)
    late = np.array([r.sent_s - r.due_s > max_lateness_s for r in requests], dtype=np.bool_)
    inside = (due >= edges[0]) & (due < edges[-1]) & ~late
    kept = [r for r, keep in zip(requests, inside, strict=True) if keep]
    due = due[inside]
    ok = np.array([r.ok for r in kept], dtype=np.bool_)
    latency = np.array([r.done_s - r.due_s if r.ok else math.inf for r in kept], dtype=np.float64)
    path = np.array([_path(r) for r in kept], dtype=np.str_)
    index = np.clip(((due - first) / width + 1e-9).astype(np.int64), 0, n - 1)

    def count(mask: npt.NDArray[np.bool_]) -> FloatArray:
        return np.bincount(index[mask], minlength=n).astype(np.float64)

    good, total = count(ok), count(np.ones(len(kept), dtype=np.bool_))
    availability = np.full(n, np.nan)
    np.divide(good, total, out=availability, where=total > 0)
    p50, p95 = np.full(n, np.nan), np.full(n, np.nan)
    order = np.argsort(index, kind="stable")
    for i, values in enumerate(np.split(latency[order], np.cumsum(total)[:-1].astype(np.int64))):
        if len(values):
            ranked = np.sort(values)
            p50[i], p95[i] = (ranked[max(0, math.ceil(q * len(ranked)) - 1)] for q in (0.5, 0.95))
    # The outer bins are cut off by the observation: their rates are over what was observed of them. A sliver without
    # a failure would only show a ragged edge.
    observed = np.minimum(edges[1:], span.end) - np.maximum(edges[:-1], span.start)
    sliver = (observed < 0.25 * width) & (total == good)
    good, total = np.where(sliver, 0.0, good), np.where(sliver, 0.0, total)
    seconds = np.maximum(observed, 0.25 * width)
    return RequestSeries(
        edges=edges,
        ok_per_s=good / seconds,
        failed_per_s=(total - good) / seconds,
        availability=availability,
        p50_s=p50,
        p95_s=p95,
        paths_per_s={name: np.where(sliver, 0.0, count(path == name)) / seconds for name in PATHS},
        late=int(late.sum()),
    )


def answer_series(record: RunRecord, samples: Samples, span: Span, edges: FloatArray, measure: str) -> FloatArray:
    """A measure of the answered numbers per bin, shape (len(edges) − 1,); NaN where too few were answered.

    A distance needs numbers: where a bin holds too few, it looks back over as many as it takes at the probe's rate.
    """
    values = np.full(len(edges) - 1, np.nan)
    reference = None if record.baseline is None else reference_of(samples, record.environment, record.baseline)
    if reference is None:
        return values
    requests = Phase(samples, record.environment, span, reference).requests
    least = 2 * FEWEST_VALUES / record.environment.probe.rate if measure in SHIFT_MEASURES else 0.0
    for i, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        value = request_value(measure, requests.window(min(float(start), float(end) - least), float(end)), reference)
        values[i] = math.nan if value is None else value
    return values


def signal_steps(samples: Samples, name: str, until_s: float) -> tuple[FloatArray, FloatArray]:
    """One signal as a step line: each reading stands until the next, the last one until `until_s`.

    Readings that repeat the value before them are dropped; they would only make the picture heavy.
    """
    steps = [(t, v) for t, v in samples.signal(name) if math.isfinite(v)]
    times: list[float] = []
    values: list[float] = []
    for t, v in steps:
        if not values or v != values[-1]:
            times.append(t)
            values.append(v)
    if steps:
        times.append(max(until_s, times[-1]))
        values.append(values[-1])
    return np.array(times, dtype=np.float64), np.array(values, dtype=np.float64)


def signal_names(samples: Samples) -> list[str]:
    """Signals with at least one reading, in the order they were first read."""
    return list(dict.fromkeys(s.name for s in samples.signals))


def blind_spans(record: RunRecord, samples: Samples) -> list[Span]:
    """Stretches without a measurement: the gaps that were recorded, and silences of the probe inside the phases."""
    spans = list(samples.gaps)
    phases = [s for s in (record.baseline, record.window, record.after) if s]
    if samples.requests and phases:
        due = np.sort(np.array([r.due_s for r in samples.requests], dtype=np.float64))
        due = np.concatenate([[phases[0].start], due, [max(due[-1], phases[-1].end)]])
        quiet = max(1.0, 10.0 * float(np.median(np.diff(due))))
        for i in np.flatnonzero(np.diff(due) > quiet):
            silence = Span(start=float(due[i]), end=float(due[i + 1]))
            if not any(g.start < silence.end and silence.start < g.end for g in samples.gaps):
                spans.append(silence)
    return sorted(spans, key=lambda s: s.start)


def first_bad(record: RunRecord, samples: Samples) -> float | None:
    """When the first request of the window was due that failed, or was slower or other than an objective allows."""
    if record.window is None:
        return None
    slis = record.environment.slis
    limits = [
        o.limit.value
        for o in record.experiment.steady_state
        if not o.floor and o.sli in slis and str(slis[o.sli].measure).startswith("latency_p")
    ]
    slowest, late = min(limits, default=math.inf), record.environment.sampling.max_lateness
    bad = (
        r.due_s
        for r in samples.requests_due(record.window)
        if r.sent_s - r.due_s <= late and (not r.ok or r.done_s - r.due_s >= slowest)
    )
    found = [*bad, *_first_wrong(record, samples)]
    return min(found, default=None)


def _first_wrong(record: RunRecord, samples: Samples) -> list[float]:
    """When the first wrong answer of the window was due, where an objective speaks of answered numbers."""
    slis = record.environment.slis
    spoken = any(o.sli in slis and slis[o.sli].measure in VALUE_MEASURES for o in record.experiment.steady_state)
    if not spoken or record.window is None or record.baseline is None:
        return []
    reference = reference_of(samples, record.environment, record.baseline)
    requests = Phase(samples, record.environment, record.window, reference).requests
    return [float(t) for t in requests.due_s[requests.wrong][:1]]


def _path(request: RequestSample) -> str:
    if not request.ok:
        return "error"
    return request.path if request.path in PATHS else "model"
