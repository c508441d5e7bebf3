"""The workflow runner: a small DAG (extract → train → evaluate) every half second, its parameters and metrics logged.

``spool``: what a run logs goes to an outbox file first and from there, in order and with idempotency keys, to the tracking
server; a run waits for its own disk only. Without it a run logs as it goes, waits for each answer, and what cannot be logged
is given up. ``breaker``: after three failed calls of five none is tried for a while. ``retries`` (without the spool, which
tries again by itself): a second try.

Lost is what was given up, and what the tracking server once confirmed and cannot find any more: the newest records are
counted every two seconds.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Gauge, Histogram

from .background import background
from .breaker import Breaker
from .lifeline import Lifeline
from .outbox import Outbox
from .service import Service
from .signal_gauges import export

_EVERY_S = 0.5
_CALL_S = 1.5
"""Above what the tracking server needs to find out that its database is silent (three tries of 0.3 s)."""
_BATCH = 100
_RECENT_S = 5.0
_RATE_OVER_S = 3.0
_AUDIT_EVERY_S = 2.0
_AUDIT_LAST = 2000
_BREAKER_VALUES = {"closed": 0, "half_open": 1, "open": 2}
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)

Record = dict[str, Any]


class Workflow:
    """Runs, and what becomes of what they log."""

    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        config = service.config
        self.service = service
        self.session = session
        self.mechanisms: dict[str, bool] = config["mechanisms"]
        self.breaker = Breaker(3, 5, config["breaker_open_s"], self.mechanisms["breaker"])
        self.outbox = Outbox(Path(config["data"]) / "workflow-outbox.jsonl") if self.mechanisms["spool"] else None
        self.writer = self.outbox.writer if self.outbox is not None else uuid.uuid4().hex[:12]
        self.seq = self.logged_up_to = self.outbox.sent if self.outbox is not None else 0
        self.given_up: list[int] = []
        self.missing = 0
        self.totals: dict[str, int] = dict.fromkeys(("runs", "logged", "given_up"), 0)
        self.finished: deque[float] = deque()
        self.waits: deque[tuple[float, float]] = deque()
        """(when, seconds) of calls that were answered well."""
        self.news = asyncio.Event()
        self.first_logged = asyncio.Event()
        self._started = time.monotonic()
        self._rng = random.Random(config["seed"])
        registry = service.registry
        self._seconds = Histogram("workflow_log_seconds", "Time of a call to the tracking server", registry=registry)
        for name, text, read in (
            ("workflow_runs", "Runs that finished", lambda: self.totals["runs"]),
            ("workflow_logged", "Records that the tracking server confirmed", lambda: self.totals["logged"]),
            ("workflow_lost", "Records lost for ever", lambda: self.lost),
            ("workflow_spool", "Records that wait", lambda: len(self.outbox or ())),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        export(registry, self.signals)

    @property
    def lost(self) -> int:
        """Records given up or confirmed and gone."""
        return self.totals["given_up"] + self.missing

    # -- runs -------------------------------------------------------------------------------------------------------

    async def run_for_ever(self) -> None:
        """Task: one run after the other, each half second or as soon as the last one is through."""
        due = time.monotonic()
        while True:
            await self._run()
            self.totals["runs"] += 1
            self.finished.append(time.monotonic())
            due = max(due + _EVERY_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def _run(self) -> None:
        run = uuid.uuid4().hex[:16]
        rate = self._rng.uniform(0.05, 0.5)
        await self._log([_record(run, "run", {"learning_rate": rate, "rows": 200})])
        points = [(x := self._rng.uniform(-1, 1), 3.0 * x + self._rng.gauss(0, 0.1)) for _ in range(200)]
        await self._log_step(run, "extract", {"rows": len(points), "mean": sum(y for _, y in points) / len(points)})
        weight = 0.0
        for _ in range(20):
            weight -= rate * sum((weight * x - y) * x for x, y in points) / len(points)
        await self._log_step(run, "train", {"weight": weight})
        loss = sum((weight * x - y) ** 2 for x, y in points) / len(points)
        await self._log_step(run, "evaluate", {"loss": loss})

    async def _log_step(self, run: str, step: str, metrics: dict[str, float]) -> None:
        ended = _record(run, "metrics", {"step": step, "ended": time.time()})
        await self._log([_record(run, "metrics", {"step": step, **metrics}), ended])

    # -- logging ----------------------------------------------------------------------------------------------------

    async def _log(self, records: list[Record]) -> None:
        if self.outbox is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.outbox.append, records)
            self.news.set()
            return
        for record in records:
            self.seq += 1
            numbered = [{**record, "seq": self.seq}]
            tries = 2 if self.mechanisms["retries"] else 1
            for _ in range(tries):
                if await self._send(numbered):
                    self._confirmed(self.seq, 1)
                    break
            else:
                self.totals["given_up"] += 1
                self.given_up.append(self.seq)

    async def drain(self) -> None:
        """Task: the outbox's oldest records first, as long as there are any."""
        assert self.outbox is not None
        while True:
            self.news.clear()
            while records := self.outbox.head(_BATCH):
                if await self._send(records):
                    self._confirmed(records[-1]["seq"], len(records))
                    self.outbox.done(records[-1]["seq"])
                else:
                    await asyncio.sleep(0.1)
            await self.news.wait()

    def _confirmed(self, seq: int, number: int) -> None:
        self.logged_up_to = seq
        self.totals["logged"] += number
        self.first_logged.set()

    async def _send(self, records: list[Record]) -> bool:
        """One call, if the breaker lets it pass; whether the tracking server has them now."""
        if not self.breaker.allow():
            return False
        began = time.monotonic()
        status, _ = await self._call("POST", "/records", {"writer": self.writer, "records": records})
        took = time.monotonic() - began
        self._seconds.observe(took)
        # 400 would be a fault of ours, and no outage: it must show, not wait in the outbox for ever.
        if status == 400:
            raise RuntimeError("the tracking server calls a record of ours malformed")
        self.breaker.record(status == 200)
        if status == 200:
            self.waits.append((time.monotonic(), took))
        return status == 200

    async def _call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer; status 0: none."""
        url = self.service.peers.get("tracking")
        if not url:
            return 0, None
        try:
            timeout = aiohttp.ClientTimeout(total=_CALL_S)
            async with self.session.request(method, url + path, json=body, timeout=timeout) as response:
                return response.status, await response.json()
        except _UNANSWERED:
            return 0, None

    async def audit(self) -> None:
        """Task: are the newest records that were confirmed still there? No answer changes nothing."""
        while True:
            await asyncio.sleep(_AUDIT_EVERY_S)
            if self.breaker.state != "closed":
                continue
            up_to = self.logged_up_to
            above = max(0, up_to - _AUDIT_LAST)
            gone = sum(above < seq <= up_to for seq in self.given_up)
            path = f"/count?writer={self.writer}&above={above}&up_to={up_to}"
            status, answer = await self._call("GET", path)
            if status == 200:
                self.missing = max(0, up_to - above - gone - answer["count"])

    # -- what is seen of it -----------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What GET /state tells."""
        now = time.monotonic()
        while self.finished and self.finished[0] < now - _RATE_OVER_S:
            self.finished.popleft()
        while self.waits and self.waits[0][0] < now - _RECENT_S:
            self.waits.popleft()
        waits = sorted(seconds for _, seconds in self.waits)
        known = now - self._started >= _RATE_OVER_S
        return {
            "runs_total": self.totals["runs"],
            "logged_total": self.totals["logged"],
            "given_up_total": self.totals["given_up"],
            "missing": self.missing,
            "lost": self.lost,
            "spool_length": len(self.outbox or ()),
            "breaker": self.breaker.state,
            "breaker_value": _BREAKER_VALUES[self.breaker.state],
            "rate": len(self.finished) / _RATE_OVER_S if known else None,
            "log_p95_s": waits[min(len(waits) - 1, int(0.95 * len(waits)))] if waits else None,
        }

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        return web.json_response(self.facts())

    def signals(self) -> dict[str, float | None]:
        """What /metrics tells under the names of signals."""
        facts = self.facts()
        return {
            "workflow_rate": facts["rate"],
            "spool_length": facts["spool_length"],
            "lost_metrics": facts["lost"],
            "tracking_breaker": facts["breaker_value"],
            "tracking_latency": facts["log_p95_s"],
        }


def _record(run: str, kind: str, body: dict[str, Any]) -> Record:
    return {"run": run, "kind": kind, "body": body, "at": time.time()}


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    async with aiohttp.ClientSession() as session:
        workflow = Workflow(service, session)

        async def begin() -> None:
            while not service.peers.get("tracking"):
                await asyncio.sleep(0.05)
            for task in (
                workflow.run_for_ever,
                workflow.audit,
                *([workflow.drain] if workflow.outbox is not None else []),
            ):
                background(task())
            # Ready without the tracking server, too: its outage is what it was made for.
            try:
                await asyncio.wait_for(workflow.first_logged.wait(), 5.0)
            except asyncio.TimeoutError:
                pass
            service.set_ready()

        async def started() -> None:
            background(begin())

        service.app.router.add_get("/state", workflow.state)
        await service.serve(started)
