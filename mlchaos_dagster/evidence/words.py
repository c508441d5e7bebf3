"""The sentences: what a verdict means, in words, the decisive one first.

Everything here is text made of a record and its verdict. The terminal, the report and Dagster say the same thing
because they all ask here.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.domain.units import show_duration, show_percent
from mlchaos_dagster.evidence.expected import expectation_words
from mlchaos_dagster.evidence.rows import size_text
from mlchaos_dagster.evidence.selection import shown_name, shown_slis
from mlchaos_dagster.judgement.golden import table_words, wrong_words

GLYPHS = {
    Outcome.HELD: "✔",
    Outcome.DEVIATED: "✘",
    Outcome.ABORTED: "■",
    Outcome.REFUSED: "⊘",
    Outcome.INCONCLUSIVE: "?",
    Outcome.UNCLEAN: "‼",
    Outcome.ERROR: "!",
}
_NO_INTERVAL = "a signal has no interval"
"""As the judgement says it of each."""
PARTS = ("detect", "reschedule", "ready", "steady")


def shown_outcome(record: RunRecord, verdict: Verdict) -> str:
    """The outcome's name; `SHADOW-HELD` where nothing was injected on purpose, so that it never counts as HELD."""
    return f"SHADOW-{verdict.outcome.value}" if record.shadow else verdict.outcome.value


def headline(record: RunRecord, verdict: Verdict) -> str:
    """`HELD  serving-pod-failure · sandbox`."""
    return f"{shown_outcome(record, verdict)}  {record.experiment.name} · {record.environment.name}"


def explanation(record: RunRecord, verdict: Verdict) -> list[str]:
    """Why this outcome, one sentence each, the decisive one first. Never empty."""
    said: list[str] = []
    {
        Outcome.HELD: _held,
        Outcome.DEVIATED: _deviated,
        Outcome.ABORTED: _aborted,
        Outcome.REFUSED: _refused,
        Outcome.INCONCLUSIVE: _inconclusive,
        Outcome.UNCLEAN: _unclean,
        Outcome.ERROR: _error,
    }[verdict.outcome](record, verdict, said)
    if record.shadow and not any("shadow" in s.lower() for s in said):
        said.append("Shadow run: nothing was injected; it shows the guards and the measurements, not the system.")
    return [in_words(s) for s in said]


def recovery_line(verdict: Verdict) -> str:
    """`detect 0.3 s · ready 2.1 s · steady > 30 s (not seen)`; empty when recovery was not measured."""
    recovery = verdict.recovery
    parts: list[str] = []
    for name in PARTS:
        value: float | None = getattr(recovery, f"{name}_s")
        if value is not None:
            censored = name in recovery.censored
            parts.append(f"{name} {'> ' if censored else ''}{show_duration(value)}{' (not seen)' if censored else ''}")
    return " · ".join(parts)


def clean_line(record: RunRecord) -> str:
    """What was read back from the target once the fault was gone; empty when nothing was ever injected."""
    if record.clean is None:
        return "" if not injected(record) else "not proven: nothing could be read back"
    said = ", ".join(record.clean.evidence) or "read back from the target, nothing more was said"
    return said if record.clean.proven else f"NOT PROVEN: {said}"


def clean_short(record: RunRecord) -> str:
    """The same in one short line where it went well; what went wrong is said in full."""
    if record.clean is None or not record.clean.proven:
        return clean_line(record)
    for line in record.clean.evidence:
        if match := re.fullmatch(r"lease (?:(\S+) )?closed ([\d.]+ s) after recover", line):
            lease = match[1] or (record.fault.lease_id if record.fault else "")
            return f"read back clean {match[2]} after recover ({f'lease {lease}' if lease else 'its lease'} closed)"
    return clean_line(record)


def action_lines(record: RunRecord) -> list[str]:
    """Every rollback action: when, why, what it did, and whether it was undone."""
    said: list[str] = []
    for action in record.actions:
        did = action.error or "; ".join(action.lines) or "nothing needed it"
        line = f"{action.kind} on {action.target} at {show_duration(round(action.t, 1))} ({action.why}): {did}"
        undone = action.undone_at
        said.append(
            f"{line}; `{action.command}` undoes it"
            if action.command
            else line
            if undone is None
            else f"{line}; undone at {show_duration(round(undone, 1))}"
        )
    return said


def judge_name(record: RunRecord) -> str:
    """Who judged for itself beside us: the backend."""
    return record.fault.backend if record.fault else "backend"


def detectable_lines(record: RunRecord, verdict: Verdict) -> list[str]:
    """What this window could have seen at all, for every SLI with an objective."""
    said: list[str] = []
    for objective in record.experiment.steady_state:
        result = verdict.slis.get(objective.sli)
        if result is None or result.detectable is None:
            continue
        change = "drop" if objective.floor else "rise"
        size = size_text(result.detectable, result.unit)
        name = shown_name(objective.sli)
        said.append(f"With this window the smallest {change} of {name} that would have been seen is {size}.")
    return said


