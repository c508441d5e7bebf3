"""Suites by the clock: window, days and minimum interval are enforced when a tick is evaluated.

A cron line alone is not enough: Dagster evaluates a tick that it missed as soon as it is back, and a laptop that
sleeps at 02:00 would break things at 09:00.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, time, timedelta, timezone
from zoneinfo import ZoneInfo

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Suite, SuiteSchedule
from mlchaos_dagster.domain.units import show_duration
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.jobs import SuiteJob, run_request, suite_job_name
from mlchaos_dagster.orchestration.ops import Pair
from mlchaos_dagster.orchestration.ports import Platform

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
LATE = timedelta(minutes=30)
"""Without a window a tick that is evaluated later than this is skipped."""


def window_of(schedule: SuiteSchedule, moment: datetime) -> tuple[datetime, datetime] | None:
    """The window that `moment` lies in (it may reach over midnight), or None when it lies in none."""
    zone = ZoneInfo(schedule.timezone)
    local = moment.astimezone(zone)
    if schedule.window is None:
        return local, local + timedelta(days=1)
    begin, end = (time.fromisoformat(part) for part in schedule.window.split("-"))
    for day in (local.date(), local.date() - timedelta(days=1)):
        opens = datetime.combine(day, begin, zone)
        closes = datetime.combine(day if begin < end else day + timedelta(days=1), end, zone)
        # Compared as instants: local arithmetic is wrong by an hour on the two days when clocks change.
        if opens.astimezone(timezone.utc) <= moment.astimezone(timezone.utc) < closes.astimezone(timezone.utc):
            return opens, closes
    return None


def why_not(schedule: SuiteSchedule, due: datetime, now: datetime, last: datetime | None) -> str | None:
    """Why nothing is requested at this tick, or None.

    Args:
        schedule: the suite's.
        due: the tick's time.
        now: when it is really evaluated.
        last: when the suite last ran.
    """
    window = window_of(schedule, now)
    if window is None:
        return f"{_shown(now, schedule)} is outside the window {schedule.window} ({schedule.timezone})"
    # The window belongs to the day on which it opens.
    opened = window[0] if schedule.window else due.astimezone(ZoneInfo(schedule.timezone))
    if schedule.days and DAYS[opened.weekday()] not in schedule.days:
        return f"{DAYS[opened.weekday()]} is not among the days {', '.join(schedule.days)}"
    if schedule.window is None and now - due > LATE:
        return f"this tick was due at {_shown(due, schedule)}, {show_duration((now - due).total_seconds())} ago"
    if last is not None and schedule.min_interval is not None:
        passed = (now - last).total_seconds()
        if passed < schedule.min_interval:
            return (
                f"the suite last ran {show_duration(max(0.0, passed))} ago; "
                f"at least {show_duration(schedule.min_interval)} must lie between"
            )
    return None


def _shown(moment: datetime, schedule: SuiteSchedule) -> str:
    return moment.astimezone(ZoneInfo(schedule.timezone)).strftime("%a %H:%M")


def last_run(instance: dg.DagsterInstance, suite: str, environment: str) -> datetime | None:
    """When a run of the suite was last requested in the environment."""
    tags = {keys.TAG_SUITE: suite, keys.TAG_ENVIRONMENT: environment}
    records = instance.get_run_records(filters=dg.RunsFilter(tags=tags), limit=1)
    if not records:
        return None
    created = records[0].create_timestamp
    return created if created.tzinfo else created.replace(tzinfo=timezone.utc)


def suite_schedule(
    suite: Suite,
    schedule: SuiteSchedule,
    environment: Environment,
    pairs: Sequence[Pair],
    job: SuiteJob,
) -> dg.ScheduleDefinition:
    """The schedule of a suite in an environment: one run per experiment, each with a key that no tick repeats.

    STOPPED until somebody switches it on: nothing is ever broken by the clock that nobody asked for.
    """

    @dg.schedule(
        name=f"{suite_job_name(suite, environment)}_schedule",
        cron_schedule=schedule.cron,
        execution_timezone=schedule.timezone,
        job=job,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        required_resource_keys={"platform"},
        description=_about(suite, schedule),
    )
    def due(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        platform: Platform = context.resources.platform
        tick, now = context.scheduled_execution_time, platform.now()
        reason = why_not(schedule, tick, now, last_run(context.instance, suite.name, environment.name))
        if reason is not None:
            return dg.SkipReason(reason)
        tags: dict[str, str] = {}
        window = window_of(schedule, now)
        if schedule.window and window:
            tags[keys.TAG_NOT_AFTER] = window[1].isoformat()
        stamp = tick.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
        # The suite's order, should the queue have to choose.
        return [
            run_request(suite, p, f"{suite.name}/{stamp}/{p[0].name}", {**tags, "dagster/priority": str(-i)})
            for i, p in enumerate(pairs)
        ]

    return due


def _about(suite: Suite, schedule: SuiteSchedule) -> str:
    parts = [suite.title]
    if schedule.window:
        parts.append(f"between {schedule.window.replace('-', ' and ')} ({schedule.timezone})")
    if schedule.days:
        parts.append(f"on {', '.join(schedule.days)}")
    if schedule.min_interval:
        parts.append(f"at least {show_duration(schedule.min_interval)} apart")
    return "; ".join(parts) + ". Stopped until you switch it on."
