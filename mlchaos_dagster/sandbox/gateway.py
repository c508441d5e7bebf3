"""The gateway: what users of the platform call, and where most of its resilience lives.

POST /predict {"entity_id": 7} (or GET /predict?entity_id=7) fetches features through the proxy, then asks a replica.
The answer says in ``X-Answered-By`` which path gave it: ``model`` (live features), ``cache`` (features seen before) or
``error`` (503, 504), and in ``X-Replica`` which replica. GET /state says how the mechanisms stand.

Ejection of a single replica (5 failed tries of its last 10 → no traffic for ``breaker_open_s``) is part of the
``breaker`` mechanism. With every ready replica ejected, all of them are tried: guessing beats certain failure.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Counter, Gauge, Histogram

from .breaker import Breaker
from .lifeline import Lifeline
from .service import Service

_CACHE_ROWS = 2000
_JITTER_S = (0.005, 0.025)
_PRIME_FOR_S = 2.0
_BREAKER_VALUES = {"closed": 0, "half_open": 1, "open": 2}
_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5)

_FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


class Unanswered(Exception):
    """No answer to give; ``status`` is the HTTP status for the caller."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Replica:
    """What the gateway knows of one inference replica."""

    def __init__(self, name: str, breaker: Breaker) -> None:
        self.name = name
        self.url = ""
        self.ready = False
        self.pending = 0
        self.breaker = breaker