def measurement_notes(record: RunRecord, verdict: Verdict) -> list[str]:
    """What a careful reader must know about the numbers: late requests, intervals not to be trusted, scaling."""
    notes: list[str] = []
    no_interval = False
    for name in shown_slis(record, verdict):
        result = verdict.slis[name]
        if result.effect is None:
            continue
        # The same of every signal: said once, behind what is particular.
        particular = [w for w in result.why.split("; ") if w and w != _NO_INTERVAL]
        no_interval |= _NO_INTERVAL in result.why
        if particular:
            notes.append(f"{shown_name(name)}: {'; '.join(particular)}")
    if no_interval:
        notes.append("Signals have no interval: they are read, not sampled")
    if verdict.golden is not None:
        notes.append(table_words(verdict.golden, record.environment.probe))
        if verdict.golden.wrong:
            notes.append(wrong_words(verdict.golden, record.environment.probe))
    late = max((r.late for r in verdict.slis.values()), default=0)
    if late:
        limit = show_duration(record.environment.sampling.max_lateness)
        notes.append(f"{late} requests were sent by the probe more than {limit} late and are left out")
    asked = record.experiment.duration
    if record.window is not None and record.window_s and record.window_s < asked - 1e-6:
        notes.append(
            f"The window was shortened here from {show_duration(asked)} to {show_duration(record.window_s)} "
            f"({shortened_by(asked, record.environment)})"
        )
    return list(dict.fromkeys(notes))


def shortened_by(duration_s: float, environment: Environment) -> str:
    """The setting that a shortened window owes its length to: the scale, or the least length it was lifted to."""
    if duration_s * environment.duration_scale < environment.duration_min:
        return f"duration_min {show_duration(environment.duration_min)}"
    return f"duration_scale {environment.duration_scale:g}"


def in_words(sentence: str) -> str:
    """A sentence of the judgement for people: states by name, a full stop at the end."""
    sentence = expectation_words(sentence.strip())
    return sentence if not sentence or sentence[-1] in ".!?:" else sentence + "."


def suspect(record: RunRecord, verdict: Verdict) -> str:
    """The mechanism that the experiment validates, if what broke is what its absence breaks; else empty."""
    teeth = record.experiment.teeth
    if teeth is None:
        return ""
    broken = {name for name, result in verdict.slis.items() if result.met is False}
    subjects = {str(e): e.subject for e in record.experiment.expect}
    broken |= {subjects.get(e.expected, "") for e in verdict.expectations if e.seen is False}
    if verdict.recovery.met is False:
        broken.add("recovery")
    return teeth.mechanism if teeth.breaks in broken else ""


def injected(record: RunRecord) -> bool:
    """Whether a fault may have touched the target in this run."""
    return not record.shadow and any(m.name == "inject_requested" for m in record.moments)


def total_s(record: RunRecord) -> float:
    """Length of the run as far as its record tells, guards included."""
    return max(
        [record.guards_s, *(m.t for m in record.moments), *(s.end for s in (record.baseline, record.after) if s)]
    )


def when(record: RunRecord, t: float = 0.0) -> str:
    """An instant of the run as UTC time of day and date."""
    return utc(record.wall(t))


