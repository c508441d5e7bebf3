"""Records and verdicts as Dagster shows them: numbers with stable names, tables, check results.

Numbers are SI, so that the UI plots them over runs: seconds end in `_s` or `_seconds`, the others are fractions 0–1
and counts. What was not measured has no number.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import GuardResult, RunRecord, SliResult, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.domain.units import show_duration, show_percent, show_value
from mlchaos_dagster.evidence.selection import shown_slis, sli_label
from mlchaos_dagster.orchestration.keys import outcome_word, python_name

Row = dict[str, Any]
Metadata = dict[str, Any]

NARROW = 12
"""Cells this short stay on one line."""
LINE = 48
"""What the page of an asset shows of a line: a long path further down widens its table, and words are cut off."""
PASSED = {True: "✔ yes", False: "✘ no", None: "? no judgement"}


def numbers(values: Mapping[str, float | None]) -> Metadata:
    """Only what was measured and is finite: Dagster's storage is JSON."""
    return {
        name: dg.MetadataValue.float(float(f"{value:.6g}"))
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }


def table(rows: Iterable[Mapping[str, Any]]) -> dg.TableMetadataValue | None:
    """A table in the UI; cells are what its records allow (text, numbers, booleans)."""
    cells = [{k: _cell(v) for k, v in row.items()} for row in rows]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in cells]) if cells else None


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        if len(value) <= NARROW:
            return value.replace(" ", "\u00a0")
        return re.sub(r"(?<=\d) (?=%|ms|s\b|pp)", "\u00a0", value)  # the UI breaks lines at every space
    return "–" if value is None else value


def words(text: str) -> dg.MarkdownMetadataValue | None:
    """A sentence in lines that are seen whole. The UI shows short Markdown in place, and keeps its line breaks."""
    return dg.MetadataValue.md("  \n".join(textwrap.wrap(text, LINE))) if text else None


def without_nothing(metadata: Mapping[str, Any]) -> Metadata:
    """Entries that say something."""
    return {name: value for name, value in metadata.items() if value is not None and value != ""}


# ---- experiment


def experiment_row(experiment: Experiment, environment: Environment) -> Row:
    """The plan as one row."""
    return {
        "experiment": experiment.name,
        "environment": environment.name,
        "hypothesis": experiment.hypothesis,
        "fault": experiment.fault.kind,
        "target": experiment.target,
        "window_s": environment.scaled(experiment.duration),
        "spec": experiment.model_dump_json(by_alias=True),
    }


def experiment_metadata(experiment: Experiment, environment: Environment, guards: Iterable[GuardResult]) -> Metadata:
    """What was planned, and how the guards stood."""
    target = environment.targets[experiment.target]
    return without_nothing(
        {
            "hypothesis": experiment.hypothesis,
            "fault": experiment.fault.kind,
            "target": f"{experiment.target} ({target.select})",
            "window_s": environment.scaled(experiment.duration),
            "duration_asked_s": experiment.duration,
            "guards": table(
                {"guard": g.name, "passed": g.passed, "saw": g.saw, "what would let it through": g.needs or None}
                for g in guards
            ),
        }
    )


# ---- SLIs


def baseline_rows(environment: Environment, values: Mapping[str, float | None]) -> list[Row]:
    """One row an SLI."""
    return [{"sli": n, "unit": _unit(environment, n), "baseline": v} for n, v in values.items()]


def _unit(environment: Environment, sli: str) -> str:
    declared = environment.slis.get(sli)
    return declared.shown_unit if declared else ""


def sli_rows(verdict: Verdict) -> list[Row]:
    """One row an SLI, every number as it is."""
    return [
        {
            "sli": name,
            "unit": s.unit,
            "baseline": _finite(s.baseline),
            "during": _finite(s.during),
            "after": _finite(s.after),
            "effect": _finite(s.effect),
            "ci_low": _finite(s.ci_low),
            "ci_high": _finite(s.ci_high),
            "samples": s.samples,
            "late": s.late,
            "detectable": _finite(s.detectable),
            "slo": s.slo,
            "met": s.met,
        }
        for name, s in verdict.slis.items()
    ]


