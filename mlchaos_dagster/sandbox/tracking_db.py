"""A database of the tracking server: SQL over HTTP on one SQLite file of its own (``data/<name>.sqlite``).

POST /execute {"statements": [[sql, [parameters]], …]}: one transaction; the rows of the last statement. POST /check:
SQLite's quick check, the rows, and whether the newest records still have the checksum that they were written with. Both
need the sandbox's token. An error says its ``kind``: ``damaged``, ``busy`` or ``sql``. Each answer carries the file's
``identity``, a number that was drawn when it was made: who kept data here sees when it is another file.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .lifeline import Lifeline

_BUSY_S = 1.0
_HISTORY = 3000
"""Records of former runs that a new database holds: a file of some hundred pages, as one that has been in use."""
_RECENT = 200
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    writer TEXT NOT NULL, seq INTEGER NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    at REAL NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (writer, seq));
CREATE INDEX IF NOT EXISTS records_of_run ON records (run);
"""
INSERT = "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)"


def row(writer: str, seq: int, run: str, kind: str, body: Any, at: float) -> list[Any]:
    """A record as ``INSERT`` takes it, with its checksum."""
    text = json.dumps(body, sort_keys=True)
    return [writer, seq, run, kind, text, at, zlib.crc32(text.encode())]


def history(seed: int) -> list[list[Any]]:
    """Records of runs long ago; the same seed gives the same."""
    rng = random.Random(seed)
    rows: list[list[Any]] = []
    for seq in range(1, _HISTORY + 1):
        run = f"history-{seq // 7:05d}"
        body = {"loss": rng.random(), "accuracy": rng.random(), "note": f"{rng.getrandbits(400):x}"}
        rows.append(row("history", seq, run, "metrics", body, 1.6e9 + seq))
    return rows


class Database:
    """The file, behind one thread; every method blocks. Raises sqlite3.Error."""

    def __init__(self, path: Path, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.identity: int | None = None
        """Of this file; None when it was damaged before it could be asked."""
        self._open()
        try:
            with self._connection:
                self._connection.executescript(_SCHEMA)
                if self._connection.execute("SELECT NOT EXISTS (SELECT 1 FROM records)").fetchone()[0]:
                    self._connection.executemany(INSERT, history(seed))
                if not self._connection.execute("PRAGMA user_version").fetchone()[0]:
                    self._connection.execute(f"PRAGMA user_version = {random.randint(1, 2**31 - 1)}")
            self.identity = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.DatabaseError:
            pass  # damaged: whoever asks is told

    def _open(self) -> None:
        self._connection = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.DatabaseError:
            pass

    def execute(self, statements: list[tuple[str, list[Any]]]) -> dict[str, Any]:
        """All of them or none: {"rows": of the last, "changes": rows changed by all}."""
        rows: list[Any] = []
        before = self._connection.total_changes
        with self._connection:
            for sql, parameters in statements:
                rows = self._connection.execute(sql, parameters).fetchall()
        return {"rows": rows, "changes": self._connection.total_changes - before}

    def check(self) -> dict[str, Any]:
        """{"problems": what is wrong (empty = intact), "rows": number of records}."""
        try:
            said = [str(line[0]) for line in self._connection.execute("PRAGMA quick_check(3)")]
            problems = [] if said == ["ok"] else said
            rows = self._connection.execute("SELECT count(*) FROM records").fetchone()[0]
            recent = self._connection.execute("SELECT body, crc FROM records ORDER BY rowid DESC LIMIT ?", (_RECENT,))
            wrong = sum(zlib.crc32(body.encode()) != crc for body, crc in recent)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            return {"problems": [str(error)], "rows": None}
        if wrong:
            problems.append(f"{wrong} of the newest records do not have their checksum")
        return {"problems": problems, "rows": rows}


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Counter

    from .service import Service

    service = Service(lifeline)
    config = service.config
    path = Path(config["data"]) / f"{config['name']}.sqlite"
    asked = Counter("tracking_db_requests_total", "Requests by result", ["result"], registry=service.registry)
    totals = {"requests": 0, "errors": 0}
    thread = ThreadPoolExecutor(1)
    loop = asyncio.get_running_loop()
    database = await loop.run_in_executor(thread, Database, path, config["seed"])

    async def answer(work: Any, *arguments: Any) -> web.Response:
        totals["requests"] += 1
        try:
            found = await loop.run_in_executor(thread, work, *arguments)
        except sqlite3.OperationalError as error:
            kind, status, said = "busy" if "locked" in str(error) else "sql", 503, str(error)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError) as error:
            kind, status, said = "sql", 400, str(error)
        except sqlite3.DatabaseError as error:
            kind, status, said = "damaged", 500, str(error)
        else:
            asked.labels("ok").inc()
            return web.json_response({**found, "identity": database.identity})
        totals["errors"] += 1
        asked.labels(kind).inc()
        return web.json_response({"error": said, "kind": kind}, status=status)

    async def execute(request: web.Request) -> web.Response:
        return await answer(database.execute, [(sql, given) for sql, given in (await request.json())["statements"]])

    async def check(request: web.Request) -> web.Response:
        return await answer(database.check)

    async def state(request: web.Request) -> web.Response:
        return web.json_response(totals)

    async def started() -> None:
        service.set_ready()

    service.app.router.add_post("/execute", service.guarded(execute))
    service.app.router.add_post("/check", service.guarded(check))
    service.app.router.add_get("/state", state)
    await service.serve(started)
