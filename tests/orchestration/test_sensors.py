"""The error-budget sensor and the operations: everything is stopped, new runs stay out, until it is safe again."""

from __future__ import annotations

import json
import threading
import time
import uuid
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from sim_platform import SimPlatform, environment, experiment

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.engine.active import ActiveRuns
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import DriverUnavailable, ProbeError
from mlchaos_dagster.kube.remote import RemoteLedger
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.definitions import resources
from mlchaos_dagster.orchestration.jobs import operations
from mlchaos_dagster.orchestration.sensors import budget_sensor, gate_path, sweeper_sensor

ENV = environment(error_budget={"objective": "99%"})


def tick(platform: SimPlatform, instance: dg.DagsterInstance, sensor: Any = None) -> str:
    with dg.build_sensor_context(instance=instance, resources={"platform": platform}) as context:
        return str((sensor or budget_sensor(ENV)).evaluate_tick(context).skip_message)


def closed(platform: SimPlatform) -> bool:
    path = gate_path(platform, "sim")
    return path.is_file() and json.loads(path.read_text())["closed"]


def test_it_aborts_what_runs_keeps_new_runs_out_and_lets_them_in_again(
    run: Any, platform: SimPlatform, instance: dg.DagsterInstance
) -> None:
    said: list[str] = []

    def overspend(world: Any, _run_id: str) -> None:
        def now(_world: Any) -> None:
            platform.left = 0.04
            said.append(tick(platform, instance))

        world.at[world.clock.t + 9.0] = now

    platform.prepare = overspend
    during = run(env=ENV)
    assert "told to stop" in said[0]
    record, verdict = platform.store().load(during.run_id)
    assert verdict is not None and verdict.outcome is Outcome.ABORTED
    assert record.abort is not None and record.clean is not None and record.clean.proven
    found = instance.get_run_by_id(during.run_id)
    assert found is not None and found.status is dg.DagsterRunStatus.CANCELED
    assert closed(platform)

    platform.prepare = lambda *_: None
    platform.left = None  # the run's own reading; the gate alone keeps it out
    refused = run(env=ENV)
    verdict = platform.store().load(refused.run_id)[1]
    assert verdict is not None and verdict.outcome is Outcome.REFUSED and "gate" in verdict.reasons[0]

    platform.left = 0.5
    assert "gate opened" in tick(platform, instance)
    platform.left = None
    again = platform.store().load(run(env=ENV).run_id)[1]
    assert again is not None and again.outcome is Outcome.HELD


def test_other_environments_are_left_alone(platform: SimPlatform) -> None:
    platform.left = 0.0
    with dg.DagsterInstance.ephemeral() as instance:
        ids = {}
        for number, name in enumerate(("sim", "staging")):
            ids[name] = f"{number}1111111-1111-1111-1111-111111111111"
            instance.add_run(
                dg.DagsterRun(
                    job_name="j",
                    run_id=ids[name],
                    status=dg.DagsterRunStatus.STARTED,
                    tags={keys.TAG_KIND: "experiment", keys.TAG_ENVIRONMENT: name},
                )
            )
        tick(platform, instance)
        status = {name: instance.get_run_by_id(i).status.value for name, i in ids.items()}  # type: ignore[union-attr]
        assert status == {"sim": "CANCELING", "staging": "STARTED"}
    assert [f.name for f in (platform.root / "stop").iterdir()] == [f"run-{ids['sim']}"]


