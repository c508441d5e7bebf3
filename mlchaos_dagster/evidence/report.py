"""The report of a run: one HTML file that needs nothing else, and Markdown for Dagster.

Everything that came from a spec, a backend or a person is escaped; secrets are masked by key and wherever else they
turn up.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import RunRecord, Samples, Verdict
from mlchaos_dagster.domain.units import show_duration
from mlchaos_dagster.engine.files import write_atomic
from mlchaos_dagster.evidence import words
from mlchaos_dagster.evidence.bars import recovery_svg
from mlchaos_dagster.evidence.document import by_hand_commands, markdown_code, markdown_text
from mlchaos_dagster.evidence.layout import origin_of, recovery_origin
from mlchaos_dagster.evidence.masking import mask_text, secrets_in
from mlchaos_dagster.evidence.palette import DARK, LIGHT, variables
from mlchaos_dagster.evidence.plots import picture_png, picture_svg
from mlchaos_dagster.evidence.rows import sli_rows
from mlchaos_dagster.evidence.spec_text import spec_yaml

HistoryEntry = tuple[str, Outcome | str, Any]
"""(run_id, outcome, started_at as Unix seconds or text)."""

_HISTORY_SHOWN = 30


def render_html(
    record: RunRecord,
    samples: Samples,
    verdict: Verdict,
    history: Sequence[HistoryEntry] = (),
    *,
    backlog: str = "",
) -> str:
    """The whole report as one self-contained page.

    Args:
        record: the facts.
        samples: raw measurements, for the picture.
        verdict: the judgement.
        history: earlier runs of the same experiment, oldest first; reports are expected beside this one.
        backlog: the backlog entry that a deviation made; default: the one it proposes.
    """
    from markupsafe import Markup

    known = secrets_in(record.environment.model_dump(mode="json"), record.experiment.model_dump(mode="json"))
    # Inside HTML an SVG needs no namespace, and a page without any URL is easily seen to fetch nothing.
    picture = re.sub(r' xmlns(:\w+)?="[^"]*"', "", picture_svg(record, samples, verdict))
    page = _template().render(
        r=record,
        v=verdict,
        words=words,
        again=words.again_command(record) if _shipped(record.experiment.name) else "",
        outcome=words.shown_outcome(record, verdict),
        glyph=words.GLYPHS[verdict.outcome],
        explanation=words.explanation(record, verdict),
        rows=sli_rows(record, verdict),
        notes=words.measurement_notes(record, verdict),
        detectable=words.detectable_lines(record, verdict),
        expectations=[
            (words.expectation_words(e.expected), e.seen, words.expectation_words(e.saw)) for e in verdict.expectations
        ],
        moments=_moments(record),
        picture=Markup(picture),
        recovery=Markup(recovery_svg(verdict.recovery)),
        counted_from=_counted_from(record),
        history=[_past(entry) for entry in history][-_HISTORY_SHOWN:],
        experiment_yaml=spec_yaml(record.experiment),
        environment_yaml=spec_yaml(record.environment),
        by_hand=by_hand_commands(record.experiment, record.environment),
        backlog=backlog or backlog_entry(record, verdict),
        duration=show_duration(round(words.total_s(record), 1)),
        light=Markup(variables(LIGHT)),
        dark=Markup(variables(DARK)),
    )
    return mask_text(page, known)


def render_markdown(record: RunRecord, samples: Samples, verdict: Verdict, *, picture: bool = True) -> str:
    """The verdict for Dagster's UI: words, table, and the picture as an embedded PNG."""
    md = markdown_text
    out = [f"## {words.GLYPHS[verdict.outcome]} {words.headline(record, verdict)}"]
    out += [md(sentence) for sentence in words.explanation(record, verdict)]
    if verdict.outcome is Outcome.UNCLEAN:
        out.append("\n".join(f"- **{label}**: {markdown_code(value)}" for label, value in words.unclean_facts(record)))
    rows = sli_rows(record, verdict)
    if rows:
        lines = ["| | before | during | after | effect (95 %) | SLO | |", "|" + " --- |" * 7]
        lines += [
            f"| {md(r.name)} | {r.before} | {r.during} | {r.after} | {r.effect} {r.interval} | {md(r.slo)} | {r.mark} |"
            for r in rows
        ]
        out.append("\n".join(lines))
    marks = {True: "✔", False: "✘", None: "?"}
    out += [f"**{md(words.judge_name(record))}** {marks[f.passed]} {md(f'{f.name}: {f.saw}')}" for f in record.findings]
    if recovery := words.recovery_line(verdict):
        out.append(f"**recovery** {md(recovery)} (limit {show_duration(verdict.recovery.within_s)})")
    if clean := words.clean_line(record):
        out.append(f"**clean** {md(clean)}")
    out += [f"**rollback** {md(line)}" for line in words.action_lines(record)]
    out += [md(line) for line in words.detectable_lines(record, verdict)]
    if picture:
        png = base64.b64encode(picture_png(record, samples, verdict, 900)).decode()
        out.append(f"![before, during and after](data:image/png;base64,{png})")
    known = secrets_in(record.environment.model_dump(mode="json"), record.experiment.model_dump(mode="json"))
    text, image = ("\n\n".join(out[:-1]), out[-1]) if picture else ("\n\n".join(out), "")
    return mask_text(text, known) + (f"\n\n{image}" if image else "") + "\n"


