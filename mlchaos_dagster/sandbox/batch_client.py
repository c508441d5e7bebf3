"""The usual load of batch scoring: ten jobs a second, each followed until it is over.

A job that is refused is submitted again under its key until it is accepted, or nobody wants it any more. Lost is a job that
was accepted and that the queue then does not know; what the queue dropped, the queue counts.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Counter

from .background import background
from .lifeline import Lifeline
from .queue_server import BASE
from .service import Service
from .signal_gauges import export

_EVERY_S = 0.1
_AGAIN_S = (0.1, 0.3)
_GIVE_UP_S = 10.0
_RESULTS_S = 0.4
_ASK_AFTER_S = _GIVE_UP_S + 1.0
"""A job that is silent this long is asked for by its key: nobody tries to submit it any more."""
_RECENT_S = 5.0
_CALL_S = 1.0
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class Client:
    """Jobs under way and what became of the others."""

    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.session = session
        self.pending: dict[str, float] = {}
        """Key of an accepted job → when it was first submitted."""
        self.waits: deque[tuple[float, float]] = deque()
        """(when it was over, seconds since it was first submitted)."""
        self.totals: dict[str, int] = dict.fromkeys(
            ("submitted", "accepted", "finished", "dropped", "lost", "never_accepted"), 0
        )
        self._prefix = uuid.uuid4().hex[:8]
        self._rng = random.Random(service.config["seed"])
        self._jobs = Counter("batch_client_jobs", "Jobs by what became of them", ["result"], registry=service.registry)
        export(service.registry, self.signals)

    def count(self, what: str) -> None:
        """Count one job."""
        self.totals[what] += 1
        self._jobs.labels(what).inc()

    async def _call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer; status 0: none."""
        try:
            url = self.service.peers.get("queue") or ""
            timeout = aiohttp.ClientTimeout(total=_CALL_S)
            async with self.session.request(method, url + path, json=body, timeout=timeout) as response:
                return response.status, await response.json()
        except _UNANSWERED:
            return 0, None

    async def submit_for_ever(self) -> None:
        """Task: a job each tenth of a second, on schedule."""
        due, number = time.monotonic(), 0
        tasks: set[asyncio.Task[None]] = set()
        while True:
            number += 1
            task = asyncio.create_task(self._submit(f"{self._prefix}-{number}"))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due = max(due + _EVERY_S, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _submit(self, key: str) -> None:
        began = time.monotonic()
        self.count("submitted")
        job = {"key": key, "source": BASE, "payload": {"features": [self._rng.gauss(0, 1) for _ in range(8)]}}
        self.pending[key] = began  # it may be over before we hear that it was accepted
        while time.monotonic() < began + _GIVE_UP_S:
            status, _ = await self._call("POST", "/jobs", job)
            if status in (200, 202):
                self.count("accepted")
                return
            await asyncio.sleep(self._rng.uniform(*_AGAIN_S))
        if self.pending.pop(key, None) is not None:
            self.count("never_accepted")

    async def follow(self) -> None:
        """Task: what is over, and what is silent for too long."""
        epoch, after = "", 0
        while True:
            await asyncio.sleep(_RESULTS_S)
            status, answer = await self._call("GET", f"/results?after={after}")
            if status == 200:
                if answer["epoch"] != epoch:
                    epoch, after = answer["epoch"], 0
                for event in answer["events"]:
                    after = max(after, event["number"])
                    self._over(event["key"], event["state"], time.monotonic() - event["age_s"])
            silent = [key for key, began in self.pending.items() if time.monotonic() - began > _ASK_AFTER_S]
            for key in silent[:20]:
                await self._ask(key)

    async def _ask(self, key: str) -> None:
        status, answer = await self._call("GET", f"/jobs/{key}")
        if status == 404:
            self._over(key, "lost", time.monotonic())
        elif status == 200 and answer["state"] != "waiting":
            self._over(key, answer["state"], time.monotonic())

    def _over(self, key: str, state: str, at: float) -> None:
        began = self.pending.pop(key, None)
        if began is None:
            return
        self.count({"done": "finished", "dropped": "dropped"}.get(state, "lost"))
        if state == "done":
            self.waits.append((at, at - began))

    def facts(self) -> dict[str, Any]:
        """What GET /state tells."""
        now = time.monotonic()
        while self.waits and self.waits[0][0] < now - _RECENT_S:
            self.waits.popleft()
        waits = sorted(seconds for _, seconds in self.waits)
        p95 = waits[min(len(waits) - 1, int(0.95 * len(waits)))] if waits else None
        return {"pending": len(self.pending), "wait_p95_s": p95, **self.totals}

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        return web.json_response(self.facts())

    def signals(self) -> dict[str, float | None]:
        """What /metrics tells under the names of signals."""
        return {"job_wait": self.facts()["wait_p95_s"], "jobs_lost": self.totals["lost"] + self.totals["dropped"]}


async def main(lifeline: Lifeline) -> None:
    """Submit until told to stop."""
    service = Service(lifeline)
    async with aiohttp.ClientSession() as session:
        client = Client(service, session)

        async def begin() -> None:
            while not service.peers.get("queue"):
                await asyncio.sleep(0.05)
            background(client.submit_for_ever())
            background(client.follow())
            while not client.waits:
                await asyncio.sleep(0.05)
            service.set_ready()

        async def started() -> None:
            background(begin())

        service.app.router.add_get("/state", client.state)
        await service.serve(started)
