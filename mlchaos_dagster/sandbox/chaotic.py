"""``model_chaos``: a replica serves its model through a ``ChaosModelWrapper`` until the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import aiohttp

from .faults import Fault, Refused
from .handlers import number, only

if TYPE_CHECKING:
    from .slots import Slot
    from .supervisor import Supervisor

_CALL_S = 0.5
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class ModelChaos:
    """Puts the wrapper around the model of a replica, and around that of the process that takes its place."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def targets(self) -> Collection[str]:
        """The replicas."""
        return [name for name, slot in self._supervisor.slots.items() if slot.role == "inference"]

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Shares of exceptions, timeouts and wrong predictions, and how long a timeout takes."""
        kind = "model_chaos"
        only(kind, given, "exceptions", "timeouts", "timeout_s", "wrong", "seed")
        shares = {name: number(kind, given, name, 0, 1, 0.0) for name in ("exceptions", "timeouts", "wrong")}
        if not 0 < sum(shares.values()) <= 1:
            raise Refused(400, "exceptions, timeouts and wrong must add up to more than 0 and at most 1")
        seed = number(kind, given, "seed", 0, 2**53, 0.0)
        return {**shares, "timeout_s": number(kind, given, "timeout_s", 0.001, 3600, 2.0), "seed": int(seed)}

    async def inject(self, fault: Fault) -> None:
        """Make it chaotic, and keep it so over restarts."""
        slot = self._slot(fault)
        if slot is None or not await self._put(slot, fault):
            raise Refused(503, f"{fault.target} did not take the wrapper; try again")
        fault.tasks.append(asyncio.get_running_loop().create_task(self._keep(fault, slot.pid)))

    async def clear(self, fault: Fault) -> None:
        """Serve the bare model again; a replica that does not confirm is killed: a new one is calm."""
        for task in fault.tasks[:1]:
            task.cancel()
        slot = self._slot(fault)
        if slot is None:
            return
        try:
            status, _ = await self._supervisor.call(slot, "DELETE", f"/chaos/{fault.lease_id}", None, _CALL_S)
        except _UNANSWERED:
            status = 0
        if status != 200:
            self._supervisor.truth.write("replica_unresponsive", slot.name, slot.pid, fault.lease_id)
            await slot.kill(fault.lease_id)
            if slot.running:
                raise Refused(503, f"{slot.name} neither answers nor dies")

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """What the replica says of its wrapper."""
        slot = self._slot(fault)
        if slot is None:
            return False, [f"{fault.target} is down: the process that takes its place gets the wrapper"], {}
        try:
            _, state = await self._supervisor.call(slot, "GET", "/state", None, _CALL_S)
        except _UNANSWERED:
            return False, [f"{fault.target} does not answer: nobody knows"], {}
        chaos = state["chaos"]
        if chaos is None or chaos["lease_id"] != fault.lease_id:
            return None if fault.remaining_s <= 0 else (False, [f"{fault.target} serves its bare model"], {})
        failed = chaos["exceptions"] + chaos["timeouts"] + chaos["wrong"]
        said = ", ".join(f"{chaos[name]} {name}" for name in ("exceptions", "timeouts", "wrong"))
        return failed > 0, [f"{fault.target} is chaotic: {said} in {chaos['calls']} calls"], {"counters": chaos}

    async def traces(self) -> list[tuple[str, str]]:
        """(lease id, replica) of every wrapper that there is: a request of ours may arrive after we gave it up."""
        slots = [slot for slot in self._supervisor.slots.values() if slot.role == "inference"]
        slots = [slot for slot in slots if slot.running and slot.port is not None]
        leases = await asyncio.gather(*(self._lease_on(slot) for slot in slots))
        return [(lease, slot.name) for lease, slot in zip(leases, slots, strict=True) if lease]

    async def _lease_on(self, slot: Slot) -> str:
        try:
            _, state = await self._supervisor.call(slot, "GET", "/state", None, _CALL_S)
        except _UNANSWERED:
            return ""
        return (state["chaos"] or {}).get("lease_id", "")

    def _slot(self, fault: Fault) -> Slot | None:
        slot = self._supervisor.slots.get(fault.target)
        return slot if slot is not None and slot.running and slot.port is not None else None

    async def _put(self, slot: Slot, fault: Fault) -> bool:
        body = {"lease_id": fault.lease_id, "deadline": fault.deadline, "config": fault.params}
        try:
            return (await self._supervisor.call(slot, "PUT", "/chaos", body, _CALL_S))[0] == 200
        except _UNANSWERED:
            return False

    async def _keep(self, fault: Fault, pid: int | None) -> None:
        while True:
            await asyncio.sleep(0.1)
            slot = self._slot(fault)
            if slot is not None and slot.pid != pid and await self._put(slot, fault):
                pid = slot.pid