def utc(unix_s: float) -> str:
    """Unix time as UTC date and time of day."""
    return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(record: RunRecord, t: float | None) -> str | None:
    """An instant of the run as ISO 8601 with milliseconds; None stays None."""
    if t is None:
        return None
    moment = datetime.fromtimestamp(record.wall(t), timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def target_text(record: RunRecord) -> str:
    """`inference-1 (1 of 3)`; the logical target where nothing was resolved."""
    fault = record.fault
    if fault is None or not fault.targets:
        return record.experiment.target
    shown = listed(fault.targets, 6)
    return f"{shown} ({len(fault.targets)} of {fault.existing})" if fault.existing else shown


def blast_text(record: RunRecord) -> str:
    """Blast radius asked for and taken."""
    radius = record.experiment.blast_radius
    asked = (
        f"{radius.count} target{'s' * (radius.count != 1)}"
        if radius.count is not None
        else show_percent(radius.fraction, 0)
    )
    said = f"asked {asked}, at most {radius.max_targets}"
    if record.fault is None:
        return said + "; nothing was taken"
    taken = radius.words(len(record.fault.targets), record.fault.existing) if record.fault.existing else "unknown"
    return f"{said}; taken {taken}" + (" (shadow: not touched)" if record.shadow else "")


def again_command(record: RunRecord) -> str:
    """The command that runs this experiment again."""
    shadow = " --shadow" if record.shadow else ""
    prefer = record.environment.prefer
    through = f" --backend {prefer}" if prefer and record.fault and record.fault.backend == prefer else ""
    return f"mlchaos run {record.experiment.name}{_elsewhere(record)}{through}{shadow}"


def _elsewhere(record: RunRecord) -> str:
    """The option that names the environment; empty for the one that is chosen anyway."""
    return "" if record.environment.name == "sandbox" else f" --environment {record.environment.name}"


def sandbox_hint(record: RunRecord) -> str:
    """How to end the platform that the run left up; empty where it has none of ours."""
    if record.environment.sandbox is None:
        return ""
    return f"sandbox still up: mlchaos sandbox down{_elsewhere(record)}"


def clear_command(record: RunRecord) -> str:
    """The one command that takes the fault away when a run is UNCLEAN."""
    if record.clean is not None and record.clean.command:
        return record.clean.command
    return f"mlchaos recover --environment {record.environment.name}"


def unclean_facts(record: RunRecord) -> list[tuple[str, str]]:
    """What somebody needs who must end a fault now: label and value."""
    fault = record.fault
    return [
        ("lease", fault.lease_id if fault and fault.lease_id else "unknown; see mlchaos status"),
        ("fault", f"{fault.kind} by {fault.backend}" if fault else record.experiment.fault.kind),
        ("target", target_text(record)),
        ("type now", clear_command(record)),
        ("call", record.experiment.owner),
    ]


# ---- one function per outcome


def _held(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    for reason in verdict.reasons:
        _add(said, reason)
    if not said:
        seen = record.fault.evidence[0] if record.fault and record.fault.evidence else "seen at the target"
        _add(said, f"The fault fired ({seen}) and every objective held.")


def _deviated(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    for reason in verdict.reasons:
        _add(said, reason)
    for name, result in verdict.slis.items():
        if result.met is False and not _mentions(said, name):
            _add(said, f"{name} broke its objective {result.slo}".rstrip())
    for e in verdict.expectations:
        if e.seen is False and not any(e.expected in s for s in said):
            _add(said, f"Expected and not seen: {e.expected}; {e.saw}")
    if not said:
        _add(said, "A promise broke")
    if mechanism := suspect(record, verdict):
        _add(said, f"This experiment validates the mechanism “{mechanism}”: look there first")


def _aborted(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    abort = record.abort
    for reason in verdict.reasons:
        # The judgement adds how long it took; that is said once, below, with the rest of the times.
        _add(said, abort.reason if abort and reason.startswith(abort.reason) else reason)
    if abort is None:
        return _add(said, "The run was stopped early") if not said else None
    if not _mentions(said, abort.reason):
        said.insert(0, abort.reason)
    if not injected(record):
        return _add(said, "Nothing had been injected")
    gone = "the fault was not proven gone"
    if abort.seconds is not None:
        began = "stopped → proven clean" if abort.cause in BY_A_PERSON else "breach → clean"
        gone = f"{began} in {show_duration(max(0.0, abort.seconds))}"
    first = ""
    if abort.first_bad_at is not None and abort.breach_at > abort.first_bad_at:
        first = f"; first bad {show_duration(abort.breach_at - abort.first_bad_at)} before that decision"
    return _add(said, f"Stopped by {_CAUSES.get(abort.cause, abort.cause)}: {gone}{first}")


BY_A_PERSON = frozenset({"stop", "signal", "lever", "dagster"})
"""Causes of an abort where nothing was breached: somebody wanted it."""

_CAUSES = {
    "limit": "an abort limit",
    "blind": "a lost measurement",
    "stop": "a stop request",
    "signal": "a signal (Ctrl-C or terminate)",
    "lever": "the emergency lever",
    "dagster": "Dagster (the run was terminated)",
    "watcher": "the loss of the watchdog",
    "fenced": "whoever took its lease over",
    "error": "an error",
    "budget": "the error budget",
}


def _refused(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    failed = [g for g in record.guards if not g.passed]
    for guard in failed:
        needs = f" To be let through it needs {guard.needs}." if guard.needs else ""
        _add(said, f"The guard “{guard.name}” refused: it saw {guard.saw}.{needs}")
    for reason in verdict.reasons:
        if not any(g.saw in reason for g in failed):
            _add(said, reason)
    if not said:
        _add(said, "A guard said no")
    if verdict.advice and not any(g.needs and g.needs in verdict.advice for g in failed):
        _add(said, verdict.advice)
    if not _mentions(said, "nothing was injected"):
        _add(said, "Nothing was injected")


def _inconclusive(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    for reason in verdict.reasons:
        _add(said, reason)
    if not said:
        _add(said, "Something that a verdict needs was not seen")
    if verdict.advice:
        _add(said, f"How to see it: {verdict.advice}")


def _unclean(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    said.append("THE FAULT MAY STILL BE LIVE.")
    for reason in verdict.reasons:
        _add(said, reason)
    if record.error:
        _add(said, record.error)


def _error(record: RunRecord, verdict: Verdict, said: list[str]) -> None:
    for reason in verdict.reasons or ("An error of ours; see the log",):
        _add(said, reason)
    if record.error and not _mentions(said, record.error):
        _add(said, record.error)
    if not injected(record):
        _add(said, "Nothing was injected")
    elif record.clean is not None and record.clean.proven:
        _add(said, "The target was proven clean; nothing is left behind")


def _add(said: list[str], sentence: str) -> None:
    """Append, unless the same was said already."""
    sentence = sentence.strip()
    plain = sentence.rstrip(".").lower()
    if plain and not any(plain in s.lower() for s in said):
        said.append(sentence)


def _mentions(said: list[str], word: str) -> bool:
    word = word.rstrip(".").lower()
    return any(word in s.lower() or shown_name(word) in s.lower() for s in said)
