"""The block at the end of a run: verdict first, in words, then numbers with units and intervals.

Plain text; colour is an addition that carries nothing alone. The live view is in `live.py`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.domain.units import show_duration
from mlchaos_dagster.evidence import words
from mlchaos_dagster.evidence.expected import expectation_values
from mlchaos_dagster.evidence.live import LiveView, PlainProgress
from mlchaos_dagster.evidence.masking import mask_text, secrets_in
from mlchaos_dagster.evidence.rows import BROKEN, MET, SliRow, sli_rows

__all__ = ["LiveView", "PlainProgress", "end_block", "outcome_style", "paint"]

Segment = tuple[str, str]
"""Text and the name of its style; empty: none."""

_STYLES = {
    Outcome.HELD: "bold green",
    Outcome.DEVIATED: "bold red",
    Outcome.ABORTED: "bold magenta",
    Outcome.REFUSED: "bold yellow",
    Outcome.INCONCLUSIVE: "bold cyan",
    Outcome.UNCLEAN: "bold white on red",
    Outcome.ERROR: "bold red",
}
_MARK_STYLES = {MET: "green", BROKEN: "bold red"}
_LABEL = 17


def outcome_style(outcome: Outcome) -> str:
    """A rich style; the name of the outcome always stands beside it."""
    return _STYLES[outcome]


def end_block(
    record: RunRecord,
    verdict: Verdict,
    *,
    color: bool = False,
    width: int = 100,
    report_path: str = "",
    dagster_hint: str = "Dagster: make dev",
    again: str | None = None,
) -> str:
    """What is printed when a run is over; ends without a newline.

    Args:
        record: the facts.
        verdict: the judgement.
        color: add ANSI colours (needs rich).
        width: columns of the terminal; the table drops its intervals, then columns, rather than wrap.
        report_path: shown as it is.
        dagster_hint: how to see the same in Dagster; empty: nothing is said.
        again: the command that runs this once more; None: by its name, as if it stood in the library.
    """
    width = max(width, 40)
    lines: list[list[Segment]] = [_title(record, verdict, width)]
    first, *rest = words.explanation(record, verdict)
    for sentence in (first, *rest):
        loud = verdict.outcome is Outcome.UNCLEAN and sentence is first
        lines += [[("  " + text, "bold red" if loud else "")] for text in _wrap(sentence, width - 2)]
    if verdict.outcome is Outcome.UNCLEAN:
        lines += _shout(record, width)
    table = _table(record, verdict, width)
    lines += table
    notes = words.detectable_lines(record, verdict)[:1] if verdict.outcome is not Outcome.REFUSED else []
    if any(text.rstrip().endswith("] *") for line in table for text, _ in line):
        notes.append("* the interval is not to be trusted; the report says why.")
    for note in notes:
        lines += [[("  " + text, "dim")] for text in _wrap(note, width - 2)]
    lines += _footer(record, report_path, dagster_hint, width, words.again_command(record) if again is None else again)
    if hint := words.sandbox_hint(record):
        lines.append([("  " + hint, "dim")])
    text = "\n".join(paint(line, color) for line in lines)
    known = secrets_in(record.environment.model_dump(mode="json"), record.experiment.model_dump(mode="json"))
    return mask_text(text, known)


def paint(segments: Iterable[Segment], color: bool) -> str:
    """One line, trailing blanks removed; with ANSI colours when asked for."""
    if not color:
        return "".join(text for text, _ in segments).rstrip()
    from rich.color import ColorSystem
    from rich.style import Style

    return "".join(
        Style.parse(style).render(text, color_system=ColorSystem.STANDARD) if style else text
        for text, style in segments
    ).rstrip()


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns; a number is never parted from its unit, nor a sign from its limit."""
    tied = re.sub(r"(\d|[≥≤<>]) (?=%|ms\b|s\b|m\b|h\b|pp\b|\d)", "\\1\u00a0", text)
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(tied, width)]


def _title(record: RunRecord, verdict: Verdict, width: int) -> list[Segment]:
    outcome = words.shown_outcome(record, verdict)
    rest = f"  {record.experiment.name} · {record.environment.name}"
    length = show_duration(round(words.total_s(record), 1))
    gap = max(2, width - len(outcome) - len(rest) - len(length))
    return [(outcome, _STYLES[verdict.outcome]), (rest, "bold"), (" " * gap + length, "dim")]


def _shout(record: RunRecord, width: int) -> list[list[Segment]]:
    bar = "  " + "█" * (width - 2)
    lines: list[list[Segment]] = [[(bar, "bold red")]]
    for label, value in words.unclean_facts(record):
        # The command stands whole on its line, however narrow the terminal: it is there to be copied.
        strong = label == "type now"
        lines.append([(f"  {label:<{_LABEL - 2}}", "bold"), (value, "bold red" if strong else "")])
    lines.append([(bar, "bold red")])
    return lines


@dataclass(frozen=True)
class _Grid:
    """Where the columns of the table begin, so that the lines below it stand under them."""

    label: int = _LABEL
    slo: int = 0
    """Column of the SLOs; 0: no table."""
    mark: int = 0


