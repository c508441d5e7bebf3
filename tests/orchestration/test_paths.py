"""Every way a run can go: only what was measured is materialised, the verdict always is, and checks tell the rest."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sim_platform import SimPlatform, environment, experiment

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import Finding
from mlchaos_dagster.errors import ConfigError, SpecError
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.checks import finding_checks
from mlchaos_dagster.orchestration.launch import LaunchResult, launch
from mlchaos_dagster.orchestration.session import not_after_of, seed_of

ALL = set(keys.PHASES)


def phases(result: Any) -> set[str]:
    return {m.asset_key.path[-1] for m in (e.materialization for e in result.get_asset_materialization_events())}


def checks(result: Any) -> dict[str, bool]:
    return {c.check_name: c.passed for c in result.get_asset_check_evaluations()}


def severities(result: Any) -> dict[str, str]:
    return {c.check_name: c.severity.value for c in result.get_asset_check_evaluations() if not c.passed}


def metadata(result: Any, phase: str) -> dict[str, Any]:
    for event in result.get_asset_materialization_events():
        if event.materialization.asset_key.path[-1] == phase:
            return {k: v.value for k, v in event.materialization.metadata.items()}
    raise AssertionError(f"{phase} was not materialised")


def status(instance: dg.DagsterInstance, result: Any) -> str:
    found = instance.get_run_by_id(result.run_id)
    assert found is not None
    return found.status.value


def outcome(platform: SimPlatform, run_id: str) -> Outcome:
    verdict = platform.store().load(run_id)[1]
    assert verdict is not None
    return verdict.outcome


def test_held(run: Any, instance: dg.DagsterInstance, platform: SimPlatform) -> None:
    platform.draw = True
    result = run()
    assert result.success
    assert phases(result) == ALL
    assert checks(result) == dict.fromkeys(keys.CHECKS, True)
    shown = metadata(result, "verdict")
    assert shown["outcome"] == "✔ HELD"
    assert {"availability_during", "availability_effect", "recovery_steady_s"} <= set(shown)
    assert (
        "data:image/png;base64," in shown["report"] and "data:image/png" in metadata(result, "chaos_metrics")["picture"]
    )
    assert Path(shown["report_path"]).is_file() and Path(shown["record_path"]).is_file()
    assert metadata(result, "baseline_metrics")["availability_baseline"] == 1.0
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None and stored.tags[keys.TAG_OUTCOME] == "HELD"
    assert outcome(platform, result.run_id) is Outcome.HELD
    assert not platform.world.faults and not platform.leases()


def test_checks_are_stored(run: Any, instance: dg.DagsterInstance) -> None:
    run()
    verdict = dg.AssetKey(keys.asset_path("sim-pod-failure", "sim", "verdict"))
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key(
        [dg.AssetCheckKey(verdict, c) for c in keys.CHECKS]
    )
    assert {k.name for k in found} == set(keys.CHECKS)
    latest = instance.get_latest_materialization_event(verdict)
    assert latest is not None
    for key in found:
        stored = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)[0]
        evaluation = stored.evaluation
        assert evaluation is not None and evaluation.target_materialization_data is not None
        assert evaluation.target_materialization_data.run_id == latest.run_id, "it tells of this verdict"


def test_refused_by_a_guard(run: Any, platform: SimPlatform) -> None:
    platform.health = 0.5
    result = run()
    assert result.success, "a refusal is a finding"
    assert phases(result) == {"experiment", "verdict"}
    assert checks(result) == {"guards_passed": False}
    assert outcome(platform, result.run_id) is Outcome.REFUSED
    assert not platform.world.injections


def test_refused_because_it_was_not_steady(run: Any, platform: SimPlatform) -> None:
    platform.prepare = lambda world, _: setattr(world, "errors_always", 0.2)
    result = run()
    assert result.success
    assert phases(result) == {"experiment", "baseline_metrics", "verdict"}
    assert checks(result) == {"guards_passed": True, "steady_state_before": False}
    assert outcome(platform, result.run_id) is Outcome.REFUSED
    assert not platform.world.injections


def test_deviated_is_a_finding(run: Any, platform: SimPlatform) -> None:
    platform.prepare = lambda world, _: setattr(world, "errors_during", 0.1)
    result = run()
    assert result.success
    assert phases(result) == ALL
    assert not checks(result)["steady_state_held"] and severities(result)["steady_state_held"] == "ERROR"
    assert checks(result)["left_clean"]
    assert outcome(platform, result.run_id) is Outcome.DEVIATED


def test_a_probe_that_failed_is_not_hidden_by_one_of_the_same_name() -> None:
    names = ("check-login", "check_login", "check-login")
    those = [
        Finding(name=f"litmus probe {n}", passed=p, saw=f"saw {p}")
        for n, p in zip(names, (False, True, True), strict=True)
    ]
    ((name, found),) = finding_checks(tuple(those)).items()
    assert name == "litmus_probe_check_login" and found["passed"] is False
    assert "saw False" in str(found["metadata"])


@pytest.mark.req("R3-01")
@pytest.mark.parametrize(("passed", "severity"), [(True, None), (False, "ERROR"), (None, "WARN")])
def test_what_the_backend_judged_is_a_check(
    run: Any, platform: SimPlatform, passed: bool | None, severity: Any
) -> None:
    def prepare(world: Any, _run_id: str) -> None:
        world.judged = Finding(name="litmus probe check-login", passed=passed, saw="expected 200")

    platform.prepare = prepare
    login = {"name": "check-login", "type": "httpProbe", "mode": "EOT"}
    hog = {"name": "pod-cpu-hog", "spec": {"probe": [login]}}
    engine = {"kind": "litmus_engine", "engine": {"experiments": [hog]}}
    result = run(experiment(fault=engine), env=environment(backends={"fake": ["litmus_engine"]}))
    assert result.success
    held = {**dict.fromkeys(keys.CHECKS, True), "steady_state_held": passed is not None}
    agrees = dict.fromkeys((keys.BACKEND_AGREES, "litmus_probe_check_login"), passed is True)
    assert checks(result) == {**held, **agrees}
    assert severities(result).get(keys.BACKEND_AGREES) == severity
    assert "probe check-login" in str(metadata(result, "chaos_metrics")["findings"])


def test_aborted_by_a_limit(run: Any, platform: SimPlatform) -> None:
    platform.prepare = lambda world, _: setattr(world, "errors_during", 1.0)
    result = run()
    assert result.success, "a limit that tripped is a finding, not a cancellation"
    assert "chaos_metrics" in phases(result) and "verdict" in phases(result)
    assert metadata(result, "verdict")["abort_seconds"] == pytest.approx(0, abs=0.1)
    assert outcome(platform, result.run_id) is Outcome.ABORTED
    assert not platform.world.faults and not platform.leases()


def test_a_fault_that_was_not_seen_only_warns(run: Any, platform: SimPlatform) -> None:
    platform.prepare = lambda world, _: setattr(world, "effective", False)
    result = run()
    assert result.success
    assert checks(result)["fault_fired"] is False
    assert set(severities(result).values()) == {"WARN"}
    assert outcome(platform, result.run_id) is Outcome.INCONCLUSIVE


def test_shadow_never_counts(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    result = run(tags={keys.TAG_SHADOW: "true"})
    assert result.success and not platform.world.injections
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None and stored.tags[keys.TAG_OUTCOME].startswith("SHADOW-")
    assert "fault_fired" not in checks(result) and metadata(result, "verdict")["held"] == 0


def test_a_shadow_run_that_held_fails_no_check(run: Any, platform: SimPlatform) -> None:
    """Nothing was injected, so what the fault was expected to cause was not seen."""
    result = run(experiment(expect=[{"sli": "availability", "drops": True}]), tags={keys.TAG_SHADOW: "true"})
    verdict = platform.store().load(result.run_id)[1]
    assert verdict is not None and verdict.expectations and not any(e.seen for e in verdict.expectations)
    assert not severities(result) and checks(result)["steady_state_held"]
    (held,) = (c for c in result.get_asset_check_evaluations() if c.check_name == "steady_state_held")
    assert held.metadata["shadow"].value is True and "nothing was injected" in held.description


def test_a_shadow_run_whose_objectives_broke_says_so(run: Any, platform: SimPlatform) -> None:
    platform.prepare = lambda world, _: world.at.update(
        {world.clock.t + 9.0: lambda w: setattr(w, "errors_always", 0.1)}
    )
    assert checks(run(tags={keys.TAG_SHADOW: "true"}))["steady_state_held"] is False


def cancelled(platform: SimPlatform, instance: dg.DagsterInstance, run: Any, hook: Any, at: float) -> Any:
    def prepare(world: Any, run_id: str) -> None:
        world.at[world.clock.t + at] = lambda w: hook(run_id)

    platform.prepare = prepare
    run_id = str(uuid.uuid4())
    assert not run(run_id=run_id).success
    found = instance.get_run_by_id(run_id)
    assert found is not None and found.status is dg.DagsterRunStatus.CANCELED
    record, verdict = platform.store().load(run_id)
    assert verdict is not None and verdict.outcome is Outcome.ABORTED
    assert record.abort is not None
    assert not platform.world.faults and not platform.leases()
    latest = instance.get_latest_materialization_event(
        dg.AssetKey(keys.asset_path("sim-pod-failure", "sim", "verdict"))
    )
    assert latest is not None and latest.run_id == run_id, "the verdict is told before the run ends CANCELED"
    assert found.tags[keys.TAG_OUTCOME] == "ABORTED"
    return record


def ctrl_c(_run_id: str) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [0.0, 2.0, 9.0], ids=["guards", "baseline", "window"])
def test_a_signal_ends_it_cancelled(run: Any, platform: SimPlatform, instance: dg.DagsterInstance, at: float) -> None:
    record = cancelled(platform, instance, run, ctrl_c, at)
    assert record.abort.cause == "signal"
    assert bool(platform.world.injections) == (at > 5)


def test_two_signals_in_the_window(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    def twice(run_id: str) -> None:
        ctrl_c(run_id)
        ctrl_c(run_id)

    assert cancelled(platform, instance, run, twice, 9.0).clean.proven


def test_terminating_a_run_of_the_command_line(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    """Dagster cannot reach its process; the run reads its own status."""

    def terminate(run_id: str) -> None:
        found = instance.get_run_by_id(run_id)
        assert found is not None
        instance.report_run_canceling(found)
        time.sleep(1.2)

    assert cancelled(platform, instance, run, terminate, 9.0).abort.cause == "dagster"


def test_a_stop_file_ends_it_cancelled(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    record = cancelled(platform, instance, run, lambda i: platform.request_stop([i], "enough"), 9.0)
    assert record.abort.cause == "stop" and record.abort.reason == "enough"


def test_an_op_that_raises_closes_the_run(
    run: Any, platform: SimPlatform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(SimPlatform, "judge", broken)
    result = run()
    assert not result.success and status(instance, result) == "FAILURE"
    assert platform.store().load(result.run_id)[0].clean is not None, "the record is saved all the same"
    assert not platform.world.faults and not platform.leases()


def test_unclean_is_never_green(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    class Sticky(dict):  # type: ignore[type-arg]
        def pop(self, *_: Any) -> Any:
            return None

    platform.prepare = lambda world, _: setattr(world, "faults", Sticky())
    result = run()
    assert not result.success
    assert outcome(platform, result.run_id) is Outcome.UNCLEAN
    assert checks(result)["left_clean"] is False and "verdict" in phases(result)


def test_several_experiments_in_one_run_take_turns(run: Any, platform: SimPlatform) -> None:
    result = run(experiment("one"), experiment("two"))
    assert result.success
    order = [e.step_key.split(".")[0] for e in result.all_events if e.is_step_start]
    assert order == sorted(order, key=lambda name: order.index(name)), order
    assert len({*order}) == 2 and order.count(order[0]) == 5 and set(order[:5]) == {order[0]}
    assert sorted(platform.store().ids()) == sorted(f"{result.run_id}.{n}" for n in ("one", "two"))


def test_re_executing_a_later_op_alone_injects_nothing(
    run: Any, platform: SimPlatform, instance: dg.DagsterInstance
) -> None:
    result = run(op_selection=["sim__sim_pod_failure.run_fault_window"])
    assert not result.success
    assert not platform.worlds, "no run was even built"


def test_history_keeps_both_runs(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    first = run()
    platform.prepare = lambda world, _: setattr(world, "errors_during", 0.1)
    second = run()
    files = sorted((platform.root / "assets" / "sim" / "sim_pod_failure" / "verdict").iterdir())
    assert {f.name for f in files} == {f"run_id={r.run_id}.parquet" for r in (first, second)}
    key = dg.AssetKey(keys.asset_path("sim-pod-failure", "sim", "verdict"))
    records = instance.fetch_materializations(key, limit=2).records
    assert [r.run_id for r in records] == [second.run_id, first.run_id]


def test_the_window_of_the_suite_closes(run: Any, platform: SimPlatform, instance: dg.DagsterInstance) -> None:
    """A run that the queue started after its window injects nothing."""
    result = run(tags={keys.TAG_NOT_AFTER: "2026-11-23T01:00:00+00:00"})
    assert not platform.world.injections
    assert phases(result) == {"experiment", "verdict"}


def test_launch(platform: SimPlatform, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    told: list[str] = []
    found = list(
        launch(
            [experiment("one"), experiment("two")],
            environment(),
            platform.settings,
            platform=platform,
            progress=lambda kind, _: told.append(kind),
        )
    )
    assert [r.verdict.outcome.value for r in found if r.verdict] == ["HELD", "HELD"]
    assert all(r.record_path and r.record_path.is_file() and not r.error for r in found)
    assert {"phase", "guard", "moment"} <= set(told)
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (platform.root / "dagster" / "history").is_dir()


@pytest.mark.parametrize("how", ["project", "DAGSTER_HOME"])
def test_the_live_view_reaches_the_terminal_whatever_dagster_yaml_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    shutil.copy(Path(__file__).parents[2] / "dagster.yaml", tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    if how == "DAGSTER_HOME":
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    platform = SimPlatform(tmp_path / ".mlchaos")
    (found,) = launch(
        [experiment("one")],
        environment(),
        platform.settings,
        platform=platform,
        progress=lambda kind, _: os.write(2, f"live {kind}\n".encode()) and None,
    )
    assert found.verdict is not None and found.verdict.outcome is Outcome.HELD
    shown = capfd.readouterr()
    assert {"live phase", "live guard", "live moment"} <= set(shown.err.splitlines()) and not shown.out
    assert not list(tmp_path.rglob("*.err"))


@pytest.mark.parametrize("locked", [".", "dagster", "dagster/history"])
def test_a_state_directory_that_cannot_be_written(
    tmp_path: Path, platform: SimPlatform, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    """Root writes anywhere, so the refusal of the system is played."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = platform.settings.home
    (home.dagster / "history").mkdir(parents=True)
    former = tempfile.TemporaryFile

    def refused(*of: Any, dir: Path, **more: Any) -> Any:
        if dir == (home.root / locked):
            raise PermissionError(13, "Permission denied", str(dir))
        return former(*of, dir=dir, **more)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(dg.DagsterInstance, "from_ref", lambda *_: pytest.fail("made all the same"))
    with pytest.raises(ConfigError, match="state directory .* cannot be written: Permission denied. Set MLCHAOS_HOME"):
        two(platform)
    assert not platform.worlds


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        two(SimPlatform(tmp_path / "file" / "home"))


