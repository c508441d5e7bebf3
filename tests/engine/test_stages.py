"""The guard `stage before held`, in the simulated world with real records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sim import SimClock, World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.engine.guards import STAGE_GUARD
from mlchaos_dagster.engine.run import run_experiment
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.judgement.verdict import judge

pytestmark = pytest.mark.req("R3-10")
SECOND = {"name": "second", "depends_on": "first"}


def first(
    tmp_path: Path, world: World | None = None, *, run_id: str = "run-1", judged: bool = True, **more: Any
) -> Any:
    """Run the first stage, judge it and keep both."""
    more = {"experiment": {"name": "first"}, **more}
    run = build(tmp_path, world or World(), run_id=run_id, **more)
    record = run_experiment(run)
    verdict = judge(record, run.samples)
    if judged:
        run.kit.store.save_verdict(record, verdict)
    return verdict


def second(tmp_path: Path, *, later_s: float = 100.0, **changes: Any) -> tuple[RunRecord, Verdict, World]:
    """Run the second stage, so much later."""
    world = World(clock=SimClock())
    world.clock.t += later_s
    run = build(tmp_path, world, experiment={**SECOND, **changes}, run_id="run-2")
    record = run_experiment(run)
    return record, judge(record, run.samples), world


def refused(tmp_path: Path, **more: Any) -> str:
    """What the guard saw; the run must be REFUSED by it, and nothing may have been injected."""
    record, verdict, world = second(tmp_path, **more)
    assert verdict.outcome is Outcome.REFUSED and world.injections == []
    assert record.guards[-1].name == STAGE_GUARD and not record.guards[-1].passed
    assert "mlchaos run first" in record.guards[-1].needs
    return record.guards[-1].saw


def test_a_stage_runs_after_the_one_before_has_held(tmp_path: Path) -> None:
    assert first(tmp_path).outcome is Outcome.HELD
    record, verdict, world = second(tmp_path)
    assert verdict.outcome is Outcome.HELD and len(world.injections) == 1
    assert any(g.name == STAGE_GUARD and g.passed and "first HELD" in g.saw for g in record.guards)


def test_never_run(tmp_path: Path) -> None:
    assert refused(tmp_path) == "no run of first here within 24 h"


@pytest.mark.parametrize(
    ("world", "more", "saw"),
    [
        pytest.param(lambda: World(errors_during=0.2), {}, "first DEVIATED (run run-1)", id="deviated"),
        pytest.param(lambda: World(errors_always=0.2), {}, "first REFUSED (run run-1)", id="refused"),
        pytest.param(lambda: World(effective=False), {}, "first INCONCLUSIVE (run run-1)", id="not seen"),
        pytest.param(lambda: World(errors_during=0.9), {}, "first ABORTED (run run-1)", id="aborted"),
        pytest.param(World, {"shadow": True}, "first SHADOW-", id="a shadow run proves nothing"),
        pytest.param(World, {"judged": False}, "first was not judged (run run-1)", id="not judged yet"),
        pytest.param(World, {"environment": {"name": "elsewhere"}}, "no run of first here", id="elsewhere"),
        pytest.param(World, {"experiment": {"name": "other"}}, "no run of first here", id="another experiment"),
    ],
)
def test_anything_but_held_refuses(tmp_path: Path, world: Any, more: dict[str, Any], saw: str) -> None:
    first(tmp_path, world(), **more)
    assert refused(tmp_path).startswith(saw)


def test_the_latest_run_counts(tmp_path: Path) -> None:
    first(tmp_path)
    broken = World(errors_during=0.2)
    broken.clock.t += 50
    first(tmp_path, broken, run_id="run-1b")
    assert refused(tmp_path).startswith("first DEVIATED (run run-1b)")


def test_too_old(tmp_path: Path) -> None:
    first(tmp_path)
    assert second(tmp_path, later_s=3500.0, depends_within="1h")[1].outcome is Outcome.HELD
    (tmp_path / "records" / "run-2.json").unlink()
    assert refused(tmp_path, later_s=3700.0, depends_within="1h").startswith("first HELD 1 h")


def test_dated_by_a_clock_that_is_wrong(tmp_path: Path) -> None:
    ahead = World()
    ahead.clock.t += 5000
    first(tmp_path, ahead)
    assert "a clock is wrong" in refused(tmp_path)


def test_unknown_is_never_safe(tmp_path: Path) -> None:
    """A record that cannot be read may be the newest of the stage before; a directory that cannot, holds anything."""
    first(tmp_path)
    (tmp_path / "records" / "run-x.json").write_text("{")
    assert "cannot be told" in refused(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "records").write_text("not a directory")
    run = build(tmp_path / "other", World(), experiment=SECOND)
    refusal = run.check_guards()[-1]
    assert refusal.name == STAGE_GUARD and not refusal.passed and "cannot be told" in refusal.saw


def test_files_that_are_too_old_are_not_opened(tmp_path: Path) -> None:
    """A store of years costs a run nothing."""
    store = RecordStore(tmp_path)
    (tmp_path / "old.json").write_text("{ not a record")
    os.utime(tmp_path / "old.json", (1e9, 1e9))
    assert store.latest("first", "sim", since=1.5e9) is None


def test_who_waits_for_nothing_is_let_through(tmp_path: Path) -> None:
    run = build(tmp_path, World())
    guards = {g.name: g for g in run.check_guards()}
    assert guards[STAGE_GUARD].passed and guards[STAGE_GUARD].saw == "waits for no other experiment"