def promise_table(verdict: Verdict) -> dg.TableMetadataValue | None:
    """The objectives, narrow enough for the page of an asset."""
    return table(
        {
            "SLI": name,
            "during": show_value(s.during, s.unit),
            "SLO": s.slo.removeprefix(name).strip(),
            "met": {True: "✔", False: "✘", None: "–"}[s.met],
        }
        for name, s in verdict.slis.items()
        if s.slo
    )


def sli_table(record: RunRecord, verdict: Verdict) -> dg.TableMetadataValue | None:
    """Before, during, after and effect of every SLI that is shown, as people read them."""
    return table(
        {
            "SLI": sli_label(name, record.environment),
            "before": show_value(s.baseline, s.unit),
            "during": show_value(s.during, s.unit),
            "after": show_value(s.after, s.unit),
            "effect": show_effect(s),
            "SLO": s.slo.removeprefix(name).strip() or None,
            "met": {True: "✔", False: "✘", None: "–"}[s.met],
            "samples": s.samples,
        }
        for name, s in ((n, verdict.slis[n]) for n in shown_slis(record, verdict))
    )


def show_effect(s: SliResult) -> str:
    """`−0.6 pp [−1.2, −0.1]`; a latency in milliseconds; `*`: the interval is not to be trusted."""
    if s.effect is None or not math.isfinite(s.effect):
        return "–"
    factor, unit = {"ratio": (100.0, " pp"), "s": (1000.0, " ms")}.get(s.unit, (1.0, ""))
    shown = f"{s.effect * factor:+.1f}{unit}"
    if s.ci_low is not None and s.ci_high is not None:
        shown += f" [{s.ci_low * factor:+.1f}, {s.ci_high * factor:+.1f}]"
    return shown.replace("-", "−") + ("" if s.reliable else " *")


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def sli_key(name: str, what: str, unit: str) -> str:
    """`availability_during`, `latency_p95_during_s`: a name that says its unit, and stays the same over runs."""
    return f"{python_name(name)}_{what}" + ("_s" if unit == "s" else "")


def baseline_metadata(
    environment: Environment, record_like: Mapping[str, float | None], steady: tuple[bool, str]
) -> Metadata:
    """SLIs before the fault."""
    held, why = steady
    return {
        **numbers({sli_key(n, "baseline", _unit(environment, n)): v for n, v in record_like.items()}),
        "steady": dg.MetadataValue.bool(held),
        "steady_because": why or "every objective holds",
    }


def chaos_metadata(record: RunRecord, verdict: Verdict, picture: str) -> Metadata:
    """SLIs during the fault, their effects, the fault itself."""
    during: dict[str, float | None] = {}
    for name, s in verdict.slis.items():
        during[sli_key(name, "during", s.unit)], during[sli_key(name, "effect", s.unit)] = s.during, s.effect
    fault, abort = record.fault, record.abort
    return without_nothing(
        {
            "picture": dg.MetadataValue.md(picture) if picture else None,
            "slis": sli_table(record, verdict),
            "fault": f"{fault.kind} by {fault.backend} on {listed(fault.targets)}" if fault else None,
            "fault_confirmed": dg.MetadataValue.bool(fault.confirmed) if fault else None,
            "fault_evidence": dg.MetadataValue.md(_list(fault.evidence)) if fault and fault.evidence else None,
            "expectations": table(
                {
                    "expected": e.expected,
                    "seen": {True: "✔ yes", False: "✘ no", None: "not measured"}[e.seen],
                    "saw": e.saw,
                }
                for e in verdict.expectations
            ),
            "findings": table(
                {
                    "judged by": fault.backend if fault else None,
                    "what": f.name,
                    "passed": PASSED[f.passed],
                    "saw": f.saw,
                }
                for f in record.findings
            ),
            "abort": f"{abort.cause}: {abort.reason}" if abort else None,
            **numbers(
                {
                    **during,
                    "window_s": record.window.length if record.window else None,
                    "confirm_seconds": _between(record, "injected", "confirmed"),
                    "abort_seconds": abort.seconds if abort else None,
                }
            ),
        }
    )


def _between(record: RunRecord, first: str, second: str) -> float | None:
    a, b = record.moment(first), record.moment(second)
    return None if a is None or b is None else b - a


