"""`stop` and `status` for runs that hold no lease (yet, or any more), played by real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlchaos_dagster.cli.stop import OBEY_S
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.engine.sweep import sweep
from mlchaos_dagster.errors import DriverError

from .conftest import Cli

pytestmark = pytest.mark.timeout(180)
RUN = "0f8fad5b-d9cb-469f-a165-70867728950e"
NAME = "serving-pod-failure"
STUBBORN = "lease-9"
"""Of this one the backend takes nothing away."""
Start = Callable[..., "subprocess.Popen[str]"]

PLAYER = """
import sys, time
from pathlib import Path
from mlchaos_dagster.engine.active import ActiveRuns
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.engine.stops import FileStop, StopFiles
from mlchaos_dagster.settings import Home

home, run_id, name, phase, manner = Home(Path(sys.argv[1])), *sys.argv[2:6]
clock, stops = SystemClock(), StopFiles(home)
active, ledger, stop = ActiveRuns(home.active, clock), FileLedger(home.ledger, clock), FileStop(stops, run_id)
now = clock.wall()
number = run_id[-1] if run_id.startswith("run-") else "1"
lease = Lease(f"lease-{number}", run_id, name, "sandbox", "sandbox", "pod_failure", (f"inference-{number}",), {}, {}, 60.0,
              now, now + 60.0, current_owner())


def told():
    while stop.requested() is None:
        time.sleep(0.005)


def leave():
    active.forget(run_id)
    stops.forget(run_id)
    sys.exit()


if manner != "unannounced":
    active.announce(run_id, name, "sandbox", current_owner(), now, 60.0)
    active.note(run_id, phase)
if manner == "unannounced":  # it looked at the lever, and is just about to write its lease
    ledger._files.prepare()
    with ledger._files.mutex(1.0) as held:
        assert held
        print("ready", flush=True)
        told()
        time.sleep(0.3)
        ledger._files.write(lease)
    time.sleep(600)
mine = ledger.open(lease) if manner in ("restores", "freezes", "damages") else None
print("ready", flush=True)
if manner == "deaf":
    time.sleep(600)
told()
time.sleep(0.3)
if manner == "obeys":
    leave()
if manner == "damages":
    ledger._files.find(lease.id).path.write_text("{half")
    time.sleep(600)
mine = mine or ledger.open(lease)
if manner == "passes":  # on from baseline to window, then it looks, recovers, closes
    time.sleep(0.3)
    ledger.close(mine, ["nothing of it is there"])
    active.note(run_id, "recovery")
    time.sleep(0.2)
    leave()
if manner in ("restores", "freezes"):  # a recovery that takes longer than a stop waits for a word
    active.note(run_id, "restoring")
    for _ in range(30):
        time.sleep(0.1)
        if manner == "freezes":
            time.sleep(600)
        ledger.renew(mine)
    ledger.close(mine, ["nothing of it is there"])
    leave()
time.sleep(600)  # "hangs", with a lease
"""


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Players of one run, and a backend that says that nothing is there."""

    class Backend:
        name = "sandbox"

        def recover(self, lease: Lease) -> None:
            if lease.id == STUBBORN:
                raise DriverError("the backend is away", driver="sandbox", verb="recover")

        def active(self, lease: object) -> Evidence:
            return Evidence(present=False, effective=False, lines=("nothing of it is there",))

    monkeypatch.setattr("mlchaos_dagster.wiring.driver", lambda *_: Backend())
    monkeypatch.setattr("mlchaos_dagster.cli.stop.OBEY_S", 2.0)
    processes: list[subprocess.Popen[str]] = []

    def begin(manner: str, phase: str = "baseline", run_id: str = RUN, name: str = NAME) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PLAYER, str(home), run_id, name, phase, manner]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def leftovers(home: Path) -> list[str]:
    return sorted(p.name for room in ("active", "stop", "ledger/open") for p in (home / room).glob("*"))


