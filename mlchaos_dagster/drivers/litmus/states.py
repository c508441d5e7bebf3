"""What the objects of one ChaosEngine say, read together. Pure.

The engine's own status lags by seconds, and `completed` is no success: a wrong selector, a missing right and a failed probe
all end there. So the ChaosResult is read, and events where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mlchaos_dagster.domain.record import Finding
from mlchaos_dagster.drivers.litmus.engine import STOP
from mlchaos_dagster.drivers.litmus.tracks import Tracks
from mlchaos_dagster.kube.objects import Object, items, mapping, text

Phase = Literal["absent", "inert", "accepted", "running", "failed", "aborting", "over"]
_OVER = ("completed", "stopped")
_NEVER_RAN = ("Skipped", "ChaosExperiment Not Found", "Forcefully Aborted")
"""Statuses of an experiment in its engine: its fault does not come."""
_TOUCHED = ("injected", "reverted", "targeted")
"""What a ChaosResult says of a target once the fault has been at it."""
_INJECTED = "ChaosInject"
"""Reason of the event that an experiment makes with its fault."""
_STUCK = ("ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError", "CreateContainerError", "InvalidImageName")


@dataclass(frozen=True)
class State:
    """Where an engine stands."""

    phase: Phase
    said: str = ""
    """In Litmus's own words, where it has any."""


def of(tracks: Tracks) -> State:
    """`accepted`: seen by the operator. `running`: its result is there, and not over. `failed`: its fault does not come."""
    engine = tracks.engine
    if engine is None:
        return State("absent", "the ChaosEngine is gone")
    status, state = text(engine, "status", "engineStatus"), text(engine, "spec", "engineState")
    if text(engine, "metadata", "deletionTimestamp"):
        return State("aborting", "the ChaosEngine is being deleted")
    for result in tracks.results:
        if said := failure(result):  # a probe with stopOnFailure is why an experiment was stopped
            broken = [f"{f.name}: {f.saw}" for f in findings([result])[:-1] if f.passed is False]
            return State("failed", "; ".join([said, *broken]))
    for entry in items(engine, "status", "experiments"):
        if (word := text(entry, "status")) in _NEVER_RAN:
            return State("failed", f"experiment {text(entry, 'name')}: {word}")
    if judged(tracks.results):
        return State("over", "; ".join(f"{f.name}: {f.saw}" for f in findings(tracks.results) if f.passed is not True))
    if status in _OVER:
        return State("over", f"engineStatus is {status}{_verdict(tracks.results)}")
    if state == STOP:
        return State("aborting" if status else "inert", "engineState is stop")
    if not status:
        return State("accepted", "the operator has not seen the ChaosEngine")
    return State("running" if tracks.results else "accepted", f"engineStatus is {status}")


def failure(result: Object) -> str:
    """Why an experiment did not do what it was asked for; empty: nothing says so."""
    found = mapping(result, "status", "experimentStatus")
    phase, error = text(found, "phase"), mapping(found, "errorOutput")
    if phase in ("Error", "Completed_With_Error") or error:
        return f"phase {phase or 'unknown'}: {text(error, 'errorCode') or 'no code'}: {_plain(text(error, 'reason'))}"
    if text(found, "verdict") == "Error" or phase == "Stopped":
        return f"phase {phase}, verdict {text(found, 'verdict')}"
    return ""


def targets(tracks: Tracks) -> dict[str, str]:
    """Name of each target at which the fault is or has been → what the result says of it; a note is the younger word."""
    found: dict[str, str] = {}
    for result in tracks.results:
        told = [(text(t, "name"), text(t, "chaosStatus")) for t in items(result, "status", "history", "targets")]
        notes = mapping(result, "metadata", "annotations").items()
        told += [(k.partition("/")[2], str(v)) for k, v in notes if "/" in k]
        found |= {name: word.lower() for name, word in told if word.lower() in _TOUCHED}
    return found


def touched(tracks: Tracks) -> set[str]:
    """Names of targets at which the fault is or has been, by the result's own word."""
    return set(targets(tracks))


def still_injected(tracks: Tracks) -> set[str]:
    """Names of targets that were not reverted, by the result's own word."""
    return {name for name, word in targets(tracks).items() if word == "injected"}


def fired(events: Iterable[Object]) -> bool:
    """Whether an experiment said that it makes its fault."""
    return any(text(e, "reason") == _INJECTED for e in events)


def stuck(tracks: Tracks, events: Iterable[Object]) -> str:
    """Why nothing goes on, in the cluster's own words; as much as there is."""
    words: list[str] = []
    for pod in tracks.pods:
        for status in items(pod, "status", "containerStatuses"):
            waiting = mapping(status, "state", "waiting")
            if text(waiting, "reason") in _STUCK:
                words.append(
                    f"pod {text(pod, 'metadata', 'name')}: {text(waiting, 'reason')}: {_plain(text(waiting, 'message'))}"
                )
        for condition in items(pod, "status", "conditions"):
            if text(condition, "type") == "PodScheduled" and text(condition, "status") == "False":
                words.append(f"pod {text(pod, 'metadata', 'name')}: {_plain(text(condition, 'message'))}")
    for event in [e for e in events if text(e, "type") == "Warning"][-1:]:
        words.append(f"{text(event, 'reason')}: {_plain(text(event, 'message'))}")
    state = of(tracks)
    if not words and not text(tracks.engine, "status", "engineStatus"):
        words.append("the chaos operator has not seen the ChaosEngine: is it running, does it watch the namespace?")
    return "; ".join([state.said, *words])


def findings(results: Iterable[Object]) -> tuple[Finding, ...]:
    """One for each probe, one for the verdict."""
    found: list[Finding] = []
    for result in results:
        for probe in items(result, "status", "probeStatuses"):
            verdict, why = text(probe, "status", "verdict"), _plain(text(probe, "status", "description"))
            passed = {"Passed": True, "Failed": False}.get(verdict)
            saw = f"{text(probe, 'type')}, mode {text(probe, 'mode')}: {verdict or 'no verdict'}"
            found.append(
                Finding(name=f"litmus probe {text(probe, 'name')}", passed=passed, saw=f"{saw}: {why}" if why else saw)
            )
        found.append(_judged(result))
    return tuple(found)


def judged(results: Iterable[Object]) -> bool:
    """Whether there is a verdict."""
    verdicts = [text(r, "status", "experimentStatus", "verdict") for r in results]
    return bool(verdicts) and all(v not in ("", "Awaited") for v in verdicts)


def _judged(result: Object) -> Finding:
    status = mapping(result, "status", "experimentStatus")
    verdict, phase = text(status, "verdict"), text(status, "phase")
    passed = {"Pass": True, "Fail": False}.get(verdict)
    share = text(status, "probeSuccessPercentage")
    saw = f"verdict {verdict or 'none'}, phase {phase or 'none'}, probe success {share or 'unknown'}"
    if share.isdecimal():
        saw += " %"
    if not items(result, "status", "probeStatuses"):
        saw += ": it has no probes, so the verdict says only that the experiment ran"
    if why := failure(result):
        saw += f"; {why}"
    return Finding(name="litmus verdict", passed=passed, saw=saw)


def _verdict(results: Iterable[Object]) -> str:
    found = [text(r, "status", "experimentStatus", "verdict") for r in results]
    return f", verdict {found[0]}" if found and found[0] else ""


def _plain(words: str) -> str:
    """On one line, and not too long."""
    line = " ".join(words.split())
    return line if len(line) <= 400 else line[:399] + "…"