def recovery_rows(verdict: Verdict) -> list[Row]:
    """One row a part of the recovery; a censored part is a lower bound and says so."""
    r = verdict.recovery
    parts = {"detect": r.detect_s, "reschedule": r.reschedule_s, "ready": r.ready_s, "steady": r.steady_s}
    return [
        {"part": part, "seconds": _finite(value), "censored": part in r.censored or f"{part}_s" in r.censored}
        for part, value in parts.items()
    ]


def recovery_metadata(record: RunRecord, verdict: Verdict) -> Metadata:
    """How long it took to come back, in parts, and the proof that nothing is left."""
    r = verdict.recovery
    shown = [
        {
            "part": row["part"],
            "took": ("> " if row["censored"] else "") + show_duration(row["seconds"]),
            "limit": show_duration(r.within_s) if row["part"] == "steady" and r.within_s else None,
        }
        for row in recovery_rows(verdict)
    ]
    after = {sli_key(n, "after", s.unit): s.after for n, s in verdict.slis.items()}
    return without_nothing(
        {
            "recovery": table(shown),
            "clean": dg.MetadataValue.md(_list(record.clean.evidence))
            if record.clean and record.clean.evidence
            else None,
            "censored": ", ".join(r.censored),
            **numbers(
                {
                    "recovery_detect_s": r.detect_s,
                    "recovery_reschedule_s": r.reschedule_s,
                    "recovery_ready_s": r.ready_s,
                    "recovery_steady_s": r.steady_s,
                    "recovery_limit_s": r.within_s or None,
                    "clean_seconds": _between(record, "recover_requested", "proven_clean"),
                    **after,
                }
            ),
        }
    )


# ---- verdict

MARK = {
    Outcome.HELD: "✔",
    Outcome.DEVIATED: "✘",
    Outcome.REFUSED: "⏸",
    Outcome.ABORTED: "■",
    Outcome.INCONCLUSIVE: "?",
    Outcome.UNCLEAN: "‼",
    Outcome.ERROR: "!",
}


def verdict_row(record: RunRecord, verdict: Verdict) -> Row:
    """The verdict as one row."""
    r = verdict.recovery
    return {
        "run_id": record.run_id,
        "experiment": record.experiment.name,
        "environment": record.environment.name,
        "started_at": record.zero_wall,
        "started_by": record.started_by,
        "outcome": outcome_word(record, verdict),
        "reasons": "; ".join(verdict.reasons),
        "fault_fired": verdict.fault_fired,
        "recovery_steady_s": _finite(r.steady_s),
        "abort_seconds": record.abort.seconds if record.abort else None,
        "clean": record.clean.proven if record.clean else None,
    }


def verdict_metadata(
    record: RunRecord, verdict: Verdict, markdown: str, record_path: str | None, report_path: str | None
) -> Metadata:
    """The page that people open: verdict first and in words, then the picture, then numbers."""
    word = outcome_word(record, verdict)
    numeric: dict[str, float | None] = {}
    for name, s in ((n, s) for n, s in verdict.slis.items() if s.slo):
        numeric[sli_key(name, "during", s.unit)], numeric[sli_key(name, "effect", s.unit)] = s.during, s.effect
    return without_nothing(
        {
            "outcome": f"{MARK[verdict.outcome]} {word}",
            "reason": words(verdict.reasons[0]) if verdict.reasons else None,
            "report": dg.MetadataValue.md(markdown) if markdown else None,
            "promises": promise_table(verdict),
            "advice": words(verdict.advice),
            "held": dg.MetadataValue.int(1 if verdict.outcome.is_pass and not record.shadow else 0),
            **numbers(
                {
                    **numeric,
                    "recovery_steady_s": verdict.recovery.steady_s,
                    "abort_seconds": record.abort.seconds if record.abort else None,
                }
            ),
            "report_path": dg.MetadataValue.path(report_path) if report_path else None,
            "record_path": dg.MetadataValue.path(record_path) if record_path else None,
        }
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def budget_words(remaining: float, limit: float) -> str:
    """`84 % of the error budget is left (limit 10 %)`; an overspent one is not called minus something left."""
    if remaining < 0:
        return f"the error budget is overspent, {show_percent(1 - remaining, 0)} of it used (limit {show_percent(limit, 0)} left)"
    return f"{show_percent(remaining, 0)} of the error budget is left (limit {show_percent(limit, 0)})"
