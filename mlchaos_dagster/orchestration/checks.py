"""Check results: what came of every promise of a run. A promise that was not tested has none."""

from __future__ import annotations

import dagster as dg

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import Finding, GuardResult, RunRecord, Verdict
from mlchaos_dagster.domain.units import show_duration
from mlchaos_dagster.orchestration.keys import BACKEND_AGREES, finding_check
from mlchaos_dagster.orchestration.metadata import PASSED, Metadata, numbers, sli_key


def checks(record: RunRecord, verdict: Verdict, steady_because: str = "") -> dict[str, Metadata]:
    """Arguments of the check results, by check; a promise that was not tested is absent."""
    found: dict[str, Metadata] = {}
    if record.guards:
        found["guards_passed"] = _guards_check(record.guards)
    if verdict.steady_before is not None:
        found["steady_state_before"] = {
            "passed": verdict.steady_before,
            "description": steady_because or ("every objective held" if verdict.steady_before else ""),
            "severity": dg.AssetCheckSeverity.WARN,
        }
    return {**found, **_verdict_checks(record, verdict)}


def _guards_check(guards: tuple[GuardResult, ...]) -> Metadata:
    refused = next((g for g in guards if not g.passed), None)
    return {
        "passed": refused is None and bool(guards),
        "severity": dg.AssetCheckSeverity.WARN,
        "description": (
            f"{refused.name}: {refused.saw}" + (f". Needs {refused.needs}" if refused.needs else "")
            if refused
            else f"{len(guards)} guards passed"
        ),
        "metadata": {g.name: f"{'✔' if g.passed else '✘'} {g.saw}" for g in guards},
    }


def _verdict_checks(record: RunRecord, verdict: Verdict) -> dict[str, Metadata]:
    found: dict[str, Metadata] = {}
    inconclusive = verdict.outcome is Outcome.INCONCLUSIVE
    why = verdict.reasons[0] if verdict.reasons else ""
    severity = dg.AssetCheckSeverity.WARN if inconclusive else dg.AssetCheckSeverity.ERROR
    if record.fault is not None and not record.shadow:
        found["fault_fired"] = {
            "passed": verdict.fault_fired,
            "severity": dg.AssetCheckSeverity.WARN,
            "description": (
                "; ".join(record.fault.evidence[:3]) or "confirmed"
                if verdict.fault_fired
                else why or "its effect was not seen"
            ),
            "metadata": {},
        }
    if record.window is not None and (verdict.held is not None or inconclusive):
        # What a fault would have caused is not to be seen where nothing was injected.
        expected = record.shadow or all(e.seen for e in verdict.expectations)
        held = bool(verdict.held) and expected and not inconclusive
        found["steady_state_held"] = {
            "passed": held,
            "severity": severity,
            "description": (
                why
                if not held
                else "shadow run, nothing was injected: every objective held"
                if record.shadow
                else "every objective held while the fault was there"
            ),
            "metadata": {
                **numbers({sli_key(n, "during", s.unit): s.during for n, s in verdict.slis.items()}),
                **({"shadow": True} if record.shadow else {}),
            },
        }
    if record.findings:
        found[BACKEND_AGREES] = _backend_check(record.findings)
        found |= finding_checks(record.findings)
    r = verdict.recovery
    if r.met is not None:
        found["recovered_in_time"] = {
            "passed": r.met,
            "severity": severity,
            "description": (
                f"steady again after {'more than ' if 'steady' in ' '.join(r.censored) else ''}{show_duration(r.steady_s)}, "
                f"limit {show_duration(r.within_s)}"
            ),
            "metadata": numbers({"recovery_steady_s": r.steady_s, "recovery_limit_s": r.within_s}),
        }
    if record.clean is not None:
        found["left_clean"] = {
            "passed": record.clean.proven,
            "severity": dg.AssetCheckSeverity.ERROR,
            "description": (
                "; ".join(record.clean.evidence[:4]) or "proven clean"
                if record.clean.proven
                else f"the fault may be live. Clear it: {record.clean.command}"
            ),
            "metadata": {},
        }
    return found


def finding_checks(findings: tuple[Finding, ...]) -> dict[str, Metadata]:
    """One for each; of those whose names become the same, one for all: none may hide another."""
    named: dict[str, tuple[Finding, ...]] = {}
    for f in findings:
        named[finding_check(f.name)] = (*named.get(finding_check(f.name), ()), f)
    return {check: _backend_check(those) for check, those in named.items()}


def _backend_check(findings: tuple[Finding, ...]) -> Metadata:
    against = [f for f in findings if not f.passed]
    failed = any(f.passed is False for f in findings)
    return {
        "passed": not against,
        "severity": dg.AssetCheckSeverity.ERROR if failed else dg.AssetCheckSeverity.WARN,
        "description": "; ".join(f"{f.name}: {f.saw}" for f in against)
        or ", ".join(f"{f.name} passed" for f in findings),
        "metadata": {
            name: "; ".join(f"{PASSED[f.passed]}: {f.saw}" for f in findings if f.name == name)
            for name in dict.fromkeys(f.name for f in findings)
        },
    }