def _table(record: RunRecord, verdict: Verdict, width: int) -> list[list[Segment]]:
    wanted = {o.sli for o in record.experiment.steady_state}
    wanted |= {e.sli for e in record.experiment.expect if e.sli}
    kept = verdict.model_copy(update={"slis": {n: r for n, r in verdict.slis.items() if n in wanted}})
    rows = sli_rows(record, kept)
    lines, grid = _sli_table(rows, width) if rows else ([], _Grid())
    for i, (expected, values, seen) in enumerate(expectation_values(record, verdict)):
        mark = {True: MET, False: BROKEN, None: "?"}[seen]
        lines += _fact("" if i else "must be seen", f"{expected}: {values}", width, grid, mark=mark)
    for i, finding in enumerate(record.findings):
        mark = {True: MET, False: BROKEN, None: "?"}[finding.passed]
        lines += _fact("" if i else words.judge_name(record), f"{finding.name}: {finding.saw}", width, grid, mark=mark)
    recovery = words.recovery_line(verdict)
    if recovery:
        limit = f"≤ {show_duration(verdict.recovery.within_s)}" if verdict.recovery.within_s else ""
        mark = {True: MET, False: BROKEN, None: "?"}[verdict.recovery.met]
        lines += _fact("recovery", recovery, width, grid, limit, mark)
    clean = words.clean_short(record)
    if clean:
        lines += _fact("clean", clean, width, grid)
    for i, line in enumerate(words.action_lines(record)):
        lines += _fact("" if i else "rollback", line, width, grid)
    return lines


def _sli_table(rows: Sequence[SliRow], width: int) -> tuple[list[list[Segment]], _Grid]:
    """The SLI table with as many columns as the width allows."""
    measured = any(r.effect != "–" for r in rows)
    effect = ("effect (95 %)", _effects(rows)) if measured else ("effect", ["–" for _ in rows])
    before, during, after = (
        ("before", [r.before for r in rows]),
        ("during", [r.during for r in rows]),
        ("after", [r.after for r in rows]),
    )
    slim = ("effect", [r.effect for r in rows])
    slo, mark = ("SLO", [r.slo for r in rows]), ("", [r.mark for r in rows])
    label = max(_LABEL, *(len(r.name) + 4 for r in rows))
    for columns in (
        [before, during, after, effect, slo, mark],
        [before, during, after, slim, slo, mark],
        [before, during, slim, slo, mark],
        [during, slo, mark],
    ):
        widths = [max(len(title), *(len(v) for v in values)) for title, values in columns]
        spare = width - label - sum(widths)
        if spare >= 2 * (len(widths) - 1):
            break
    gap = max(2, min(5, spare // max(1, len(widths) - 1)))
    header: list[Segment] = [(" " * label, "")]
    lines = [header]
    for (title, _), w in zip(columns, widths, strict=True):
        header.append((f"{title:<{w + gap}}", "dim"))
    for i, row in enumerate(rows):
        line: list[Segment] = [(f"  {row.name:<{label - 2}}", "bold")]
        for (_, values), w in zip(columns, widths, strict=True):
            line.append((f"{values[i]:<{w + gap}}", _MARK_STYLES.get(values[i], "")))
        lines.append(line)
    mark_at = label + sum(widths[:-1]) + gap * (len(widths) - 1)
    return lines, _Grid(label, mark_at - gap - widths[-2], mark_at)


def _effects(rows: Sequence[SliRow]) -> list[str]:
    size = max(len(r.effect) for r in rows)
    return [f"{r.effect:<{size}}  {r.interval}".rstrip() for r in rows]


def _fact(label: str, text: str, width: int, grid: _Grid, limit: str = "", mark: str = "") -> list[list[Segment]]:
    """A labelled text, wrapped, with its limit and mark under those of the table where there is room."""
    lines: list[list[Segment]] = []
    for i, part in enumerate(_wrap(text, max(20, width - grid.label)) or [""]):
        lines.append([(f"  {label if i == 0 else '':<{grid.label - 2}}", "bold"), (part, "")])
    if not limit and not mark:
        return lines
    used = grid.label + len(lines[-1][1][0])
    if used + 2 + len(limit) + 3 > width:
        lines.append([(" " * grid.label, "")])
        used = grid.label
    to_limit = max(2 if used > grid.label else 0, grid.slo - used)
    to_mark = max(2, grid.mark - used - to_limit - len(limit))
    lines[-1] += [(" " * to_limit + limit + " " * to_mark, ""), (mark, _MARK_STYLES.get(mark, ""))]
    return lines


def _footer(record: RunRecord, report_path: str, dagster_hint: str, width: int, again: str) -> list[list[Segment]]:
    parts = [f"report {report_path}"] if report_path else []
    if again:
        parts.append(f"again: {again}")
    if dagster_hint:
        parts.append(dagster_hint)
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}      {part}" if lines[-1] else f"  {part}"
        if len(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(f"  {part}")
    return [[(line, "dim")] for line in lines]