def write_report(
    path: Path,
    record: RunRecord,
    samples: Samples,
    verdict: Verdict,
    history: Sequence[HistoryEntry] = (),
    *,
    backlog: str = "",
) -> Path:
    """Render and write the page, whole or not at all.

    Raises:
        StoreError: it could not be written; an earlier report is untouched.
    """
    write_atomic(path, render_html(record, samples, verdict, history, backlog=backlog).encode())
    return path


def backlog_entry(record: RunRecord, verdict: Verdict) -> str:
    """What a deviation asks somebody to do; empty for every other outcome."""
    if verdict.outcome is not Outcome.DEVIATED or record.shadow:
        return ""
    first = words.explanation(record, verdict)[0]
    suspect = words.suspect(record, verdict)
    mechanism = f" Look at: {suspect}." if suspect else ""
    return f"{record.experiment.target}: {first}{mechanism} Owner: {record.experiment.owner}. Found by run {record.run_id}."


def _counted_from(record: RunRecord) -> str:
    if record.window is not None and recovery_origin(record) == record.window.start:
        return (
            "Detect counts from the request (what another tool takes to begin is in it), the other parts from the kill"
        )
    return "Detect counts from the injection, the other parts from the removal of the fault"


def _shipped(name: str) -> bool:
    """Whether an experiment can be run by its name wherever the package is installed."""
    return any((Path(__file__).parents[1] / "library" / "experiments").rglob(f"{name}.yaml"))


def _moments(record: RunRecord) -> list[tuple[str, str, str, str]]:
    zero = origin_of(record)
    return [
        (
            m.name.replace("_", " "),
            f"{m.t - zero:+.3f} s".replace("-", "−"),
            words.when(record, m.t),
            m.note,
        )
        for m in record.moments
    ]


def _past(entry: HistoryEntry) -> dict[str, str]:
    run_id, outcome, started = entry
    name = outcome.value if isinstance(outcome, Outcome) else str(outcome)
    plain = name.removeprefix("SHADOW-")
    glyph = words.GLYPHS[Outcome(plain)] if plain in Outcome.__members__ else "?"
    at = words.utc(float(started)) if isinstance(started, (int, float)) else str(started)
    return {"run_id": run_id, "outcome": name, "glyph": glyph, "at": at, "kind": plain.lower()}


@functools.lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    # A missing name is an error, not an empty space in somebody's report.
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")
