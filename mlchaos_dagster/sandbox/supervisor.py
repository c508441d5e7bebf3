"""The supervisor: starts and watches every process of one sandbox, and is the one address that faults are asked at.

Started detached by :mod:`.api`. Its death, by whatever signal, ends all its children (see :mod:`.lifeline`), and with
them every fault. Control API: JSON on loopback, header ``X-Sandbox-Token``; see ``_routes``.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from .config import MAX_REPLICAS, SandboxConfig
from .fault_book import FaultBook, proxy_of
from .faults import Refused
from .lifeline import listen
from .service import TOKEN_HEADER, Handler
from .slots import Slot
from .truth import TruthLog

_STORE_LINK = "gateway->feature-store"
_POLL_S = 0.1
_POLL_STEADY_S = 0.5
_POLL_STARTING_S = 0.05
_RING_S = 3600
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class Supervisor:
    """One sandbox, from set-up to shutdown."""

    def __init__(self, directory: Path, config: SandboxConfig) -> None:
        self.directory = directory
        self.config = config
        self.token = secrets.token_urlsafe(24)
        self.child_token = secrets.token_urlsafe(24)
        self.truth = TruthLog(directory / "truth.jsonl")
        self.slots: dict[str, Slot] = {}
        self.model_sha256 = ""
        self.replicas = config.replicas
        self.stop = asyncio.Event()
        self.started_at = time.time()
        self.control_port = 0
        self.link_ports: dict[str, int] = {}
        self.book = FaultBook(self.slots, self.links, self.call, self.truth, directory)
        self.session: aiohttp.ClientSession
        self._me = psutil.Process()
        self._dirty = asyncio.Event()
        self._pushed: dict[str, tuple[int | None, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ring: deque[tuple[float, int, int]] = deque(maxlen=_RING_S + 60)
        self._total = self._bad = 0
        self._last = (0, 0, 0)
        self._scrape_lock = asyncio.Lock()

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Set up, serve until told to stop, take everything down."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop.set)
        (self.directory / "logs").mkdir(exist_ok=True)
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.truth.write("supervisor_started", "supervisor", os.getpid())
        runner = await self._serve()
        try:
            for name in ("feature-store", "proxy-feature-store", "proxy-inference", "gateway"):
                self._add_slot(name)
            for task in (self._reconcile, self._scrape_loop, self.book.watch):
                self._start(task())
            self._start(self._set_up())
            await self.stop.wait()
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*(slot.stop() for slot in self.slots.values()), return_exceptions=True)
            self.truth.write("supervisor_stopped", "supervisor", os.getpid())
            (self.directory / "state.json").unlink(missing_ok=True)
            await runner.cleanup()
            await self.session.close()

    async def _set_up(self) -> None:
        """Train the model (in a process of its own: we never import scikit-learn), then start the replicas."""
        command = [sys.executable, "-m", "mlchaos_dagster.sandbox.model"]
        arguments = ["--sandbox", str(self.directory), "--name", "trainer", str(self.config.seed)]
        # Its standard input stays open as long as we live, and no longer.
        trainer = await asyncio.create_subprocess_exec(
            *command, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert trainer.stdout is not None
        output = await trainer.stdout.read()
        code = await trainer.wait()
        if code != 0:
            self.truth.write("training_failed", "trainer", trainer.pid, code=code)
            self.stop.set()
            return
        self.model_sha256 = output.decode().strip()
        self._sync_replicas()

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A supervisor that watches only half of its world must not go on.
            self.truth.write("supervisor_failed", "supervisor", os.getpid(), error=repr(error))
            self.stop.set()

    # -- processes --------------------------------------------------------------------------------------------------

    def links(self) -> list[str]:
        """Names of all links."""
        return [_STORE_LINK, *(f"gateway->{name}" for name in self.slots if name.startswith("inference-"))]

    def _add_slot(self, name: str) -> Slot:
        role = name.split("-")[0] if name != "feature-store" else "feature_store"
        restart = role == "proxy" or self.config.mechanisms["restart"]
        slot = Slot(name, role, self.directory, self._settings, self.config, restart, self.truth, self._changed)
        self.slots[name] = slot
        self._start(slot.run())
        self._start(self._poll(slot))
        return slot

    def _settings(self) -> dict[str, Any]:
        """Everything a child is told, on its standard input."""
        config = self.config.to_dict()
        return {
            **config,
            "token": self.child_token,
            "database": str(self.directory / "data" / "features.sqlite"),
            "model_dir": str(self.directory / "model"),
            "model_sha256": self.model_sha256,
        }

    def _sync_replicas(self) -> None:
        if not self.model_sha256:
            return
        for number in range(1, self.replicas + 1):
            if f"inference-{number}" not in self.slots:
                self._add_slot(f"inference-{number}")
        self._changed()

    async def scale(self, replicas: int) -> None:
        """Change the number of replicas; the highest numbers go first."""
        gone = [n for n in self.slots if n.startswith("inference-") and int(n.split("-")[1]) > replicas]
        for name in gone:
            if leases := self.book.on(name):
                raise Refused(409, f"{name} cannot be scaled away: lease {leases[0]} has a fault on it")
        self.truth.write("scaled", "inference", replicas=replicas, before=self.replicas)
        self.replicas = replicas
        for slot in [self.slots.pop(name) for name in gone]:
            await slot.stop()
        self._sync_replicas()

    def _changed(self) -> None:
        self._dirty.set()

    async def _poll(self, slot: Slot) -> None:
        """Keep a slot's readiness true; a child also reports changes itself, which is faster."""
        while self.slots.get(slot.name) is slot and not self.stop.is_set():
            if slot.port is not None and slot.running:
                pid = slot.pid
                ready = (await self._readyz(slot))[0]
                if slot.pid == pid and slot.running and slot.port is not None:
                    slot.mark_ready(ready)
            if not slot.ready:
                await asyncio.sleep(_POLL_STARTING_S)
            else:
                await asyncio.sleep(_POLL_S if slot.role == "inference" else _POLL_STEADY_S)

    async def _readyz(self, slot: Slot) -> tuple[bool, str]:
        if slot.port is None or not slot.running:
            return False, "not running"
        try:
            timeout = aiohttp.ClientTimeout(total=0.5)
            async with self.session.get(f"http://127.0.0.1:{slot.port}/readyz", timeout=timeout) as response:
                return response.status == 200, (await response.json()).get("reason", "")
        except _UNANSWERED as error:
            return False, f"does not answer: {type(error).__name__}"

    async def call(self, slot: Slot, method: str, path: str, body: Any, timeout_s: float) -> tuple[int, Any]:
        """One request to a child's control face."""
        async with self.session.request(
            method,
            f"http://127.0.0.1:{slot.port}{path}",
            json=body,
            headers={TOKEN_HEADER: self.child_token},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as response:
            return response.status, await response.json()

    # -- wiring -----------------------------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        """Task: keep proxies, gateway and state.json in step with what runs where."""
        while True:
            try:
                await asyncio.wait_for(self._dirty.wait(), 0.5)
            except asyncio.TimeoutError:
                pass
            self._dirty.clear()
            await asyncio.gather(*(self._push_links(name) for name in ("proxy-feature-store", "proxy-inference")))
            await self._push_endpoints()
            self._write_state()

    async def _push_links(self, proxy: str) -> None:
        slot = self.slots[proxy]
        wanted = {
            link: {"upstream": self.slots[link[9:]].last_port or None, "port": self.link_ports.get(link, 0)}
            for link in self.links()
            if proxy_of(link) == proxy
        }
        fresh = self._pushed.get(proxy, (None, ""))[0] != slot.pid
        content = {"links": wanted}
        digest = json.dumps({link: spec["upstream"] for link, spec in wanted.items()})
        if (answer := await self._push(slot, "/links", content, digest)) is None:
            return
        self.link_ports.update(answer["ports"])
        if fresh:
            await self.book.reinstate(slot)

    async def _push_endpoints(self) -> None:
        if _STORE_LINK not in self.link_ports:
            return
        replicas = {
            name: {"url": f"http://127.0.0.1:{self.link_ports[f'gateway->{name}']}", "ready": slot.ready}
            for name, slot in self.slots.items()
            if slot.role == "inference" and f"gateway->{name}" in self.link_ports
        }
        store = f"http://127.0.0.1:{self.link_ports[_STORE_LINK]}" if self.slots["feature-store"].last_port else ""
        content = {"feature_store": store, "replicas": replicas}
        await self._push(self.slots["gateway"], "/endpoints", content, json.dumps(content))

    async def _push(self, slot: Slot, path: str, content: Any, digest: str) -> Any | None:
        """Tell a process something it does not know yet; None when there was nothing new or it did not listen."""
        pid = slot.pid
        if slot.port is None or not slot.running or self._pushed.get(slot.name) == (pid, digest):
            return None
        try:
            status, answer = await self.call(slot, "PUT", path, content, 0.5)
        except _UNANSWERED:
            return None  # the next round tries again
        if status != 200:
            return None
        self._pushed[slot.name] = (pid, digest)
        return answer

    def _write_state(self) -> None:
        """The file others find us by; also tells ``down`` whom to kill when we are dead."""
        children = {n: {"pid": s.pid, "create_time": s.create_time} for n, s in self.slots.items() if s.pid}
        gateway = self.slots["gateway"].last_port
        state = {
            "pid": os.getpid(),
            "create_time": self._me.create_time(),
            "control_url": f"http://127.0.0.1:{self.control_port}",
            "token": self.token,
            "gateway_url": f"http://127.0.0.1:{gateway}" if gateway else None,
            "ports": {name: slot.last_port for name, slot in self.slots.items()},
            "link_ports": self.link_ports,
            "children": children,
            "config": self.config.to_dict(),
            "started_at": self.started_at,
        }
        content = json.dumps(state, indent=1)
        if content == getattr(self, "_state", None):
            return
        partial = self.directory / ".state.json.partial"
        try:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(file, "w") as stream:
                stream.write(content)
            os.replace(partial, self.directory / "state.json")
        except OSError:
            return  # full disk: the old file is still whole, the next change tries again
        self._state = content

    # -- error budget -----------------------------------------------------------------------------------------------

    async def _scrape_loop(self) -> None:
        while True:
            await self._scrape()
            await asyncio.sleep(1.0)

    async def _scrape(self) -> None:
        """Add the gateway's counters to ours; a restarted gateway starts again from zero, as Prometheus expects."""
        async with self._scrape_lock:
            slot = self.slots["gateway"]
            if slot.port is None or not slot.running:
                return
            pid = slot.pid or 0
            try:
                _, state = await self.call(slot, "GET", "/state", None, 0.5)
            except _UNANSWERED:
                return
            known_pid, total, bad = self._last
            if known_pid != pid:
                total = bad = 0
            self._total += state["requests_total"] - total
            self._bad += state["errors_total"] - bad
            self._last = (pid, state["requests_total"], state["errors_total"])
            self._ring.append((time.monotonic(), self._total, self._bad))

    async def requests(self, window_s: float) -> dict[str, Any]:
        """Requests and bad ones (5xx) at the gateway in the last ``window_s`` seconds."""
        await self._scrape()
        now = time.monotonic()
        if not self._ring:
            return {"total": 0, "bad": 0, "window_s": window_s, "covered_s": 0.0, "age_s": None}
        newest = self._ring[-1]
        # The oldest count inside the window's start, so that the window is covered whole.
        oldest = self._ring[0]
        for entry in reversed(self._ring):
            oldest = entry
            if entry[0] <= now - window_s:
                break
        return {
            "total": newest[1] - oldest[1],
            "bad": newest[2] - oldest[2],
            "window_s": window_s,
            "covered_s": round(newest[0] - oldest[0], 3),
            "age_s": round(now - newest[0], 3),
        }

    # -- control API ------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """Everything, asked of the processes themselves just now."""
        slots = list(self.slots.values())
        readiness, faults = await asyncio.gather(
            asyncio.gather(*(self._readyz(slot) for slot in slots)), self.book.present()
        )
        processes = [
            {
                "name": slot.name,
                "role": slot.role.replace("_", "-"),
                "pid": slot.pid if slot.running else None,
                "alive": slot.running,
                "ready": ready,
                "reason": reason,
                "restarts": slot.restarts,
                "port": slot.port,
                "url": f"http://127.0.0.1:{slot.port}" if slot.port else None,
                "held_by": sorted({hold.split("/")[0] for hold in slot.holds}),
            }
            for slot, (ready, reason) in zip(slots, readiness, strict=True)
        ]
        complete = self._complete(processes)
        links = {name: self.link_ports[name] for name in self.links() if name in self.link_ports}
        return {
            "directory": str(self.directory),
            "supervisor": {"pid": os.getpid(), "create_time": self._me.create_time(), "started_at": self.started_at},
            "control_url": f"http://127.0.0.1:{self.control_port}",
            "gateway_url": next((p["url"] for p in processes if p["name"] == "gateway"), None),
            "ready": complete and all(process["ready"] for process in processes),
            "replicas": self.replicas,
            "mechanisms": dict(self.config.mechanisms),
            "model_sha256": self.model_sha256,
            "processes": processes,
            "links": {name: {"port": port, "url": f"http://127.0.0.1:{port}"} for name, port in links.items()},
            "faults": faults["faults"],
            "unanswered": faults["unanswered"],
        }

    def signals(self) -> dict[str, float]:
        """Gauges that cost nothing to read: for somebody who asks twenty times a second."""
        replicas = [slot for slot in self.slots.values() if slot.role == "inference"]
        return {
            "ready_replicas": sum(slot.ready for slot in replicas),
            "running_replicas": sum(slot.running for slot in replicas),
            "restarts": sum(slot.restarts for slot in self.slots.values()),
        }

    def _complete(self, processes: list[dict[str, Any]]) -> bool:
        """True when all replicas have slots and the gateway was told of all that are ready."""
        pid, digest = self._pushed.get("gateway", (None, ""))
        told = digest.count('"ready": true') if pid == self.slots["gateway"].pid else -1
        ready = sum(process["ready"] for process in processes if process["role"] == "inference")
        return len(self.links()) == self.replicas + 1 and told == ready

    async def _serve(self) -> web.AppRunner:
        registry = CollectorRegistry()
        Gauge("sandbox_processes_ready", "Processes that are ready", registry=registry).set_function(
            lambda: sum(slot.ready for slot in self.slots.values())
        )
        Gauge("sandbox_restarts", "Restarts of all processes", registry=registry).set_function(
            lambda: sum(slot.restarts for slot in self.slots.values())
        )

        async def metrics(request: web.Request) -> web.Response:
            return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

        async def health(request: web.Request) -> web.Response:
            return web.json_response({"alive": True})

        async def ready(request: web.Request) -> web.Response:
            done = (await self.status())["ready"]
            return web.json_response({"ready": done}, status=200 if done else 503)

        app = web.Application(middlewares=[self._gate])
        app.router.add_get("/healthz", health)
        app.router.add_get("/readyz", ready)
        app.router.add_get("/metrics", metrics)
        self._routes(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        sock = listen()
        self.control_port = sock.getsockname()[1]
        await web.SockSite(runner, sock).start()
        return runner

    def _routes(self, app: web.Application) -> None:
        async def status(request: web.Request) -> Any:
            return await self.status()

        async def signals(request: web.Request) -> Any:
            return self.signals()

        async def add_fault(request: web.Request) -> Any:
            return await self.book.add(await _json(request))

        async def remove_fault(request: web.Request) -> Any:
            lease = request.match_info["lease_id"]
            return {"lease_id": lease, "removed": await self.book.remove(lease), "tombstone": True}

        async def faults(request: web.Request) -> Any:
            return await self.book.present()

        async def scale(request: web.Request) -> Any:
            body = await _json(request)
            replicas = body.get("replicas") if isinstance(body, dict) else None
            if isinstance(replicas, bool) or not isinstance(replicas, int) or not 0 <= replicas <= MAX_REPLICAS:
                raise Refused(400, f"replicas must be a whole number from 0 to {MAX_REPLICAS}, not {replicas!r}")
            async with self.book.lock:
                await self.scale(replicas)
            return {"replicas": self.replicas}

        async def requests(request: web.Request) -> Any:
            text = request.query.get("window_s", "60")
            try:
                window_s = float(text)
            except ValueError:
                window_s = 0.0
            if not 0 < window_s <= _RING_S:
                raise Refused(400, f"window_s must be seconds, more than 0 and at most {_RING_S}, not {text!r}")
            return await self.requests(window_s)

        async def shutdown(request: web.Request) -> Any:
            # After the answer is on its way.
            asyncio.get_running_loop().call_later(0.02, self.stop.set)
            return {"stopping": True}

        for method, path, handler in (
            ("GET", "/status", status),
            ("GET", "/signals", signals),
            ("POST", "/faults", add_fault),
            ("DELETE", "/faults/{lease_id}", remove_fault),
            ("GET", "/faults", faults),
            ("PUT", "/scale", scale),
            ("GET", "/requests", requests),
            ("POST", "/shutdown", shutdown),
        ):
            app.router.add_route(method, path, _as_json(handler))

    @web.middleware
    async def _gate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        open_to_all = request.path in ("/healthz", "/readyz", "/metrics")
        given = request.headers.get(TOKEN_HEADER, "").encode()
        if not open_to_all and not secrets.compare_digest(given, self.token.encode()):
            return web.json_response({"error": f"{TOKEN_HEADER} is missing or wrong"}, status=403)
        return await handler(request)


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


def _detach() -> None:
    """Leave the caller's session; the launcher prints our pid and ends, so that nobody has to reap us."""
    pid = os.fork()
    if pid:
        os.write(1, f"{pid}\n".encode())
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)


def main() -> int:
    """Run the supervisor of ``--sandbox DIRECTORY``; with ``--detach`` in a session of its own."""
    parser = argparse.ArgumentParser(prog="mlchaos_dagster.sandbox.supervisor")
    parser.add_argument("--sandbox", required=True, type=Path)
    parser.add_argument("--detach", action="store_true")
    arguments = parser.parse_args()
    if arguments.detach:
        _detach()
    directory: Path = arguments.sandbox.resolve()
    lock = open(directory / "supervisor.lock", "w")  # noqa: SIM115 - held as long as we live
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.stderr.write(f"another supervisor runs in {directory}\n")
        return 1
    config = SandboxConfig.from_dict(json.loads((directory / "config.json").read_text()))
    asyncio.run(_run(directory, config))
    return 0


async def _run(directory: Path, config: SandboxConfig) -> None:
    await Supervisor(directory, config).run()


if __name__ == "__main__":
    sys.exit(main())
