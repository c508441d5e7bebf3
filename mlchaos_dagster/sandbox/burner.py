"""A process that does nothing but use CPU or memory, for as long as it may.

It ends at its deadline by itself, and with its supervisor. Told on standard input: ``burn`` (``cpu`` or ``memory``),
``deadline`` (monotonic seconds), and ``load`` (0–1) and ``cores`` (indices it may run on; empty: all), or ``bytes``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from typing import Any

from .lifeline import Lifeline

_SLICE_S = 0.1
_STEPS = 20
_FILL_S = 1.0
"""Memory grows over a second, as a leak that somebody could watch."""


async def main(lifeline: Lifeline) -> None:
    """Burn until the deadline."""
    config: dict[str, Any] = lifeline.config
    _first_to_go()
    if config["burn"] == "cpu":
        _pin(config["cores"])
        lifeline.report(ready=True)
        _use_cpu(float(config["load"]), float(config["deadline"]))
        return
    blocks: list[bytearray] = []
    step = max(1, int(config["bytes"]) // _STEPS)
    for number in range(_STEPS):
        if time.monotonic() >= config["deadline"]:
            return
        size = int(config["bytes"]) - step * (_STEPS - 1) if number == _STEPS - 1 else step
        blocks.append(bytearray(b"\xa5") * size)  # writes every page: a calloc alone would take none
        await asyncio.sleep(_FILL_S / _STEPS)
    lifeline.report(ready=True)
    await asyncio.sleep(max(0.0, config["deadline"] - time.monotonic()))


def _use_cpu(load: float, deadline: float) -> None:
    """Be busy for ``load`` of each tenth of a second. The lifeline's thread ends us when the supervisor is gone."""
    while (begun := time.monotonic()) < deadline:
        busy_until = begun + load * _SLICE_S
        while time.monotonic() < busy_until:
            sum(range(2000))
        if load < 1.0:
            time.sleep(max(0.0, begun + _SLICE_S - time.monotonic()))


def _pin(cores: Iterable[int]) -> None:
    chosen = set(cores)
    if chosen and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def _first_to_go() -> None:
    """Should the whole machine run out of memory, the kernel is to take us before anything else."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not Linux
