"""A network fault proxy: links with traffic rules, and the HTTP face that sets them (token needed).

Every rule carries its own deadline, kept by a timer in this very process: it ends though the watchdog and the run are
gone and the supervisor hangs. A lease whose removal was asked for can never set a rule here again (tombstone), so a
delayed or repeated request does no harm.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from typing import Any

from aiohttp import web
from prometheus_client import Gauge

from .lifeline import Lifeline, listen
from .link import Link, client_side
from .rule import Rule
from .service import Service


class Proxy:
    """All links of one proxy process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.links: dict[str, Link] = {}
        self.servers: dict[str, asyncio.Server] = {}
        self.tombstones: set[str] = set()
        self.expired: deque[dict[str, Any]] = deque(maxlen=1000)
        self._expiries = 0
        self._rng = random.Random()
        registry = service.registry
        self._rules = Gauge("proxy_rules", "Fault rules in force", ["link", "kind"], registry=registry)
        self._bytes = Gauge("proxy_bytes", "Bytes passed on", ["link"], registry=registry)
        self._connections = Gauge("proxy_connections", "Connections open now", ["link"], registry=registry)

    async def put_links(self, request: web.Request) -> web.Response:
        """Make the links exactly these: {name: {"upstream": port | null, "port": preferred listening port}}."""
        wanted: dict[str, Any] = (await request.json())["links"]
        for name in set(self.links) - set(wanted):
            link = self.links.pop(name)
            self.servers.pop(name).close()
            link.rules.clear()
            for connection in list(link.connections):
                connection.abort()
        loop = asyncio.get_running_loop()
        for name, spec in wanted.items():
            link = self.links.get(name)
            if link is None:
                link = self.links[name] = Link(name, self._rng)
                sock = listen(int(spec.get("port") or 0))
                link.port = sock.getsockname()[1]
                self.servers[name] = await loop.create_server(lambda link=link: client_side(link), sock=sock)
                self._connections.labels(name).set_function(lambda link=link: len(link.connections))
                self._bytes.labels(name).set_function(lambda link=link: link.bytes_total)
            link.upstream = ("127.0.0.1", spec["upstream"]) if spec["upstream"] else None
        self.service.set_ready(bool(self.links) and all(link.upstream for link in self.links.values()))
        return web.json_response({"ports": {name: link.port for name, link in self.links.items()}})

    async def add_rule(self, request: web.Request) -> web.Response:
        """Set one rule; the same lease, link and kind a second time changes nothing."""
        asked = await request.json()
        lease, name, kind = asked["lease_id"], asked["link"], asked["kind"]
        if lease in self.tombstones:
            return web.json_response({"error": f"lease {lease} was removed for ever"}, status=409)
        link = self.links.get(name)
        if link is None:
            return web.json_response({"error": f"no link {name!r}"}, status=404)
        remaining = asked["deadline"] - time.monotonic()
        if remaining <= 0:
            return web.json_response({"error": "the deadline has passed"}, status=409)
        for rule in link.rules:
            if (rule.lease_id, rule.kind) == (lease, kind):
                return web.json_response(rule.to_dict())
        rule = Rule(lease, asked["token"], name, kind, asked["params"], asked["deadline"])
        link.added(rule)
        self._rules.labels(name, kind).inc()
        asyncio.get_running_loop().call_later(remaining, self._expire, link, rule)
        return web.json_response(rule.to_dict())

    async def remove_rules(self, request: web.Request) -> web.Response:
        """Take every rule of a lease away and never let it set one again."""
        lease = request.match_info["lease_id"]
        self.tombstones.add(lease)
        removed: list[dict[str, Any]] = []
        for link in self.links.values():
            for rule in [rule for rule in link.rules if rule.lease_id == lease]:
                self._remove(link, rule)
                removed.append(rule.to_dict())
        return web.json_response({"removed": removed})

    async def get_rules(self, request: web.Request) -> web.Response:
        """The rules in force, and those that expired after number ``?after=``."""
        after = int(request.query.get("after", "0"))
        return web.json_response(
            {
                "rules": [rule.to_dict() for link in self.links.values() for rule in link.rules],
                "expired": [event for event in self.expired if event["number"] > after],
            }
        )

    def _expire(self, link: Link, rule: Rule) -> None:
        if rule not in link.rules:
            return
        self._remove(link, rule)
        self._expiries += 1
        event = {"number": self._expiries, "at": time.time(), "mono": time.monotonic()}
        self.expired.append({**rule.to_dict(), **event})

    def _remove(self, link: Link, rule: Rule) -> None:
        link.rules.remove(rule)
        self._rules.labels(link.name, rule.kind).dec()
        link.changed()


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    proxy = Proxy(service)
    service.app.router.add_put("/links", service.guarded(proxy.put_links))
    service.app.router.add_post("/rules", service.guarded(proxy.add_rule))
    service.app.router.add_get("/rules", service.guarded(proxy.get_rules))
    service.app.router.add_delete("/rules/{lease_id}", service.guarded(proxy.remove_rules))
    await service.serve()
