"""Tracking: what was logged is there once, whatever happens to the database or the way to it. Databases are read directly."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers.database import DatabaseDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.sandbox.outbox import Outbox

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)

TO_DATABASE = "tracking->database"
TO_TRACKING = "workflow->tracking"


def ask(jobs: Platform, method: str, path: str, body: Any = None) -> Any:
    """One request to the tracking server itself."""
    url = jobs.process("tracking")["url"] + path
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)


def kept(jobs: Platform, name: str, writer: str) -> list[int]:
    """Sequence numbers of a writer's records in one of the databases, read from its file."""
    with closing(sqlite3.connect(jobs.directory / "data" / f"{name}.sqlite")) as database:
        rows = database.execute("SELECT seq FROM records WHERE writer = ? ORDER BY seq", (writer,))
        return [seq for (seq,) in rows]


def signal_of(jobs: Platform, name: str) -> float:
    """A signal now; NaN while nobody knows it, which is equal to nothing and above nothing."""
    return jobs.client.signals().get(name, float("nan"))


def test_what_is_logged_twice_is_kept_once_and_in_both_databases(jobs: Platform) -> None:
    for _ in range(2):
        ask(jobs, "POST", "/runs", {"writer": "me", "seq": 1, "run": "mine", "params": {"depth": 3}})
        ask(jobs, "POST", "/runs/mine/metrics", {"writer": "me", "seq": 2, "metrics": {"loss": 0.5}})
    found = ask(jobs, "GET", "/runs/mine")["records"]
    assert found == [{"kind": "run", "body": {"depth": 3}}, {"kind": "metrics", "body": {"loss": 0.5}}]
    assert kept(jobs, "tracking-db", "me") == kept(jobs, "tracking-db-standby", "me") == [1, 2]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(jobs, "POST", "/runs", {"run": "without a key"})
    with refused.value as answer:
        assert answer.code == 400


@pytest.mark.req("R3-06")
def test_the_standby_goes_on_and_the_primary_gets_what_it_missed(jobs: Platform) -> None:
    lease = jobs.inject("database_unavailable", TO_DATABASE)
    # The very first request after the refusal is answered: by the standby.
    ask(jobs, "POST", "/runs", {"writer": "failover", "seq": 1, "run": "during"})
    assert kept(jobs, "tracking-db", "failover") == [] and kept(jobs, "tracking-db-standby", "failover") == [1]
    eventually(lambda: signal_of(jobs, "on_standby") == 1)
    os.kill(jobs.process("tracking")["pid"], signal.SIGKILL)  # it remembers which one is in charge
    eventually(lambda: jobs.process("tracking")["ready"], every_s=0.1)
    assert ask(jobs, "GET", "/state")["on_standby"]
    jobs.client.remove_fault(lease)
    eventually(lambda: signal_of(jobs, "on_standby") == 0)
    assert kept(jobs, "tracking-db", "failover") == [1]
    assert signal_of(jobs, "lost_metrics") == 0


@pytest.mark.req("R1-03")
def test_the_spool_keeps_what_cannot_be_logged_over_a_crash_and_logs_it_once(jobs: Platform) -> None:
    writer = json.loads((jobs.directory / "data" / "workflow-outbox.mark").read_text())["writer"]
    lease = jobs.inject("network_partition", TO_TRACKING)
    eventually(lambda: signal_of(jobs, "spool_length") >= 20)
    pid = jobs.process("workflow")["pid"]
    os.kill(pid, signal.SIGKILL)
    waiting = [json.loads(line)["seq"] for line in _lines(jobs.directory / "data" / "workflow-outbox.jsonl")]
    eventually(lambda: jobs.process("workflow")["pid"] not in (None, pid))
    eventually(lambda: len(_lines(jobs.directory / "data" / "workflow-outbox.jsonl")) > len(waiting))
    jobs.client.remove_fault(lease)
    found = eventually(lambda: (seqs := kept(jobs, "tracking-db", writer)) and seqs[-1] > waiting[-1] and seqs)
    assert found == list(range(1, found[-1] + 1))  # none is missing, none is twice (the key is the primary key)
    eventually(lambda: signal_of(jobs, "lost_metrics") == 0)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.req("R4-11")
