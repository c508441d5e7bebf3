"""When other tools would start their chaos → the schedule of a suite (R3-05), which Dagster keeps.

Litmus: `ChaosSchedule` (litmuschaos.io), whose scheduler knows neither a time zone nor a window of the day; both are said in
a suite. Chaos Mesh: the cron line of a `Schedule`, with descriptors (`@every 10m`) and an optional time zone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mlchaos_dagster.domain.manifests.drafts import Brought, SuiteDraft, name_of
from mlchaos_dagster.domain.manifests.litmus import engine
from mlchaos_dagster.domain.manifests.shapes import Fields, Looker, Rule, Words, at, go_seconds, part, text_at
from mlchaos_dagster.domain.nodes import Node, Path
from mlchaos_dagster.domain.parsing import nearest

DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONG = {"sunday": 0, "monday": 1, "tuesday": 2, "wednesday": 3, "thursday": 4, "friday": 5, "saturday": 6}
_INTERVAL: Rule = "any"
_WHEN: dict[str, Rule] = {
    "timeRange": "any",
    "workDays": Fields({"includedDays": "text"}),
    "workHours": Fields({"includedHours": "text"}),
    "minChaosInterval": _INTERVAL,
    "random": "bool",
}
_REPEAT = Fields({**_WHEN, "properties": Fields({**_WHEN})})
_SCHEDULE = Fields(
    {**_WHEN, "now": "bool", "once": Fields({"executionTime": "text"}), "repeat": _REPEAT, "type": "text"}
)
_SPEC = Fields(
    {
        "schedule": _SCHEDULE,
        "scheduleState": Words(("active", "halt", "stop", "complete"), fold=True),
        "concurrencyPolicy": Words(("Allow", "Forbid", "Replace"), fold=True),
        "chaosServiceAccount": "text",
        "engineTemplateSpec": "any",
    },
    ("schedule", "engineTemplateSpec"),
    ignored=True,
)
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::\d\d)?")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d.*")
_PATH: Path = ("spec", "schedule")


@dataclass
class _Plan:
    """What a ChaosSchedule says, wherever in it that was written."""

    window: tuple[int, int] | None = None
    """Minutes of the day."""
    days: set[int] = field(default_factory=set[int])
    """0 is Sunday; empty: every day."""
    hours: set[int] = field(default_factory=set[int])
    """Empty: every hour."""
    every_s: float = 0.0
    minute: int = 0
    seen: set[str] = field(default_factory=set[str])


def chaos_schedule(look: Looker, brought: Brought, name: str) -> None:
    """A ChaosSchedule: its engine's experiments, and a suite of them."""
    root = look.document.root
    pair = root.pair("spec")
    if pair is None:
        look.problem((), "missing field spec.")
        return
    spec = part(look.look(pair[1], ("spec",), _SPEC))
    template = at(pair[1], "engineTemplateSpec")
    if template is not None:
        engine(look, template, brought, ("spec", "engineTemplateSpec"), name, "ChaosSchedule")
    schedule = part(spec.get("schedule"))
    if not schedule:
        return
    policy = spec.get("concurrencyPolicy")
    if policy in ("Allow", "Replace"):
        look.note(("spec", "concurrencyPolicy"), "left out, as in Litmus: no run of a suite overlaps another.")
    found = _when(look, schedule)
    state = spec.get("scheduleState", "active")
    if state != "active" and found is not None:
        look.note(("spec", "scheduleState"), f"{state}: the suite gets no schedule; run it by hand, with --suite.")
        found = None
    brought.suites.append(SuiteDraft(name_of(name), f"From ChaosSchedule {name}", found))


