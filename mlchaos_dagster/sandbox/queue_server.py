"""The queue of batch scoring: jobs accepted durably, handed to workers on a lease, answered for.

POST /jobs {key, source, payload} → 202, 200 (that key is known), 429 (full). POST /lease {worker, done: [{id, result}]}
→ the next job {id, key, payload} or 204 after a while; ``done`` acknowledges. A job whose worker says nothing for
``_LEASE_S`` goes back to the head of the queue. GET /jobs/{key}, GET /results?after=, GET /state.

``backpressure``: with ``_FULL`` jobs under way a further one is refused, so that those accepted are done in time. Without
it everything is taken, and what waited longer than ``_TTL_S`` is dropped: its caller wants it no more. Dropped is lost.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import Counter, Gauge

from .background import background
from .job_store import Job, JobStore
from .lifeline import Lifeline
from .service import Service
from .signal_gauges import export

_FULL = 60
_TTL_S = 5.0
"""Above what a full queue needs: 60 jobs by two workers at about 30 a second each are done in a second."""
_LEASE_S = 2.0
_HOLD_S = 1.0
"""How long a worker's request waits for a job."""
_SWEEP_S = 0.2
_RATE_OVER_S = 2.0
BASE = "base"
"""Source of the usual load."""


class Queue:
    """Waiting and leased jobs in memory; the store knows them, too."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.backpressure: bool = service.config["mechanisms"]["backpressure"]
        self.store = JobStore(Path(service.config["data"]) / "queue.sqlite")
        self.waiting: deque[Job] = deque(self.store.waiting())
        self.leased: dict[int, tuple[Job, float]] = {}
        """Job id → (job, when its lease ends)."""
        self.entering = 0
        self.epoch = uuid.uuid4().hex[:12]
        self.events: deque[dict[str, Any]] = deque(maxlen=5000)
        """Jobs of the usual load that are over; numbered from 1 within this epoch."""
        self.numbered = 0
        self.arrivals: deque[tuple[float, bool, bool]] = deque()
        """(when, of the usual load, refused)."""
        self.totals: dict[str, int] = dict.fromkeys(("accepted", "finished", "dropped", "rejected", "returned"), 0)
        self.there_is_work = asyncio.Event()
        registry = service.registry
        self._jobs = Counter("queue_jobs", "Jobs by what became of them", ["result"], registry=registry)
        Gauge("queue_backlog", "Jobs accepted and not over", registry=registry).set_function(lambda: self.backlog)
        export(registry, self.signals)

    @property
    def backlog(self) -> int:
        """Jobs accepted, or about to be, and not over."""
        return len(self.waiting) + len(self.leased) + self.entering

    def count(self, what: str) -> None:
        """Count one job."""
        self.totals[what] += 1
        self._jobs.labels(what).inc()

    # -- in ---------------------------------------------------------------------------------------------------------

    async def submit(self, request: web.Request) -> web.Response:
        """POST /jobs."""
        try:
            given = await request.json()
            key, source, payload = str(given["key"]), str(given["source"]), given["payload"]
        except (ValueError, KeyError, TypeError) as error:
            return web.json_response({"error": f"not a job: {error!r}"}, status=400)
        refused = self.backpressure and self.backlog >= _FULL
        self.arrivals.append((time.monotonic(), source == BASE, refused))
        if refused:
            self.count("rejected")
            return web.json_response({"error": "the queue is full"}, status=429, headers={"Retry-After": "1"})
        self.entering += 1
        try:
            job, new = await self.store.accept(key, source, payload)
        finally:
            self.entering -= 1
        if new:
            self.count("accepted")
            self.waiting.append(Job(job, key, source, payload, time.monotonic()))
            self.there_is_work.set()
        return web.json_response({"id": job}, status=202 if new else 200)

    # -- out --------------------------------------------------------------------------------------------------------

    async def lease(self, request: web.Request) -> web.Response:
        """POST /lease."""
        for done in (await request.json()).get("done", []):
            await self._over(int(done["id"]), "done", done["result"])
        end = time.monotonic() + _HOLD_S
        while True:
            if job := await self._next():
                return web.json_response({"id": job.id, "key": job.key, "payload": job.payload})
            self.there_is_work.clear()
            try:
                await asyncio.wait_for(self.there_is_work.wait(), end - time.monotonic())
            except asyncio.TimeoutError:
                return web.Response(status=204)

    async def _next(self) -> Job | None:
        while self.waiting:
            job = self.waiting.popleft()
            if time.monotonic() - job.since <= _TTL_S:
                self.leased[job.id] = (job, time.monotonic() + _LEASE_S)
                return job
            self.leased[job.id] = (job, float("inf"))
            await self._over(job.id, "dropped")
        return None

    async def _over(self, number: int, state: str, result: Any = None) -> None:
        """A job that was handed out is over. Of two workers that did it, the first counts."""
        held = self.leased.pop(number, None)
        job = held[0] if held else next((job for job in self.waiting if job.id == number), None)
        if job is not None and held is None:
            self.waiting.remove(job)
        if await self.store.finish(number, state, result) and job is not None:
            self.count("finished" if state == "done" else "dropped")
            if job.source == BASE:
                self.numbered += 1
                self.events.append({"number": self.numbered, "key": job.key, "state": state, "at": time.monotonic()})

    async def sweep(self) -> None:
        """Task: leases that ended, and jobs that waited too long."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for number, (job, ends) in list(self.leased.items()):
                if ends < now:
                    del self.leased[number]
                    self.waiting.appendleft(job)
                    self.count("returned")
                    self.there_is_work.set()
            while self.waiting and now - self.waiting[0].since > _TTL_S:
                job = self.waiting.popleft()
                self.leased[job.id] = (job, float("inf"))
                await self._over(job.id, "dropped")

    # -- what is seen of it -----------------------------------------------------------------------------------------

    async def look(self, request: web.Request) -> web.Response:
        """GET /jobs/{key}."""
        state = await self.store.look(request.match_info["key"])
        return web.json_response({"state": state}, status=200 if state else 404)

    async def results(self, request: web.Request) -> web.Response:
        """GET /results: what is over of the usual load, after a number; a new epoch begins at 1 again."""
        after = int(request.query.get("after", "0"))
        now = time.monotonic()
        events = [{**event, "age_s": now - event["at"]} for event in self.events if event["number"] > after]
        return web.json_response({"epoch": self.epoch, "events": events})

    def facts(self) -> dict[str, Any]:
        """What GET /state tells."""
        since = time.monotonic() - _RATE_OVER_S
        while self.arrivals and self.arrivals[0][0] < since:
            self.arrivals.popleft()
        return {
            "backlog": self.backlog,
            "rejected_rate": sum(refused for _, _, refused in self.arrivals) / _RATE_OVER_S,
            "others_rate": sum(not base for _, base, _ in self.arrivals) / _RATE_OVER_S,
            **{f"{name}_total": value for name, value in self.totals.items()},
        }

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        return web.json_response(self.facts())

    def signals(self) -> dict[str, float | None]:
        """What /metrics tells under the names of signals; jobs lost are these and what the client misses."""
        facts = self.facts()
        return {
            "backlog": facts["backlog"],
            "jobs_rejected_rate": facts["rejected_rate"],
            "jobs_dropped": facts["dropped_total"],
        }


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    queue = Queue(service)

    async def started() -> None:
        background(queue.store.commit_for_ever())
        background(queue.sweep())
        service.set_ready()

    router = service.app.router
    router.add_post("/jobs", queue.submit)
    router.add_post("/lease", service.guarded(queue.lease))
    router.add_get("/jobs/{key}", queue.look)
    router.add_get("/results", queue.results)
    router.add_get("/state", queue.state)
    await service.serve(started)
