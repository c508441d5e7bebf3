"""The supervisor's HTTP face: JSON on loopback, header ``X-Sandbox-Token``; see ``_routes``."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from . import account
from .config import MAX_REPLICAS
from .faults import Refused
from .lifeline import listen
from .request_ring import RING_S
from .service import TOKEN_HEADER, Handler

if TYPE_CHECKING:
    from .supervisor import Supervisor

_OPEN_TO_ALL = ("/healthz", "/readyz", "/metrics")


async def serve(supervisor: Supervisor) -> tuple[web.AppRunner, int]:
    """Open the control API; the runner (to clean up) and the port."""
    app = web.Application(middlewares=[_gate(supervisor.token)])
    _health(app, supervisor)
    _routes(app, supervisor)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    sock = listen()
    await web.SockSite(runner, sock).start()
    return runner, sock.getsockname()[1]


def _health(app: web.Application, supervisor: Supervisor) -> None:
    registry = CollectorRegistry()
    Gauge("sandbox_processes_ready", "Processes that are ready", registry=registry).set_function(
        lambda: sum(slot.ready for slot in supervisor.slots.values())
    )
    Gauge("sandbox_restarts", "Restarts of all processes", registry=registry).set_function(
        lambda: sum(slot.restarts for slot in supervisor.slots.values())
    )

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def ready(request: web.Request) -> web.Response:
        done = (await account.status(supervisor))["ready"]
        return web.json_response({"ready": done}, status=200 if done else 503)

    app.router.add_get("/healthz", health)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/metrics", metrics)


def _routes(app: web.Application, supervisor: Supervisor) -> None:
    async def status(request: web.Request) -> Any:
        return await account.status(supervisor)

    async def signals(request: web.Request) -> Any:
        return account.signals(supervisor)

    async def add_fault(request: web.Request) -> Any:
        return await supervisor.book.add(await _json(request))

    async def remove_fault(request: web.Request) -> Any:
        lease = request.match_info["lease_id"]
        return {"lease_id": lease, "removed": await supervisor.book.remove(lease), "tombstone": True}

    async def faults(request: web.Request) -> Any:
        return await supervisor.book.present()

    async def targets(request: web.Request) -> Any:
        return {"targets": supervisor.book.targets(request.query.get("kind", ""))}

    async def scale(request: web.Request) -> Any:
        body = await _json(request)
        replicas = body.get("replicas") if isinstance(body, dict) else None
        if isinstance(replicas, bool) or not isinstance(replicas, int) or not 0 <= replicas <= MAX_REPLICAS:
            raise Refused(400, f"replicas must be a whole number from 0 to {MAX_REPLICAS}, not {replicas!r}")
        async with supervisor.book.lock:
            gone = supervisor.scale(replicas)
        await supervisor.retire(gone)
        return {"replicas": supervisor.replicas}

    async def parts(request: web.Request) -> Any:
        body = await _json(request)
        names = body.get("parts") if isinstance(body, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused(400, "parts must be a list of names")
        return {"parts": ["serving", *supervisor.start_parts(names)]}

    async def requests(request: web.Request) -> Any:
        text = request.query.get("window_s", "60")
        try:
            window_s = float(text)
        except ValueError:
            window_s = 0.0
        if not 0 < window_s <= RING_S:
            raise Refused(400, f"window_s must be seconds, more than 0 and at most {RING_S}, not {text!r}")
        return await supervisor.requests.in_last(window_s)

    async def shutdown(request: web.Request) -> Any:
        # After the answer is on its way.
        asyncio.get_running_loop().call_later(0.02, supervisor.stop.set)
        return {"stopping": True}

    for method, path, handler in (
        ("GET", "/status", status),
        ("GET", "/signals", signals),
        ("POST", "/faults", add_fault),
        ("DELETE", "/faults/{lease_id}", remove_fault),
        ("GET", "/faults", faults),
        ("GET", "/targets", targets),
        ("PUT", "/scale", scale),
        ("PUT", "/parts", parts),
        ("GET", "/requests", requests),
        ("POST", "/shutdown", shutdown),
    ):
        app.router.add_route(method, path, _as_json(handler))


def _gate(token: str) -> Any:
    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get(TOKEN_HEADER, "").encode()
        if request.path not in _OPEN_TO_ALL and not secrets.compare_digest(given, token.encode()):
            return web.json_response({"error": f"{TOKEN_HEADER} is missing or wrong"}, status=403)
        return await handler(request)

    return gate


def _as_json(handler: Callable[[web.Request], Awaitable[Any]]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return web.json_response(await handler(request))
        except Refused as refused:
            return web.json_response({"error": str(refused)}, status=refused.status)

    return answer


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
