"""Memory limits of replicas, kept the way the kernel keeps those of a container.

A replica and whatever runs inside its limit (burners) are one group. Kubernetes has the kernel kill a whole container
group when it is over its limit (``memory.oom.group``, since 1.28); so does this: every process of the group gets SIGKILL,
the slot restarts with its usual back-off, what was a guest in the group is gone for good.

The supervisor enforces: a cgroup with the memory controller needs a delegated, writable hierarchy, which a process
without privileges rarely has. It reads resident memory every 50 ms, so a group can be over for that long; the truth log
says by whom a limit was enforced, what was used then and who died.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from .slots import Slot
from .truth import TruthLog

_WATCH_S = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc/self/statm").exists()


class MemoryLimits:
    """The groups of all slots that have a limit, and the task that watches them."""

    def __init__(self, slots: Mapping[str, Slot], limit_bytes: int, truth: TruthLog) -> None:
        self._slots = slots
        self._truth = truth
        self._guests: dict[str, dict[Slot, str]] = {}
        """Slot → what runs inside its limit → the lease it belongs to."""
        self._last: dict[tuple[str, str | None], dict[str, Any]] = {}
        self.limit_bytes = limit_bytes
        self.enforced_by = "supervisor"

    def limited(self) -> list[str]:
        """Names of the slots that have a limit."""
        return [name for name, slot in self._slots.items() if slot.role == "inference"]

    def join(self, name: str, guest: Slot, lease: str) -> None:
        """Count a process as part of a slot's group: its memory, its CPU time, its death."""
        self._guests.setdefault(name, {})[guest] = lease

    def leave(self, name: str, guest: Slot) -> None:
        """No part of the group any more; idempotent."""
        guests = self._guests.get(name, {})
        guests.pop(guest, None)
        if not guests:
            self._guests.pop(name, None)

    def members(self, name: str) -> list[Slot]:
        """Everything in a slot's group that runs now."""
        own = [self._slots[name]] if name in self._slots else []
        return [slot for slot in (*own, *self._guests.get(name, {})) if slot.running and slot.pid is not None]

    def usage(self, name: str) -> int:
        """Resident memory of a slot's group now, bytes. Pages that two processes share count twice."""
        return sum(resident(slot.pid or 0) for slot in self.members(name))

    def last_oom(self, name: str, lease: str | None) -> dict[str, Any] | None:
        """The latest OOM kill of a slot's group that a lease's guest brought about, and when it was (``at``)."""
        return self._last.get((name, lease))

    async def watch(self) -> None:
        """Task: kill every group that is over its limit."""
        while True:
            over = [(name, usage) for name in self.limited() if (usage := self.usage(name)) > self.limit_bytes]
            await asyncio.gather(*(self._oom(name, usage) for name, usage in over))
            await asyncio.sleep(_WATCH_S)

    async def _oom(self, name: str, usage: int) -> None:
        slot, members, guests = self._slots.get(name), self.members(name), self._guests.pop(name, {})
        sizes = {slot: resident(slot.pid or 0) for slot in members}
        largest = max(sizes, key=lambda slot: sizes[slot], default=None)
        if slot is None or largest is None:
            return  # it died or was scaled away between two looks
        slot.oom_kills += 1
        # The lease of whoever filled the group; a replica that grew by itself has none.
        lease = next((guests[guest] for guest in sorted(guests, key=lambda g: -sizes.get(g, 0))), None)
        facts = {
            "usage_bytes": usage,
            "limit_bytes": self.limit_bytes,
            "largest": largest.name,
            "killed": {member.name: {"pid": member.pid, "resident_bytes": sizes[member]} for member in members},
            "enforced_by": self.enforced_by,
        }
        at = time.time()
        self._truth.write("oom_killed", name, slot.pid, lease, at=at, **facts)
        await asyncio.gather(*(member.kill(lease) for member in members))
        self._last[name, lease] = {"at": at, **facts}


def resident(pid: int) -> int:
    """Resident memory of a process, bytes; 0 for one that is gone."""
    try:
        if _PROC:
            with open(f"/proc/{pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * _PAGE
        return psutil.Process(pid).memory_info().rss
    except (OSError, psutil.Error, IndexError):
        return 0
