"""Where the marks and bands of the picture go, and what they are called. Geometry only; draws nothing.

Labels of marks stand in rows above the panels, each beginning at its line. A later mark's line must not cut through
an earlier mark's label, so labels that would touch go to different rows, the earlier one higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.record import RunRecord, Span, Verdict
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.domain.units import show_duration

BandKind = Literal["baseline", "fault", "recovery"]
MarkKind = Literal["fault", "bad", "good"]

_MARKS: tuple[tuple[str, str, MarkKind], ...] = (
    ("injected", "injected", "fault"),
    ("confirmed", "confirmed", "fault"),
    ("first_bad", "first bad", "bad"),
    ("breach", "breach", "bad"),
    ("stop_requested", "stop asked", "bad"),
    ("recover_requested", "recover", "good"),
    ("proven_clean", "clean", "good"),
    ("steady_again", "steady", "good"),
)


@dataclass(frozen=True)
class Band:
    """A phase of the run and its labels, longest first."""

    kind: BandKind
    span: Span
    labels: tuple[str, ...]

    def label_that_fits(self, width: float, char_width: float) -> str:
        """The longest label that fits; empty when none does."""
        return next((text for text in self.labels if len(text) * char_width <= width), "")


@dataclass(frozen=True)
class Mark:
    """A named instant."""

    t: float
    label: str
    kind: MarkKind


def origin_of(record: RunRecord) -> float:
    """The zero of the picture's time axis: the injection, else the window's start, else the run's."""
    injected = record.moment("injected")
    if injected is not None:
        return injected
    if record.window:
        return record.window.start
    return record.baseline.end if record.baseline else 0.0


def bands_of(record: RunRecord, end_s: float) -> list[Band]:
    """Baseline, fault and recovery, as far as the run came."""
    bands: list[Band] = []
    if record.baseline:
        length = show_duration(round(record.baseline.length, 1))
        bands.append(Band("baseline", record.baseline, (f"baseline {length}", "baseline")))
    if record.window:
        length = show_duration(round(record.window.length, 1))
        if record.shadow:
            labels = (f"shadow window {length} · nothing injected", f"shadow {length}", "shadow")
        else:
            kind = record.experiment.fault.kind
            hit = f" on {_targets(record)}" if record.fault and record.fault.targets else ""
            labels = (f"fault {length} · {kind}{hit}", f"fault {length} · {kind}", f"fault {length}", "fault")
        bands.append(Band("fault", record.window, labels))
        recovery_end = record.after.end if record.after else end_s
        if recovery_end > record.window.end:
            span = Span(start=record.window.end, end=recovery_end)
            length = show_duration(round(span.length, 1))
            labels = (f"recovery {length}", "recovery")
            if record.clean is None or not record.clean.proven:
                labels = ("not proven clean: the fault may be live", "not proven clean")
            bands.append(Band("recovery", span, labels))
    return bands


def marks_of(record: RunRecord, verdict: Verdict, first_bad_s: float | None = None) -> list[Mark]:
    """The moments worth a line, in time order, labelled with the time on the picture's axis.

    Args:
        record: whose moments.
        verdict: for the recovery.
        first_bad_s: the first bad request, where the watch loop had no reason to note it.
    """
    zero = origin_of(record)
    marks: list[Mark] = []
    for name, label, kind in _MARKS:
        t = record.moment(name)
        if name == "steady_again":
            # The table's number, not the moment at which the watch loop was sure of it.
            t = _steady(record, verdict)
        elif name == "first_bad" and t is None and first_bad_s is not None:
            t = first_bad_s
        if t is None or (record.shadow and kind != "bad"):
            continue
        shown = "" if name == "injected" else f" {_on_axis(t - zero)}"
        marks.append(Mark(t, label + shown, kind))
    return sorted(marks, key=lambda m: m.t)


def rows_of(starts: Sequence[float], widths: Sequence[float], gap: float) -> list[int]:
    """A row for each label, 0 nearest to the panels.

    Args:
        starts: where each label begins, ascending.
        widths: of the labels.
        gap: least distance between two labels of one row.
    """
    rows = [0] * len(starts)
    for i in range(len(starts) - 1, -1, -1):
        below = [rows[j] for j in range(i + 1, len(starts)) if starts[j] < starts[i] + widths[i] + gap]
        rows[i] = max(below) + 1 if below else 0
    return rows


def _on_axis(seconds: float) -> str:
    """To the centisecond: what took 20 ms must not look like nothing."""
    if abs(seconds) >= 600:
        return show_duration(seconds)
    return f"{seconds:.2f} s".replace("-", "−")


def removed_at(record: RunRecord) -> float | None:
    """When the fault was proven gone, else when it was asked to go; None when there was no window."""
    clean = record.moment("proven_clean")
    return clean if clean is not None else record.window.end if record.window else None


def recovery_origin(record: RunRecord) -> float | None:
    """From when recovery counts, as in the judgement: the removal; for a single kill the kill itself."""
    if record.window is None:
        return None
    fault = record.experiment.fault
    return record.window.end if is_held(fault.kind, fault.params()) else record.window.start


def _steady(record: RunRecord, verdict: Verdict) -> float | None:
    recovery, origin = verdict.recovery, recovery_origin(record)
    if recovery.steady_s is None or "steady" in recovery.censored or origin is None:
        return None
    return origin + recovery.steady_s


def _targets(record: RunRecord) -> str:
    assert record.fault
    targets = record.fault.targets
    shown = listed(targets, 2)
    return f"{shown} ({len(targets)} of {record.fault.existing})" if record.fault.existing else shown
