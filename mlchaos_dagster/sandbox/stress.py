"""Faults that use a process's CPU or memory up: burners beside it, counted as part of its group.

A burner is a process of the sandbox (it dies with the supervisor), ends at its deadline by itself, and belongs to the
target's group: its memory counts against the target's limit, an OOM kill of the group takes it along, its CPU time is
the group's (see ``limits`` and ``autoscaler``). A burner that died is not started again: one fault, one OOM kill.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from .faults import Fault, Refused
from .handlers import number, only
from .identity import burner_suffix, lives
from .limits import resident
from .slots import Slot

if TYPE_CHECKING:
    from .supervisor import Supervisor

_STARTED_S = 1.0
_LEAST_SHARE = 0.1
"""A burner that got less than this part of what it should use burns nothing worth the name: the machine is too busy."""
_FILLED = 0.9
_MIB = 2**20


@dataclass(frozen=True)
class Burner:
    """One burner and who it was, which its slot forgets when it dies."""

    slot: Slot
    pid: int
    create_time: float
    load: float = 0.0
    bytes: int = 0

    @property
    def alive(self) -> bool:
        """That very process is there."""
        return lives(self.pid, self.create_time)


class _Stress:
    """What both kinds have in common: starting burners, and seeing that they are gone."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.limits = supervisor.limits
        self.burners: dict[tuple[str, str, str], list[Burner]] = {}

    async def start(self, fault: Fault, told: list[dict[str, Any]]) -> None:
        """One burner for each setting. Raises Refused(409, 503)."""
        if not self.supervisor.slots[fault.target].running:
            raise Refused(409, f"{fault.target} is not running: there is nothing to put under stress")
        mine = self.burners[fault.key] = []
        for count, settings in enumerate(told, 1):
            name = f"burner-{fault.target}-{count}{burner_suffix(fault.lease_id)}"
            slot = Slot(
                name,
                "burner",
                self.supervisor.directory,
                partial(dict, settings, deadline=fault.deadline),
                self.supervisor.config,
                False,
                self.supervisor.truth,
                lambda: None,
            )
            self.limits.join(fault.target, slot, fault.lease_id)
            fault.tasks.append(asyncio.get_running_loop().create_task(slot.run()))
            end = time.monotonic() + _STARTED_S
            while slot.pid is None and time.monotonic() < end:
                await asyncio.sleep(0.005)
            if slot.pid is None or slot.create_time is None:
                await slot.stop()
                self.limits.leave(fault.target, slot)
                raise Refused(503, f"{name} did not start")
            load, size = settings.get("load", 0.0), settings.get("bytes", 0)
            mine.append(Burner(slot, slot.pid, slot.create_time, load, size))

    async def clear(self, fault: Fault) -> None:
        """Kill the burners and see that they are gone. Raises Refused(503)."""
        mine = self.burners.get(fault.key, [])
        await asyncio.gather(*(burner.slot.stop() for burner in mine))
        if left := [burner for burner in mine if burner.alive]:
            raise Refused(503, f"{', '.join(f'{b.slot.name} (pid {b.pid})' for b in left)} did not die")
        for burner in mine:
            self.limits.leave(fault.target, burner.slot)
            log = self.supervisor.directory / "logs" / f"{burner.slot.name}.log"
            if log.exists() and not log.stat().st_size:
                log.unlink()
        if self.burners.pop(fault.key, None):
            self.supervisor.truth.write(
                "burners_gone",
                fault.target,
                None,
                fault.lease_id,
                kind=fault.kind,
                burners=[{"pid": burner.pid, "create_time": burner.create_time} for burner in mine],
                usage_bytes=self.limits.usage(fault.target),
            )


