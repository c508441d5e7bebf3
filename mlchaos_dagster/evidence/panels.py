"""The small multiples of the picture: what each panel shows, its scale and its legend.

A panel knows nothing of the figure around it; it draws on the axes it is given.
"""

# matplotlib and numpy type parts of themselves as unknown; what is ours is still checked.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlchaos_dagster.domain.environment import VALUE_MEASURES
from mlchaos_dagster.domain.record import RunRecord, Samples, Span, Verdict
from mlchaos_dagster.domain.spec import Objective
from mlchaos_dagster.domain.units import show_latency, show_percent, show_value
from mlchaos_dagster.evidence.layout import origin_of
from mlchaos_dagster.evidence.palette import LIGHT
from mlchaos_dagster.evidence.rows import BREAKER_STATES, limit_text
from mlchaos_dagster.evidence.selection import shown_name
from mlchaos_dagster.evidence.series import (
    PATHS,
    FloatArray,
    RequestSeries,
    answer_series,
    request_series,
    signal_names,
    signal_steps,
)
from mlchaos_dagster.evidence.words import injected

_MAX_SIGNALS = 5


@dataclass(frozen=True)
class X:
    """The time axis: seconds on the run's clock → units since the zero of the picture."""

    zero: float
    scale: float
    start: float
    end: float

    def __call__(self, t: Any) -> Any:
        """One instant, or an array of them."""
        return (t - self.zero) / self.scale


@dataclass(frozen=True)
class Panel:
    """One row of the picture."""

    title: str
    height_in: float
    draw: Callable[[Any, X], None]
    legend: tuple[tuple[str, str], ...] = ()
    """(text, palette name of its swatch or empty)."""
    summary: str = ""
    """Before, during and after, in words, at the right end of the title."""
    grid: bool = True
    timed: bool = True
    """Whether its time axis means anything."""


def panels_of(record: RunRecord, samples: Samples, verdict: Verdict, span: Span) -> list[Panel]:
    """The panels that this run has data for; one that says so when it has none."""
    panels: list[Panel] = []
    if samples.requests:
        series = request_series(
            samples.requests,
            span,
            anchor_s=origin_of(record),
            max_lateness_s=record.environment.sampling.max_lateness,
        )
        panels += [_availability(record, verdict, series), _latency(record, verdict, series), _paths(series)]
        for name in _chosen_answers(record, verdict):
            measure = str(record.environment.slis[name].measure)
            values = answer_series(record, samples, span, series.edges, measure)
            panels.append(_answers(record, verdict, series, name, values))
    panels += [_signal(record, samples, verdict, span, name) for name in _chosen_signals(record, samples)]
    if not panels:
        panels.append(Panel("nothing was measured", 0.8, _draw_nothing(record), grid=False, timed=False))
    return panels


def _availability(record: RunRecord, verdict: Verdict, series: RequestSeries) -> Panel:
    slos = _slos(record, "availability") + _slos(record, "error_rate")
    levels = [o.limit.value if o.floor else 1 - o.limit.value for o in slos]
    worst = np.nanmin(series.availability, initial=1.0)
    reach = max(1 - min([worst, *levels]), 0.01)
    bottom = max(0.0, 1 - 1.25 * reach)

    def draw(axes: Any, x: X) -> None:
        failed = np.where(np.isnan(series.availability), 1.0, series.availability)
        _bars(axes, x(series.edges), failed, np.ones_like(failed), "error", hatch="//////")
        seen = np.where(np.isnan(series.availability), np.nan, 1.0)
        axes.plot(x(series.centres), seen, color=LIGHT["good"], linewidth=1.6, zorder=3)
        axes.set_ylim(bottom, 1 + 0.04 * (1 - bottom))
        digits = 0 if 1 - bottom > 0.04 else 1
        axes.set_yticks(_ticks(bottom, 1.0, 4))
        axes.yaxis.set_major_formatter(lambda v, _: show_percent(v, digits))
        for objective, level in zip(slos, levels, strict=True):
            _slo_line(axes, level, f"SLO {limit_text(objective)}")

    width = series.edges[1] - series.edges[0]
    per = "second" if width == 1 else f"{width:g} s"
    legend = ((f"failed requests, hanging from 100 %, per {per}", "error"),)
    return Panel("availability", 0.95, draw, legend, _summary(record, verdict, "availability"))