@pytest.mark.req("R4-05")
@pytest.mark.parametrize("phase", ["guards", "baseline", "fault"])
@pytest.mark.parametrize("word", [NAME, RUN, RUN[:8], "--all"])
def test_a_run_without_a_lease_is_stopped_by_any_name(
    cli: Cli, home: Path, start: Start, phase: str, word: str
) -> None:
    player = start("obeys", phase)
    (row,) = json.loads(cli("status", "-o", "json").out)["active_runs"]
    assert (row["run_id"], row["experiment"], row["environment"]) == (RUN, NAME, "sandbox")
    assert (row["phase"], row["pid"], row["leases"]) == (phase, player.pid, [])
    assert time.time() - 60 < _unix(row["started_at"]) < time.time() + 2
    before = time.monotonic()
    answer = cli("stop", word, "-o", "json")
    assert answer.code == 0 and 0.3 < time.monotonic() - before < OBEY_S
    found = json.loads(answer.out)
    (stopped,) = found["stopped"]
    assert found["clean"] and (stopped["run_id"], stopped["lease"]) == (RUN, None)
    assert stopped["evidence"] == [f"no fault of it is active: it was told in its {phase} phase and has ended"]
    assert player.wait(5) == 0
    assert leftovers(home) == (["lever"] if word == "--all" else [])


