"""What a suite's schedule asks for in one week, tick by tick, as Dagster's daemon would evaluate it.

    python -m benchmarks.week [SUITE] [--from 2026-11-23] [--days 7] [--environment sandbox]

Nothing is run. One line per RunRequest: local time, experiment, run key, tags. A tick that asks for nothing says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
from dagster._utils.schedules import schedule_execution_time_iterator

from mlchaos_dagster import settings
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.definitions import build_definitions, read_library
from mlchaos_dagster.orchestration.platform import RealPlatform
from mlchaos_dagster.settings import Home


class At(RealPlatform):
    """The real platform with a clock that is set to each tick."""

    at = datetime.now(timezone.utc)

    def now(self) -> datetime:
        return self.at


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", nargs="?", default="nightly")
    parser.add_argument("--from", dest="first", default="2026-11-23", help="first day, a Monday by default")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--environment", default="sandbox")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, dg.instance_for_test() as instance:
        platform = At(dataclasses.replace(settings.load(), home=Home(Path(home)), environment=args.environment))
        library = read_library(platform.settings)
        repository = build_definitions(library, platform).get_repository_def()
        schedule = repository.get_schedule_def(f"{args.suite}__{keys.python_name(args.environment)}_schedule")
        assert isinstance(schedule.cron_schedule, str) and schedule.execution_timezone
        zone = ZoneInfo(schedule.execution_timezone)
        begin = datetime.fromisoformat(args.first).replace(tzinfo=zone)
        end = begin + timedelta(days=args.days)
        ticks = schedule_execution_time_iterator(begin.timestamp(), schedule.cron_schedule, schedule.execution_timezone)
        print(f"{schedule.name}: {schedule.cron_schedule} ({zone.key}), {begin:%a %d %b %Y} and {args.days} days on")
        requested = 0
        for tick in itertools.takewhile(lambda t: t < end, ticks):
            platform.at = tick.astimezone(timezone.utc)
            context = dg.build_schedule_context(
                instance=instance, scheduled_execution_time=tick, resources={"platform": platform}
            )
            with context:
                data = schedule.evaluate_tick(context)
            shown = tick.astimezone(zone).strftime("%a %d %b %H:%M")
            if data.skip_message:
                print(f"{shown}  –  {data.skip_message}")
            for request in data.run_requests or []:
                requested += 1
                tags = " ".join(
                    f"{k}={v}" for k, v in sorted(request.tags.items()) if k.startswith((keys.TAG, "dagster/priority"))
                )
                print(f"{shown}  {request.tags[keys.TAG_EXPERIMENT]:<26}  {request.run_key:<54}  {tags}")
        print(f"{requested} runs requested")


if __name__ == "__main__":
    main()