def _latency(record: RunRecord, verdict: Verdict, series: RequestSeries) -> Panel:
    slos = [
        (o, o.limit.value) for name in ("latency_p50", "latency_p95", "latency_p99", "latency_mean")
        for o in _slos(record, name)
    ]  # fmt: skip
    p95 = series.p95_s[np.isfinite(series.p95_s)]
    p50 = series.p50_s[np.isfinite(series.p50_s)]
    tallest = max([float(p95.max(initial=0.0)), float(p50.max(initial=0.0)), *(v for _, v in slos), 1e-3])
    lowest = float(min(p50.min(initial=tallest), tallest))
    logarithmic = tallest / max(lowest, 1e-4) > 12
    top = tallest * (1.6 if logarithmic else 1.2)
    bottom = 10 ** math.floor(math.log10(max(lowest, 1e-4) * 0.9)) if logarithmic else 0.0
    unanswered = np.isinf(series.p95_s)

    def draw(axes: Any, x: X) -> None:
        centres = x(series.centres)
        low, high = np.minimum(series.p50_s, top), np.minimum(series.p95_s, top)
        if logarithmic:
            axes.set_yscale("log")
        # Steps, not slopes: a slope between two seconds would draw latencies that nobody had.
        axes.fill_between(centres, low, high, step="mid", color=LIGHT["model"], alpha=0.22, linewidth=0)
        axes.plot(centres, high, color=LIGHT["model"], linewidth=1.4, drawstyle="steps-mid")
        axes.plot(centres, low, color=LIGHT["model"], linewidth=1.0, drawstyle="steps-mid", linestyle=(0, (3, 1.5)))
        if unanswered.any():
            axes.plot(
                centres[unanswered], np.full(int(unanswered.sum()), top), linestyle="none", marker="^", markersize=5,
                color=LIGHT["error"], clip_on=False, zorder=5,
            )  # fmt: skip
        axes.set_ylim(bottom, top)
        if logarithmic:
            decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
            axes.set_yticks([t for d in decades for t in (10.0**d,) if bottom <= t <= top])
            axes.minorticks_off()
        else:
            axes.set_yticks(_ticks(0.0, top, 4))
        axes.yaxis.set_major_formatter(lambda v, _: show_latency(v) if v else "0")
        for objective, level in slos:
            _slo_line(axes, level, f"SLO {shown_name(objective.sli)}\n{limit_text(objective)}")

    legend = [("p95 ─── and p50 ╌╌╌" + (", log scale" if logarithmic else ""), "model")]
    if unanswered.any():
        legend.append(("▲ no answer", ""))
    return Panel("latency", 1.1, draw, tuple(legend), _summary(record, verdict, "latency_p95"))


def _paths(series: RequestSeries) -> Panel:
    present = [p for p in PATHS if series.paths_per_s[p].any()]

    def draw(axes: Any, x: X) -> None:
        base = np.zeros(len(series.edges) - 1)
        for path in present:
            values = series.paths_per_s[path]
            _bars(axes, x(series.edges), base, base + values, path, hatch="//////" if path == "error" else None)
            base = base + values
        top = float(np.quantile(base, 0.98)) * 1.15 if len(base) else 1.0
        axes.set_ylim(0, max(top, 1.0))
        axes.set_yticks(_ticks(0.0, max(top, 1.0), 3))

    names = {"model": "the model", "cache": "the cache", "error": "nobody (error)"}
    return Panel("who answered", 0.85, draw, tuple((names[p], p) for p in present), "requests per second")


