"""Rollback actions in the simulated world: when they are taken, that they are bounded, and that they are undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sim import ENVIRONMENT, Crash, FakeDriver, World, build

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence, RunRecord
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.engine.run import Run, run_experiment

ACTIONS = [
    {"scale_up": {"target": "workload", "at_least": 4}},
    {"restart_unhealthy": {"target": "prediction-service", "at_most": 2}},
]
TARGETS = {**ENVIRONMENT["targets"], "workload": {"select": "workload"}}


class ActingDriver(FakeDriver):
    """Workloads have 3 replicas, and some pods are unwell."""

    actions = frozenset({"scale_up", "restart_unhealthy"})

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.scaled: dict[str, Lease] = {}
        self.restarted: list[str] = []
        self.unwell = [f"replica-{i}" for i in range(1, 6)]
        self.stuck = False
        self.log: list[str] = []

    def affected(self, kind: str, target: Target, params: dict[str, Any]) -> tuple[str, ...]:
        self.world.call(driver=True)
        return tuple(self.unwell) if kind == "restart_unhealthy" else ("workload-1",)

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        self.log.append(f"inject {lease.kind}")
        if lease.kind not in self.actions:
            super().inject(lease, step)
        elif lease.kind == "scale_up":
            self.world.call(driver=True)
            self.scaled[lease.id] = lease
        else:
            self.restarted += lease.targets

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        self.log.append(f"recover {lease.kind}")
        if lease.kind not in self.actions:
            super().recover(lease, step)
        elif self.stuck:
            raise RuntimeError("a bug of the driver")
        else:
            self.scaled.pop(lease.id, None)

    def active(self, lease: Lease) -> Evidence:
        if lease.kind not in self.actions:
            return super().active(lease)
        there = lease.id in self.scaled
        return Evidence(present=there, effective=there, lines=("4 replicas" if there else "as before",))


def acting(tmp_path: Path, world: World, rollback: dict[str, Any], **more: Any) -> tuple[Run, ActingDriver]:
    run = build(tmp_path, world, experiment={"rollback": rollback, **more}, environment={"targets": TARGETS})
    driver = ActingDriver(world)
    run.kit.driver = driver
    return run, driver


def left(run: Run) -> list[str]:
    return [lease.kind for lease in run.kit.ledger.leases()]


@pytest.mark.req("R3-09")
def test_after_a_breach_each_action_is_taken_once_recorded_and_undone(tmp_path: Path) -> None:
    world = World(errors_during=1.0)
    run, driver = acting(tmp_path, world, {"actions": ACTIONS})
    record = run_experiment(run)
    assert record.abort is not None and record.abort.cause == "limit"
    faults = ["inject pod_failure", "recover pod_failure"]
    assert driver.log == [*faults, "inject scale_up", "inject restart_unhealthy", "recover scale_up"]
    scaled, restarted = record.actions
    clean, ended = record.moment("proven_clean"), record.moment("observation_ended")
    assert clean is not None and ended is not None and scaled.undone_at is not None
    assert clean <= scaled.t < ended <= scaled.undone_at, "it helps the recovery for as long as that is watched"
    assert (scaled.ids, scaled.lines, scaled.error) == (("workload-1",), ("4 replicas", "as before"), "")
    assert driver.restarted == ["replica-1", "replica-2"] == list(restarted.ids), "at_most: 2"
    assert restarted.undone_at is None and not restarted.error and not left(run) and not driver.scaled
    assert len([line for line in record.incidents if line.startswith("action:")]) == 2
    assert RunRecord.model_validate_json(record.model_dump_json()).actions == record.actions


def test_while_it_lasts_its_lease_is_renewed(tmp_path: Path) -> None:
    run, _ = acting(tmp_path, World(errors_during=1.0), {"actions": ACTIONS[:1]})
    renewed: list[float] = []
    renew = run.kit.ledger.renew

    def counted(lease: Lease) -> None:
        if lease.kind == "scale_up":
            renewed.append(run.kit.clock.monotonic())
        renew(lease)

    run.kit.ledger.renew = counted  # type: ignore[method-assign]
    (facts,) = run_experiment(run).actions
    assert facts.undone_at is not None and facts.undone_at - facts.t > 2
    gaps = [b - a for a, b in zip(renewed, renewed[1:], strict=False)]
    assert max(gaps) < 1.0 and len(renewed) >= 2 * (facts.undone_at - facts.t) - 2, "a watchdog would take it for hung"


def test_without_a_breach_nothing_is_done(tmp_path: Path) -> None:
    run, driver = acting(tmp_path, World(), {"actions": ACTIONS})
    record = run_experiment(run)
    assert not record.actions and record.abort is None and not driver.restarted


def test_a_stop_by_a_person_is_no_breach(tmp_path: Path) -> None:
    world = World()
    world.at[world.clock.t + 8] = lambda w: setattr(w, "stop", ("stop", "asked"))
    run, _ = acting(tmp_path, world, {"actions": ACTIONS})
    record = run_experiment(run)
    assert record.abort is not None and record.abort.cause == "stop" and not record.actions


def test_a_slow_recovery_is_helped_once(tmp_path: Path) -> None:
    world = World(heal_after_s=8.0)
    run, driver = acting(tmp_path, world, {"actions": ACTIONS, "slower_than": "3s"})
    record = run_experiment(run)
    assert [a.why for a in record.actions] == ["not steady again 3 s after the fault was gone"] * 2
    assert record.after is not None and 2.9 < record.actions[0].t - record.after.start < 4.0
    assert driver.log.count("inject scale_up") == 1 and not left(run)


def test_who_dies_meanwhile_leaves_a_lease_that_undoes_it(tmp_path: Path) -> None:
    world = World(errors_during=1.0)
    run, driver = acting(tmp_path, world, {"actions": ACTIONS})

    def dies(lease: Lease, step: Step = no_step) -> None:
        ActingDriver.inject(driver, lease, step)
        if lease.kind == "scale_up":
            raise Crash("in the reply")

    driver.inject = dies  # type: ignore[method-assign]
    driver.stuck = True  # a process that is gone undoes nothing
    with pytest.raises(Crash):
        run_experiment(run)
    (lease,) = run.kit.ledger.leases()
    assert lease.kind == "scale_up" and driver.scaled, "it is on, and the ledger knows"
    driver.stuck = False
    driver.recover(lease)
    assert not driver.active(lease).present


def test_what_cannot_be_undone_is_told_with_the_command(tmp_path: Path) -> None:
    world = World(errors_during=1.0)
    run, driver = acting(tmp_path, world, {"actions": ACTIONS[:1]})
    driver.stuck = True
    record = run_experiment(run)  # its driver breaks off each time; the run ends all the same
    (facts,) = record.actions
    assert (
        facts.undone_at is None and facts.command == f"mlchaos recover {facts.lease_id}" and "not undone" in facts.error
    )
    assert left(run) == ["scale_up"] and record.clean is not None and record.clean.proven


def test_a_backend_that_takes_no_actions_refuses_before_anything(tmp_path: Path) -> None:
    run, _ = acting(tmp_path, World(), {"actions": ACTIONS[:1]})
    run.kit.driver = FakeDriver(run.kit.driver.world)  # type: ignore[attr-defined]
    record = run_experiment(run)
    assert record.fault is None and record.guards[-1].saw == "backend fake does not scale_up"