def test_launch_stops_after_a_cancelled_run(platform: SimPlatform) -> None:
    platform.prepare = lambda world, _: world.at.update({world.clock.t + 9.0: lambda w: ctrl_c("")})
    found = list(launch([experiment("one"), experiment("two")], environment(), platform.settings, platform=platform))
    assert len(found) == 1 and found[0].cancelled
    assert found[0].verdict is not None and found[0].verdict.outcome is Outcome.ABORTED


def two(platform: SimPlatform, **more: Any) -> list[LaunchResult]:
    both = [experiment("one"), experiment("two")]
    return list(launch(both, environment(), platform.settings, platform=platform, **more))


def calling(monkeypatch: pytest.MonkeyPatch, method: str, hook: Any) -> None:
    """`hook` is called as the platform's method begins."""
    former = getattr(SimPlatform, method)

    def called(self: SimPlatform, *of: Any, **more: Any) -> Any:
        hook(self)
        return former(self, *of, **more)

    monkeypatch.setattr(SimPlatform, method, called)


def test_ctrl_c_while_the_recovery_is_sampled_stops_the_suite(platform: SimPlatform) -> None:
    def progress(kind: str, data: dict[str, Any]) -> None:
        if kind == "moment" and data["name"] == "proven_clean":
            ctrl_c("")

    found = two(platform, progress=progress)
    assert len(found) == 1 and found[0].cancelled and len(platform.worlds) == 1
    assert found[0].verdict is not None, "its own outcome stands"


