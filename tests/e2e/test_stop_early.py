"""Stop a real run that holds no lease: before its fault it injects nothing, after it, it is no dead end."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.e2e.conftest import Place, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]
NAME = "serving-pod-failure"


def phases(place: Place) -> dict[str, str]:
    """Run id → phase, read from the files as they lie there."""
    found = {}
    for path in (place.home / "active").glob("*.json"):
        try:
            found[path.stem] = path.read_text().split("\n")[0].strip()
        except OSError:
            continue
    return found


def begun(place: Place, phase: str) -> tuple[subprocess.Popen[str], str]:
    run = place.start("run", NAME, "-o", "json")
    assert wait_for(lambda: phase in phases(place).values()), f"never in {phase}: {run.poll()}"
    return run, next(iter(phases(place)))


def injected(place: Place) -> int:
    return sum(e["what"] == "fault_added" for e in place.observer.truth())


@pytest.mark.req("R4-05", "RX-05")
@pytest.mark.parametrize(("phase", "by"), [("baseline", "name"), ("guards", "id"), ("baseline", "--all")])
def test_a_stop_before_the_fault_injects_nothing(place: Place, phase: str, by: str) -> None:
    before = injected(place)
    run, run_id = begun(place, phase)
    try:
        stopped = place.run("stop", {"name": NAME, "id": run_id[:8], "--all": "--all"}[by], "-o", "json")
        assert stopped.returncode == 0, stopped.stderr
        answer = json.loads(stopped.stdout)
        assert answer["clean"] and [r["run_id"] for r in answer["stopped"]] == [run_id], answer
        out, err = run.communicate(timeout=60)
        result = json.loads(out)
        ends = [(4, "ABORTED")] + [(3, "REFUSED")] * (phase == "guards")  # a guard may see the request first
        assert (run.returncode, result["outcome"]) in ends, (result["reasons"], err[-500:])
        assert injected(place) == before, "a fault was made after the stop"
        assert not phases(place) and not list((place.home / "stop").glob("run-*"))
    finally:
        place.run("stop", "--release")


@pytest.mark.req("R4-05")
def test_a_stop_during_the_recovery_sampling_is_heard(place: Place) -> None:
    run, run_id = begun(place, "recovery")
    stopped = place.run("stop", NAME)
    assert stopped.returncode == 0 and run_id in stopped.stdout, stopped.stdout + stopped.stderr
    out, _ = run.communicate(timeout=60)
    assert json.loads(out)["clean"]["proven"]
    assert not phases(place) and not list((place.home / "stop").glob("run-*"))