def test_a_budget_that_cannot_be_read_changes_nothing(platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    platform.left = ProbeError("no answer")
    assert "cannot be read" in tick(platform, instance)
    assert not closed(platform)
    platform.left = 0.0
    tick(platform, instance)
    platform.left = ProbeError("no answer")
    assert "closed" in tick(platform, instance) and closed(platform)


def test_a_gate_that_cannot_be_read_is_closed_until_the_budget_is_seen(
    platform: SimPlatform, instance: dg.DagsterInstance
) -> None:
    gate_path(platform, "sim").parent.mkdir(parents=True)
    gate_path(platform, "sim").write_text("{")
    platform.left = 1.0
    assert "gate opened" in tick(platform, instance)


def test_the_sweeper_says_what_it_took_away(
    platform: SimPlatform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tick(platform, instance, sweeper_sensor()) == "no open lease"
    monkeypatch.setattr(SimPlatform, "leases", lambda _: ("a lease",))
    platform.swept = ["recovered: pod_failure on replica-1"]
    assert "replica-1" in tick(platform, instance, sweeper_sensor())


def operate(
    platform: SimPlatform, instance: dg.DagsterInstance, name: str, config: dict[str, Any] | None = None
) -> Any:
    job = next(j for j in operations((ENV,), (experiment(),)) if j.name == name)
    definitions = dg.Definitions(jobs=[job], resources=resources(platform), executor=dg.in_process_executor)
    found = definitions.resolve_job_def(name)
    run_config: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    if config:
        run_config["ops"] = {"stop_everything": {"config": config}}
    return found.execute_in_process(run_config, instance, raise_on_error=False)


def test_emergency_stop_while_an_experiment_runs(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    results: list[Any] = []

    def emergency(_world: Any) -> None:
        # In a thread, as Dagster would do it in another process: the experiment goes on meanwhile.
        thread = threading.Thread(target=lambda: results.append(operate(platform, instance, "emergency_stop")))
        thread.start()
        end = time.monotonic() + 60
        while not (platform.root / "stop" / "lever").exists() and time.monotonic() < end:
            time.sleep(0.02)

    platform.prepare = lambda world, _: world.at.update({world.clock.t + 9.0: emergency})
    stopped = run()
    end = time.monotonic() + 60
    while not results and time.monotonic() < end:
        time.sleep(0.05)
    assert results and results[0].success
    found = instance.get_run_by_id(stopped.run_id)
    assert found is not None and found.status is dg.DagsterRunStatus.CANCELED
    assert not platform.leases() and not platform.world.faults
    assert (platform.root / "stop" / "lever").is_file()
    incidents = (platform.root / "incidents.jsonl").read_text()
    assert "emergency_stop" in incidents

    platform.prepare = lambda *_: None
    refused = platform.store().load(run().run_id)[1]
    assert refused is not None and refused.outcome is Outcome.REFUSED
    assert operate(platform, instance, "release_lever").success
    assert not (platform.root / "stop" / "lever").exists()


def test_one_wrong_id_keeps_nobody_from_being_stopped(platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    """A Dagster run of several experiments holds its lease, and looks for its stop file, under `<run>.<experiment>`."""
    run_id, ours = str(uuid.uuid4()), current_owner()
    stored = dg.DagsterRun(
        job_name="j", run_id=run_id, status=dg.DagsterRunStatus.STARTED, tags={keys.TAG_KIND: "experiment"}
    )
    instance.add_run(stored)
    active = ActiveRuns(platform.settings.home.active, SystemClock())
    for other in (f"{run_id}.one", f"{run_id}-other"):
        active.announce(other, "one", "sim", ours, time.time(), 60.0)
    platform.ledger().open(
        Lease(
            id="l1",
            run_id=f"{run_id}.one",
            experiment="one",
            environment="sim",
            driver="fake",
            kind="pod_failure",
            targets=("replica-1",),
            params={},
            undo={},
            duration_s=10.0,
            opened_wall=0.0,
            deadline_wall=9e9,
            owner=ours,
        )
    )
    config = {"run_ids": ["../../wrong", run_id], "within_s": 0.2}
    result = operate(platform, instance, "emergency_stop", config)
    assert not result.success
    failure = next(e for e in result.all_events if e.is_step_failure)
    assert "is not a run id" in str(failure.step_failure_data)
    assert sorted(f.name for f in (platform.root / "stop").iterdir()) == [f"run-{run_id}", f"run-{run_id}.one"]
    assert platform.recovered == [f"{run_id}.one"] and not platform.leases()
    found = instance.get_run_by_id(run_id)
    assert found is not None and found.status is dg.DagsterRunStatus.CANCELING


def test_runs_that_dagster_does_not_know_are_stopped_too(platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    active = ActiveRuns(platform.settings.home.active, SystemClock())
    active.announce("of-the-command-line", "one", "sim", current_owner(), time.time(), 60.0)
    assert operate(platform, instance, "emergency_stop", {"lever": False}).success
    assert (platform.root / "stop" / "run-of-the-command-line").is_file()


class FarLedger:
    """The ledger of a cluster in which one lease of another machine is open, until the lever is pulled."""

    def __init__(self) -> None:
        self.lever, self.reason, self.open = self, "", ["of-another-machine"]

    def pull(self, reason: str, who: str = "") -> None:
        self.reason = reason

    def release(self) -> bool:
        pulled, self.reason = bool(self.reason), ""
        return pulled

    def leases(self) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(id=i) for i in self.open)

    def heads(self) -> tuple[Any, ...]:
        if self.reason:
            self.open = []
        return self.leases()


def test_emergency_stop_pulls_the_lever_of_the_cluster_too(
    platform: SimPlatform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = FarLedger()
    monkeypatch.setattr(SimPlatform, "cluster", lambda self, environment: RemoteLedger(lambda: far, "tester"))  # type: ignore[arg-type,return-value]
    assert operate(platform, instance, "emergency_stop", {"reason": "enough"}).success
    assert far.reason == "enough" and not far.open and platform.lever() == "enough"
    assert operate(platform, instance, "release_lever").success
    assert not far.reason and platform.lever() is None


def test_a_cluster_that_does_not_answer_is_told_and_keeps_nobody_here_from_being_stopped(
    platform: SimPlatform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise DriverUnavailable("no route to host", driver="kubernetes", verb="connect")

    monkeypatch.setattr(SimPlatform, "cluster", lambda self, environment: RemoteLedger(away, "tester"))
    active = ActiveRuns(platform.settings.home.active, SystemClock())
    active.announce("of-the-command-line", "one", "sim", current_owner(), time.time(), 60.0)
    result = operate(platform, instance, "emergency_stop")
    assert not result.success and platform.lever() is not None
    failure = next(e for e in result.all_events if e.is_step_failure)
    assert "NOT pulled" in str(failure.step_failure_data) and "no route to host" in str(failure.step_failure_data)
    assert (platform.root / "stop" / "run-of-the-command-line").is_file()


def test_preflight_says_what_is_missing(platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    platform.left = 0.9
    assert operate(platform, instance, "preflight").success
    platform.pull_lever("maintenance")
    result = operate(platform, instance, "preflight")
    assert not result.success
    failure = next(e for e in result.all_events if e.is_step_failure)
    assert "maintenance" in str(failure.step_failure_data)


def test_recover_leases(platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    platform.swept = ["recovered: x"]
    assert operate(platform, instance, "recover_leases").success
