"""Active runs: announced before the guards, found by who stops them, gone when they are; no stop is missed in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sim import World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.engine.active import ActiveRuns
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.engine.run import Run, run_experiment
from mlchaos_dagster.engine.stops import FileStop
from mlchaos_dagster.errors import StoreError
from mlchaos_dagster.judgement.verdict import judge

SHORT: dict[str, Any] = {
    "environment": {"sampling": {"baseline": "2s", "interval": "250ms", "signal_interval": "250ms"}},
    "experiment": {"duration": "2s", "recovery": {"within": "1s", "dwell": "500ms"}},
}


@pytest.fixture
def active(tmp_path: Path) -> ActiveRuns:
    return ActiveRuns(tmp_path / "active", SystemClock())


def announce(active: ActiveRuns, run_id: str = "run-1", started: float | None = None, owner: Any = None) -> None:
    now = active.clock.wall() if started is None else started
    active.announce(run_id, "an-experiment", "test", owner or current_owner(), now, 60.0)


# ---- the list


def test_announced_is_read_back_by_another_with_its_phase(active: ActiveRuns) -> None:
    assert active.running() == () and not active.directory.exists()
    announce(active, "run-2", 20.0)
    announce(active, "run-1.an-experiment", 10.0)
    other = ActiveRuns(active.directory, SystemClock())
    first, second = other.running()
    assert (first.run_id, second.run_id) == ("run-1.an-experiment", "run-2")
    assert (first.experiment, first.environment, first.owner) == ("an-experiment", "test", current_owner())
    for phase, may in (("guards", True), ("baseline", True), ("fault", True), ("recovery", False), ("ended", False)):
        active.note("run-2", phase)
        assert (other.running()[1].phase, other.running()[1].may_inject) == (phase, may)
    assert other.running()[0].phase == "guards"
    active.forget("run-2")
    active.forget("run-2")
    active.note("run-2", "fault")
    assert [r.run_id for r in other.running()] == ["run-1.an-experiment"]


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".x", "a" * 200])
def test_what_could_not_be_stopped_is_not_announced(active: ActiveRuns, run_id: str) -> None:
    with pytest.raises(StoreError):
        announce(active, run_id)
    assert active.running() == ()


def test_a_damaged_phase_may_inject_and_a_damaged_entry_hides_no_other(active: ActiveRuns) -> None:
    announce(active)
    with open(active.directory / "run-1.json", "r+b") as f:
        f.write(b"re\xff\0very")
    (active.directory / "run-2.json").write_bytes(b"baseline")
    (active.directory / "run-3.json").write_bytes((active.directory / "run-1.json").read_bytes())
    (run,) = active.running()
    assert run.run_id == "run-1" and run.may_inject


def test_a_process_that_is_gone_is_forgotten(active: ActiveRuns) -> None:
    code = f"""
