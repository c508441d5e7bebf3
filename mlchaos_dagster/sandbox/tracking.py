"""The tracking server: runs, parameters and metrics by HTTP, kept in a database with a standby.

POST /runs {writer, seq, run, params}, POST /runs/{run}/metrics {writer, seq, metrics} and, for many at once, POST /records
{writer, records: [{seq, run, kind, body, at}]}; ``writer`` and ``seq`` are the idempotency key: what comes twice is
kept once. GET /runs/{run}; GET /count?writer=&above=&up_to= (records kept with above < seq ≤ up_to). GET /state.

What the active database has committed is then copied to the other one before the caller is told. Both are checked twice
a second; what is damaged is not written to any more. ``failover``: with the primary damaged or out of reach the standby
goes on (remembered over restarts), and the primary is used again once it is intact and has what it missed. A database
that came back as another file (its pod was replaced, its disk is gone) is one that missed everything.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Counter, Gauge

from .background import background
from .lifeline import Lifeline
from .service import TOKEN_HEADER, Service
from .signal_gauges import export
from .tracking_db import INSERT, row

_TRY_S = 0.3
_WAITS_S = (0.05, 0.1)
"""Before the second and the third try."""
_CHECK_EVERY_S = 0.5
_CHECK_S = 0.8
_BUCKET = 200
_KEEP = 10_000
"""Records kept of each writer."""
_PRUNE_EVERY = 500
_RATE_OVER_S = 3.0
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)
_REPLACED = "the primary is another database than before"


class Failed(Exception):
    """A database did not do it. ``damaged``: trying again is of no use."""

    def __init__(self, said: str, damaged: bool = False) -> None:
        super().__init__(said)
        self.damaged = damaged


class Store:
    """One of the two databases, as seen from here."""

    def __init__(self, key: str, service: Service, session: aiohttp.ClientSession) -> None:
        self.key = key
        self.service = service
        self.session = session
        self.problems: list[str] | None = None
        """Of the last check: empty = intact; None = it could not be asked."""
        self.failed_checks = 0
        self.good_checks = 0
        self.behind = True
        """It may lack what the other one has; true until it was compared."""
        self.identity: int | None = None
        """Of the file that answered last."""
        self.replaced = False
        """It is another file than the one that held our data, and has not got that yet."""

    async def ask(self, path: str, body: Any, within_s: float = _TRY_S) -> dict[str, Any]:
        """One request. Raises Failed."""
        url = self.service.peers.get(self.key)
        if not url:
            raise Failed(f"no address of {self.key} yet")
        headers = {TOKEN_HEADER: str(self.service.config["token"])}
        try:
            timeout = aiohttp.ClientTimeout(total=within_s)
            async with self.session.post(url + path, json=body, headers=headers, timeout=timeout) as response:
                answer = await response.json()
        except _UNANSWERED as error:
            raise Failed(f"{self.key} does not answer: {type(error).__name__}") from error
        if response.status != 200:
            raise Failed(f"{self.key}: {answer.get('error')}", answer.get("kind") == "damaged")
        if (identity := answer.get("identity")) is not None:
            if self.identity not in (None, identity):
                self.replaced = self.behind = True
            self.identity = identity
        return answer

    async def execute(self, statements: list[Any], within_s: float = _TRY_S) -> dict[str, Any]:
        """One transaction. Raises Failed."""
        return await self.ask("/execute", {"statements": statements}, within_s)

    async def check(self) -> None:
        """Ask it whether it is intact."""
        try:
            self.problems = (await self.ask("/check", {}, _CHECK_S))["problems"]
        except Failed as error:
            self.problems = [str(error)] if error.damaged else None
        self.failed_checks = self.failed_checks + 1 if self.problems is None else 0
        self.good_checks = self.good_checks + 1 if self.problems == [] else 0


class Tracking:
    """Mechanisms and state behind the HTTP face."""

    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.mechanisms: dict[str, bool] = service.config["mechanisms"]
        self.primary = Store("database", service, session)
        self.standby = Store("standby", service, session)
        self.switching = asyncio.Lock()
        self.answers: deque[tuple[float, bool]] = deque()
        self.totals: dict[str, int] = dict.fromkeys(
            ("requests", "errors", "retries", "failovers", "failbacks", "copied"), 0
        )
        self._memory = Path(service.config["data"]) / "tracking-active.json"
        self._since_pruned = 0
        self._merged = False
        self.on_standby = self.mechanisms["failover"] and self._remembered()
        registry = service.registry
        self._requests = Counter("tracking_requests", "Requests", ["code"], registry=registry)
        Gauge("tracking_on_standby", "1 while the standby answers", registry=registry).set_function(
            lambda: float(self.on_standby)
        )
        Gauge("tracking_failovers", "Times the standby was promoted", registry=registry).set_function(
            lambda: self.totals["failovers"]
        )
        export(registry, self.signals)

    # -- reading and writing ----------------------------------------------------------------------------------------

    async def execute(self, statements: list[Any]) -> dict[str, Any]:
        """One transaction on whichever database is in charge. Raises Failed."""
        if self.on_standby:
            return await self._try(self.standby, statements)
        try:
            answer = await self._try(self.primary, statements)
            if not self._must_leave():
                return answer
            await self._promote(_REPLACED)
        except Failed as error:
            # A standby that lacks what was confirmed is no way out of a primary that is merely slow.
            if not self.mechanisms["failover"] or (self.standby.behind and not error.damaged):
                raise
            await self._promote(str(error))
        return await self._try(self.standby, statements)

    async def write(self, writer: str, rows: list[list[Any]]) -> int:
        """Keep records, in one transaction; how many were new. Raises Failed."""
        statements: list[Any] = [[INSERT, one] for one in rows]
        self._since_pruned += len(rows)
        if self._since_pruned >= _PRUNE_EVERY:
            self._since_pruned = 0
            newest = "(SELECT max(seq) FROM records WHERE writer = ?)"
            statements.append([f"DELETE FROM records WHERE writer = ? AND seq <= {newest} - {_KEEP}", [writer, writer]])
        async with self.switching:
            done = await self.execute(statements)
            if not self.on_standby and not self.standby.behind:
                try:
                    await self.standby.execute(statements)
                except Failed:
                    self.standby.behind = True
        return done["changes"]

    async def _try(self, store: Store, statements: list[Any]) -> dict[str, Any]:
        if store.problems:
            raise Failed(f"{store.key} is damaged: {store.problems[0]}", damaged=True)
        waits = _WAITS_S if self.mechanisms["retries"] else ()
        for wait in (*waits, None):
            try:
                return await store.execute(statements)
            except Failed as error:
                if error.damaged:
                    store.problems = [str(error)]
                if error.damaged or wait is None:
                    raise
            self.totals["retries"] += 1
            await asyncio.sleep(wait)
        raise AssertionError

    # -- failover ---------------------------------------------------------------------------------------------------

    def _must_leave(self) -> bool:
        """The primary lost what the standby has."""
        return self.mechanisms["failover"] and self.primary.replaced and not self.standby.behind

    async def _promote(self, why: str) -> None:
        if not self.on_standby:
            self.on_standby = True
            self.primary.behind = True
            self.primary.good_checks = 0
            self.totals["failovers"] += 1
            self._remember()
            sys.stderr.write(f"failover to the standby: {why}\n")

    async def watch(self) -> None:
        """Task: look at both databases, and use the one that is fit."""
        while True:
            await asyncio.gather(self.primary.check(), self.standby.check())
            try:
                await self._settle()
            except Failed:
                pass  # the next round tries again
            await asyncio.sleep(_CHECK_EVERY_S)

    async def _settle(self) -> None:
        primary, standby = self.primary, self.standby
        if not self.on_standby:
            fit = standby.problems == []
            if (
                self.mechanisms["failover"]
                and fit
                and (primary.problems or (primary.failed_checks >= 2 and not standby.behind))
            ):
                async with self.switching:
                    await self._promote("; ".join(primary.problems or ["it does not answer"]))
            elif fit and self._must_leave():
                async with self.switching:
                    await self._promote(_REPLACED)
            elif fit and standby.behind and primary.problems == []:
                if not self._merged or primary.replaced:
                    # Which of the two was in charge before us nobody may remember: no record is in one of them only.
                    await self._copy(standby, primary)
                    self._merged = True
                await self._copy(primary, standby)
                async with self.switching:
                    await self._copy(primary, standby)
                    standby.behind = standby.replaced = primary.replaced = False
        elif primary.good_checks >= 2 and standby.problems == []:
            await self._copy(standby, primary)  # most of it, while callers go on
            async with self.switching:
                await self._copy(standby, primary)
                primary.behind = primary.replaced = self.on_standby = False
                standby.behind = standby.replaced = False
                self.totals["failbacks"] += 1
                self._remember()
        elif (standby.problems or standby.replaced) and primary.problems == []:
            self.on_standby = False  # the better of two evils: what it lacks comes back with the standby
            self._remember()

    async def _copy(self, source: Store, target: Store) -> None:
        """Give ``target`` the records that ``source`` has and it does not. Raises Failed."""
        sums = f"SELECT writer, seq / {_BUCKET}, count(*), sum(seq), sum(crc) FROM records GROUP BY 1, 2"
        there = await source.execute([[sums, []]], _CHECK_S)
        here = {tuple(line) for line in (await target.execute([[sums, []]], _CHECK_S))["rows"]}
        for line in there["rows"]:
            if tuple(line) in here:
                continue
            writer, low = line[0], line[1] * _BUCKET
            some = "SELECT * FROM records WHERE writer = ? AND seq BETWEEN ? AND ? ORDER BY seq"
            rows = (await source.execute([[some, [writer, low, low + _BUCKET - 1]]], _CHECK_S))["rows"]
            done = await target.execute([[INSERT, one] for one in rows], _CHECK_S)
            self.totals["copied"] += done["changes"]

    def _remember(self) -> None:
        partial = self._memory.with_suffix(".partial")
        partial.write_text(json.dumps({"on_standby": self.on_standby}))
        os.replace(partial, self._memory)

    def _remembered(self) -> bool:
        try:
            return bool(json.loads(self._memory.read_text())["on_standby"])
        except (OSError, ValueError, KeyError):
            return False

    # -- HTTP -------------------------------------------------------------------------------------------------------

    async def answer(self, work: Any) -> web.Response:
        """The result of ``work`` as JSON; 503 when the database failed, 400 when the request is not one."""
        self.totals["requests"] += 1
        status = 200
        try:
            content = await work
        except Failed as error:
            status, content = 503, {"error": str(error)}
            self.totals["errors"] += 1
        except (KeyError, TypeError, ValueError) as error:
            status, content = 400, {"error": f"not a request: {error!r}"}
        self._requests.labels(str(status)).inc()
        self.answers.append((time.monotonic(), status < 500))
        return web.json_response(content, status=status)

    async def start_run(self, request: web.Request) -> web.Response:
        """POST /runs."""

        async def work() -> Any:
            given = await request.json()
            one = row(given["writer"], int(given["seq"]), given["run"], "run", given.get("params", {}), time.time())
            return {"run": given["run"], "new": await self.write(given["writer"], [one])}

        return await self.answer(work())

    async def log_metrics(self, request: web.Request) -> web.Response:
        """POST /runs/{run}/metrics."""

        async def work() -> Any:
            given, run = await request.json(), request.match_info["run"]
            one = row(given["writer"], int(given["seq"]), run, "metrics", given["metrics"], time.time())
            return {"run": run, "new": await self.write(given["writer"], [one])}

        return await self.answer(work())

    async def log_many(self, request: web.Request) -> web.Response:
        """POST /records."""

        async def work() -> Any:
            given = await request.json()
            writer = given["writer"]
            rows = [row(writer, int(r["seq"]), r["run"], r["kind"], r["body"], r["at"]) for r in given["records"]]
            return {"new": await self.write(writer, rows)}

        return await self.answer(work())

    async def get_run(self, request: web.Request) -> web.Response:
        """GET /runs/{run}."""

        async def work() -> Any:
            some = "SELECT kind, body FROM records WHERE run = ? ORDER BY writer, seq"
            rows = (await self.execute([[some, [request.match_info["run"]]]]))["rows"]
            return {"run": request.match_info["run"], "records": [{"kind": k, "body": json.loads(b)} for k, b in rows]}

        return await self.answer(work())

    async def count(self, request: web.Request) -> web.Response:
        """GET /count."""

        async def work() -> Any:
            query = request.query
            some = "SELECT count(*) FROM records WHERE writer = ? AND seq > ? AND seq <= ?"
            bounds = [query["writer"], int(query["above"]), int(query["up_to"])]
            return {"count": (await self.execute([[some, bounds]]))["rows"][0][0]}

        return await self.answer(work())

    def facts(self) -> dict[str, Any]:
        """What GET /state tells."""
        since = time.monotonic() - _RATE_OVER_S
        while self.answers and self.answers[0][0] < since:
            self.answers.popleft()
        failed = sum(not ok for _, ok in self.answers)
        intact = None if self.primary.problems is None else not self.primary.problems
        return {
            "on_standby": self.on_standby,
            "database_intact": intact,
            "problems": self.primary.problems,
            "standby_intact": None if self.standby.problems is None else not self.standby.problems,
            "standby_behind": self.standby.behind,
            "error_rate": failed / len(self.answers) if self.answers else None,
            **{f"{name}_total": value for name, value in self.totals.items()},
        }

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        return web.json_response(self.facts())

    def signals(self) -> dict[str, float | None]:
        """What /metrics tells under the names of signals."""
        facts = self.facts()
        return {
            "database_intact": facts["database_intact"],
            "on_standby": facts["on_standby"],
            "tracking_error_rate": facts["error_rate"],
        }


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    async with aiohttp.ClientSession() as session:
        tracking = Tracking(service, session)

        async def begin() -> None:
            while not (service.peers.get("database") and service.peers.get("standby")):
                await asyncio.sleep(0.05)
            background(tracking.watch())
            # Ready when the standby has what the primary has: from then on nothing depends on one file.
            while tracking.standby.behind and not tracking.on_standby and not tracking.primary.problems:
                await asyncio.sleep(0.05)
            service.set_ready()

        async def started() -> None:
            background(begin())

        router = service.app.router
        router.add_post("/runs", tracking.start_run)
        router.add_post("/runs/{run}/metrics", tracking.log_metrics)
        router.add_get("/runs/{run}", tracking.get_run)
        router.add_post("/records", tracking.log_many)
        router.add_get("/count", tracking.count)
        router.add_get("/state", tracking.state)
        await service.serve(started)
