"""Verbs that take long: the lease is renewed meanwhile, a stop is heard, and no copy outlives its lease."""

from __future__ import annotations

from pathlib import Path

import pytest
from sim import World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.run import Run, run_experiment
from mlchaos_dagster.judgement.verdict import judge


def backups(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "ledger" / "backups").glob("*/*"))


def longest_silence(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times at which the lease was opened, renewed or closed."""
    times: list[float] = []
    for name in ("open", "renew", "close"):
        real = getattr(FileLedger, name)

        def noted(self: FileLedger, *args: object, real=real) -> object:
            times.append(run.kit.clock.monotonic())
            return real(self, *args)

        monkeypatch.setattr(FileLedger, name, noted)
    return times


def test_a_long_injection_and_a_long_recovery_do_not_look_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(batches={"undo": 10, "inject": 30, "recover": 10})
    told: list[dict[str, object]] = []
    run = build(tmp_path, world, progress=lambda kind, data: told.append(data) if kind == "progress" else None)
    times = longest_silence(run, monkeypatch)
    record = run_experiment(run)
    assert judge(record, run.samples).outcome is Outcome.HELD
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert max(gaps) < run.environment.safety.lease_ttl / 2, "the watchdog would have taken it for hung"
    assert {(d["what"], d["total"]) for d in told} == {("preparing", 10), ("injecting", 30), ("restoring", 10)}
    assert not backups(tmp_path), "a copy outlived its lease"


@pytest.mark.req("R4-05", "RX-01")
def test_a_stop_in_the_middle_of_an_injection_is_heard_at_the_next_batch(tmp_path: Path) -> None:
    world = World(batches={"inject": 100})

    def stop(w: World) -> None:
        w.stop = ("stop", "enough")

    run = build(tmp_path, world)
    world.at[world.clock.t + 15] = stop  # the baseline is over after about 11 s; the injection takes 40 s
    record = run_experiment(run)
    assert 0 < world.batches_done["inject"] < 30
    assert judge(record, run.samples).outcome is Outcome.ABORTED
    assert record.abort is not None and record.abort.seconds is not None and record.abort.seconds < 1
    assert [m.name for m in record.moments].count("stop_requested") == 1
    assert not world.faults and not run.kit.ledger.leases() and not backups(tmp_path)


def test_a_limit_that_is_crossed_while_still_injecting_aborts(tmp_path: Path) -> None:
    world = World(batches={"inject": 100}, errors_during=1.0)
    limit = {"abort": [{"sli": "error_rate", "above": "20%", "for": "1s"}]}
    run = build(tmp_path, world, experiment=limit)
    record = run_experiment(run)
    assert record.abort is not None and record.abort.cause == "limit", record.abort
    assert world.batches_done["inject"] < 20 and not world.faults


def test_a_stop_while_the_undo_is_read_touches_nothing(tmp_path: Path) -> None:
    world = World(batches={"undo": 100})

    def stop(w: World) -> None:
        w.stop = ("stop", "enough")

    run = build(tmp_path, world)
    world.at[world.clock.t + 15] = stop
    record = run_experiment(run)
    assert not world.injections and not run.kit.ledger.leases() and not backups(tmp_path)
    assert record.fault is None
    assert judge(record, run.samples).outcome is Outcome.ABORTED


def test_what_cannot_be_undone_is_refused_and_its_copy_removed(tmp_path: Path) -> None:
    world = World(cannot_undo=True)
    run = build(tmp_path, world)
    record = run_experiment(run)
    assert judge(record, run.samples).outcome is Outcome.REFUSED
    assert not world.injections and not backups(tmp_path)


def test_reading_back_may_take_its_time_while_the_lease_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    run = build(tmp_path, world)
    times = longest_silence(run, monkeypatch)
    real, clock = run.kit.driver.active, world.clock

    def in_the_background(read):
        ready_at, result = clock.t + (8.0 if world.fenced else 0.0), []

        def poll():
            if clock.t < ready_at:
                return False, None
            result.append(real(next(iter(world.faults.values()), None) or run.kit.ledger.leases()[0]))
            return True, result[-1]

        return poll

    run.kit.background = in_the_background
    record = run_experiment(run)
    assert record.clean is not None and record.clean.proven
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert max(gaps) < run.environment.safety.lease_ttl / 2, "the watchdog would have taken it for hung"


def test_a_target_that_never_answers_does_not_keep_unclean_from_being_told(tmp_path: Path) -> None:
    world = World()
    run = build(tmp_path, world)
    real = run.kit.driver.active

    def in_the_background(read):
        silent = bool(world.fenced)
        return lambda: (False, None) if silent else (True, real(next(iter(world.faults.values()))))

    run.kit.background = in_the_background
    record = run_experiment(run)
    assert record.clean is not None and not record.clean.proven
    assert judge(record, run.samples).outcome is Outcome.UNCLEAN
    assert run.kit.ledger.leases(), "the watchdog and the sweeper have it now"