def test_a_stop_file_while_the_recovery_is_sampled_stops_the_suite(platform: SimPlatform) -> None:
    def progress(kind: str, data: dict[str, Any]) -> None:
        if kind == "moment" and data["name"] == "proven_clean":
            platform.request_stop(list(platform.worlds), "enough")

    found = two(platform, progress=progress)
    assert len(found) == 1 and found[0].cancelled and len(platform.worlds) == 1


@pytest.mark.parametrize("method", ["judge", "publish"])
def test_ctrl_c_while_it_is_judged_or_reported_stops_the_suite(
    platform: SimPlatform, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling(monkeypatch, method, lambda _: ctrl_c(""))
    found = two(platform)
    assert len(found) == 1 and found[0].cancelled and len(platform.worlds) == 1
    assert found[0].verdict is not None and found[0].verdict.outcome is Outcome.HELD and not found[0].error


def test_ctrl_c_while_the_environment_is_brought_up_stops_the_suite(
    platform: SimPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling(monkeypatch, "build_run", lambda _: ctrl_c(""))
    found = two(platform)
    assert len(found) == 1 and found[0].cancelled and not platform.world.injections
    assert found[0].record is None and found[0].error.startswith("interrupted before it began")


def test_the_lever_between_two_runs_stops_the_suite(platform: SimPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    calling(monkeypatch, "publish", lambda p: p.pull_lever("enough"))
    found = two(platform)
    assert len(found) == 1 and found[0].cancelled and len(platform.worlds) == 1
    platform.worlds.clear()
    refused = two(platform)
    assert [r.verdict.outcome.value for r in refused if r.verdict] == ["REFUSED", "REFUSED"], "each says why"


def test_ctrl_c_while_one_of_several_is_judged_begins_no_other(
    run: Any, platform: SimPlatform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling(monkeypatch, "judge", lambda _: ctrl_c(""))
    run_id = str(uuid.uuid4())
    assert not run(experiment("one"), experiment("two"), run_id=run_id).success
    assert len(platform.worlds) == 1
    found = instance.get_run_by_id(run_id)
    assert found is not None and found.status is dg.DagsterRunStatus.CANCELED


def test_the_error_of_ours_is_told_and_not_its_cause(platform: SimPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: SimPlatform) -> None:
        try:
            raise RuntimeError("address in use")
        except RuntimeError as e:
            raise ConfigError("the sandbox is up with another configuration") from e

    calling(monkeypatch, "build_run", refused)
    found = two(platform)
    assert [(r.error, r.kind, r.cancelled) for r in found] == [
        ("the sandbox is up with another configuration", "usage", False)
    ] * 2


def test_dagster_heads_an_error_of_ours_with_its_own_words(
    run: Any, platform: SimPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: SimPlatform) -> None:
        raise ConfigError("the context leads to another cluster than before")

    calling(monkeypatch, "build_run", refused)
    result = run(experiment("one"))
    (failed,) = [e for e in result.all_events if e.is_step_failure and "check_guards" in (e.step_key or "")]
    told = failed.step_failure_data.user_failure_data
    assert told is not None and told.description == "the context leads to another cluster than before"


@pytest.mark.parametrize("text", ["-3", "x", "1.5", "", "²"])
def test_a_seed_that_is_none(text: str) -> None:
    with pytest.raises(SpecError, match="not a seed"):
        seed_of({keys.TAG_SEED: text})
    assert seed_of({keys.TAG_SEED: "7"}) == 7 and seed_of({}) is None


@pytest.mark.parametrize("text", ["soon", "2026-11-23T05:00:00"])
def test_an_end_of_the_window_that_is_none(text: str) -> None:
    with pytest.raises(SpecError, match="not a time"):
        not_after_of({keys.TAG_NOT_AFTER: text})


def test_a_wrong_seed_fails_before_anything_is_injected(platform: SimPlatform) -> None:
    (found,) = launch([experiment("one")], environment(), platform.settings, platform=platform, seed=-3)
    assert found.kind == "usage" and '"-3" is not a seed' in found.error
    assert not platform.worlds


def test_a_full_disk_keeps_the_verdict(
    platform: SimPlatform, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the window on Dagster stores nothing any more."""
    full: list[str] = []
    former = dg.DagsterInstance.handle_new_event

    def store(self: Any, event: Any, **more: Any) -> Any:
        if full:
            raise sqlite3.OperationalError("database or disk is full [SQL: INSERT INTO event_logs]")
        return former(self, event, **more)

    def dispose(_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(dg.DagsterInstance, "handle_new_event", store)
    monkeypatch.setattr(dg.DagsterInstance, "dispose", dispose)
    platform.prepare = lambda world, _: world.at.update({world.clock.t + 9.0: lambda w: full.append("")})
    (found,) = launch([experiment("one")], environment(), platform.settings, platform=platform)
    assert found.verdict is not None and found.verdict.outcome is Outcome.HELD and found.record is not None
    assert "disk is full" in found.error and not found.kind
    assert capfd.readouterr() == ("", "")
