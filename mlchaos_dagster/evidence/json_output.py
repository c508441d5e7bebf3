"""`mlchaos run --output json`: one object per run, keys as contracted in DESIGN.md section 4.

Times that end in `_at` are ISO 8601 in UTC with milliseconds; those in `_s` and `seconds` are seconds. There is no
NaN and no infinity: what was not measured is null.
"""

from __future__ import annotations

import math
from typing import Any

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome, counted
from mlchaos_dagster.domain.record import ActionFacts, RunRecord, SliResult, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.evidence import words
from mlchaos_dagster.evidence.masking import mask_text, secrets_in
from mlchaos_dagster.evidence.selection import measured


def run_json(
    record: RunRecord,
    verdict: Verdict,
    record_path: str | None = None,
    report_path: str | None = None,
    *,
    wall_s: float | None = None,
) -> dict[str, Any]:
    """The contracted object.

    Args:
        record: the facts.
        verdict: the judgement.
        record_path: where the record lies; None: it was not written.
        report_path: where the report lies; None: there is none.
        wall_s: how long the whole run took, orchestration included; default: as far as the record tells.
    """
    fault, abort, recovery = record.fault, record.abort, verdict.recovery
    known = secrets_in(record.environment.model_dump(mode="json"), record.experiment.model_dump(mode="json"))

    def text(value: str) -> str:
        return mask_text(value, known)

    return {
        "run_id": record.run_id,
        "experiment": record.experiment.name,
        "environment": record.environment.name,
        "outcome": words.shown_outcome(record, verdict),
        "shadow": record.shadow,
        "exit_code": counted(verdict.outcome, record.shadow).exit_code,
        "reasons": [text(r) for r in words.explanation(record, verdict)],
        "started_at": words.iso(record, 0.0),
        "durations_s": _durations(record, wall_s),
        "targets": list(fault.targets) if fault else [],
        "fault": {
            "kind": fault.kind if fault else record.experiment.fault.kind,
            "backend": fault.backend if fault else record.environment.backend_for(record.experiment.fault.kind),
            "confirmed": bool(fault and fault.confirmed),
            "evidence": [text(e) for e in fault.evidence] if fault else [],
            "lease_id": fault.lease_id if fault else "",
        },
        "slis": {name: _sli(result) for name, result in verdict.slis.items() if result.slo or measured(result)},
        "golden": None if verdict.golden is None else verdict.golden.model_dump(mode="json"),
        "expectations": [{"expected": e.expected, "seen": e.seen, "saw": text(e.saw)} for e in verdict.expectations],
        "findings": [{"name": f.name, "passed": f.passed, "saw": text(f.saw)} for f in record.findings],
        "guards": [
            {"name": g.name, "passed": g.passed, "saw": text(g.saw), "needs": text(g.needs)} for g in record.guards
        ],
        "abort": None
        if abort is None
        else {
            "reason": text(abort.reason),
            "cause": abort.cause,
            "first_bad_at": words.iso(record, abort.first_bad_at),
            "breach_at": words.iso(record, abort.breach_at),
            "clean_at": words.iso(record, abort.clean_at),
            "seconds": number(abort.seconds, 3),
        },
        "recovery": {
            "detect_s": number(recovery.detect_s, 3),
            "reschedule_s": number(recovery.reschedule_s, 3),
            "ready_s": number(recovery.ready_s, 3),
            "steady_s": number(recovery.steady_s, 3),
            "censored": list(recovery.censored),
            "within_s": number(recovery.within_s, 3),
            "met": recovery.met,
        },
        "clean": _clean(record, text),
        "actions": [_action(action, text) for action in record.actions],
        "error": text(record.error),
        "record_path": record_path,
        "report_path": report_path,
    }


def unjudged_json(
    run_id: str, experiment: Experiment, environment: Environment, outcome: Outcome, error: str, *, shadow: bool = False
) -> dict[str, Any]:
    """The contracted object of a run that left no record or verdict: every key, and nothing claimed.

    `clean.proven` is false: without a record nobody knows.
    """
    return {
        "run_id": run_id,
        "experiment": experiment.name,
        "environment": environment.name,
        "outcome": outcome.value,
        "shadow": shadow,
        "exit_code": outcome.exit_code,
        "reasons": [mask_text(error)],
        "started_at": None,
        "durations_s": dict.fromkeys(("guards", "baseline", "window", "recovery", "overhead")),
        "targets": [],
        "fault": {
            "kind": experiment.fault.kind,
            "backend": environment.backend_for(experiment.fault.kind),
            "confirmed": False,
            "evidence": [],
            "lease_id": "",
        },
        "slis": {},
        "golden": None,
        "expectations": [],
        "findings": [],
        "guards": [],
        "abort": None,
        "recovery": {
            **dict.fromkeys(("detect_s", "reschedule_s", "ready_s", "steady_s")),
            "censored": [],
            "within_s": None,
            "met": None,
        },
        "clean": {"proven": False, "evidence": [], "command": "mlchaos status"},
        "actions": [],
        "error": mask_text(error),
        "record_path": None,
        "report_path": None,
    }


def number(value: float | None, digits: int) -> float | None:
    """Rounded; None when there is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    rounded = round(value, digits)
    return 0.0 if rounded == 0 else rounded


def _durations(record: RunRecord, wall_s: float | None) -> dict[str, float | None]:
    guards = record.guards_s
    baseline = record.baseline.length if record.baseline else 0.0
    window = record.window.length if record.window else 0.0
    # From the wish to take the fault away to the last look at the target.
    end = record.moment("observation_ended")
    if end is None and record.after is not None:
        end = record.after.end
    recovery = max(0.0, end - record.window.end) if record.window and end is not None else 0.0
    total = wall_s if wall_s is not None else words.total_s(record)
    overhead = max(0.0, total - guards - baseline - window - recovery)
    return {
        "guards": number(guards, 3),
        "baseline": number(baseline, 3),
        "window": number(window, 3),
        "recovery": number(recovery, 3),
        "overhead": number(overhead, 3),
    }


def _sli(result: SliResult) -> dict[str, Any]:
    return {
        "unit": result.unit,
        "baseline": number(result.baseline, 6),
        "during": number(result.during, 6),
        "after": number(result.after, 6),
        "effect": number(result.effect, 6),
        "ci_low": number(result.ci_low, 6),
        "ci_high": number(result.ci_high, 6),
        "reliable": result.reliable,
        "why": result.why,
        "samples": result.samples,
        "late": result.late,
        "detectable": number(result.detectable, 6),
        "slo": result.slo,
        "met": result.met,
    }


def _action(action: ActionFacts, text: Any) -> dict[str, Any]:
    shown = action.model_dump(mode="json", exclude={"why", "lines", "error"})
    return {**shown, "why": text(action.why), "lines": [text(x) for x in action.lines], "error": text(action.error)}


def _clean(record: RunRecord, text: Any) -> dict[str, Any]:
    """`proven` is true without a reading only where nothing was ever injected."""
    if record.clean is not None:
        return {
            "proven": record.clean.proven,
            "evidence": [text(e) for e in record.clean.evidence],
            "command": "" if record.clean.proven else words.clear_command(record),
        }
    if words.injected(record):
        return {"proven": False, "evidence": [], "command": words.clear_command(record)}
    return {"proven": True, "evidence": ["nothing was injected"], "command": ""}
