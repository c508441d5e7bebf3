"""Numbers as people read them: names, limits, effects with their intervals, one row per SLI.

Every dash that stands for a minus is a real minus (−); a missing value is an en dash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlchaos_dagster.domain.record import RunRecord, SliResult, Verdict
from mlchaos_dagster.domain.spec import Objective, Quantity
from mlchaos_dagster.domain.units import show_duration, show_value
from mlchaos_dagster.evidence.selection import shown_slis, sli_label

BREAKER_STATES = {0.0: "closed", 1.0: "half-open", 2.0: "open"}
_SIGNS = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
MET, BROKEN, UNKNOWN = "✔", "✘", "?"


@dataclass(frozen=True)
class SliRow:
    """One SLI as text."""

    name: str
    before: str
    during: str
    after: str
    effect: str
    """`−0.6 pp`; an en dash when there is none."""
    interval: str
    """`[−1.2, −0.1]`; empty when there is none."""
    slo: str
    mark: str
    """✔, ✘ or ?; empty without an objective."""
    samples: int
    late: int
    detectable: str
    note: str
    """Why the interval is missing or not to be trusted."""


def quantity_text(quantity: Quantity) -> str:
    """A limit as it was meant: `99 %`, `300 ms`, `2`."""
    if quantity.unit == "ratio":
        return f"{quantity.value * 100:.10g} %"
    if quantity.unit == "s":
        return show_duration(quantity.value) if quantity.value >= 1 else f"{quantity.value * 1000:.10g} ms"
    return f"{quantity.value:g}"


def limit_text(objective: Objective) -> str:
    """`≥ 99 %`."""
    return f"{_SIGNS[objective.side]} {quantity_text(objective.limit)}"


def signed(value: float, digits: int) -> str:
    """With its sign, a real minus, and no sign on what rounds to zero."""
    rounded = round(value, digits)
    if rounded == 0:
        return f"{0:.{digits}f}"
    return f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}"


def effect_texts(result: SliResult) -> tuple[str, str]:
    """The effect with its unit, and its interval in the same unit without it."""
    if result.effect is None or not math.isfinite(result.effect):
        return "–", ""
    bounds = [b for b in (result.ci_low, result.ci_high) if b is not None and math.isfinite(b)]
    scale, digits, unit = _effect_scale(result.unit, max(abs(v) for v in (result.effect, *bounds)))
    effect = signed(result.effect * scale, digits) + (f" {unit}" if unit else "")
    if len(bounds) < 2:
        return effect, ""
    return effect, "[" + ", ".join(signed(b * scale, digits) for b in bounds) + "]"


def size_text(value: float, unit: str) -> str:
    """A change's size: `0.9 pp`, `13 ms`."""
    scale, digits, shown = _effect_scale(unit, abs(value))
    return f"{abs(value) * scale:.{digits}f}" + (f" {shown}" if shown else "")


def sli_rows(record: RunRecord, verdict: Verdict) -> list[SliRow]:
    """One row for every SLI that is shown, in that order."""
    return [_row(record, verdict, name) for name in shown_slis(record, verdict)]


def _row(record: RunRecord, verdict: Verdict, name: str) -> SliRow:
    result = verdict.slis[name]
    objectives = [o for o in record.experiment.steady_state if o.sli == name]
    slo = " and ".join(limit_text(o) for o in objectives) or result.slo
    effect, interval = effect_texts(result)
    mark = "" if not slo else {True: MET, False: BROKEN, None: UNKNOWN}[result.met]
    finite = result.detectable is not None and math.isfinite(result.detectable)
    return SliRow(
        name=sli_label(name, record.environment),
        before=show_value(result.baseline, result.unit),
        during=show_value(result.during, result.unit),
        after=show_value(result.after, result.unit),
        effect=effect,
        interval=interval + ("" if result.reliable or not interval else " *"),
        slo=slo,
        mark=mark,
        samples=result.samples,
        late=result.late,
        detectable=size_text(result.detectable or 0.0, result.unit) if finite else "–",
        note=result.why,
    )


def _effect_scale(unit: str, largest: float) -> tuple[float, int, str]:
    """Factor, digits and unit for a change. Small changes keep a digit that says something."""
    if unit == "ratio":
        return 100.0, 1 if largest >= 0.0005 or largest == 0 else 3, "pp"
    if unit == "s":
        if largest >= 1:
            return 1.0, 2, "s"
        return 1000.0, 0 if largest >= 0.003 or largest == 0 else 1, "ms"
    return 1.0, 0 if float(largest).is_integer() else 2, ""
