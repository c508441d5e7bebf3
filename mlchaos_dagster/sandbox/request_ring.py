"""The error budget's memory: what the gateway has answered, second by second, for an hour; outlives the gateway."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

RING_S = 3600
_EVERY_S = 1.0

Counts = tuple[int, int, int]
"""Pid of the gateway, requests and bad ones (5xx) since it started."""


class RequestRing:
    """Counts over any window of the last hour. ``count`` asks the gateway; None when it does not tell."""

    def __init__(self, count: Callable[[], Awaitable[Counts | None]]) -> None:
        self._count = count
        self._ring: deque[tuple[float, int, int]] = deque(maxlen=RING_S + 60)
        self._total = self._bad = 0
        self._last: Counts = (0, 0, 0)
        self._lock = asyncio.Lock()

    async def watch(self) -> None:
        """Task: take the counters once a second."""
        while True:
            await self._scrape()
            await asyncio.sleep(_EVERY_S)

    async def _scrape(self) -> None:
        """Add the gateway's counters to ours; a restarted gateway starts again from zero, as Prometheus expects."""
        async with self._lock:
            counts = await self._count()
            if counts is None:
                return
            pid, requests, errors = counts
            known_pid, total, bad = self._last
            if known_pid != pid:
                total = bad = 0
            self._total += requests - total
            self._bad += errors - bad
            self._last = counts
            self._ring.append((time.monotonic(), self._total, self._bad))

    async def in_last(self, window_s: float) -> dict[str, Any]:
        """Requests and bad ones (5xx) at the gateway in the last ``window_s`` seconds."""
        await self._scrape()
        now = time.monotonic()
        if not self._ring:
            return {"total": 0, "bad": 0, "window_s": window_s, "covered_s": 0.0, "age_s": None}
        newest = self._ring[-1]
        # The oldest count inside the window's start, so that the window is covered whole.
        oldest = self._ring[0]
        for entry in reversed(self._ring):
            oldest = entry
            if entry[0] <= now - window_s:
                break
        return {
            "total": newest[1] - oldest[1],
            "bad": newest[2] - oldest[2],
            "window_s": window_s,
            "covered_s": round(newest[0] - oldest[0], 3),
            "age_s": round(now - newest[0], 3),
        }
