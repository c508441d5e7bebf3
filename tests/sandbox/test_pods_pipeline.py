"""What the pipeline's services must know as pods: a disk that is gone with its pod, a worker whose past is told elsewhere."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from mlchaos_dagster.sandbox.progress import Progress
from mlchaos_dagster.sandbox.remote_progress import heard, told
from mlchaos_dagster.sandbox.tracking import Failed, Tracking
from mlchaos_dagster.sandbox.tracking_db import Database, row
from mlchaos_dagster.sandbox.training_status import Status


class Wire:
    """Carries requests to real databases, as `aiohttp.ClientSession.post` does."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.files = tmp_path, 0
        self.databases: dict[str, Database] = {}
        self.silent: set[str] = set()
        for name in ("database", "standby"):
            self.replace(name)

    def replace(self, name: str) -> None:
        """Another pod answers there: its file is new."""
        self.files += 1
        self.databases[name] = Database(self.folder / f"{self.files}.sqlite", 7)

    def post(self, url: str, **given: Any) -> Any:
        name, path = url.split("/")
        if name in self.silent:
            raise OSError(f"{name} does not answer")
        database = self.databases[name]
        if path == "check":
            found = database.check()
        else:
            found = database.execute([(sql, parameters) for sql, parameters in given["json"]["statements"]])
        return _Answer({**found, "identity": database.identity})


class _Answer:
    status = 200

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body

    async def __aenter__(self) -> _Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def json(self) -> dict[str, Any]:
        return self.body


def tracking(wire: Wire, tmp_path: Path, failover: bool = True) -> Tracking:
    mechanisms = {"failover": failover, "retries": True}
    service = SimpleNamespace(
        config={"mechanisms": mechanisms, "data": str(tmp_path), "token": "t"},
        peers={"database": "database", "standby": "standby"},
        registry=CollectorRegistry(),
    )
    return Tracking(cast(Any, service), cast(Any, wire))


async def rounds(server: Tracking, number: int) -> None:
    """What `watch` does, without its pauses."""
    for _ in range(number):
        await asyncio.gather(server.primary.check(), server.standby.check())
        await server._settle()


async def count(server: Tracking) -> int:
    return (await server.execute([["SELECT count(*) FROM records WHERE writer = 'me'", []]]))["rows"][0][0]


@pytest.mark.req("R3-06", "R4-11")
def test_a_database_that_came_back_empty_answers_nobody_until_it_has_everything(tmp_path: Path) -> None:
    async def scene() -> None:
        wire = Wire(tmp_path)
        server = tracking(wire, tmp_path)
        await rounds(server, 2)
        await server.write("me", [row("me", 1, "r", "run", {}, 1.0)])
        wire.replace("database")
        assert await count(server) == 1  # the first request after the change, before any check saw it
        assert server.on_standby
        await server.write("me", [row("me", 2, "r", "run", {}, 2.0)])
        await rounds(server, 4)
        assert not server.on_standby
        wire.replace("standby")
        await rounds(server, 2)
        assert wire.databases["standby"].execute([("SELECT count(*) FROM records WHERE writer = 'me'", [])])[
            "rows"
        ] == [(2,)]
        assert await count(server) == 2

    asyncio.run(scene())


def test_a_standby_that_lacks_what_was_confirmed_does_not_answer_for_a_slow_primary(tmp_path: Path) -> None:
    async def scene() -> None:
        wire = Wire(tmp_path)
        server = tracking(wire, tmp_path)
        await rounds(server, 2)
        wire.silent = {"standby"}
        await server.write("me", [row("me", 1, "r", "run", {}, 1.0)])
        wire.silent = {"database"}
        with pytest.raises(Failed):
            await count(server)
        await rounds(server, 3)
        assert not server.on_standby
        wire.silent = set()
        assert await count(server) == 1

    asyncio.run(scene())


def test_a_server_that_remembers_nothing_loses_nothing_that_only_the_standby_has(tmp_path: Path) -> None:
    """It was on the standby when its own pod, and with it its memory, was replaced."""

    async def scene() -> None:
        wire = Wire(tmp_path)
        wire.databases["standby"].execute(
            [("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", row("me", 1, "r", "run", {}, 1.0))]
        )
        server = tracking(wire, tmp_path)
        await rounds(server, 2)
        assert not server.on_standby and await count(server) == 1

    asyncio.run(scene())


@pytest.mark.req("R0-02")
def test_a_dead_worker_counts_where_it_will_resume_and_a_new_status_knows_its_past(tmp_path: Path) -> None:
    now = time.monotonic()
    status = Status(tmp_path / "status.json")
    for name, step in (("trainer-0", 300), ("trainer-1", 200)):
        mine = Progress(pid=1, step=step, best=step, checkpoint_step=step - 30, checkpoint_at=now - 1.5, rate=20.0)
        mine.started_at, mine.updated_at = now - 20, now
        status.take(name, json.loads(json.dumps(told(mine))))
    assert (status.signals()["training_step"], status.signals()["steps_behind"]) == (500, 0)
    status.told_at["trainer-0"] -= 2.0  # not a word for two seconds
    seen = status.signals()
    assert (seen["training_step"], seen["steps_behind"], seen["training_workers_ready"]) == (470, 30, 1)
    assert seen["checkpoint_age"] == pytest.approx(1.5, abs=0.5)

    async def written() -> None:
        task = asyncio.create_task(status.keep())
        while not (tmp_path / "status.json").exists():
            await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(written())
    again = Status(tmp_path / "status.json")
    assert again.known["trainer-0"].best == 300 and again.signals()["training_workers_ready"] == 0


def test_progress_travels_as_ages_and_what_is_no_progress_is_refused() -> None:
    seen = heard(told(Progress(step=3, checkpoint_at=time.monotonic() - 7.0)))
    assert seen.step == 3 and time.monotonic() - seen.checkpoint_at == pytest.approx(7.0, abs=0.5)
    assert seen.started_at == 0.0  # never is never, on every clock
    with pytest.raises(KeyError):
        heard({"step": 1})