def _answers(record: RunRecord, verdict: Verdict, series: RequestSeries, name: str, values: FloatArray) -> Panel:
    slos, unit = _slos_by_name(record, name), record.environment.slis[name].shown_unit
    top = max([float(np.nanmax(values, initial=0.0)), *(1.5 * o.limit.value for o in slos), 0.01])
    share = unit == "ratio"

    def draw(axes: Any, x: X) -> None:
        if share:
            heights = np.nan_to_num(values)
            _bars(axes, x(series.edges), np.zeros_like(heights), heights, "error", hatch="xxxx")
        else:
            axes.step(x(series.edges[1:]), values, where="pre", color=LIGHT["model"], linewidth=1.5)
        axes.set_ylim(0.0, top * 1.15)
        axes.set_yticks(_ticks(0.0, top, 3))
        digits = 0 if top > 0.04 else 1
        axes.yaxis.set_major_formatter(lambda v, _: show_percent(v, digits) if share else show_value(v, unit))
        for objective in slos:
            _slo_line(axes, objective.limit.value, f"SLO {limit_text(objective)}")

    legend = (
        (("answered 200 with a wrong number", "error"),) if share else (("against the baseline's answers", "model"),)
    )
    result = verdict.slis[name]
    parts = (("before", result.baseline), ("during", result.during), ("after", result.after))
    summary = " · ".join(f"{word} {show_value(v, unit)}" for word, v in parts if v is not None)
    return Panel(shown_name(name), 0.7, draw, legend, summary)


def _chosen_answers(record: RunRecord, verdict: Verdict) -> list[str]:
    """SLIs of answered numbers that the experiment speaks of; wrong answers always: nobody may have to look for them."""
    spoken = {o.sli for o in record.experiment.steady_state} | {e.sli for e in record.experiment.expect}
    spoken |= {c.sli for c in record.experiment.abort}
    wrong = verdict.golden is not None and verdict.golden.wrong > 0
    return [
        name
        for name, sli in record.environment.slis.items()
        if sli.measure in VALUE_MEASURES and name in verdict.slis
        and (name in spoken or (wrong and sli.measure == "golden_error_rate"))
    ]  # fmt: skip


def _signal(record: RunRecord, samples: Samples, verdict: Verdict, span: Span, name: str) -> Panel:
    times, values = signal_steps(samples, name, span.end)
    sli_name = next((n for n, s in record.environment.slis.items() if s.signal == name or f"sli:{n}" == name), "")
    slos = _slos_by_name(record, sli_name) if sli_name else []
    breaker = "breaker" in name and "state" in name
    unit = record.environment.slis[sli_name].shown_unit if sli_name else ""
    top = max([float(values.max(initial=0.0)), *(o.limit.value for o in slos)])
    bottom = min(0.0, float(values.min(initial=0.0)))

    def draw(axes: Any, x: X) -> None:
        axes.step(x(times), values, where="post", color=LIGHT["model"], linewidth=1.5)
        axes.fill_between(x(times), bottom, values, step="post", color=LIGHT["model"], alpha=0.15, linewidth=0)
        if breaker:
            axes.set_ylim(-0.25, 2.35)
            axes.set_yticks(list(BREAKER_STATES), labels=list(BREAKER_STATES.values()))
        else:
            high = top if top > bottom else bottom + 1.0
            axes.set_ylim(bottom, bottom + (high - bottom) * 1.18)
            axes.set_yticks(_ticks(bottom, high, 3, whole=_whole(values)))
            axes.yaxis.set_major_formatter(lambda v, _: show_value(v, unit))
        for objective in slos:
            _slo_line(axes, objective.limit.value, f"SLO {limit_text(objective)}")

    summary = _summary(record, verdict, sli_name) or _steps_summary(record, samples, name, breaker)
    return Panel(shown_name(name.removeprefix("sli:")), 0.6, draw, (), summary)


