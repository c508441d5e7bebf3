"""Accepted jobs, durable: SQLite behind one thread, with one commit for all that comes together."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, source TEXT NOT NULL, payload TEXT NOT NULL,
    accepted REAL NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', result TEXT);
CREATE INDEX IF NOT EXISTS jobs_waiting ON jobs (id) WHERE state = 'waiting';
"""
_KEEP = 5000
"""Jobs kept that are over; their keys are known so long."""
_PRUNE_EVERY = 1000


@dataclass(frozen=True)
class Job:
    """One accepted job."""

    id: int
    key: str
    source: str
    payload: Any
    since: float
    """Monotonic seconds: accepted, or the queue's own start if that was later (its outage is not the caller's fault)."""


class JobStore:
    """What was accepted, and what became of it. Every ``await`` ends when it is on disk. Raises sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)
        self._thread = ThreadPoolExecutor(1)
        self._asked: list[tuple[str, tuple[Any, ...], asyncio.Future[Any]]] = []
        self._wake = asyncio.Event()
        self._written = 0

    def waiting(self) -> list[Job]:
        """All jobs that are not over, oldest first; for the start."""
        rows = self._database.execute("SELECT id, key, source, payload FROM jobs WHERE state = 'waiting' ORDER BY id")
        return [Job(i, key, source, json.loads(text), time.monotonic()) for i, key, source, text in rows]

    async def accept(self, key: str, source: str, payload: Any) -> tuple[int, bool]:
        """The job's id, and whether it is new."""
        return await self._do("accept", key, source, json.dumps(payload), time.time())

    async def finish(self, job: int, state: str, result: Any = None) -> bool:
        """It is over (``done`` or ``dropped``); False when it was already."""
        return await self._do("finish", job, state, json.dumps(result))

    async def look(self, key: str) -> str | None:
        """``waiting``, ``done`` or ``dropped``; None: there is no such job."""
        return await self._do("look", key)

    async def commit_for_ever(self) -> None:
        """Task: what was asked since the last commit goes into one."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._asked = self._asked, []
            try:
                answers = await loop.run_in_executor(self._thread, self._commit, batch)
            except sqlite3.Error as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _do(self, what: str, *arguments: Any) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append((what, arguments, future))
        self._wake.set()
        return await future

    def _commit(self, batch: list[tuple[str, tuple[Any, ...], Any]]) -> list[Any]:
        with self._database:
            answers = [getattr(self, f"_{what}")(*arguments) for what, arguments, _ in batch]
            self._written += len(batch)
            if self._written >= _PRUNE_EVERY:
                self._written = 0
                newest = "(SELECT max(id) FROM jobs)"
                self._database.execute(f"DELETE FROM jobs WHERE state != 'waiting' AND id <= {newest} - {_KEEP}")
        return answers

    def _accept(self, key: str, source: str, payload: str, at: float) -> tuple[int, bool]:
        some = "INSERT OR IGNORE INTO jobs (key, source, payload, accepted) VALUES (?, ?, ?, ?)"
        new = self._database.execute(some, (key, source, payload, at)).rowcount > 0
        job = self._database.execute("SELECT id FROM jobs WHERE key = ?", (key,)).fetchone()[0]
        return job, new

    def _finish(self, job: int, state: str, result: str) -> bool:
        some = "UPDATE jobs SET state = ?, result = ? WHERE id = ? AND state = 'waiting'"
        return self._database.execute(some, (state, result, job)).rowcount > 0

    def _look(self, key: str) -> str | None:
        found = self._database.execute("SELECT state FROM jobs WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None