def _unix(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


@pytest.mark.req("R4-05")
@pytest.mark.parametrize("word", [NAME, RUN])
def test_a_run_that_passes_into_its_window_is_awaited_until_its_lease_is_closed(
    cli: Cli, home: Path, start: Start, word: str
) -> None:
    player = start("passes")
    found = json.loads(cli("stop", word, "-o", "json").out)
    (stopped,) = found["stopped"]
    assert (stopped["lease"], stopped["taken_away_by"]) == ("lease-1", "its own run"), found
    assert stopped["evidence"] == ["nothing of it is there"] and stopped["seconds"] >= 0.5
    assert player.wait(5) == 0 and leftovers(home) == []


def test_a_run_that_opens_a_lease_and_hangs_is_taken_over(cli: Cli, home: Path, start: Start) -> None:
    player = start("hangs")
    answer = cli("stop", NAME, "-o", "json")
    (stopped,) = json.loads(answer.out)["stopped"]
    assert answer.code == 0 and (stopped["lease"], stopped["taken_away_by"]) == ("lease-1", "mlchaos stop")
    assert player.wait(5) == -9 and leftovers(home) == []


@pytest.mark.req("R4-05", "RX-01")
@pytest.mark.parametrize("word", [NAME, "--all"])
def test_a_run_that_is_long_at_restoring_is_awaited(
    cli: Cli, start: Start, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that needs many seconds, such as another tool's operator: a killed run would have no record."""
    monkeypatch.setattr("mlchaos_dagster.cli.stop.OBEY_S", 1.0)
    player = start("restores", "fault")
    answer = cli("stop", word, "-o", "json")
    (stopped,) = json.loads(answer.out)["stopped"]
    assert answer.code == 0 and stopped["taken_away_by"] == "its own run" and stopped["seconds"] > 2.5, stopped
    assert player.wait(5) == 0


@pytest.mark.req("R4-05", "RX-01")
def test_a_run_that_freezes_while_it_restores_is_taken_over(cli: Cli, home: Path, start: Start) -> None:
    player = start("freezes", "fault")
    (stopped,) = json.loads(cli("stop", NAME, "-o", "json").out)["stopped"]
    assert stopped["taken_away_by"] == "mlchaos stop" and stopped["clean"] and stopped["seconds"] < 10
    assert player.wait(5) == -9 and leftovers(home) == []


@pytest.mark.req("R4-05", "RX-01")
def test_a_run_that_restores_for_ever_is_not_awaited_for_ever(
    cli: Cli, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlchaos_dagster.cli.stop.OBEY_S", 0.5)
    monkeypatch.setattr("mlchaos_dagster.cli.stop.LONGEST_S", 1.5)
    player = start("restores", "fault")
    (stopped,) = json.loads(cli("stop", NAME, "-o", "json").out)["stopped"]
    assert stopped["taken_away_by"] == "mlchaos stop" and player.wait(5) == -9


@pytest.mark.req("R4-05", "RX-01")
def test_what_could_not_be_taken_away_is_told_once_while_another_is_awaited(
    cli: Cli, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlchaos_dagster.cli.stop.OBEY_S", 1.0)
    monkeypatch.setitem(sweep.__kwdefaults__, "proof_s", 0.1)
    hangs, restores = start("hangs", "fault", run_id="run-9"), start("restores", "fault", run_id="run-1")
    answer = cli("stop", NAME, "-o", "json")
    rows = {r["lease"]: r for r in json.loads(answer.out)["stopped"]}
    assert len(rows) == len(json.loads(answer.out)["stopped"]), answer.out
    assert (
        answer.code == 70 and not rows[STUBBORN]["clean"] and rows[STUBBORN]["command"] == f"mlchaos recover {STUBBORN}"
    )
    assert rows["lease-1"]["taken_away_by"] == "its own run"
    assert hangs.wait(5) == -9 and restores.wait(5) == 0


@pytest.mark.req("R4-05", "RX-01")
def test_a_lease_that_is_damaged_meanwhile_is_not_taken_for_closed(cli: Cli, home: Path, start: Start) -> None:
    player = start("damages", "fault")
    answer = cli("stop", NAME, "-o", "json")
    (stopped,) = json.loads(answer.out)["stopped"]
    assert answer.code == 0 and stopped["taken_away_by"] == "mlchaos stop", stopped
    assert stopped["targets"] == ["inference-1"], "it was readable before: nothing of it is forgotten"
    assert player.wait(5) == -9 and leftovers(home) == []


@pytest.mark.req("R4-05")
def test_a_run_that_does_not_obey_and_holds_nothing_is_told_of_and_not_killed(
    cli: Cli, home: Path, start: Start
) -> None:
    player = start("deaf")
    answer = cli("stop", NAME)
    assert answer.code == 0 and player.poll() is None
    assert "told" in answer.out and f"process {player.pid} has not ended, phase baseline" in answer.out
    assert "holds no lease" in answer.out
    assert leftovers(home) == [f"{RUN}.json", f"run-{RUN}"], "the request must wait for it"


def test_an_unreadable_lease_of_a_run_in_its_window_may_be_a_live_fault(cli: Cli, home: Path, start: Start) -> None:
    player = start("deaf", "fault")
    (home / "ledger" / "open").mkdir(parents=True)
    (home / "ledger" / "open" / "lease-1.sandbox.json").write_text("{half")
    answer = cli("stop", NAME)
    assert answer.code == 70 and player.poll() is None
    assert "UNCLEAN" in answer.out and "type: mlchaos recover" in answer.out


def test_a_run_after_its_fault_is_told_and_not_awaited(cli: Cli, home: Path, start: Start) -> None:
    start("deaf", "recovery")
    before = time.monotonic()
    answer = cli("stop", NAME)
    assert answer.code == 0 and time.monotonic() - before < OBEY_S
    assert "recovery phase and injects nothing more" in answer.out
    assert (home / "stop" / f"run-{RUN}").is_file()


def test_every_run_of_the_experiment_is_stopped_and_no_other(cli: Cli, start: Start) -> None:
    mine = [start("obeys", run_id=f"run-{n}") for n in (1, 2)]
    other = start("obeys", run_id="run-3", name="feature-store-delay")
    found = json.loads(cli("stop", NAME, "-o", "json").out)
    assert sorted(r["run_id"] for r in found["stopped"]) == ["run-1", "run-2"]
    assert [p.wait(5) for p in mine] == [0, 0] and other.poll() is None
    status = json.loads(cli("status", "-o", "json").out)["active_runs"]
    assert [r["run_id"] for r in status] == ["run-3"]


@pytest.mark.req("R4-05")
def test_a_lease_that_is_being_written_when_the_lever_is_pulled_is_not_missed(
    cli: Cli, home: Path, start: Start
) -> None:
    player = start("unannounced")
    found = json.loads(cli("stop", "--all", "-o", "json").out)
    assert [r["lease"] for r in found["stopped"]] == ["lease-1"], found
    assert found["clean"] and player.wait(5) == -9 and leftovers(home) == ["lever"]


def test_status_of_one_run_before_its_fault(cli: Cli, start: Start) -> None:
    player = start("deaf")
    for word in (NAME, RUN, RUN[:4]):
        found = json.loads(cli("status", word, "-o", "json").out)
        assert (found["run_id"], found["state"], found["open_leases"]) == (RUN, "running", [])
        assert found["active_runs"][0]["phase"] == "baseline"
    text = cli("status", NAME).out
    assert f"pid {player.pid}" in text and "no fault is active" in text
    player.kill()
    player.wait()
    assert json.loads(cli("status", "-o", "json").out)["active_runs"] == []
    answer = cli("stop", NAME)
    assert answer.code == 0 and f"no run of {NAME} is active" in answer.out
    assert cli("stop", "no-such-run").code == 2
