"""Crash-point exhaustion: lose the process, or get a driver error, at the k-th port call, for every k.

Afterwards nothing is active, or its lease is open and the sweeper clears it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sim import Crash, FakeDriver, World, build

from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Owner
from mlchaos_dagster.engine.run import run_experiment
from mlchaos_dagster.engine.sweep import sweep

SHORT: dict[str, Any] = {
    "environment": {"sampling": {"baseline": "2s", "interval": "250ms", "signal_interval": "250ms"}},
    "experiment": {"duration": "2s", "recovery": {"within": "1s", "dwell": "500ms"}},
}


class AllDead:
    """Every owner is gone: the process that crashed, seen from outside."""

    def is_local(self, owner: Owner) -> bool:
        return True

    def is_running(self, owner: Owner) -> bool:
        return False

    def kill(self, owner: Owner) -> bool:
        return True


def one_run(tmp_path: Path) -> World:
    world = World()
    run_experiment(build(tmp_path / "count", world, **SHORT))
    assert world.injections
    return world


@pytest.mark.req("RX-01")
def test_losing_the_process_at_every_call(tmp_path: Path) -> None:
    calls = one_run(tmp_path).calls
    left_for_the_sweeper = 0
    for k in range(1, calls + 1):
        world = World(crash_at=k)
        home = tmp_path / f"crash-{k}"
        run = build(home, world, **SHORT)
        # The dead run nothing: what `finally` would have done is taken from the run as well.
        run.kit.driver.recover = lambda lease: (_ for _ in ()).throw(Crash())  # type: ignore[method-assign]
        try:
            run_experiment(run)
        except Crash:
            pass
        ledger = FileLedger(home / "ledger", world.clock)
        open_leases = ledger.leases()
        assert not world.faults or open_leases, f"call {k}: a fault is active and no lease is open"
        left_for_the_sweeper += bool(world.faults)
        world.crash_at = None
        results = sweep(
            ledger,
            lambda name, environment, world=world: FakeDriver(world),
            world.clock,
            IncidentLog(home / "incidents.jsonl", world.clock),
            processes=AllDead(),
        )
        assert not world.faults and not ledger.leases(), f"call {k}: the sweeper left something: {results}"
    assert left_for_the_sweeper > 5, "no crash hit the window: this test shows nothing"


@pytest.mark.req("RX-01")
def test_a_driver_error_at_every_call(tmp_path: Path) -> None:
    for k in range(1, one_run(tmp_path).driver_calls + 1):
        world = World(fail_at=k)
        run = build(tmp_path / f"fail-{k}", world, **SHORT)
        try:
            run_experiment(run)
        except Exception as e:  # noqa: BLE001  the point: nothing at all may come out
            pytest.fail(f"call {k}: {type(e).__name__}: {e}")
        assert not world.faults, f"call {k}: a fault was left behind"
        assert not run.kit.ledger.leases(), f"call {k}: the lease was left open"


@pytest.mark.req("RX-01")
def test_fenced_owner_injects_nothing(tmp_path: Path) -> None:
    world = World()
    run = build(tmp_path, world, **SHORT)
    ledger = run.kit.ledger
    opened = ledger.open

    def open_and_lose(lease: Any) -> Any:
        mine = opened(lease)
        ledger.fence(mine.id, by="a watchdog")
        return mine

    ledger.open = open_and_lose  # type: ignore[method-assign]
    record = run_experiment(run)
    assert not world.injections
    assert record.abort is not None and record.abort.cause == "fenced"
