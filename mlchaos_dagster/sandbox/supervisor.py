"""The supervisor: starts and watches every process of one sandbox, and is the one address that faults are asked at.

Started detached by :mod:`.api`. Its death, by whatever signal, ends all its children (see :mod:`.lifeline`), and with
them every fault. Control API: JSON on loopback, header ``X-Sandbox-Token``; see :mod:`.control`.
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
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from . import account
from .config import SandboxConfig
from .connections import Connections
from .control import serve
from .fault_book import FaultBook
from .faults import Refused
from .handlers import build
from .limits import MemoryLimits
from .parts import Part, part, with_required
from .request_ring import Counts, RequestRing
from .service import TOKEN_HEADER
from .slots import Slot
from .state_file import StateFile
from .truth import TruthLog

_STATE_EVERY_S = 0.1
_POLL_S = 0.1
_POLL_STEADY_S = 0.5
_POLL_STARTING_S = 0.2
"""A child reports its readiness itself, at once; asking more often only slows its start down."""
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
        self.connections = Connections(self)
        self.parts: dict[str, Part] = {}
        self._polled: set[str] = set()
        self.states: dict[str, tuple[float, dict[str, Any]]] = {}
        """Process of a part → (monotonic time, its GET /state)."""
        self.book = FaultBook(
            self.slots, self.connections.links, self.call, self.truth, directory, lambda kind: build(kind, self)
        )
        self.limits = MemoryLimits(self.slots, config.memory_limit_bytes, self.truth)
        self.requests = RequestRing(self._count_requests)
        self.session: aiohttp.ClientSession
        self.me = psutil.Process()
        self._state = StateFile(directory)
        self._dirty = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Set up, serve until told to stop, take everything down."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop.set)
        (self.directory / "logs").mkdir(exist_ok=True)
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.truth.write("supervisor_started", "supervisor", os.getpid())
        runner, self.control_port = await serve(self)
        try:
            for name in ("feature-store", "proxy-feature-store", "proxy-inference", "gateway"):
                self._add_slot(name)
            for task in (self._reconcile, self.requests.watch, self.book.watch, self.limits.watch):
                self._start(task())
            self._start(self._set_up())
            await self.stop.wait()
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*(slot.stop() for slot in self.slots.values()), return_exceptions=True)
            self.truth.write("supervisor_stopped", "supervisor", os.getpid())
            self._state.remove()
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

    def start_parts(self, names: Iterable[str]) -> list[str]:
        """Bring further parts up, with what they require; returns at once, readiness follows. All parts there are.

        Raises:
            Refused: 400, there is no such part.
        """
        try:
            wanted = with_required(names)
        except KeyError as error:
            raise Refused(400, f"no part {error.args[0]!r}") from None
        for name in wanted:
            if name in self.parts:
                continue
            one = self.parts[name] = part(name)
            self.truth.write("part_started", name)
            for process in one.processes:
                self._add_slot(process.name, process.role)
            if one.task is not None:
                self._start(one.task(self))
        for name in self.slots:
            self._poll_state_of(name)
        self._changed()
        return list(self.parts)

    def _poll_state_of(self, name: str) -> None:
        """Ask a process for its state from now on, if some part is about it. Proxies say nothing."""
        globs = [glob for one in self.parts.values() for glob in (*one.watches, *(p.name for p in one.processes))]
        asked = self.slots[name].role != "proxy" and any(fnmatchcase(name, glob) for glob in globs)
        if asked and name not in self._polled:
            self._polled.add(name)
            self._start(self._poll_state(name))

    async def _poll_state(self, name: str) -> None:
        """Task: what a process says of itself, for signals."""
        while (slot := self.slots.get(name)) is not None:
            if slot.running and slot.port is not None:
                pid = slot.pid
                try:
                    status, state = await self.call(slot, "GET", "/state", None, 0.5)
                except _UNANSWERED:
                    status, state = 0, {}
                if status == 200 and slot.pid == pid:
                    self.states[name] = (time.monotonic(), state)
            await asyncio.sleep(_STATE_EVERY_S)
        self._polled.discard(name)
        self.states.pop(name, None)

    def _add_slot(self, name: str, role: str = "") -> Slot:
        role = role or (name.split("-")[0] if name != "feature-store" else "feature_store")
        restart = role == "proxy" or self.config.mechanisms["restart"]
        settings = partial(self._settings, name)
        slot = Slot(name, role, self.directory, settings, self.config, restart, self.truth, self._changed)
        self.slots[name] = slot
        self._start(slot.run())
        self._start(self._poll(slot))
        self._poll_state_of(name)
        return slot

    def _settings(self, name: str) -> dict[str, Any]:
        """Everything a child is told, on its standard input."""
        config = self.config.to_dict()
        for one in self.parts.values():
            if one.settings is not None:
                config |= one.settings(self, name)
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

    def scale(self, replicas: int, **why: Any) -> list[Slot]:
        """Change the number of replicas, under the book's lock; ``why`` goes to the truth log.

        Returns:
            Slots that are out of service now, the highest numbers: ``retire`` them when the lock is released.

        Raises:
            Refused: 409, a fault is on one that would have to go.
        """
        gone = [n for n in self.slots if n.startswith("inference-") and int(n.split("-")[1]) > replicas]
        for name in gone:
            if leases := self.book.on(name):
                raise Refused(409, f"{name} cannot be scaled away: lease {leases[0]} has a fault on it")
        self.truth.write("scaled", "inference", replicas=replicas, before=self.replicas, **why)
        self.replicas = replicas
        slots = [self.slots.pop(name) for name in gone]
        self._sync_replicas()
        return slots

    async def retire(self, slots: list[Slot]) -> None:
        """End the processes of slots that were scaled away."""
        if slots:
            await self.connections.push_endpoints()  # no new requests for them, and time to answer those they have
        await asyncio.gather(*(slot.stop("SIGTERM") for slot in slots))

    def _changed(self) -> None:
        self._dirty.set()

    async def _poll(self, slot: Slot) -> None:
        """Keep a slot's readiness true; a child also reports changes itself, which is faster."""
        while self.slots.get(slot.name) is slot and not self.stop.is_set():
            if slot.port is not None and slot.running:
                pid = slot.pid
                ready = (await self.readyz(slot))[0]
                if slot.pid == pid and slot.running and slot.port is not None:
                    slot.mark_ready(ready)
            if not slot.ready:
                await asyncio.sleep(_POLL_STARTING_S)
            else:
                await asyncio.sleep(_POLL_S if slot.role == "inference" else _POLL_STEADY_S)

    async def readyz(self, slot: Slot) -> tuple[bool, str]:
        """Whether a process says that it is ready, and why not."""
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

    async def _count_requests(self) -> Counts | None:
        """The gateway's counters; None when it does not tell."""
        slot = self.slots["gateway"]
        if slot.port is None or not slot.running:
            return None
        pid = slot.pid or 0
        try:
            _, state = await self.call(slot, "GET", "/state", None, 0.5)
        except _UNANSWERED:
            return None
        return pid, state["requests_total"], state["errors_total"]

    # -- wiring -----------------------------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        """Task: keep proxies, gateway and state.json in step with what runs where."""
        while True:
            try:
                await asyncio.wait_for(self._dirty.wait(), 0.5)
            except asyncio.TimeoutError:
                pass
            self._dirty.clear()
            await self.connections.push()
            self._write_state()

    def _write_state(self) -> None:
        self._state.write(account.state(self))

    def link_ports(self) -> dict[str, int]:
        """Link → the port that its callers use."""
        ports = self.connections.ports
        return {link: ports[link] for link in self.connections.links() if link in ports}


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
