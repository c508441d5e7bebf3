"""``network_isolation``: a process is cut off, as one that may be compromised is; it keeps running for the investigation.

Every link that leads to it, and every link that is its alone, refuses connections and ends those there are; the rules are
in the proxies, with the deadline. Where processes know each other without a link between them, the isolated one is told
that nobody is there, and the others that it is not. A link that it shares with others of its kind as their way out (all
replicas use one ``inference->object-store``) stays: cutting it would isolate them, too. The supervisor can still look at
it and end it: that is management, not the network of the platform.

``segmentation``: the gateway is told first, and gets the time of one try to finish what it has there. Off: it finds out by
itself, request by request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import aiohttp

from . import audit
from .faults import Fault, Refused
from .handlers import only

if TYPE_CHECKING:
    from .slots import Slot
    from .supervisor import Supervisor

_CALL_S = 0.4
_LOOK_S = 0.2
_KEEP_S = 0.2
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class NetworkIsolation:
    """Cuts processes off and lets them back."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.audit = supervisor.directory / audit.NAME
        self.isolated: dict[tuple[str, str, str], dict[str, str]] = {}
        """Fault → its links and the proxies they run through."""

    def targets(self) -> Collection[str]:
        """Processes with a link that can be cut."""
        return [name for name, slot in self.supervisor.slots.items() if slot.role != "proxy" and self._links_of(name)]

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """None."""
        only("network_isolation", given)
        return {}

    async def inject(self, fault: Fault) -> None:
        """Take it out of rotation, then cut it off. Raises Refused(409, 503)."""
        supervisor = self.supervisor
        slot = supervisor.slots[fault.target]
        if not slot.running:
            raise Refused(409, f"{fault.target} is not running: there is nothing to isolate")
        links = self._links_of(fault.target)
        self.isolated[fault.key] = links
        await self._note(fault, "isolated", pid=slot.pid, links=sorted(links))
        supervisor.connections.isolated.add(fault.target)
        await supervisor.connections.push_endpoints()
        if supervisor.config.mechanisms["segmentation"]:
            await asyncio.sleep(supervisor.config.replica_timeout_s)
        for link, proxy in links.items():
            if not await self._cut(fault, link, proxy):
                raise Refused(503, f"{proxy} did not confirm the rule on {link}; it was taken back")
        fault.tasks.append(asyncio.get_running_loop().create_task(self._keep(fault)))

    async def clear(self, fault: Fault) -> None:
        """Let it back: its links first, then its place in the rotation. Raises Refused(503)."""
        if (links := self.isolated.get(fault.key)) is None:
            return
        for task in fault.tasks[:1]:
            task.cancel()
        supervisor = self.supervisor
        for proxy in sorted(set(links.values())):
            await supervisor.book.clear_proxy(supervisor.slots[proxy], fault.lease_id)
        del self.isolated[fault.key]
        if not any(target == fault.target for _, target, _ in self.isolated):
            supervisor.connections.isolated.discard(fault.target)
            await supervisor.connections.push_endpoints()
        await self._note(fault, "released", links=sorted(links))

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """A connection of our own through every link, and whether the process still runs."""
        if (links := self.isolated.get(fault.key)) is None:
            return None
        slot = self.supervisor.slots.get(fault.target)
        refused = await asyncio.gather(*(self._refuses(link) for link in links))
        lines = [
            f"{link} {'refuses connections' if no else 'ANSWERS'} (GET /healthz through the link)"
            for link, no in zip(links, refused, strict=True)
        ]
        if slot is not None and slot.running:
            lines.append(f"{fault.target} pid {slot.pid} keeps running, {'ready' if slot.ready else 'not ready'}")
        else:
            lines.append(f"{fault.target} is down")
        last = await asyncio.to_thread(audit.head, self.audit)
        broken = await asyncio.to_thread(audit.verify, self.audit)
        lines.append(f"audit log: {last.n} entries, {'chain intact' if broken is None else f'BROKEN at line {broken}'}")
        return all(refused), lines, {"links": sorted(links)}

    def _links_of(self, name: str) -> dict[str, str]:
        """Links that lead to a process or are its alone → their proxies."""
        supervisor, found = self.supervisor, dict[str, str]()
        for link, proxy in supervisor.connections.links().items():
            begins, _, ends = link.partition("->")
            ends = next((one.links[link][1] for one in supervisor.parts.values() if link in one.links), ends)
            if name in (begins, ends):
                found[link] = proxy
        return found

    async def _cut(self, fault: Fault, link: str, proxy: str) -> bool:
        slot: Slot = self.supervisor.slots[proxy]
        if not slot.running or slot.port is None:
            return False
        rule = {
            "lease_id": fault.lease_id,
            "token": fault.token,
            "link": link,
            "kind": fault.kind,
            "params": {},
            "deadline": fault.deadline,
        }
        try:
            return (await self.supervisor.call(slot, "POST", "/rules", rule, _CALL_S))[0] == 200
        except _UNANSWERED:
            return False

    async def _keep(self, fault: Fault) -> None:
        """Task: give a proxy that was restarted its rules back."""
        slots = self.supervisor.slots
        known = {link: slots[proxy].pid for link, proxy in self.isolated[fault.key].items()}
        while True:
            await asyncio.sleep(_KEEP_S)
            for link, proxy in self.isolated.get(fault.key, {}).items():
                if slots[proxy].pid != known[link]:
                    pid = slots[proxy].pid
                    if await self._cut(fault, link, proxy):
                        known[link] = pid

    async def _refuses(self, link: str) -> bool:
        """Whether a connection through the link is ended at once; silence is no refusal."""
        url = f"http://127.0.0.1:{self.supervisor.connections.ports.get(link, 0)}/healthz"
        try:
            timeout = aiohttp.ClientTimeout(total=_LOOK_S)
            async with self.supervisor.session.get(url, timeout=timeout, headers={"Connection": "close"}):
                return False
        except asyncio.TimeoutError:
            return False
        except (aiohttp.ClientError, OSError):
            return True

    async def _note(self, fault: Fault, what: str, **details: Any) -> None:
        try:
            await audit.note(self.audit, f"lease {fault.lease_id}", what, fault.target, **details)
        except OSError as error:
            raise Refused(503, f"the audit log cannot be written: {error}") from error
