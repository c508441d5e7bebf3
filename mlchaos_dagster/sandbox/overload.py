"""Load above what the workers can do: a process that submits jobs to the queue open loop.

It is a process of the sandbox (it dies with the supervisor) and ends at its deadline by itself. What it does is read
from the queue: jobs a second that do not come from the usual load.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from .faults import Fault, Refused
from .handlers import number, only
from .identity import lives
from .slots import Slot

if TYPE_CHECKING:
    from .supervisor import Supervisor

_STARTED_S = 1.0
_FELT = 0.5
"""Share of the rate that must arrive at the queue; the rest may be lost to a busy machine."""


class QueueOverflow:
    """``rate_per_s`` jobs on top of the usual load."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.submitters: dict[tuple[str, str, str], tuple[Slot, int, float]] = {}
        """Fault → its submitter's slot, pid and start time."""

    def targets(self) -> Collection[str]:
        """The queues."""
        return [name for name, slot in self.supervisor.slots.items() if slot.role == "queue_server"]

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``rate_per_s``."""
        only("queue_overflow", given, "rate_per_s")
        return {"rate_per_s": number("queue_overflow", given, "rate_per_s", 0.1, 5000)}

    async def inject(self, fault: Fault) -> None:
        """Start the submitter. Raises Refused(503)."""
        queue = self.supervisor.slots[fault.target]
        if not queue.running or queue.port is None:
            raise Refused(503, f"{fault.target} is not running; try again")
        name = f"submitter-{re.sub(r'[^A-Za-z0-9.-]', '_', fault.lease_id)}"
        told = {
            "url": f"http://127.0.0.1:{queue.port}",
            "source": fault.lease_id,
            "deadline": fault.deadline,
            **fault.params,
        }
        supervisor = self.supervisor
        slot = Slot(
            name,
            "submitter",
            supervisor.directory,
            partial(dict, told),
            supervisor.config,
            False,
            supervisor.truth,
            lambda: None,
        )
        fault.tasks.append(asyncio.get_running_loop().create_task(slot.run()))
        end = time.monotonic() + _STARTED_S
        while slot.pid is None and time.monotonic() < end:
            await asyncio.sleep(0.005)
        if slot.pid is None or slot.create_time is None:
            await slot.stop()
            raise Refused(503, f"{name} did not start")
        self.submitters[fault.key] = (slot, slot.pid, slot.create_time)

    async def clear(self, fault: Fault) -> None:
        """Kill the submitter and see that it is gone. Raises Refused(503)."""
        if fault.key not in self.submitters:
            return
        slot, pid, create_time = self.submitters[fault.key]
        await slot.stop()
        if lives(pid, create_time):
            raise Refused(503, f"{slot.name} (pid {pid}) did not die")
        del self.submitters[fault.key]
        log = self.supervisor.directory / "logs" / f"{slot.name}.log"
        if log.exists() and not log.stat().st_size:
            log.unlink()
        state = self._queue(fault.target)
        self.supervisor.truth.write("submitter_gone", fault.target, pid, fault.lease_id, backlog=state.get("backlog"))

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """What arrives at the queue. None once the submitter has ended."""
        if fault.key not in self.submitters:
            return None
        slot, pid, create_time = self.submitters[fault.key]
        if not lives(pid, create_time):
            return None
        state = self._queue(fault.target)
        rate = state.get("others_rate", 0.0)
        lines = [
            f"{fault.target} gets {rate:.0f} jobs a second beyond its usual load from {slot.name} (pid {pid})",
            f"{fault.target}: backlog {state.get('backlog')}, {state.get('rejected_rate', 0.0):.0f} refused a second",
        ]
        facts = {"backlog": state.get("backlog"), "rejected_total": state.get("rejected_total")}
        return rate >= _FELT * fault.params["rate_per_s"], lines, facts

    def _queue(self, name: str) -> Mapping[str, Any]:
        """What the queue said of itself within the last second."""
        at, state = self.supervisor.states.get(name, (0.0, {}))
        return state if time.monotonic() - at <= 1.0 else {}
