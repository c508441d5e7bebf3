"""Whatever happens to a run that Dagster launched: the fault goes, at once, and nothing is left.

One `dagster dev` for all; the tests run in this order, because the last one kills its code server.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import yaml

from benchmarks.kills import fast_library
from benchmarks.observer import alive
from tests.e2e.test_dagster_dev import ENDED, Dev, dagster_dev, nothing_left, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150), pytest.mark.req("RX-01", "R4-05")]

EXPERIMENT, TARGET = "feature-store-delay", "feature-store"
WINDOW_S = 12.0
"""Long enough that a fault which went by itself cannot be mistaken for one that was taken away."""
AT_ONCE_S = 5.0
"""Far above what it takes (about 0.2 s), far below the window: a loaded machine must not fail it."""


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    project = tmp_path_factory.mktemp("project")
    library = fast_library(project / "library")
    path = library / "environments" / "fast.yaml"
    environment = yaml.safe_load(path.read_text()) | {"duration_min": f"{WINDOW_S:g}s"}
    path.write_text(yaml.safe_dump(environment, sort_keys=False))
    with dagster_dev(project, library, "fast") as made:
        yield made


def in_the_window(dev: Dev) -> tuple[str, int, int]:
    """A run whose fault is on: its id, its process, and how many faults there ever were."""
    run_id = dev.launch_until_fault(EXPERIMENT, TARGET)
    return run_id, dev.worker(), dev.faults_added()


def gone(dev: Dev, what: str, begun: float, bound_s: float = AT_ONCE_S) -> None:
    """The fault is gone soon after `begun` (wall clock), by the truth log."""
    wait_for(lambda: not dev.observer.live_faults(), bound_s)
    removed = max(e["at"] for e in dev.observer.truth() if e["what"] in ("fault_removed", "fault_expired"))
    print(f"\n{what}: fault gone after {removed - begun:.2f} s")


def told(dev: Dev, run_id: str, outcome: str) -> None:
    """The run ended CANCELED with its verdict: in Dagster's history, not only on disk."""
    run = dev.ended(run_id)
    assert run["status"] == "CANCELED", run
    assert dev.outcome(run_id) == outcome, run
    steps = {s["stepKey"].rpartition(".")[2]: s["status"] for s in run["stepStats"]}
    assert steps["judge"] == "SUCCESS", steps
    assert dev.record(run_id)["record"]["clean"]["proven"]


def test_terminated_three_times_in_the_window(dev: Dev) -> None:
    run_id, _, added = in_the_window(dev)
    begun = time.time()
    first, second = dev.terminate(run_id), dev.terminate(run_id)
    dev.terminate(run_id, "MARK_AS_CANCELED_IMMEDIATELY")
    assert first["__typename"] == "TerminateRunSuccess", first
    assert second["__typename"] in ("TerminateRunFailure", "TerminateRunSuccess"), second
    gone(dev, "terminated in the window", begun)
    # Forced: Dagster calls it over while the run still reports.
    wait_for(lambda: dev.outcome(run_id) == "ABORTED", 30, 0.3)
    told(dev, run_id, "ABORTED")
    nothing_left(dev)
    assert dev.faults_added() == added, "nothing was injected again"


def test_terminated_twice_while_the_recovery_is_sampled(dev: Dev) -> None:
    run_id, worker, added = in_the_window(dev)
    wait_for(lambda: not dev.observer.live_faults(), WINDOW_S + 20)
    dev.terminate(run_id)
    dev.terminate(run_id)
    run = dev.ended(run_id)
    assert run["status"] in ("CANCELED", "SUCCESS"), run
    assert dev.outcome(run_id), "a verdict is told, whatever the cut-off recovery allows to say"
    assert dev.record(run_id)["record"]["clean"]["proven"]
    wait_for(lambda: not alive(worker), 15)
    nothing_left(dev)
    assert dev.faults_added() == added


def test_an_impatient_sender_of_signals(dev: Dev) -> None:
    """A SIGTERM every 30 ms from the window to the end: some hit Dagster between two ops, some hit judge and report."""
    run_id, worker, added = in_the_window(dev)
    begun, sent = time.time(), 0
    while alive(worker) and not dev.outcome_file(run_id) and time.time() < begun + 30:
        os.kill(worker, signal.SIGTERM)
        sent += 1
        time.sleep(0.03)
    gone(dev, f"{sent} signals", begun, 1.0)
    told(dev, run_id, "ABORTED")
    assert sent > 10
    nothing_left(dev)
    assert dev.faults_added() == added


def test_its_process_is_killed(dev: Dev) -> None:
    run_id, worker, added = in_the_window(dev)
    begun = time.time()
    os.kill(worker, signal.SIGKILL)
    gone(dev, "run process killed", begun)
    assert dev.ended(run_id)["status"] == "FAILURE"
    nothing_left(dev)
    assert dev.faults_added() == added


def test_the_code_server_is_killed(dev: Dev) -> None:
    """Dagster can no longer stop the run, and does not restart the server: the run sees it and stops itself."""
    run_id, worker, added = in_the_window(dev)
    begun = time.time()
    os.kill(dev.code_server(), signal.SIGKILL)
    gone(dev, "code server killed", begun)
    wait_for(lambda: dev.run(run_id)["status"] in ENDED, 60, 0.3)
    told(dev, run_id, "ABORTED")
    assert "code server is gone" in dev.record(run_id)["record"]["abort"]["reason"]
    wait_for(lambda: not alive(worker), 15)
    nothing_left(dev)
    assert dev.faults_added() == added