def _chosen_signals(record: RunRecord, samples: Samples) -> list[str]:
    """Ready replicas, what the experiment speaks of, then what moved; a constant says nothing."""
    spoken = {e.signal for e in record.experiment.expect}
    for objective in record.experiment.steady_state:
        sli = record.environment.slis.get(objective.sli)
        spoken |= {f"sli:{objective.sli}", sli.signal if sli else None}
    names = signal_names(samples)
    moved = {n for n in names if len({v for _, v in samples.signal(n)}) > 1}
    ranked = sorted(names, key=lambda n: (n != "ready_replicas", n not in spoken, n not in moved, names.index(n)))
    return [n for n in ranked if n == "ready_replicas" or n in spoken or n in moved][:_MAX_SIGNALS]


def _bars(
    axes: Any, edges: FloatArray, low: FloatArray, high: FloatArray, colour: str, hatch: str | None = None
) -> None:
    """Bars between two heights as one collection: hundreds of single patches would take a second to draw."""
    from matplotlib.collections import PolyCollection

    inset = 0.06 * (edges[1] - edges[0])
    shown = np.flatnonzero(high - low > 1e-12)
    corners = [
        [(edges[i] + inset, low[i]), (edges[i] + inset, high[i]), (edges[i + 1] - inset, high[i]),
         (edges[i + 1] - inset, low[i])]
        for i in shown
    ]  # fmt: skip
    if corners:
        bars = PolyCollection(
            corners, facecolors=LIGHT[colour], edgecolors=LIGHT["paper"] if hatch else "none", linewidths=0
        )
        if hatch:
            bars.set_hatch(hatch)
        axes.add_collection(bars, autolim=False)


def _slo_line(axes: Any, level: float, label: str) -> None:
    axes.axhline(level, color=LIGHT["slo"], linewidth=1.1, linestyle=(0, (6, 2)), zorder=3.5)
    axes.annotate(
        label, (1.0, level), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        va="center", fontsize=8, color=LIGHT["slo"],
        annotation_clip=False,
    )  # fmt: skip


def _draw_nothing(record: RunRecord) -> Callable[[Any, X], None]:
    touched = injected(record)
    said = "The measurements of this run are missing." if touched else "No request was sent, and nothing was injected."

    def draw(axes: Any, x: X) -> None:
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", color=LIGHT["muted"], fontsize=9)

    return draw


def _slos(record: RunRecord, measure: str) -> list[Objective]:
    slis = record.environment.slis
    return [o for o in record.experiment.steady_state if o.sli in slis and slis[o.sli].measure == measure]


def _slos_by_name(record: RunRecord, sli: str) -> list[Objective]:
    return [o for o in record.experiment.steady_state if o.sli == sli]


def _summary(record: RunRecord, verdict: Verdict, measure: str) -> str:
    slis = record.environment.slis
    name = next((n for n in verdict.slis if n == measure or (n in slis and slis[n].measure == measure)), None)
    if name is None:
        return ""
    result = verdict.slis[name]
    parts = (("before", result.baseline), ("during", result.during), ("after", result.after))
    prefix = shown_name(name) + " " if measure.startswith("latency") else ""
    return prefix + " · ".join(f"{word} {show_value(v, result.unit)}" for word, v in parts if v is not None)


def _steps_summary(record: RunRecord, samples: Samples, name: str, breaker: bool) -> str:
    parts: list[str] = []
    for word, span in (("before", record.baseline), ("during", record.tested), ("after", record.after)):
        values = sorted({v for t, v in samples.signal(name) if span and span.start <= t < span.end})
        if not values:
            continue
        shown = [BREAKER_STATES.get(v, f"{v:g}") if breaker else show_value(v, "") for v in values]
        parts.append(f"{word} {shown[0]}" if len(shown) == 1 else f"{word} {shown[0]} to {shown[-1]}")
    return " · ".join(parts)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = 1.0 if high - low <= 4 else max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _whole(values: Iterable[float]) -> bool:
    return all(float(v).is_integer() for v in values)
