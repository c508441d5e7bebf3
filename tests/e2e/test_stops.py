"""Whoever says stop, and however often: the fault goes, the result is kept, the exit code says ABORTED."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from tests.e2e.conftest import Place, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]


def ended(run: subprocess.Popen[str]) -> tuple[int, dict]:
    out, err = run.communicate(timeout=60)
    assert out.startswith("{"), f"not JSON on stdout: {out[:300]!r}; {err[-800:]}"
    return run.returncode, json.loads(out)


def in_the_window(place: Place, experiment: str = "serving-pod-failure") -> subprocess.Popen[str]:
    run = place.start("run", experiment, "-o", "json")
    assert wait_for(place.observer.fault_seen), "the fault was never seen"
    return run


@pytest.mark.req("R4-05", "RX-01", "RX-05")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C twice"])
def test_a_signal_aborts_and_recovers(place: Place, number: signal.Signals) -> None:
    run = in_the_window(place)
    os.killpg(run.pid, number)
    if number is signal.SIGINT:
        os.killpg(run.pid, number)  # the impatient second Ctrl-C hits the recovery
    code, result = ended(run)
    assert code == 4 and result["outcome"] == "ABORTED", result["reasons"]
    assert result["clean"]["proven"] and result["abort"]["seconds"] < 5
    assert wait_for(lambda: not place.observer.wrong(), 10), place.observer.wrong()


@pytest.mark.req("R4-02", "R4-05")
def test_stop_by_name_waits_until_clean(place: Place) -> None:
    run = in_the_window(place, "feature-store-partition")
    stopped = place.run("stop", "feature-store-partition", "-o", "json")
    assert stopped.returncode == 0, stopped.stderr
    assert not place.observer.live_faults()
    assert json.loads(stopped.stdout)["clean"] is True, stopped.stdout
    code, result = ended(run)
    assert code == 4 and result["abort"]["reason"]


@pytest.mark.req("RX-01")
def test_two_runs_on_one_target_in_the_same_second(place: Place) -> None:
    before = sum(e["what"] == "fault_added" for e in place.observer.truth())
    runs = [place.start("run", "feature-store-delay", "-o", "json") for _ in range(2)]
    ends = sorted(ended(run) for run in runs)
    codes = [code for code, _ in ends]
    assert 3 in codes and codes[0] in (0, 1, 5), [(c, r["outcome"], r["reasons"]) for c, r in ends]
    refused = next(r for c, r in ends if c == 3)
    assert "runs here" in " ".join(refused["reasons"]) or "held by" in " ".join(refused["reasons"])
    injected = [e["lease"] for e in place.observer.truth() if e["what"] == "fault_added"][before:]
    assert len(injected) == 1, f"two runs held one target: {injected}"


def test_the_lever_keeps_new_runs_out(place: Place) -> None:
    assert place.run("stop", "--all", "--reason", "drill").returncode == 0
    refused = place.run("run", "serving-pod-failure", "-o", "json")
    assert refused.returncode in (3, 4) and "drill" in refused.stdout
    assert place.run("stop", "--release").returncode == 0
    status = json.loads(place.run("status", "-o", "json").stdout)
    assert set(status) >= {"open_leases", "active_runs", "lever", "health_score", "error_budget_remaining"}
    assert not status["lever"] and not status["open_leases"]