class CpuStress(_Stress):
    """``cores`` burners, the last one with the fraction that is left, each busy for ``load`` of the time.

    The measurement must not become the victim: where there are two cores or more, burners never run on the first one
    (on systems with processor affinity), and a fault that asks for more cores than the others is refused.
    """

    def targets(self) -> Collection[str]:
        """Every process but the proxies, which are the network."""
        return [name for name, slot in self.supervisor.slots.items() if slot.role != "proxy"]

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``cores`` (1) and ``load`` (1.0, 0–1)."""
        only("cpu_stress", given, "cores", "load")
        cores = number("cpu_stress", given, "cores", 0.01, 256, 1.0)
        return {"cores": cores, "load": number("cpu_stress", given, "load", 0.01, 1.0, 1.0)}

    async def inject(self, fault: Fault) -> None:
        """Start the burners. Raises Refused(409, 503)."""
        cores, load = fault.params["cores"], fault.params["load"]
        pinned, free = cores_to_burn()
        burners = math.ceil(cores)
        if burners > free:
            have = os.cpu_count() or 1
            raise Refused(503, f"{cores:g} cores asked for; this machine has {have}, one of them for the measurement")
        shares = [min(1.0, cores - count) * load for count in range(burners)]
        await self.start(fault, [{"burn": "cpu", "load": share, "cores": pinned} for share in shares])

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """CPU time of each burner, as the kernel counts it."""
        pinned, _ = cores_to_burn()
        where = f"on core {', '.join(map(str, pinned))}" if pinned else "on any core"
        effective, lines, used_s = True, list[str](), 0.0
        for burner in self.burners.get(fault.key, []):
            try:
                times = psutil.Process(burner.pid).cpu_times() if burner.alive else None
            except psutil.Error:
                times = None
            if times is None:
                effective = False
                lines.append(f"{burner.slot.name} pid {burner.pid} is gone")
                continue
            burnt, lived = times.user + times.system, max(0.01, time.time() - burner.create_time)
            used_s += burnt
            effective &= burner.slot.ready and burnt >= _LEAST_SHARE * burner.load * lived
            lines.append(
                f"{burner.slot.name} pid {burner.pid} used {burnt:.2f} s of CPU time in {lived:.2f} s "
                f"(load {burner.load:.0%}, {where})"
            )
        return effective and bool(lines), lines, {"cpu_s": round(used_s, 3)}


class MemoryStress(_Stress):
    """A burner that takes ``bytes`` over a second and holds them, inside the target's memory limit."""

    def targets(self) -> Collection[str]:
        """Processes that have a memory limit."""
        return self.limits.limited()

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``bytes``, at least 1 MiB."""
        only("memory_stress", given, "bytes")
        return {"bytes": int(number("memory_stress", given, "bytes", _MIB, 2**50))}

    async def inject(self, fault: Fault) -> None:
        """Start the burner. Raises Refused: 409; 503, the machine itself would be in danger."""
        wanted = fault.params["bytes"]
        coming = sum(b.bytes - resident(b.pid) for mine in self.burners.values() for b in mine if b.alive)
        available = psutil.virtual_memory().available - max(0, coming)
        if wanted > available / 2:
            raise Refused(503, f"{_mib(wanted)} are more than half of the {_mib(available)} this machine has left")
        await self.start(fault, [{"burn": "memory", "bytes": wanted}])

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """What the burner holds and what its group uses; after the OOM kill: when that was, and at what usage."""
        mine = self.burners.get(fault.key, [])
        held = sum(resident(burner.pid) for burner in mine if burner.alive)
        usage, limit = self.limits.usage(fault.target), self.limits.limit_bytes
        now = f"the group of {fault.target} uses {_mib(usage)} of {_mib(limit)}"
        found = {
            "burner_bytes": held,
            "usage_bytes": usage,
            "limit_bytes": limit,
            "enforced_by": self.limits.enforced_by,
        }
        if (kill := self.limits.last_oom(fault.target, fault.lease_id)) is not None:
            at = time.strftime("%H:%M:%S", time.localtime(kill["at"])) + f".{int(kill['at'] * 1000) % 1000:03d}"
            line = f"{fault.target} was OOM-killed at {at}: its group used {_mib(kill['usage_bytes'])} of {_mib(limit)}"
            return (
                True,
                [f"{line} (enforced by: {self.limits.enforced_by})", now],
                {**found, "oom_killed_at": kill["at"]},
            )
        names = ", ".join(f"{b.slot.name} pid {b.pid}{'' if b.alive else ' (gone)'}" for b in mine)
        line = f"{names} holds {_mib(held)} of {_mib(fault.params['bytes'])}"
        return held >= _FILLED * fault.params["bytes"], [line, now], found


def cores_to_burn() -> tuple[list[int], int]:
    """Cores that burners are pinned to (empty: not pinned), and how many a fault may ask for."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pinned = sorted(os.sched_getaffinity(0))[1:] if hasattr(os, "sched_getaffinity") else []
    return pinned, max(1, have - 1)


def _mib(size: float) -> str:
    return f"{size / _MIB:.0f} MiB"