import time
from pathlib import Path
from mlchaos_dagster.engine.active import ActiveRuns
from mlchaos_dagster.engine.ports import SystemClock
from mlchaos_dagster.engine.processes import current_owner
ActiveRuns(Path({str(active.directory)!r}), SystemClock()).announce("run-9", "e", "t", current_owner(), 1.0, 60.0)
print("announced", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "announced\n"
        try:
            (run,) = active.running()
            assert (run.run_id, run.owner.pid) == ("run-9", process.pid)
            process.send_signal(signal.SIGSTOP)
            assert len(active.running()) == 1, "a frozen process is not gone"
        finally:
            process.kill()
    assert active.running() == () and not list(active.directory.iterdir())


def test_a_later_process_with_the_same_pid_is_another(active: ActiveRuns) -> None:
    announce(active, owner=replace(current_owner(), started=current_owner().started - 100))
    assert active.running() == ()


def test_a_run_of_another_host_counts_until_it_must_be_over(active: ActiveRuns) -> None:
    far = replace(current_owner(), host="elsewhere", pid=1)
    announce(active, "young", owner=far)
    announce(active, "old", active.clock.wall() - 60.0 - 3601.0, owner=far)
    assert [r.run_id for r in active.running()] == ["young"]


# ---- a run in the list


def finished(run: Run) -> Outcome:
    record = run_experiment(run)
    return judge(record, run.samples).outcome


def test_a_run_is_listed_from_its_guards_to_its_end(tmp_path: Path) -> None:
    run, seen = build(tmp_path, World()), list[tuple[str, str]]()

    def progress(kind: str, data: dict[str, Any]) -> None:
        if kind in ("guard", "moment"):
            (listed,) = run.kit.active.running()
            assert (listed.run_id, listed.experiment) == (run.run_id, "sim-pod-failure")
            seen.append((data["name"], listed.phase))

    run.tell = progress
    run.kit.stop_files.request("run-2", "another one")
    assert run.kit.active.running() == ()
    assert finished(run) is Outcome.HELD
    phases = dict(seen)
    assert phases["lever released"] == phases["health"] == "guards"
    assert phases["baseline_started"] == "baseline" and phases["injected"] == "fault"
    assert phases["proven_clean"] == "restoring"
    assert phases["observation_ended"] == "recovery"
    assert run.kit.active.running() == () and not list((tmp_path / "active").iterdir())
    assert run.kit.stop_files.requested("run-2") == "another one" and not run.may_inject


def test_what_cannot_be_announced_is_refused(tmp_path: Path) -> None:
    (tmp_path / "active").write_text("no directory")
    world = World()
    run = build(tmp_path, world)
    record = run_experiment(run)
    verdict = judge(record, run.samples)
    assert verdict.outcome is Outcome.REFUSED and "cannot be announced" in verdict.reasons[0]
    assert not world.injections and [g.name for g in record.guards] == ["can be stopped"]


def test_a_full_disk_after_the_announcement_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = build(tmp_path, World(), **SHORT), os.open

    def full(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.fspath(path).endswith("active/run-1.json") and flags & os.O_WRONLY:
            raise OSError(28, "No space left on device")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", full)
    record = run_experiment(run)
    assert record.clean is not None and record.clean.proven and run.kit.active.running() == ()


def test_an_end_that_fails_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path, World(), **SHORT)
    run.kit.stop_files.request("run-1", "late")
    monkeypatch.setattr(run.kit.store, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_experiment(run)
    assert run.kit.active.running() == () and run.kit.stop_files.requested("run-1") is None


# ---- no stop is missed: at every moment of a run


@dataclass
class StoppedWorld(World):
    """Somebody stops the run at the `k`-th call, as `mlchaos stop NAME` does."""

    k: int = 0
    act: Callable[[], None] = lambda: None

    def call(self, driver: bool = False) -> None:
        super().call(driver)
        if self.calls == self.k:
            self.act()


def stopped_run(directory: Path, k: int) -> tuple[StoppedWorld, Run, dict[str, Any]]:
    world = StoppedWorld(k=k)
    run, saw = build(directory, world, **SHORT), dict[str, Any]()
    run.stops.append(FileStop(run.kit.stop_files, run.run_id))
    opened, steady = run.kit.ledger.open, run.steady_before

    def open_slowly(lease: Lease) -> Lease:
        world.call()  # between the last look of the baseline, or of the window's beginning, and the lease
        mine = opened(lease)
        world.call()  # the lease is there, the fault is not
        return mine

    def between() -> tuple[bool, str]:
        world.call()
        return steady()

    def stop() -> None:
        saw["runs"] = run.kit.active.running()
        if saw["runs"]:
            run.kit.stop_files.request(run.run_id, "somebody")
        saw["leases"], saw["injected"] = run.kit.ledger.leases(), len(world.injections)

    world.act = stop
    run.kit.ledger.open, run.steady_before = open_slowly, between  # type: ignore[method-assign]
    return world, run, saw


@pytest.mark.req("R4-05")
def test_who_is_asked_at_any_moment_and_holds_no_lease_injects_nothing(tmp_path: Path) -> None:
    """What `stop` relies on: the request first, then a look at the leases; no lease means that no fault comes."""
    world, run, _ = stopped_run(tmp_path / "count", -1)
    assert finished(run) is not Outcome.ABORTED and world.injections
    early, phases = 0, set[str]()
    for k in range(1, world.calls + 1):
        world, run, saw = stopped_run(tmp_path / str(k), k)
        record = run_experiment(run)
        assert not world.faults and not run.kit.ledger.leases()
        assert run.kit.stop_files.requested(run.run_id) is None, "the stop file outlives its run"
        if not saw["runs"]:
            continue
        phases.add(saw["runs"][0].phase)
        if not saw["leases"]:
            assert len(world.injections) == saw["injected"], f"call {k}: injected after a stop that saw no lease"
            early += not saw["injected"]
        if not saw["leases"] and not saw["injected"]:
            assert judge(record, run.samples).outcome in (Outcome.ABORTED, Outcome.REFUSED)
        if not saw["runs"][0].may_inject:
            assert not saw["leases"], f"call {k}: called harmless with an open lease"
    assert early > 10 and phases == {"guards", "baseline", "fault", "restoring", "recovery", "ended"}, (early, phases)


@pytest.mark.req("R4-05")
def test_a_stop_between_lease_and_fault_injects_nothing(tmp_path: Path) -> None:
    world = World()
    run = build(tmp_path, world, **SHORT)
    run.stops.append(FileStop(run.kit.stop_files, run.run_id))
    opened = run.kit.ledger.open

    def open_and_be_told(lease: Lease) -> Lease:
        mine = opened(lease)
        run.kit.stop_files.request(run.run_id, "just in time")
        return mine

    run.kit.ledger.open = open_and_be_told  # type: ignore[method-assign]
    record = run_experiment(run)
    assert not world.injections and record.abort is not None and record.abort.reason == "just in time"
    assert record.clean is not None and record.clean.proven and not run.kit.ledger.leases()


@pytest.mark.req("R4-05")
def test_a_stop_between_baseline_and_lease_opens_none(tmp_path: Path) -> None:
    world = World()
    run = build(tmp_path, world, **SHORT)
    run.stops.append(FileStop(run.kit.stop_files, run.run_id))
    run.check_guards()
    run.measure_baseline()
    assert run.steady_before()[0]
    run.kit.stop_files.request(run.run_id, "enough")
    run.fault_window()
    record = run.finish()
    assert record.fault is None and not world.injections and not (tmp_path / "ledger" / "closed").exists()
    verdict = judge(record, run.samples)
    assert verdict.outcome is Outcome.ABORTED and "before anything was injected" in verdict.reasons[0]
