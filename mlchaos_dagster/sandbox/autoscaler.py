"""Replicas follow their CPU use, by the rules of Kubernetes' HorizontalPodAutoscaler.

Desired = ceil(replicas × use / target), within a tolerance; up at once, down only to the highest wish of a stabilisation
window; a replica that is not ready yet counts as idle on the way up and as busy on the way down. Times are those of
Kubernetes scaled by 0.025, as the durations of experiments are here. A replica's use is its group's: the process and
the burners inside its limits.

With the mechanism ``autoscaler`` off the use is measured all the same, and nothing is done about it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil

from .faults import Refused

if TYPE_CHECKING:
    from .slots import Slot
    from .supervisor import Supervisor

STATE = "autoscaler"
"""Under this name its numbers are among the supervisor's states."""
REQUEST_CORES = 0.1
"""What one replica asks for (`100m`): several times its use at the usual load."""
TARGET = 0.5
TOLERANCE = 0.1
MORE_AT_MOST = 2
"""Replicas above the configured number."""
STABILISE_S = 7.5
"""5 min × 0.025."""
_EVERY_S = 0.5
_WINDOW = 3
"""Readings that a use is averaged over: 1.5 s, the metrics server's minute."""


def desired(replicas: int, uses: Sequence[float | None], least: int, most: int) -> int:
    """How many replicas there should be.

    Args:
        replicas: there are now.
        uses: of each replica, as a share of its request; None: not ready, or too young to tell.
        least: lower bound.
        most: upper bound.
    """
    known = [use for use in uses if use is not None]
    if not known:
        return min(max(replicas, least), most)
    ratio = sum(known) / len(known) / TARGET
    if len(known) < len(uses) and ratio != 1.0:
        guess = 0.0 if ratio > 1 else TARGET
        whole = (sum(known) + guess * (len(uses) - len(known))) / len(uses) / TARGET
        # What is not known must not turn the direction round.
        ratio = whole if (whole > 1) == (ratio > 1) else 1.0
    wish = replicas if abs(ratio - 1.0) <= TOLERANCE else math.ceil(ratio * len(uses))
    return min(max(wish, least), most)


class Stabiliser:
    """Turns wishes into goals: up at once, down only as far as every wish of the window goes."""

    def __init__(self) -> None:
        self._wishes: deque[tuple[float, int]] = deque()

    def goal(self, now: float, replicas: int, wish: int) -> int:
        """Take a wish at a moment (seconds); how many replicas there should be."""
        self._wishes.append((now, wish))
        while self._wishes[0][0] < now - STABILISE_S:
            self._wishes.popleft()
        return wish if wish >= replicas else min(replicas, max(one for _, one in self._wishes))


class _Reading:
    """CPU seconds of every process of the replicas' groups at one moment."""

    def __init__(self, groups: dict[str, tuple[Slot, list[int]]]) -> None:
        self.at = time.monotonic()
        self.cpu_s: dict[int, float] = {}
        self.ready = {name: slot.pid for name, (slot, _) in groups.items() if slot.ready and slot.pid}
        self.pids = {name: pids for name, (_, pids) in groups.items()}
        for pid in (pid for pids in self.pids.values() for pid in pids):
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:
                continue
            self.cpu_s[pid] = times.user + times.system

    def uses(self, before: _Reading) -> list[float | None]:
        """Each replica's use since ``before``, as a share of its request."""
        elapsed = self.at - before.at
        found: list[float | None] = []
        for name, pids in self.pids.items():
            if name not in self.ready or before.ready.get(name) != self.ready[name] or elapsed <= 0:
                found.append(None)
                continue
            both = [pid for pid in pids if pid in self.cpu_s and pid in before.cpu_s]
            spent = sum(self.cpu_s[pid] - before.cpu_s[pid] for pid in both)
            found.append(spent / elapsed / REQUEST_CORES)
        return found


async def run(supervisor: Supervisor) -> None:
    """Task: measure, decide, scale."""
    readings: deque[_Reading] = deque(maxlen=_WINDOW + 1)
    stabiliser = Stabiliser()
    acts = supervisor.config.mechanisms["autoscaler"]
    least = supervisor.config.replicas
    refused = ""
    while True:
        groups = {
            name: (slot, [member.pid for member in supervisor.limits.members(name) if member.pid])
            for name, slot in supervisor.slots.items()
            if slot.role == "inference"
        }
        readings.append(_Reading(groups))
        uses = readings[-1].uses(readings[0]) if len(readings) > _WINDOW else []
        now, replicas = time.monotonic(), supervisor.replicas
        wish = desired(replicas, uses, least, least + MORE_AT_MOST) if acts else replicas
        if known := [use for use in uses if use is not None]:
            use = sum(known) / len(known)
            supervisor.states[STATE] = (now, {"cpu_usage": round(use, 4), "desired_replicas": wish})
        goal = stabiliser.goal(now, replicas, wish)
        if acts and goal != replicas:
            try:
                async with supervisor.book.lock:
                    gone = supervisor.scale(goal, by=STATE, cpu_usage=round(sum(known) / max(1, len(known)), 3))
                await supervisor.retire(gone)
                refused = ""
            except Refused as error:  # a fault is on a replica that would have to go: later, then
                if refused != str(error):
                    supervisor.truth.write("scaling_refused", "inference", replicas=goal, error=str(error))
                refused = str(error)
        await asyncio.sleep(_EVERY_S)
