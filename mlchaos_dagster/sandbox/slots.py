"""A slot: the supervisor's place for one process, restarted with back-off unless a fault holds it down."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from .config import SandboxConfig
from .truth import TruthLog

_KILL_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


class Slot:
    """One process's place. All methods are called on the supervisor's event loop."""

    def __init__(
        self,
        name: str,
        role: str,
        directory: Path,
        settings: Callable[[], dict[str, Any]],
        config: SandboxConfig,
        restart: bool,
        truth: TruthLog,
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.role = role
        self.restart = restart
        self.holds: set[str] = set()
        self.ready = False
        self.restarts = 0
        self.oom_kills = 0
        """Times its group was killed for being over its memory limit (see ``limits``)."""
        self.port: int | None = None
        self.last_port = 0
        self.pid: int | None = None
        self.create_time: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = directory
        self._settings = settings
        self._config = config
        self._truth = truth
        self._changed = changed
        self._stopping = False
        self._start_now = False
        self._exits = 0
        self._wake = asyncio.Event()
        self._exited = asyncio.Event()
        self._kill_lease: str | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a process in this slot until ``stop``."""
        first = True
        while not self._stopping:
            if self.holds or not (first or self.restart or self._start_now):
                await self._sleep(None)
                continue
            if not first and not self._start_now:
                wait = min(self._config.backoff_max_s, self._config.backoff_initial_s * 2 ** (self._exits - 1))
                await self._sleep(wait)
                if self._stopping or self.holds:
                    continue
            if not first:
                self.restarts += 1
            first = self._start_now = False
            began = time.monotonic()
            try:
                self._spawn()
            except OSError as error:
                self._truth.write("start_failed", self.name, error=str(error))
            else:
                await self._exited.wait()
            stable = time.monotonic() - began >= self._config.backoff_reset_s
            self._exits = 1 if stable else self._exits + 1

    def hold(self, key: str) -> None:
        """Keep the slot empty from now on (the process in it still has to be killed)."""
        self.holds.add(key)

    def release(self, key: str) -> bool:
        """Take one hold away; with the last one the process is started at once. True if it was there."""
        if key not in self.holds:
            return False
        self.holds.discard(key)
        if not self.holds and not self._stopping and not self.running:
            self._start_now = True
            self._exits = 0
            self._wake.set()
        return True

    async def kill(self, lease: str | None = None, how: str = "SIGKILL", within_s: float = 1.0) -> int | None:
        """Signal the process and wait for its death; return the pid that was hit, None when there was none.

        After ``within_s`` without an exit the process may still be there: ask ``gone``.
        """
        process = self._process
        if process is None or process.poll() is not None:
            return None
        self._kill_lease = lease
        process.send_signal(_KILL_SIGNALS[how])
        self._truth.write("killed", self.name, process.pid, lease, signal=how)
        try:
            await asyncio.wait_for(self._exited.wait(), within_s)
        except asyncio.TimeoutError:
            pass
        return process.pid

    async def stop(self, how: str = "SIGKILL") -> None:
        """Empty the slot for good; a process that does not end on ``how`` within a second is killed."""
        self._stopping = True
        self._wake.set()
        await self.kill(how=how)
        await self.kill()

    @property
    def running(self) -> bool:
        """True when the kernel says that the process is there."""
        return self._process is not None and self._process.poll() is None

    async def _sleep(self, wait_s: float | None) -> None:
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), wait_s)
        except asyncio.TimeoutError:
            pass

    # -- process ----------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        reader, writer = os.pipe()
        settings = {**self._settings(), "name": self.name, "port": self.last_port, "report_fd": writer}
        command = [sys.executable, "-m", "mlchaos_dagster.sandbox.child", self.role]
        command += ["--sandbox", str(self._directory), "--name", self.name]
        self._exited.clear()
        try:
            with open(self._directory / "logs" / f"{self.name}.log", "ab") as log:
                # No preexec_fn: it is not safe once there are threads. The child asks for its own death signal.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writer,), cwd=self._directory
                )
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._process = process
        self.pid = process.pid
        try:
            self.create_time = psutil.Process(process.pid).create_time()
        except psutil.Error:
            self.create_time = None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # it died at once; the watcher will say so
        self._truth.write("started", self.name, process.pid, restarts=self.restarts)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(process, reader, loop), name=self.name, daemon=True).start()
        self._changed()

    def _watch(self, process: subprocess.Popen[bytes], reader: int, loop: asyncio.AbstractEventLoop) -> None:
        """Thread: pass on what the child reports; the pipe's end is its death, known to the millisecond."""
        with open(reader, "rb") as reports:
            for line in reports:
                loop.call_soon_threadsafe(self._reported, process, json.loads(line))
            code = process.wait()
            moment = {"at": time.time(), "mono": time.monotonic()}
        try:
            loop.call_soon_threadsafe(self._gone, process, code, moment)
        except RuntimeError:
            pass  # the loop is closed: everything is over

    def _reported(self, process: subprocess.Popen[bytes], facts: dict[str, Any]) -> None:
        if process is not self._process or not self.running:
            return
        if "port" in facts:
            self.port = self.last_port = facts["port"]
        if "ready" in facts:
            self.mark_ready(facts["ready"], at=facts["at"], mono=facts["mono"])
        self._changed()

    def _gone(self, process: subprocess.Popen[bytes], code: int, moment: dict[str, float]) -> None:
        if process is not self._process:
            return
        if process.stdin is not None:
            try:
                process.stdin.close()
            except OSError:
                pass
        self._truth.write("exited", self.name, process.pid, self._kill_lease, code=code, **moment)
        self._kill_lease = None
        self.mark_ready(False, **moment)
        self.port = self.pid = self.create_time = None
        self._exited.set()
        self._changed()

    def mark_ready(self, ready: bool, at: float | None = None, mono: float | None = None) -> None:
        """Note readiness, with the moment at which it changed."""
        if ready != self.ready:
            self.ready = ready
            self._truth.write("ready" if ready else "unready", self.name, self.pid, at=at, mono=mono)
            self._changed()


def is_living_process(slot: Slot | None, pid: int) -> bool:
    """True when that very pid is still this slot's process (the slot reaped all others itself)."""
    if slot is None or slot.pid != pid or not slot.running:
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