def _when(look: Looker, schedule: dict[str, Any]) -> dict[str, Any] | None:
    repeat = part(schedule.get("repeat"))
    if schedule.get("once"):
        at_time = part(schedule["once"]).get("executionTime", "")
        what = f"at {at_time}: a suite repeats, so it gets no schedule; run it then, with --suite."
        look.note((*_PATH, "once"), what)
        return None
    placed = [n for n in _WHEN if n in schedule]
    if not repeat and not placed:
        what = "now: a suite repeats, so it gets no schedule; `mlchaos run` of this file runs it now."
        look.note((*_PATH, "now") if schedule.get("now") else _PATH, what)
        return None
    plan = _Plan()
    _take(look, plan, repeat, (*_PATH, "repeat"), ("timeRange", "workDays", "workHours"))
    _take(look, plan, part(repeat.get("properties")), (*_PATH, "repeat", "properties"), ("minChaosInterval", "random"))
    _take(look, plan, schedule, _PATH, ())
    return _suite_schedule(look, plan)


def _take(look: Looker, plan: _Plan, found: dict[str, Any], path: Path, right: tuple[str, ...]) -> None:
    """Fields of one place; those that belong elsewhere are taken all the same."""
    for name in _WHEN:
        if name not in found:
            continue
        where = (*path, name)
        if name not in right:
            home = "repeat.properties" if name in ("minChaosInterval", "random") else "repeat"
            look.note(
                where, f"it belongs into schedule.{home}, and Litmus does not see it here: taken as meant.", key=True
            )
        if name in plan.seen:
            look.problem(where, "given twice. Allowed: once.", key=True)
            continue
        plan.seen.add(name)
        value = found[name]
        if name == "timeRange":
            _range(look, plan, part(value), where)
        elif name == "workDays":
            plan.days = _days(look, str(part(value).get("includedDays", "")), (*where, "includedDays"))
        elif name == "workHours":
            plan.hours = _hours(look, str(part(value).get("includedHours", "")), (*where, "includedHours"))
        elif name == "minChaosInterval":
            _interval(look, plan, value, where)
        elif value:
            look.note(where, "left out: a suite starts at its times, not at random ones in between.")


def _range(look: Looker, plan: _Plan, found: dict[str, Any], path: Path) -> None:
    for name in ("workDays", "workHours"):
        if name in found:
            _take(look, plan, {name: _inner(look, found[name], (*path, name))}, path, ())
    times = {n: str(found[n]) for n in ("startTime", "endTime") if found.get(n) not in (None, "")}
    clocks = {n: _CLOCK.fullmatch(t.strip()) for n, t in times.items()}
    if len(times) == 2 and all(clocks.values()):
        start, end = (int(m[1]) * 60 + int(m[2]) for m in clocks.values() if m)
        if start == end:
            look.problem(path, "a window without length. Allowed: such as 02:00 to 04:00.")
            return
        plan.window = (start, end)
        what = (
            "Litmus wants whole dates here and would refuse times of day: taken as the window of each day, "
            "in UTC (write another timezone into the suite)."
        )
        look.note(path, what)
        return
    for name, text in times.items():
        if _STAMP.fullmatch(text.strip()):
            what = f"{text[:40]}: a suite has no first or last day; take its file away when it is over."
            look.note((*path, name), what)
        else:
            look.problem(
                (*path, name), f'"{text[:40]}" is not a time. Allowed: such as 02:00, both of startTime and endTime.'
            )


