"""A worker of batch scoring: takes a job on a lease, scores it, acknowledges it with its next request."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Counter

from .background import background
from .lifeline import Lifeline
from .service import TOKEN_HEADER, Service

_EACH_S = 0.03
"""A worker's share of the machine: one job in this time, however fast it scores."""
_SAMPLES = 50
_ANSWER_S = 3.0
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


def score(features: list[float], seed: int) -> dict[str, float]:
    """Mean and spread of a logistic model whose weights are uncertain: ``_SAMPLES`` draws, the same for the same seed."""
    rng = random.Random(seed)
    draws = [1 / (1 + math.exp(-sum(value * rng.gauss(0.5, 0.1) for value in features[:8]))) for _ in range(_SAMPLES)]
    mean = sum(draws) / len(draws)
    return {"score": mean, "spread": math.sqrt(sum((draw - mean) ** 2 for draw in draws) / len(draws))}


async def main(lifeline: Lifeline) -> None:
    """Work until told to stop."""
    service = Service(lifeline)
    seed, name = service.config["seed"], service.config["name"]
    headers = {TOKEN_HEADER: str(service.config["token"])}
    jobs = Counter("worker_jobs_total", "Jobs scored", registry=service.registry)
    totals = {"jobs": 0}

    async def work() -> None:
        done: list[dict[str, Any]] = []
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
            while True:
                url = service.peers.get("queue")
                if not url:
                    await asyncio.sleep(0.05)
                    continue
                service.set_ready()
                try:
                    asked = {"worker": name, "done": done}
                    async with session.post(url + "/lease", json=asked) as response:
                        status = response.status
                        job = await response.json() if status == 200 else {}
                except _UNANSWERED:
                    # What was done is told again: the queue counts it once.
                    await asyncio.sleep(0.1)
                    continue
                if status not in (200, 204):
                    await asyncio.sleep(0.1)
                    continue
                done = []
                if status == 200:
                    began = time.monotonic()
                    done = [{"id": job["id"], "result": score(job["payload"]["features"], seed)}]
                    totals["jobs"] += 1
                    jobs.inc()
                    await asyncio.sleep(max(0.0, began + _EACH_S - time.monotonic()))

    async def state(request: web.Request) -> web.Response:
        return web.json_response(totals)

    async def started() -> None:
        background(work())

    service.app.router.add_get("/state", state)
    await service.serve(started)
