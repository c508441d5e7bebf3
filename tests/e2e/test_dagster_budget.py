"""An experiment that spends the error budget: the sensor stops it, keeps others out, and lets them in again by itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.kills import fast_library
from mlchaos_dagster import wiring
from mlchaos_dagster.catalog import SHIPPED, Catalog
from mlchaos_dagster.settings import Home, Settings
from tests.e2e.test_dagster_dev import Dev, dagster_dev, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

WINDOW_S = 72.0
"""Of the fault, if nobody stopped it."""
BUDGET_S = 40.0
"""The rolling window of the budget: so long after the last bad request it is whole again."""


def library(directory: Path) -> Path:
    """No cached features and no abort limits: only the budget can stop `budget-burner`."""
    fast_library(directory)
    path = directory / "environments" / "fast.yaml"
    environment = yaml.safe_load(path.read_text())
    environment["sandbox"]["mechanisms"] = {"fallback": False}
    environment["limits"]["abort"] = []
    environment["error_budget"] = {"objective": "80%", "window": f"{BUDGET_S:g}s", "source": "requests"}
    environment["duration_scale"] = 0.01
    path.write_text(yaml.safe_dump(environment, sort_keys=False))
    burner = yaml.safe_load((SHIPPED / "experiments" / "features" / "feature-store-partition.yaml").read_text())
    del burner["abort"], burner["teeth"]
    burner |= {"name": "budget-burner", "duration": f"{WINDOW_S / 0.01 / 60:g}m"}
    (directory / "experiments").mkdir()
    (directory / "experiments" / "budget-burner.yaml").write_text(yaml.safe_dump(burner, sort_keys=False))
    return directory


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Dev]:
    with dagster_dev(tmp_path, library(tmp_path / "library"), "fast") as made:
        yield made


class Budget:
    """Reads the budget ten times a second, beside the test."""

    def __init__(self, dev: Dev) -> None:
        environment = Catalog((dev.project / "library",)).environment("fast")
        settings = Settings(Home(dev.project / ".mlchaos"), "fast", (), False, "")
        read = wiring.budget_reader(environment, settings)
        assert read is not None
        self.read, self.limit = read, environment.limits.budget_at_least
        self.breached_at = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.1) and not self.breached_at:
            if self.read().remaining < self.limit:
                self.breached_at = time.time()

    def close(self) -> None:
        self._done.set()
        self._thread.join(5)


@pytest.mark.req("R4-02", "R4-05", "RX-01")
def test_the_sensor_aborts_refuses_and_opens_again(dev: Dev) -> None:
    gate = dev.project / ".mlchaos" / "gates" / "fast.json"

    def closed() -> str:
        state = json.loads(gate.read_text()) if gate.is_file() else {}
        return state["reason"] if state.get("closed") else ""

    budget = Budget(dev)
    burner = dev.launch_until_fault("budget-burner", "feature-store")
    wait_for(closed, 30)
    reason = closed()
    closed_at = time.time()
    wait_for(lambda: not dev.observer.live_faults(), 10)
    budget.close()

    # While it is closed: one from Dagster, one from a terminal, on a target that is free.
    assert "the error budget" in reason
    from_dagster = dev.launch("serving-pod-failure", "prediction-service")
    from_terminal = dev.mlchaos("run", "serving-pod-delete", "-o", "json")
    assert from_terminal.returncode == 3, from_terminal.stdout + from_terminal.stderr
    said = json.loads(from_terminal.stdout)
    assert said["outcome"] == "REFUSED" and "“gate open” refused" in said["reasons"][0], said["reasons"]

    aborted = dev.ended(burner)
    assert aborted["status"] == "CANCELED" and dev.outcome(burner) == "ABORTED", aborted
    record = dev.record(burner)["record"]
    assert "error budget" in record["abort"]["reason"] and record["clean"]["proven"], record["abort"]
    refused = dev.ended(from_dagster)
    assert refused["status"] == "SUCCESS" and dev.outcome(from_dagster) == "REFUSED", refused
    assert "gate open: closed:" in dev.record(from_dagster)["verdict"]["reasons"][0]
    assert closed(), "the gate opened before the test had seen it refuse; a longer budget window is needed"
    assert dev.faults_added() == 1, "nothing was injected while the gate was closed"

    added, removed = (
        next(e["at"] for e in dev.observer.truth() if e["what"] == what) for what in ("fault_added", "fault_removed")
    )
    assert budget.breached_at and removed - budget.breached_at < 15, "the sensor ticks every 5 s"
    assert removed - added < WINDOW_S / 2

    wait_for(lambda: not closed(), BUDGET_S + 20, 0.2)
    opened_at = time.time()
    assert budget.read().remaining >= budget.limit
    again = dev.launch_until_fault("serving-pod-failure", "prediction-service")
    dev.terminate(again)
    dev.ended(again)
    assert not dev.observer.live_faults()
    incidents = (dev.project / ".mlchaos" / "incidents.jsonl").read_text()
    assert "gate closed" in incidents and "error budget" in incidents
    print(
        f"fault → budget breached {budget.breached_at - added:.1f} s → gate closed {closed_at - budget.breached_at:.1f} s"
        f" → fault gone {removed - closed_at:+.1f} s (breach → gone {removed - budget.breached_at:.1f} s);"
        f" gate opened {opened_at - removed:.1f} s after the fault was gone"
    )
