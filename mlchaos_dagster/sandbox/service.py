"""What every process of the sandbox has in common: an HTTP server with /healthz, /readyz and /metrics."""

from __future__ import annotations

import asyncio
import hmac
import signal
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from .lifeline import Lifeline

TOKEN_HEADER = "X-Sandbox-Token"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service:
    """One process's HTTP face. Ready only after ``set_ready``; tells the supervisor at the moment it is."""

    def __init__(self, lifeline: Lifeline) -> None:
        self.lifeline = lifeline
        self.config = lifeline.config
        self.registry = CollectorRegistry()
        self.app = web.Application()
        self.ready = False
        self.reason = "starting"
        self.draining = False
        self._ready_gauge = Gauge("sandbox_ready", "1 when this process is ready for traffic", registry=self.registry)
        for name, read in lifeline.gauges().items():
            Gauge(name, "Of this process's surroundings", registry=self.registry).set_function(read)
        self.peers: dict[str, str] = dict(self.config.get("peers") or {})
        """Where others are, as the supervisor told: key → URL, empty while there is none."""
        self.peers_known = asyncio.Event()
        if self.peers:
            self.peers_known.set()
        self.app.on_response_prepare.append(self._part_company)
        self.app.router.add_put("/peers", self.guarded(self._take_peers))
        self.app.router.add_get("/healthz", self._healthz)
        self.app.router.add_get("/readyz", self._readyz)
        self.app.router.add_get("/metrics", self._metrics)

    def set_ready(self, ready: bool = True, reason: str = "ok") -> None:
        """Change readiness; ``reason`` is what /readyz says."""
        if self.draining:
            ready, reason = False, "draining"
        changed = ready != self.ready
        self.ready, self.reason = ready, reason
        self._ready_gauge.set(1 if ready else 0)
        if changed:
            self.lifeline.report(ready=ready, reason=reason)

    def guarded(self, handler: Handler) -> Handler:
        """Let only the holder of the sandbox's token call ``handler``."""
        token = str(self.config["token"])

        async def checked(request: web.Request) -> web.StreamResponse:
            if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, ""), token):
                return web.json_response({"error": f"{TOKEN_HEADER} is missing or wrong"}, status=403)
            return await handler(request)

        return checked

    async def serve(self, started: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until SIGTERM or SIGINT; ``started`` runs once the port is open and reported."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        sock = self.lifeline.listen()
        await web.SockSite(runner, sock).start()
        self.lifeline.report(port=sock.getsockname()[1])
        if started is not None:
            await started()
        await stop.wait()
        await self._drain(float(self.config.get("drain_s") or 0))
        await runner.cleanup()

    async def _drain(self, for_s: float) -> None:
        """Not ready any more, but still answering: for as long as others may not know yet that this process goes."""
        self.draining = True
        self.set_ready(False)
        await asyncio.sleep(for_s)

    async def _part_company(self, request: web.Request, response: web.StreamResponse) -> None:
        """While draining each answer is a connection's last: its client goes elsewhere before we are gone."""
        if self.draining:
            response.headers["Connection"] = "close"
            response.force_close()

    async def _take_peers(self, request: web.Request) -> web.Response:
        self.peers = await request.json()
        self.peers_known.set()
        return web.json_response({"ok": True})

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"alive": True, "name": self.config["name"]})

    async def _readyz(self, request: web.Request) -> web.Response:
        return web.json_response({"ready": self.ready, "reason": self.reason}, status=200 if self.ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": _METRICS_TYPE})
