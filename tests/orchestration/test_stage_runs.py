"""Stages through the real ops: one after the other in a Dagster run, and refused by the guard, not by Dagster."""

from __future__ import annotations

from typing import Any

import pytest
from sim_platform import SimPlatform, environment, experiment

from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.engine.guards import STAGE_GUARD
from mlchaos_dagster.orchestration.launch import launch

pytestmark = pytest.mark.req("R3-10")
# In the order of names the second would come first.
STAGES = (experiment("b-first"), experiment("a-second", depends_on="b-first"))


def of(platform: SimPlatform, run_id: str, name: str) -> tuple[RunRecord, Verdict]:
    record, verdict = platform.store().load(f"{run_id}.{name}")
    assert verdict is not None
    return record, verdict


def test_in_one_dagster_run_a_stage_begins_after_the_verdict_of_the_stage_before(
    run: Any, platform: SimPlatform
) -> None:
    result = run(*reversed(STAGES))
    assert result.success
    assert [of(platform, result.run_id, e.name)[1].outcome.value for e in STAGES] == ["HELD", "HELD"]


def test_a_stage_that_did_not_hold_leaves_the_next_refused_not_failed(run: Any, platform: SimPlatform) -> None:
    def broken(world: Any, run_id: str) -> None:
        world.errors_during = 0.2 if run_id.endswith("b-first") else 0.0

    platform.prepare = broken
    result = run(*STAGES)
    assert result.success, "a refusal is an answer"
    assert of(platform, result.run_id, "b-first")[1].outcome.value == "DEVIATED"
    record, verdict = of(platform, result.run_id, "a-second")
    assert verdict.outcome.value == "REFUSED" and record.guards[-1].name == STAGE_GUARD
    assert "b-first DEVIATED" in record.guards[-1].saw
    assert platform.worlds[f"{result.run_id}.a-second"].injections == []


def test_launch_asks_before_each_whether_it_is_left_out(platform: SimPlatform) -> None:
    seen: list[str] = []

    def skip(e: Any) -> bool:
        return e.name == "a-second" and "b-first" in seen

    for found in launch([*STAGES, experiment("third")], environment(), platform.settings, platform=platform, skip=skip):
        assert found.record is not None, found.error
        seen.append(found.record.experiment.name)
    assert seen == ["b-first", "third"]