def test_a_damaged_primary_is_noticed_and_costs_nothing(jobs: Platform, tmp_path: Path) -> None:
    driver = DatabaseDriver(jobs.directory)
    assert driver.resolve(Target(select="tracking-db")) == ("tracking-db",)
    params = {"fraction": 0.3}
    undo = driver.undo("database_corruption", ("tracking-db",), params, backup=tmp_path / "backup")
    owner = Owner(os.getpid(), 0.0, "", "")
    lease = Lease(
        "live", "", "", "", "database", "database_corruption", ("tracking-db",), params, undo, 30, 0, 0, owner
    )
    driver.inject(lease)
    try:
        assert driver.active(lease).effective
        eventually(lambda: signal_of(jobs, "database_intact") == 0 and signal_of(jobs, "on_standby") == 1)
        ask(jobs, "POST", "/runs", {"writer": "damage", "seq": 1, "run": "meanwhile"})
    finally:
        driver.recover(lease)
    assert not driver.active(lease).present
    eventually(lambda: signal_of(jobs, "on_standby") == 0 and signal_of(jobs, "database_intact") == 1)
    assert kept(jobs, "tracking-db", "damage") == [1]
    with closing(sqlite3.connect(jobs.directory / "data" / "tracking-db.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert database.execute("SELECT count(*) FROM records WHERE writer = 'history'").fetchone()[0] == 3000
    assert signal_of(jobs, "lost_metrics") == 0


@pytest.mark.req("R1-02")
def test_latency_to_the_database_is_felt_and_the_workflow_keeps_its_pace(jobs: Platform) -> None:
    lease = jobs.inject("network_latency", TO_DATABASE, latency_ms=100)
    began = time.monotonic()
    ask(jobs, "POST", "/runs", {"writer": "late", "seq": 1, "run": "late"})
    assert time.monotonic() - began >= 0.1
    eventually(lambda: signal_of(jobs, "tracking_latency") >= 0.1)
    eventually(lambda: signal_of(jobs, "workflow_rate") >= 1.3)  # a run that waited for each answer takes 0.7 s
    jobs.client.remove_fault(lease)


# -- the outbox, without processes ------------------------------------------------------------------------------------


def test_an_outbox_survives_its_process_in_order(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "box.jsonl")
    outbox.append([{"n": n} for n in range(5)])
    outbox.done(2)
    again = Outbox(tmp_path / "box.jsonl")
    assert again.writer == outbox.writer and [record["seq"] for record in again.head(10)] == [3, 4, 5]
    again.append([{"n": 5}])
    assert again.head(10)[-1] == {"n": 5, "seq": 6} and len(again) == 4


def test_a_torn_last_line_was_never_taken_in(tmp_path: Path) -> None:
    Outbox(tmp_path / "box.jsonl").append([{"n": 1}])
    with (tmp_path / "box.jsonl").open("ab") as file:
        file.write(b'{"n": 2, "se')
    again = Outbox(tmp_path / "box.jsonl")
    again.append([{"n": 3}])
    assert [(record["n"], record["seq"]) for record in Outbox(tmp_path / "box.jsonl").head(9)] == [(1, 1), (3, 2)]


def test_an_empty_outbox_gets_small_again_and_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlchaos_dagster.sandbox.outbox._COMPACT_BYTES", 100)
    outbox = Outbox(tmp_path / "box.jsonl")
    outbox.append([{"n": n} for n in range(20)])
    outbox.done(20)
    assert (tmp_path / "box.jsonl").stat().st_size == 0
    assert Outbox(tmp_path / "box.jsonl").seq == 20
