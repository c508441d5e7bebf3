"""A simulated week of the nightly schedule, and everything that must keep it from running."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from sim_platform import SimPlatform, environment, experiment
from test_definitions import SUITE

from mlchaos_dagster.domain.spec import SuiteSchedule
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.definitions import Library, build_definitions
from mlchaos_dagster.orchestration.schedules import why_not, window_of

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTLY = SUITE.schedule
assert NIGHTLY is not None


@pytest.fixture
def schedule(platform: SimPlatform) -> Any:
    library = Library((environment(),), (experiment("one"), experiment("two")), (SUITE,))
    return build_definitions(library, platform).get_repository_def().get_schedule_def("nightly__sim_schedule")


def evaluate(schedule: Any, platform: SimPlatform, instance: dg.DagsterInstance, due: datetime, now: datetime) -> Any:
    platform.at = now.astimezone(timezone.utc)
    with dg.build_schedule_context(
        instance=instance, scheduled_execution_time=due, resources={"platform": platform}
    ) as context:
        return schedule.evaluate_tick(context)


def test_a_week(schedule: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    """Monday 23 to Sunday 29 November 2026, tick by tick: two runs each at 02:00 on the five weekdays, nothing else."""
    requested: list[tuple[str, str]] = []
    for tick in ticks(schedule, at(23, 0), at(23, 0) + timedelta(days=7)):
        data = evaluate(schedule, platform, instance, tick, tick)
        for request in data.run_requests:
            requested.append((tick.astimezone(BERLIN).strftime("%a %H:%M"), request.tags[keys.TAG_EXPERIMENT]))
            assert request.tags[keys.TAG_TARGET] == "sim.prediction-service"
            assert request.tags[keys.TAG_NOT_AFTER].startswith(tick.strftime("%Y-%m-%dT04:00"))
            assert {k.path[-1] for k in request.asset_selection} == set(keys.PHASES)
    days = ("Mon", "Tue", "Wed", "Thu", "Fri")
    assert requested == [(f"{d} 02:00", e) for d in days for e in ("one", "two")]


def ticks(schedule: Any, start: datetime, end: datetime) -> list[datetime]:
    """When Dagster's daemon would evaluate it."""
    from dagster._utils.schedules import schedule_execution_time_iterator

    every = schedule_execution_time_iterator(start.timestamp(), schedule.cron_schedule, schedule.execution_timezone)
    return list(itertools.takewhile(lambda tick: tick < end, every))


def test_run_keys_never_repeat(schedule: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    due = at(23, 2)
    once = evaluate(schedule, platform, instance, due, due)
    again = evaluate(schedule, platform, instance, due, due + timedelta(minutes=1))
    other = evaluate(schedule, platform, instance, due + timedelta(days=1), due + timedelta(days=1))
    first = [r.run_key for r in once.run_requests]
    assert first == [r.run_key for r in again.run_requests] and len(set(first)) == 2
    assert not set(first) & {r.run_key for r in other.run_requests}


@pytest.mark.req("R3-10")
def test_stages_are_requested_in_their_order(platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    """One run each, the earlier stage with the higher priority; the queue lets one into an environment at a time."""
    stages = [experiment(f"p-{i}", **({"depends_on": f"p-{i - 1}"} if i > 1 else {})) for i in (1, 2, 3)]
    suite = SUITE.model_copy(update={"experiments": tuple(e.name for e in stages)})
    library = Library((environment(),), (stages[2], stages[0], stages[1]), (suite,))
    schedule = build_definitions(library, platform).get_repository_def().get_schedule_def("nightly__sim_schedule")
    requests = evaluate(schedule, platform, instance, at(23, 2), at(23, 2)).run_requests
    assert [r.tags[keys.TAG_EXPERIMENT] for r in requests] == ["p-1", "p-2", "p-3"]
    priorities = [int(r.tags["dagster/priority"]) for r in requests]
    assert priorities == sorted(priorities, reverse=True) and len(set(priorities)) == 3
    assert {r.tags[keys.TAG_ENVIRONMENT] for r in requests} == {"sim"}


def test_the_last_run_is_read_from_the_history(schedule: Any, platform: SimPlatform) -> None:
    with dg.instance_for_test() as instance:
        tags = {keys.TAG_SUITE: "nightly", keys.TAG_ENVIRONMENT: "sim"}
        instance.add_run(
            dg.DagsterRun(job_name="nightly__sim", run_id="11111111-1111-1111-1111-111111111111", tags=tags)
        )
        now = datetime.now(timezone.utc)
        monday = (now + timedelta(days=(7 - now.weekday()) % 7 or 7)).astimezone(BERLIN)
        due = monday.replace(hour=2, minute=0, second=0, microsecond=0)
        data = evaluate(schedule, platform, instance, due, due)
        late_enough = (due - now) >= timedelta(hours=8)
        assert bool(data.run_requests) == late_enough
        if not late_enough:
            assert "at least 8 h" in data.skip_message


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 11, day, hour, minute, tzinfo=BERLIN)


@pytest.mark.parametrize(
    ("due", "now", "last", "says"),
    [
        pytest.param(at(23, 2), at(23, 2), None, None, id="in time"),
        pytest.param(at(23, 2), at(23, 3, 59), None, None, id="late, but inside"),
        pytest.param(at(23, 2), at(23, 9), None, "outside the window", id="the laptop slept"),
        pytest.param(at(23, 2), at(23, 4), None, "outside the window", id="the window is half open"),
        pytest.param(at(28, 2), at(28, 2), None, "sat is not among", id="saturday"),
        pytest.param(at(23, 2), at(24, 2), None, None, id="a day late is another night's window"),
        pytest.param(at(23, 2), at(23, 2), at(22, 18, 1), "at least 8 h", id="too soon"),
        pytest.param(at(23, 2), at(23, 2), at(22, 18), None, id="just long enough"),
    ],
)
def test_why_not(due: datetime, now: datetime, last: datetime | None, says: str | None) -> None:
    assert NIGHTLY is not None
    found = why_not(NIGHTLY, due, now, last)
    assert (found is None) if says is None else (found is not None and says in found)


def test_a_window_over_midnight_belongs_to_its_first_day() -> None:
    schedule = SuiteSchedule.model_validate(
        {"cron": "0 23 * * 5", "timezone": "Europe/Berlin", "window": "23:00-01:00", "days": ["fri"]}
    )
    assert why_not(schedule, at(27, 23), at(28, 0, 30), None) is None
    assert why_not(schedule, at(27, 23), at(28, 23, 30), None) is not None


def test_the_nights_when_clocks_change() -> None:
    assert NIGHTLY is not None
    # Autumn: 02:30 happens twice, both inside. Spring: 02:30 does not exist; 03:30 is inside.
    for utc in ("2026-10-25T00:30+00:00", "2026-10-25T01:30+00:00", "2026-03-29T01:30+00:00"):
        assert window_of(NIGHTLY, datetime.fromisoformat(utc)) is not None
    assert window_of(NIGHTLY, datetime.fromisoformat("2026-03-29T02:00+00:00")) is None
