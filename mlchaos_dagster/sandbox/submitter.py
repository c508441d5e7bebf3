"""Load above capacity: jobs submitted open loop, each at its time whatever became of the others, until a deadline."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from .lifeline import Lifeline

_CALL_S = 2.0
_MOST_OPEN = 2000
"""Requests at once; a queue that answers none of them gets no more than that."""


async def main(lifeline: Lifeline) -> None:
    """Submit at ``rate_per_s`` until ``deadline`` (monotonic seconds), and end."""
    config = lifeline.config
    url, source, rate, deadline = config["url"], config["source"], config["rate_per_s"], config["deadline"]
    features = [[random.gauss(0, 1) for _ in range(8)] for _ in range(50)]
    begun, sent = time.monotonic(), 0
    tasks: set[asyncio.Task[None]] = set()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_CALL_S)) as session:

        async def submit(number: int) -> None:
            job = {"key": f"{source}-{number}", "source": source, "payload": {"features": features[number % 50]}}
            try:
                async with session.post(url + "/jobs", json=job) as response:
                    await response.read()
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                pass  # open loop: a refusal or a silence changes nothing about the next one

        while (now := time.monotonic()) < deadline:
            due = int((now - begun) * rate) + 1
            while sent < due:
                sent += 1
                if len(tasks) < _MOST_OPEN:
                    task = asyncio.create_task(submit(sent))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            await asyncio.sleep(max(0.001, min(begun + sent / rate, deadline) - time.monotonic()))
