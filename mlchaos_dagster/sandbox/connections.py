"""Who is told where whom is: links to proxies, endpoints to the gateway, peers to everybody else."""

from __future__ import annotations

import asyncio
import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import aiohttp

from .slots import Slot

if TYPE_CHECKING:
    from .supervisor import Supervisor

_STORE_LINK = "gateway->feature-store"
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class Connections:
    """Keeps what processes know of each other in step with what runs where. Each is told only what is new to it."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.ports: dict[str, int] = {}
        """Link → port it listens on; of links that are gone, remembered for their return."""
        self.isolated: set[str] = set()
        """Processes that are cut off: they are told of no others, and no others of them (see ``isolation``)."""
        self._pushed: dict[tuple[str, str], tuple[int | None, str]] = {}

    async def push(self) -> None:
        """Tell everybody what is new."""
        await asyncio.gather(*(self._push_links(name) for name in sorted(set(self.links().values()))))
        await self.push_endpoints()
        await asyncio.gather(*(self._push_peers(slot) for slot in list(self._supervisor.slots.values())))

    def complete(self, ready: int) -> bool:
        """Whether every link has its port, and the gateway was told of so many ready replicas."""
        pid, digest = self._pushed.get(("gateway", "/endpoints"), (None, ""))
        told = digest.count('"ready": true') if pid == self._supervisor.slots["gateway"].pid else -1
        return all(link in self.ports for link in self.links()) and told == ready

    def links(self) -> dict[str, str]:
        """Every link, and the proxy process that it runs through."""
        found = {_STORE_LINK: "proxy-feature-store"}
        found |= {
            f"gateway->{name}": "proxy-inference" for name in self._supervisor.slots if name.startswith("inference-")
        }
        for one in self._supervisor.parts.values():
            found |= {link: proxy for link, (proxy, _) in one.links.items()}
        return found

    async def _push_links(self, proxy: str) -> None:
        slot = self._supervisor.slots[proxy]
        wanted = {
            link: {"upstream": self._upstream(link), "port": self.ports.get(link, 0)}
            for link, through in self.links().items()
            if through == proxy
        }
        fresh = self._pushed.get((proxy, "/links"), (None, ""))[0] != slot.pid
        content = {"links": wanted}
        digest = json.dumps({link: spec["upstream"] for link, spec in wanted.items()})
        if (answer := await self._push(slot, "/links", content, digest)) is None:
            return
        self.ports.update(answer["ports"])
        if fresh:
            await self._supervisor.book.reinstate(slot)

    def _upstream(self, link: str) -> int | None:
        """Port of the process that a link leads to, also while that process is down; None before its first life."""
        leads_to = next(
            (one.links[link][1] for one in self._supervisor.parts.values() if link in one.links), link.split("->")[1]
        )
        return self._supervisor.slots[leads_to].last_port or None if leads_to in self._supervisor.slots else None

    async def _push_peers(self, slot: Slot) -> None:
        """Tell a process where the others are that its parts let it talk to."""
        wanted: dict[str, str] = {}
        for one in self._supervisor.parts.values():
            for glob, peers in one.peers.items():
                if fnmatchcase(slot.name, glob):
                    wanted |= {key: self._url(name) for key, name in peers.items()}
        if slot.name in self.isolated:
            wanted = dict.fromkeys(wanted, "")
        if wanted:
            await self._push(slot, "/peers", wanted, json.dumps(wanted))

    def _url(self, name: str) -> str:
        """Address of a link or a process; empty while there is none."""
        if "->" in name:
            port = self.ports.get(name, 0) if self._upstream(name) else 0
        else:
            port = (
                self._supervisor.slots[name].last_port
                if name in self._supervisor.slots and name not in self.isolated
                else 0
            )
        return f"http://127.0.0.1:{port}" if port else ""

    async def push_endpoints(self) -> None:
        """Tell the gateway where everything is, if something of it is new."""
        if _STORE_LINK not in self.ports:
            return
        quarantined = self.isolated if self._supervisor.config.mechanisms["segmentation"] else set[str]()
        replicas = {
            name: {
                "url": f"http://127.0.0.1:{self.ports[f'gateway->{name}']}",
                "ready": slot.ready,
                "isolated": name in quarantined,
            }
            for name, slot in self._supervisor.slots.items()
            if slot.role == "inference" and f"gateway->{name}" in self.ports
        }
        store = (
            f"http://127.0.0.1:{self.ports[_STORE_LINK]}" if self._supervisor.slots["feature-store"].last_port else ""
        )
        content = {"feature_store": store, "replicas": replicas}
        await self._push(self._supervisor.slots["gateway"], "/endpoints", content, json.dumps(content))

    async def _push(self, slot: Slot, path: str, content: Any, digest: str) -> Any | None:
        """Tell a process something it does not know yet; None when there was nothing new or it did not listen."""
        pid = slot.pid
        if slot.port is None or not slot.running or self._pushed.get((slot.name, path)) == (pid, digest):
            return None
        try:
            status, answer = await self._supervisor.call(slot, "PUT", path, content, 0.5)
        except _UNANSWERED:
            return None  # the next round tries again
        if status != 200:
            return None
        self._pushed[(slot.name, path)] = (pid, digest)
        return answer