class Gateway:
    """Mechanisms and state behind the HTTP face."""

    def __init__(self, service: Service) -> None:
        self.service = service
        config = service.config
        self.mechanisms: dict[str, bool] = config["mechanisms"]
        self.deadline_s: float = config["deadline_s"]
        self.feature_timeout = aiohttp.ClientTimeout(total=config["feature_timeout_s"])
        self.replica_timeout = aiohttp.ClientTimeout(total=config["replica_timeout_s"])
        self.store_url = ""
        self.replicas: dict[str, Replica] = {}
        self.breaker = self._new_breaker()
        self.cache: OrderedDict[int, list[float]] = OrderedDict()
        self._turn = 0
        self._rng = random.Random()
        self._started = time.monotonic()
        self._ejected_before = 0
        self.totals = dict.fromkeys(("requests", "errors", "fallback", "retries"), 0)
        self.session: aiohttp.ClientSession
        registry = service.registry
        self._requests = Counter("gateway_requests", "Requests", ["code", "answered_by"], registry=registry)
        self._seconds = Histogram("gateway_request_seconds", "Time to answer", registry=registry, buckets=_BUCKETS)
        for name, text, read in (
            ("gateway_fallback", "Answers from cached features", lambda: self.totals["fallback"]),
            ("gateway_retries", "Second and later tries at an upstream", lambda: self.totals["retries"]),
            ("gateway_breaker_opened", "Times the feature-store breaker opened", lambda: self.breaker.opened_total),
            ("gateway_breaker_state", "0 closed, 1 half open, 2 open", lambda: _BREAKER_VALUES[self.breaker.state]),
            ("gateway_ready_replicas", "Replicas in rotation", lambda: len(self._in_rotation())),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    # -- features ---------------------------------------------------------------------------------------------------

    async def features(self, entity: int) -> tuple[list[float], str]:
        """Features and where they came from (``model`` = live, ``cache``)."""
        reason = "the breaker of the feature store is open"
        tries = 2 if self.mechanisms["retries"] else 1
        for attempt in range(tries):
            trial = self.breaker.state != "closed"
            if not self.breaker.allow():
                break
            if attempt:
                self.totals["retries"] += 1
                await self._jitter()
            try:
                vector = await self._fetch(entity)
            except _FAILURES as error:
                self.breaker.record(False)
                reason = f"the feature store failed: {type(error).__name__}"
                if trial:
                    break
                continue
            self.breaker.record(True)
            self._remember(entity, vector)
            return vector, "model"
        if self.mechanisms["fallback"] and (known := self.cache.get(entity)) is not None:
            self.totals["fallback"] += 1
            return known, "cache"
        raise Unanswered(503, reason)

    async def _fetch(self, entity: int) -> list[float]:
        url = f"{self.store_url}/features/{entity}"
        async with self.session.get(url, timeout=self.feature_timeout) as response:
            if response.status == 404:
                self.breaker.record(True)
                raise Unanswered(404, f"no entity {entity}")
            response.raise_for_status()
            return (await response.json())["features"]

    def _remember(self, entity: int, vector: list[float]) -> None:
        self.cache[entity] = vector
        self.cache.move_to_end(entity)
        if len(self.cache) > _CACHE_ROWS:
            self.cache.popitem(last=False)

    async def prime(self) -> None:
        """Fill the cache once; try until it works, but do not hold readiness up for more than two seconds."""
        while self.mechanisms["fallback"]:
            try:
                url = f"{self.store_url}/features?limit={_CACHE_ROWS}"
                async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=1.0)) as response:
                    response.raise_for_status()
                    for entity, vector in (await response.json())["features"].items():
                        self.cache.setdefault(int(entity), vector)
                break
            except (*_FAILURES, ValueError):
                if time.monotonic() - self._started > _PRIME_FOR_S:
                    self.service.set_ready(True, "cache not primed yet")
                await asyncio.sleep(0.05)
        self.service.set_ready()

    # -- replicas ---------------------------------------------------------------------------------------------------

    def _in_rotation(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.ready or not self.mechanisms["readiness"]]

    def _choose(self, tried: set[str]) -> Replica | None:
        candidates = [r for r in self._in_rotation() if r.name not in tried]
        healthy = [r for r in candidates if r.breaker.would_allow()]
        pool = healthy or candidates
        if not pool:
            return None
        self._turn += 1
        fewest = min(r.pending for r in pool)
        least = [r for r in pool if r.pending == fewest]
        chosen = least[self._turn % len(least)]
        chosen.breaker.allow()  # takes the trial when this replica is due for one
        return chosen

    async def score(self, vector: list[float]) -> tuple[dict[str, Any], str]:
        """Ask replicas until one answers: at most 3 tries, each on a replica not tried before while there is one."""
        tried: set[str] = set()
        reason = "no replica is ready"
        for attempt in range(3 if self.mechanisms["retries"] else 1):
            replica = self._choose(tried) or self._choose(set())
            if replica is None:
                break
            if attempt:
                self.totals["retries"] += 1
                await self._jitter()
            tried.add(replica.name)
            replica.pending += 1
            try:
                url = f"{replica.url}/predict"
                async with self.session.post(url, json={"features": vector}, timeout=self.replica_timeout) as response:
                    response.raise_for_status()
                    answer = await response.json()
            except _FAILURES as error:
                replica.breaker.record(False)
                reason = f"{replica.name} failed: {type(error).__name__}"
                continue
            finally:
                replica.pending -= 1
            replica.breaker.record(True)
            return answer, replica.name
        raise Unanswered(503, reason)

    async def _jitter(self) -> None:
        await asyncio.sleep(self._rng.uniform(*_JITTER_S))

    def _new_breaker(self) -> Breaker:
        enabled = self.mechanisms["breaker"]
        return Breaker(open_s=self.service.config["breaker_open_s"], enabled=enabled)

    # -- HTTP -------------------------------------------------------------------------------------------------------

    async def predict(self, request: web.Request) -> web.Response:
        """Answer within the deadline, whatever happens behind."""
        began = time.perf_counter()
        try:
            text = request.query["entity_id"] if request.method == "GET" else (await request.json())["entity_id"]
            entity = int(text)
            if not 0 <= entity < 2**62:
                raise ValueError("out of range")
        except (ValueError, KeyError, TypeError) as error:
            return web.json_response({"error": f"entity_id: {error}"}, status=400, headers={"X-Answered-By": "error"})
        headers = {"X-Answered-By": "error"}
        try:
            body, path, replica = await asyncio.wait_for(self._answer(entity), self.deadline_s)
            status, headers = 200, {"X-Answered-By": path, "X-Replica": replica}
        except asyncio.TimeoutError:
            status, body = 504, {"error": f"no answer within {self.deadline_s} s"}
        except Unanswered as error:
            status, body = error.status, {"error": str(error)}
        self.totals["requests"] += 1
        self.totals["errors"] += status >= 500
        self._requests.labels(str(status), headers["X-Answered-By"]).inc()
        self._seconds.observe(time.perf_counter() - began)
        return web.json_response(body, status=status, headers=headers)

    async def _answer(self, entity: int) -> tuple[dict[str, Any], str, str]:
        vector, path = await self.features(entity)
        answer, replica = await self.score(vector)
        return {"entity_id": entity, **answer}, path, replica

    async def state(self, request: web.Request) -> web.Response:
        """How the mechanisms stand, for signals and people."""
        rotation = self._in_rotation()
        ejections = self._ejected_before + sum(r.breaker.opened_total for r in self.replicas.values())
        return web.json_response(
            {
                "breaker": self.breaker.state,
                "breaker_open_total": self.breaker.opened_total,
                "ready_replicas": sum(r.ready for r in self.replicas.values()),
                "in_rotation": len(rotation),
                "ejected_replicas": [r.name for r in rotation if r.breaker.state != "closed"],
                "ejections_total": ejections,
                "fallback_total": self.totals["fallback"],
                "requests_total": self.totals["requests"],
                "errors_total": self.totals["errors"],
                "retries_total": self.totals["retries"],
                "cached_entities": len(self.cache),
                "mechanisms": self.mechanisms,
                "uptime_s": round(time.monotonic() - self._started, 3),
            }
        )

    async def endpoints(self, request: web.Request) -> web.Response:
        """Take the supervisor's word on where upstreams are and which replicas are ready."""
        wanted = await request.json()
        first, self.store_url = not self.store_url, wanted["feature_store"]
        for name in set(self.replicas) - set(wanted["replicas"]):
            self._ejected_before += self.replicas.pop(name).breaker.opened_total
        for name, known in wanted["replicas"].items():
            replica = self.replicas.setdefault(name, Replica(name, self._new_breaker()))
            replica.url, replica.ready = known["url"], known["ready"]
        if first and self.store_url:
            self._started = time.monotonic()
            self._priming = asyncio.get_running_loop().create_task(self.prime())
        return web.json_response({"ok": True})


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    gateway = Gateway(service)
    service.app.router.add_post("/predict", gateway.predict)
    service.app.router.add_get("/predict", gateway.predict)
    service.app.router.add_get("/state", gateway.state)
    service.app.router.add_put("/endpoints", service.guarded(gateway.endpoints))
    gateway.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    async with gateway.session:
        await service.serve()
