"""What the status of a Chaos Mesh resource says. Pure.

Conditions carry no times and go back (`AllInjected` turns False on recovery, `AllRecovered` is True before anything is
injected), so everything here is read from the records: one a target, with counters and the events of what was done.

    Not Injected → Not Injected/… → Injected → Injected/… → Not Injected
"""

from __future__ import annotations

from collections.abc import Collection

from mlchaos_dagster.kube.objects import Object, items, part, text

_OFF, _ON = "Not Injected", "Injected"


def records(found: Object) -> list[Object]:
    """One for each target (pod, container, or whatever the kind selects)."""
    return items(found, "status", "experiment", "containerRecords")


def condition(found: Object, kind: str) -> str:
    """`True`, `False`, or empty where there is none yet."""
    return next((text(c, "status") for c in items(found, "status", "conditions") if text(c, "type") == kind), "")


def pods(found: Object) -> set[tuple[str, str]]:
    """(namespace, name) of the pods it selected itself; the other end of a link is not counted."""
    ids = [text(r, "id").split("/") for r in records(found) if text(r, "selectorKey") in (".", "")]
    return {(i[0], i[1]) for i in ids if len(i) > 1}


def count(record: Object, what: str) -> int:
    """A record's counter, `injectedCount` or `recoveredCount`."""
    return int(part(record, what) or 0)


def injected(found: Object) -> bool:
    """Every target was injected at some time: an `Apply` that succeeded, which stays when it is recovered."""
    there = records(found)
    return bool(there) and all(count(r, "injectedCount") > 0 or _happened(r, "Apply") for r in there)


def is_on(found: Object) -> bool:
    """A target is injected now, or about to be, or about to be recovered."""
    return any(text(r, "phase") != _OFF for r in records(found))


def untouched(found: Object) -> bool:
    """No target was ever injected, and none is on its way."""
    return not is_on(found) and not any(count(r, "injectedCount") for r in records(found))


def recovered(found: Object) -> bool:
    """Every target was injected and has been recovered as often."""
    there = records(found)
    return bool(there) and all(
        text(r, "phase") == _OFF
        and count(r, "injectedCount") > 0
        and count(r, "recoveredCount") >= count(r, "injectedCount")
        for r in there
    )


def injections(found: Object) -> int:
    """How often a target was injected, all together."""
    return sum(count(r, "injectedCount") for r in records(found))


def at_rest(found: Object) -> bool:
    """Each target is recovered or was never touched: some were injected before the stop, some were not."""
    return all(
        text(r, "phase") == _OFF and count(r, "recoveredCount") >= count(r, "injectedCount") for r in records(found)
    )


def settled(found: Object) -> bool:
    """No target is halfway: what is on stays on or is recovered, and nothing more is injected once it is deleted."""
    return all(text(r, "phase") in (_OFF, _ON) for r in records(found))


def failures(found: Object, operation: str) -> list[str]:
    """Of each target whose newest event is that this operation (`Apply`, `Recover`) failed: whose, and Chaos Mesh's words."""
    said: list[str] = []
    for record in records(found):
        events = items(record, "events")
        newest = events[-1] if events else Object()
        if text(newest, "type") == "Failed" and text(newest, "operation") == operation:
            said.append(f"{text(record, 'id')}: {' '.join(text(newest, 'message').split())}")
    return said


def injected_at(found: Object) -> str:
    """When the last target was injected; empty where none was."""
    times = [
        text(e, "timestamp")
        for r in records(found)
        for e in items(r, "events")
        if (text(e, "type"), text(e, "operation")) == ("Succeeded", "Apply")
    ]
    return max(times, default="")


def stray(found: Object, wanted: Collection[tuple[str, str]]) -> str:
    """How its selection differs from the frozen pods; empty: it does not."""
    selected = pods(found)
    if more := selected - set(wanted):
        return f"it selected {_names(more)}, which was not meant"
    if less := set(wanted) - selected:
        return f"it did not select {_names(less)}"
    return ""


def _happened(record: Object, operation: str) -> bool:
    return any((text(e, "type"), text(e, "operation")) == ("Succeeded", operation) for e in items(record, "events"))


def _names(those: Collection[tuple[str, str]]) -> str:
    return ", ".join(sorted(f"{space}/{name}" for space, name in those))
