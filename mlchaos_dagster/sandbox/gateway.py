"""The gateway: what users of the platform call, and where most of its resilience lives.

POST /predict {"entity_id": 7} (or GET /predict?entity_id=7) fetches features through the proxy, then asks a replica.
The answer says in ``X-Answered-By`` which path gave it: ``model`` (live features), ``cache`` (features seen before) or
``error`` (503, 504), and in ``X-Replica`` which replica. GET /state says how the mechanisms stand.

Ejection of a single replica (5 failed tries of its last 10 → no traffic for ``breaker_open_s``) is part of the
``breaker`` mechanism. With every ready replica ejected, the last answer for the same entity is given (mechanism
``degraded``, path ``cache``); where there is none, all of them are tried: guessing beats certain failure.

Features are checked before they reach the model (``feature_validation``, see :mod:`.feature_checks`). A row that is refused
is answered from the cache, as if the store had not answered; no refused row ever enters the cache. Where features are
refreshed, a cached row counts for ``feature_cache_limit_s`` from its last refresh; then the answer is 503 with the reason.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web
from prometheus_client import Counter, Gauge, Histogram

from .background import background
from .breaker import Breaker
from .discovery import follow
from .feature_checks import REASONS, Checks, Schema, Vector, imputed
from .lifeline import Lifeline
from .service import Service

_CACHE_ROWS = 2000
_ANSWER_LASTS_S = 300.0
"""A prediction that is older says nothing about now."""
_JITTER_S = (0.005, 0.025)
_PRIME_FOR_S = 2.0
_LOOK_EVERY_S = 10.0
"""Between two looks at all rows on a platform that refreshes them."""
_LOOK_AGAIN_S = 1.0
"""The same while they are shifted: rows that were never validated are refused until they are not."""
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
        self.isolated = False
        self.pending = 0
        self.breaker = breaker


class Known(NamedTuple):
    """Features that may answer in place of live ones."""

    vector: list[float]
    fresh_at: float
    """When ingestion had refreshed them; where nothing is refreshed, when they were read. Monotonic seconds."""


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
        self.cache: OrderedDict[int, Known] = OrderedDict()
        self.checks = Checks(stale_s=config["feature_stale_s"])
        self.cache_limit_s: float = config["feature_cache_limit_s"]
        self._refreshed = False
        self.refused: dict[str, int] = dict.fromkeys(REASONS, 0)
        self.answers: OrderedDict[int, tuple[float, dict[str, Any], str]] = OrderedDict()
        """Entity → (when, answer, replica) of the last answer with live features."""
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
            ("gateway_in_rotation", "Replicas in rotation that are not ejected", lambda: len(self._serving())),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        refused = Gauge("gateway_features_refused", "Rows that did not pass validation", ["reason"], registry=registry)
        for reason in REASONS:
            refused.labels(reason).set_function(lambda reason=reason: self.refused[reason])

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
                vector, age_s = await self._fetch(entity)
            except _FAILURES as error:
                self.breaker.record(False)
                reason = f"the feature store failed: {type(error).__name__}"
                if trial:
                    break
                continue
            self.breaker.record(True)
            if not (wrong := self._take(entity, vector, age_s)):
                return imputed(vector), "model"
            self.refused[wrong] += 1
            reason = f"the features of {entity} did not pass validation: {wrong}"
            break
        if self.mechanisms["fallback"] and entity in self.cache:
            if (known := self._known(entity)) is not None:
                self.totals["fallback"] += 1
                return known, "cache"
            reason += f", and those seen before are older than {self.cache_limit_s:g} s"
        raise Unanswered(503, reason)

    def _take(self, entity: int, vector: Vector, age_s: float | None) -> str:
        """Check a row and remember it; else why not."""
        self._refreshed = age_s is not None
        if self.mechanisms["feature_validation"]:
            if wrong := self.checks.refuse(vector, age_s, self._known(entity)):
                return wrong
        self._remember(entity, imputed(vector), age_s or 0.0)
        return ""

    def _known(self, entity: int) -> list[float] | None:
        """Features that were seen before, if they are young enough to count."""
        known = self.cache.get(entity)
        if known is None:
            return None
        limited = self._refreshed and self.mechanisms["feature_validation"]
        return None if limited and time.monotonic() - known.fresh_at > self.cache_limit_s else known.vector

    async def _fetch(self, entity: int) -> tuple[Vector, float | None]:
        url = f"{self.store_url}/features/{entity}"
        async with self.session.get(url, timeout=self.feature_timeout) as response:
            if response.status == 404:
                self.breaker.record(True)
                raise Unanswered(404, f"no entity {entity}")
            response.raise_for_status()
            row = await response.json()
            return row["features"], row["age_s"]

    def _remember(self, entity: int, vector: list[float], age_s: float) -> None:
        self.cache[entity] = Known(vector, time.monotonic() - age_s)
        self.cache.move_to_end(entity)
        if len(self.cache) > _CACHE_ROWS:
            self.cache.popitem(last=False)

    async def prime(self) -> None:
        """Fill the cache once; try until it works, but do not hold readiness up for more than two seconds.

        Where rows are refreshed, all of them are looked at again and again: so that also those that nobody asks for have a
        young copy, and a shift of the whole is seen.
        """
        while self.mechanisms["fallback"] or self.mechanisms["feature_validation"]:
            try:
                await self._look()
                break
            except (*_FAILURES, ValueError):
                if time.monotonic() - self._started > _PRIME_FOR_S:
                    self.service.set_ready(True, "cache not primed yet")
                await asyncio.sleep(0.05)
        self.service.set_ready()
        while self.mechanisms["feature_validation"]:
            await asyncio.sleep(_LOOK_AGAIN_S if self.checks.shifted else _LOOK_EVERY_S)
            if self._refreshed or self.checks.shifted:
                try:
                    await self._look()
                except (*_FAILURES, ValueError):
                    continue

    async def _look(self) -> None:
        """Read all rows (of many, the first) and keep what passes."""
        url = f"{self.store_url}/features?limit={_CACHE_ROWS}"
        async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=1.0)) as response:
            response.raise_for_status()
            answer = await response.json()
        schema = Schema(**answer["schema"])
        self.checks = replace(self.checks, schema=schema, shifted=schema.shifted(answer["features"].values()))
        for entity, vector in answer["features"].items():
            # What people ask for is not pushed out by what they might ask for.
            if int(entity) in self.cache or len(self.cache) < _CACHE_ROWS:
                self._take(int(entity), vector, answer["ages_s"][entity])

    # -- replicas ---------------------------------------------------------------------------------------------------

    def _in_rotation(self) -> list[Replica]:
        every = [r for r in self.replicas.values() if not r.isolated]
        return [r for r in every if r.ready or not self.mechanisms["readiness"]]

    def _serving(self) -> list[Replica]:
        return [r for r in self._in_rotation() if r.breaker.state == "closed"]

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
            return answer, str(answer.get("replica") or replica.name)
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
        known = self._last_answer(entity)
        if known is not None and self._all_ejected(resting=True):
            return known  # nobody to ask: trying would only make the caller wait
        vector, path = await self.features(entity)
        try:
            answer, replica = await self.score(vector)
        except Unanswered:
            if known is None or not self._all_ejected():
                raise
            return known
        if path == "model":
            self.answers[entity] = (time.monotonic(), {"entity_id": entity, **answer}, replica)
            self.answers.move_to_end(entity)
            if len(self.answers) > _CACHE_ROWS:
                self.answers.popitem(last=False)
        return {"entity_id": entity, **answer}, path, replica

    def _last_answer(self, entity: int) -> tuple[dict[str, Any], str, str] | None:
        """What the model last said of an entity, if that is allowed and not too long ago."""
        at, answer, replica = self.answers.get(entity, (0.0, {}, ""))
        fresh = answer and time.monotonic() - at <= _ANSWER_LASTS_S
        return (answer, "cache", replica) if fresh and self.mechanisms["degraded"] else None

    def _all_ejected(self, resting: bool = False) -> bool:
        """Whether no replica in rotation is healthy; ``resting``: and none of them is due for a trial, either."""
        rotation = self._in_rotation()
        return not any(r.breaker.would_allow() if resting else r.breaker.state == "closed" for r in rotation)

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
                "isolated": [r.name for r in self.replicas.values() if r.isolated],
                "fallback_total": self.totals["fallback"],
                "requests_total": self.totals["requests"],
                "errors_total": self.totals["errors"],
                "retries_total": self.totals["retries"],
                "cached_entities": len(self.cache),
                "features_refused": self.refused,
                "mechanisms": self.mechanisms,
                "uptime_s": round(time.monotonic() - self._started, 3),
            }
        )

    async def endpoints(self, request: web.Request) -> web.Response:
        """Take the supervisor's word on where upstreams are, and which replicas are ready or isolated."""
        wanted = await request.json()
        self.use_replicas(wanted["replicas"])
        self.use_store(wanted["feature_store"])
        return web.json_response({"ok": True})

    def use_replicas(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """All replicas there are from now on: name → ``url``, ``ready``, ``isolated``."""
        for name in set(self.replicas) - set(wanted):
            self._ejected_before += self.replicas.pop(name).breaker.opened_total
        for name, known in wanted.items():
            replica = self.replicas.setdefault(name, Replica(name, self._new_breaker()))
            replica.url, replica.ready, replica.isolated = known["url"], known["ready"], known["isolated"]

    def use_store(self, url: str) -> None:
        """Where the feature store is from now on; the first time its rows are read into the cache."""
        first, self.store_url = not self.store_url, url
        if first and url:
            self._started = time.monotonic()
            self._priming = asyncio.get_running_loop().create_task(self.prime())


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    gateway = Gateway(service)
    service.app.router.add_post("/predict", gateway.predict)
    service.app.router.add_get("/predict", gateway.predict)
    service.app.router.add_get("/state", gateway.state)
    service.app.router.add_put("/endpoints", service.guarded(gateway.endpoints))
    gateway.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def started() -> None:
        if service.peers:
            background(follow(service.peers["inference"], gateway.use_replicas))
            gateway.use_store(service.peers["feature_store"])

    async with gateway.session:
        await service.serve(started)