def _inner(look: Looker, value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return part(value)
    look.problem(path, "not fields. Allowed: such as includedDays: Mon-Fri.")
    return {}


def _interval(look: Looker, plan: _Plan, value: Any, path: Path) -> None:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        seconds = go_seconds(str(value))
        if seconds is None or seconds < 60:
            look.problem(path, f'"{str(value)[:40]}" is not an interval of a minute or more. Allowed: such as 8h.')
            return
        plan.every_s = seconds
        form = (
            f"hour: {{everyNthHour: {seconds / 3600:g}}}"
            if seconds % 3600 == 0
            else f"minute: {{everyNthMinute: {seconds / 60:g}}}"
        )
        look.note(path, f"Litmus wants {form}: taken so.")
        return
    found = part(value)
    hour, minute = part(found.get("hour")), part(found.get("minute"))
    try:
        hours, minutes = int(hour.get("everyNthHour") or 0), int(minute.get("everyNthMinute") or 0)
        plan.minute = int(hour.get("minuteOfTheHour") or 0)
    except (TypeError, ValueError):
        hours, minutes = 0, 0
    unknown = sorted((set(found) - {"hour", "minute"}) | (set(hour) - {"everyNthHour", "minuteOfTheHour"}))
    unknown += sorted(set(minute) - {"everyNthMinute"})
    if unknown or not (0 < hours <= 24 * 7 or 0 < minutes <= 60 * 24 * 7) or not 0 <= plan.minute < 60:
        what = "needs hour: {everyNthHour: 8} or minute: {everyNthMinute: 30}"
        look.problem(path, f"{what}{f'; {unknown[0]} is not known' if unknown else ''}.")
        return
    plan.every_s = minutes * 60.0 if minutes else hours * 3600.0  # as in Litmus, minutes win


def _days(look: Looker, text: str, path: Path) -> set[int]:
    """`Mon,Wed-Fri` or `0,2-4` → numbers, 0 is Sunday. Litmus itself takes a word it does not know for Sunday."""
    found: set[int] = set()
    for word in text.replace("*", "").split(","):
        if not word.strip():
            continue
        ends = [_day(w) for w in word.split("-")]
        if len(ends) > 2 or None in ends:
            bad = next((w for w in word.split("-") if _day(w) is None), word).strip()
            near = nearest(bad[:3].lower(), DAYS)
            hint = f' Did you mean "{near.title()}"?' if near else ""
            look.problem(path, f'"{bad[:40]}" is not a day.{hint} Allowed: such as Mon,Tue or Mon-Fri.')
            return set()
        first, last = ends[0] or 0, ends[-1] or 0
        found |= {d % 7 for d in range(first, (last if last >= first else last + 7) + 1)}
    return found if len(found) < 7 else set()


def _day(word: str) -> int | None:
    word = word.strip().lower()
    if word.isdecimal() and len(word) == 1 and int(word) <= 7:
        return int(word) % 7
    return DAYS.index(word) if word in DAYS else _LONG.get(word)


def _hours(look: Looker, text: str, path: Path) -> set[int]:
    found: set[int] = set()
    for word in text.replace("*", "").split(","):
        if not word.strip():
            continue
        match = re.fullmatch(r"(\d{1,2})(?:\s*-\s*(\d{1,2}))?", word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= 23:
            look.problem(path, f'"{word.strip()[:40]}" is not an hour or a range of hours. Allowed: such as 0-12.')
            return set()
        found |= set(range(first, last + 1))
    return found


def _suite_schedule(look: Looker, plan: _Plan) -> dict[str, Any] | None:
    every = plan.every_s
    if not every:
        if plan.window is None:
            look.problem(_PATH, "does not say how often. Allowed: repeat: {properties: {minChaosInterval: …}}.")
            return None
        every = 86400.0
        look.note(_PATH, "no minChaosInterval: once a day is taken.")
    if plan.window and plan.hours:
        look.note(_PATH, "timeRange and workHours at once: the hours of timeRange are taken.")
    hours, minute = _open_hours(plan)
    schedule: dict[str, Any] = {
        "cron": f"{_minutes(every, minute)} {_hour_field(every, hours)} * * {_day_field(plan.days)}"
    }
    if plan.window is None:
        look.note(_PATH, "no time zone is said in Litmus; its scheduler runs in UTC, and so does the suite.")
    schedule["timezone"] = "UTC"
    if plan.window:
        schedule["window"] = "-".join(f"{m // 60:02}:{m % 60:02}" for m in plan.window)
    elif (
        plan.hours and sorted(plan.hours) == list(range(min(plan.hours), max(plan.hours) + 1)) and len(plan.hours) < 24
    ):
        schedule["window"] = f"{min(plan.hours):02}:00-{(max(plan.hours) + 1) % 24:02}:00"
    if plan.days:
        schedule["days"] = [DAYS[d] for d in (1, 2, 3, 4, 5, 6, 0) if d in plan.days]
    schedule["min_interval"] = _length(every)
    return schedule


def _open_hours(plan: _Plan) -> tuple[list[int], int]:
    """Hours in which it may begin, in their order (empty: all), and the minute."""
    if plan.window is None:
        return sorted(plan.hours), plan.minute
    start, end = plan.window
    end = end if end > start else end + 1440
    minute = plan.minute or start % 60
    hours = [h % 24 for h in range(start // 60, (end + 59) // 60) if start <= h * 60 + minute < end]
    return hours or [start // 60], minute if hours else start % 60


def _minutes(every: float, minute: int) -> str:
    return f"*/{every / 60:g}" if every < 3600 else str(minute)


def _hour_field(every: float, hours: list[int]) -> str:
    step = max(1, int(every // 3600))
    if not hours:
        return "*" if step == 1 else (f"*/{step}" if step < 24 else "0")
    chosen = [h for i, h in enumerate(hours) if i % step == 0]
    if len(chosen) > 2 and chosen == list(range(chosen[0], chosen[-1] + 1)):
        return f"{chosen[0]}-{chosen[-1]}"
    return ",".join(str(h) for h in sorted(chosen))


def _day_field(days: set[int]) -> str:
    if not days:
        return "*"
    ordered = sorted(days)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(str(d) for d in ordered)


def _length(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


# -- Chaos Mesh -----------------------------------------------------------------------------------------------------

_DESCRIPTORS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_CRON_FIELD = re.compile(r"[0-9A-Za-z*?/,-]{1,60}")


def cron_schedule(look: Looker, node: Node, path: Path) -> dict[str, Any] | None:
    """The `schedule` of a Schedule of Chaos Mesh as that of a suite; None: it is none, which was said."""
    line = text_at(node, "schedule").strip()
    where = (*path, "schedule")
    zone, found = "UTC", re.match(r"(?:CRON_)?TZ=([A-Za-z0-9_+/-]{1,60})\s+(.*)", line)
    if found:
        zone, line = found[1], found[2].strip()
    if line.startswith("@every"):
        return _every(look, line.removeprefix("@every").strip(), where)
    line = _DESCRIPTORS.get(line, line)
    words = line.split()
    if len(words) == 6:
        what = f'six fields, the first of which is seconds: "{" ".join(words[1:])}" is taken, a suite starts on full minutes.'
        look.note(where, what)
        words = words[1:]
    if len(words) != 5 or not all(_CRON_FIELD.fullmatch(w) for w in words):
        look.problem(where, f'"{line[:60]}" is not a cron line. Allowed: such as "0 2 * * 1-5" or "@every 10m".')
        return None
    if not found:
        look.note(where, "no time zone is said; Chaos Mesh runs in that of its controller, the suite in UTC.")
    return {"cron": " ".join(words).replace("?", "*"), "timezone": zone}


def _every(look: Looker, length: str, where: Path) -> dict[str, Any] | None:
    seconds = go_seconds(length)
    if seconds is None or seconds <= 0:
        look.problem(where, f'"@every {length[:40]}" is not an interval. Allowed: such as "@every 10m".')
        return None
    if seconds < 60:
        what = f"every {seconds:g} s: a suite starts once a minute at most, and not before its last run is over."
        look.note(where, what)
        seconds = 60.0
    minutes = max(1, int(seconds // 60))
    if minutes >= 1440:
        cron = "0 0 * * *"
    elif minutes >= 60:
        cron = f"0 */{minutes // 60} * * *" if minutes >= 120 else "0 * * * *"
    else:
        cron = "* * * * *" if minutes == 1 else f"*/{minutes} * * * *"
    return {"cron": cron, "timezone": "UTC", "min_interval": _length(float(minutes * 60))}
