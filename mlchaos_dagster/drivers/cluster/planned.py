"""Chaos that other tools will start by themselves: whether one of its times is near.

Chaos Mesh: `spec.schedule` of a Schedule is a cron line (robfig/cron with descriptors and optional seconds, in the time
zone of its controller, by default UTC). Litmus: `spec.schedule` of a ChaosSchedule is `now`, `once` or `repeat`. A line
that is not understood counts as near: who does not know when something starts must not be surprised by it.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

from mlchaos_dagster.kube.objects import Object, mapping, text

NEAR = timedelta(hours=1)
"""A run with its baseline, window and recovery is over by then."""
_EVERY = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *"}
_SELDOM = {"@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}
_MONTHS: dict[str, int] = dict(
    zip("jan feb mar apr may jun jul aug sep oct nov dec".split(), range(1, 13), strict=True)
)
_DAYS: dict[str, int] = dict(zip("sun mon tue wed thu fri sat".split(), range(7), strict=True))
_NUMBERS: dict[str, int] = {}
_FIELDS = ((0, 59, _NUMBERS), (0, 23, _NUMBERS), (1, 31, _NUMBERS), (1, 12, _MONTHS), (0, 7, _DAYS))
_PAUSED = "experiment.chaos-mesh.org/pause"


def schedule_is_near(schedule: Object, now: datetime) -> bool:
    """Whether a Schedule of Chaos Mesh may start something within `NEAR`."""
    if text(schedule, "metadata", "annotations", _PAUSED) == "true" or text(schedule, "metadata", "deletionTimestamp"):
        return False
    return cron_is_near(text(schedule, "spec", "schedule"), now)


def chaos_schedule_is_near(schedule: Object, now: datetime) -> bool:
    """Whether a ChaosSchedule of Litmus may start an engine within `NEAR`."""
    if text(schedule, "spec", "scheduleState") in ("halt", "stop", "complete"):
        return False
    plan = mapping(schedule, "spec", "schedule")
    if "once" in plan:
        at = _time(text(plan, "once", "executionTime"))
        return at is None or now <= at <= now + NEAR
    repeat = mapping(plan, "repeat")
    begins, ends = (_time(text(repeat, "timeRange", key)) for key in ("startTime", "endTime"))
    if (begins is not None and begins > now + NEAR) or (ends is not None and ends < now):
        return False
    days, hours = text(repeat, "workDays", "includedDays"), text(repeat, "workHours", "includedHours")
    return _any(f"0 {hours or '*'} * * {days or '*'}", now.replace(minute=0), now + NEAR)


def cron_is_near(line: str, now: datetime) -> bool:
    """Whether a cron line has a time within `NEAR`; one that is not understood counts as near."""
    zone, _, rest = line.strip().partition(" ")
    if zone.startswith(("TZ=", "CRON_TZ=")):
        return _zoned(zone.partition("=")[2], rest, now)
    line = line.strip()
    if line.startswith("@every "):
        return True  # from the schedule's last time on, which is not told exactly
    line = _EVERY.get(line, _SELDOM.get(line, line))
    return _any(line, now, now + NEAR)


def _zoned(zone: str, line: str, now: datetime) -> bool:
    from zoneinfo import ZoneInfo

    try:
        return cron_is_near(line, now.astimezone(ZoneInfo(zone)))
    except (OSError, ValueError):  # no such zone
        return True


def _any(line: str, start: datetime, end: datetime) -> bool:
    """Whether one of the minutes from `start` to `end` is meant."""
    words = line.split()
    try:
        fields = [_field(w, *f) for w, f in zip(words[-5:], _FIELDS, strict=True)]
    except ValueError:
        return True
    if len(words) > 6:
        return True
    minute, hour, day, month, weekday = fields
    both = words[-5:][2] != "*" and words[-5:][4] != "*"  # as cron has it: then either is enough
    at = start.replace(second=0, microsecond=0)
    while at <= end:
        on_day, on_weekday = at.day in day, at.isoweekday() % 7 in weekday
        fits = (on_day or on_weekday) if both else (on_day and on_weekday)
        if fits and at.minute in minute and at.hour in hour and at.month in month:
            return True
        at += timedelta(minutes=1)
    return False


def _field(written: str, low: int, high: int, names: dict[str, int]) -> set[int]:
    """The numbers that one field means. Raises ValueError: it is none."""
    found: set[int] = set()
    for word in written.lower().split(","):
        one = re.fullmatch(r"(?P<from>\*|\?|\w+)(?:-(?P<to>\w+))?(?:/(?P<step>\d+))?", word.strip())
        if one is None:
            raise ValueError(word)
        if one["from"] in "*?":
            first, last = low, high
        else:
            first = _number(one["from"], names)
            last = _number(one["to"], names) if one["to"] else (high if one["step"] else first)
        step = int(one["step"] or 1)
        if step < 1 or first < low or last > high or last < first:
            raise ValueError(word)
        found |= set(range(first, last + 1, step))
    return {n % 7 for n in found} if names is _DAYS else found


def _number(word: str, names: dict[str, int]) -> int:
    return names[word] if word in names else int(word)


def _time(written: str) -> datetime | None:
    """RFC 3339, as the API writes it; None where it is none."""
    try:
        found = datetime.fromisoformat(written.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
