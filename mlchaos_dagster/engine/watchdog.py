"""The ring outside the process: a watchdog that takes a run's fault away when its owner dies or hangs.

Two sides. `Watchdog` is the logic, over ports, for the process in watcher.py. `start_watchdog` and `WatchdogHandle` are
what the owner holds: a pipe whose end means that the owner is gone, and a counter that shows that the watchdog lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from uuid import uuid4

from mlchaos_dagster.engine.files import write_atomic
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import Clock, Lease, Owner, SystemClock
from mlchaos_dagster.engine.processes import Processes
from mlchaos_dagster.engine.sweep import OVERDUE_S, Drivers, RenewalObserver, SweepLedger, clear_command, sweep
from mlchaos_dagster.errors import StoreError
from mlchaos_dagster.settings import Home

TICK_S = 0.2
"""Between two looks and heartbeats of the watchdog. A dead owner is seen at once, through the pipe."""
SILENT_S = 2.0
"""Heartbeat silence after which the owner takes its watchdog for lost: ten missed beats, so not mere load."""
GIVE_UP_S = 600.0
"""How long the watchdog keeps trying; after that the sweeper and people have it, and guards refuse."""
_LONGEST_PAUSE_S = 30.0
BEAT_BYTES = 32

Pipe = Literal["open", "bye", "eof"]
"""`bye`: the owner said so before it closed its end; `eof`: it did not, so it died."""


class Watchdog:
    """Watches the leases of one run.

    Args:
        run_id: Whose leases.
        owner: The process that holds the other end of the pipe.
        ledger: Where the leases are.
        drivers: For recovering.
        clock: The watchdog's own.
        incidents: Log.
        ttl_s: Silence, in seconds, after which the owner counts as hung.
        pipe: State of the pipe; never blocks.
        processes: Whether the owner runs, and how to end it.
        told: Called with one line for the process's log.
    """

    def __init__(
        self,
        run_id: str,
        owner: Owner,
        ledger: SweepLedger,
        drivers: Drivers,
        clock: Clock,
        incidents: IncidentLog,
        *,
        ttl_s: float,
        pipe: Callable[[], Pipe],
        processes: Processes,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.run_id, self.owner, self.ledger, self.drivers = run_id, owner, ledger, drivers
        self.clock, self.incidents, self.pipe, self.processes, self.told = clock, incidents, pipe, processes, told
        self.observer = RenewalObserver(ledger, clock, ttl_s)
        self.known: dict[str, Lease] = {}
        """Leases of the run as last read: should a file become unreadable, its undo data is still here."""
        self._first_try: float | None = None
        self._next_try, self._pause = float("-inf"), TICK_S

    def leases(self) -> list[Lease]:
        """Open leases of the run, also those whose file has become unreadable. Raises StoreError."""
        found = {x.id: x for x in self.ledger.leases() if x.run_id == self.run_id}
        for lease_id, lease in self.known.items():
            if lease_id not in found and self.ledger.is_open(lease_id):
                found[lease_id] = lease
        self.known = dict(found)
        return list(found.values())

    def tick(self, *, leave: bool = False) -> bool:
        """One look, and what follows from it.

        Args:
            leave: Somebody asked this process to end; it does so once no lease is open.

        Returns:
            False when there is nothing left to watch, or it has given up.

        Raises:
            StoreError: the ledger cannot be read now; try again.
        """
        # Before the leases are listed: what a dead owner opened is in the list, and it opens nothing after.
        pipe, gone = self.pipe(), not self.processes.is_running(self.owner)
        leases = self.leases()
        if not leases:
            # A closed pipe with a living owner and no lease: a lost handle. It may open one yet, so stay.
            return not (gone or leave or pipe == "bye") or self._strays()
        self.observer.look(leases)
        why = self._why(leases, pipe, gone)
        if not why or self.clock.monotonic() < self._next_try:
            return True
        # Who said good-bye injects no more, and has a record to write: it is fenced, but not killed.
        return self._act(leases, why, spare=pipe == "bye" and not gone)

    def _strays(self) -> bool:
        """Lease files that were unreadable before their run could be read: ours perhaps, or nobody's.

        Whoever owns one is refused at its next check, so taking a silent one over does no live run harm.

        Returns:
            Whether there are any that may yet turn out to be left behind.
        """
        strays = [x for x in map(self.ledger.stub, self.ledger.unreadable()) if x is not None]
        self.observer.look(strays)
        silent = [x for x in strays if self.observer.silent(x)]
        if silent and self.clock.monotonic() >= self._next_try:
            return self._act(silent, f"unreadable, and no renewal was seen for {self.observer.ttl_s:g} s", spare=False)
        return any(not self.observer.moved(x) for x in strays)

    def _why(self, leases: list[Lease], pipe: Pipe, gone: bool) -> str:
        if gone:
            return f"its owner, process {self.owner.pid}, is gone"
        if pipe == "eof":
            return f"its owner, process {self.owner.pid}, died (its pipe ended)"
        if pipe == "bye":
            return "its owner left it open"
        if any(self.observer.silent(x) for x in leases):
            return f"no renewal was seen for {self.observer.ttl_s:g} s"
        if any(self.ledger.overdue(x) > OVERDUE_S for x in leases):
            return f"it is more than {OVERDUE_S:g} s past its deadline"
        return ""

    def _act(self, leases: list[Lease], why: str, *, spare: bool) -> bool:
        if self._first_try is None:
            self._first_try = self.clock.monotonic()
        self.told(f"{why}: taking over {', '.join(x.id for x in leases)}")
        results = sweep(
            self.ledger,
            self.drivers,
            self.clock,
            self.incidents,
            only={x.id for x in leases},
            force=why,
            mine=self.owner if spare else None,
            by=f"watchdog {os.getpid()}",
            processes=self.processes,
            known=self.known,
        )
        for result in results:
            self.told(f"{result.lease.id}: {result.action} {'; '.join(result.evidence)} {result.error}".rstrip())
        now = self.clock.monotonic()
        if all(x.clean and not x.error for x in results):
            self._pause = TICK_S
            return True
        if now - self._first_try >= GIVE_UP_S:
            for result in results:
                self.incidents.write(
                    "unclean",
                    f"the watchdog gave lease {result.lease.id} up after {GIVE_UP_S:g} s: {result.error}",
                    lease=result.lease.id,
                    command=clear_command(result.lease.id),
                )
            return False
        self._next_try, self._pause = now + self._pause, min(self._pause * 2, _LONGEST_PAUSE_S)
        return True


class WatchdogHandle:
    """`ports.Watcher`: the watchdog process as its owner sees it. Made by `start_watchdog`."""

    def __init__(self, process: subprocess.Popen[bytes], beat: Path, log: Path, clock: Clock) -> None:
        self.process, self.beat, self.log, self.clock = process, beat, log, clock
        self._count, self._moved_at, self._asked_at = 0, float("-inf"), float("-inf")
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the watchdog process."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether its heartbeat moved within `SILENT_S`. False until the first beat, and once it has exited."""
        if self._closed or self.process.poll() is not None:
            return False
        now = self.clock.monotonic()
        unasked, self._asked_at = now - self._asked_at, now
        if self._look():
            return True
        if self._count and unasked > SILENT_S / 2:
            # Nobody asked for long: this process, or the whole machine, was stopped. Give it two beats' time.
            for _ in range(10):
                self.clock.sleep(TICK_S / 5)
                if self._look():
                    return True
        return False

    def wait_alive(self, timeout_s: float = 10.0) -> bool:
        """Wait for the first beat; False when it exits or does not come."""
        end = self.clock.monotonic() + timeout_s
        while not self.alive():
            if self.process.poll() is not None or self.clock.monotonic() >= end:
                return False
            self.clock.sleep(0.01)
        return True

    def close(self) -> None:
        """Say good-bye and let go. With no lease of the run open it exits at once, else it recovers first."""
        if self._closed:
            return
        self._closed = True
        stdin = self.process.stdin
        if stdin is not None:
            with contextlib.suppress(OSError):  # it is gone already
                os.write(stdin.fileno(), b"bye")
            with contextlib.suppress(OSError):
                stdin.close()
        try:
            self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            # It is recovering, or stopped. Not ours to end; a thread reaps it, so that it leaves no zombie.
            threading.Thread(target=self.process.wait, name="watchdog-reaper", daemon=True).start()
            return
        self._remove_files()

    def _remove_files(self) -> None:
        with contextlib.suppress(OSError):
            self.beat.unlink()
        with contextlib.suppress(OSError):
            if self.log.stat().st_size == 0:
                self.log.unlink()

    def _look(self) -> bool:
        now = self.clock.monotonic()
        try:
            text = self.beat.read_bytes().split(b"\n")[0].strip()
        except OSError:
            text = b""
        count = int(text) if text.isdigit() else 0
        if count != self._count:
            self._count, self._moved_at = count, now
        return now - self._moved_at <= SILENT_S


def start_watchdog(
    home: Home,
    run_id: str,
    owner: Owner,
    lease_ttl_s: float,
    *,
    environment: str,
    driver: str = "",
    python: str = sys.executable,
    factory: str = "mlchaos_dagster.wiring:driver",
    clock: Clock | None = None,
) -> WatchdogHandle:
    """Start the watchdog of one run. Returns at once; `alive` turns true with its first beat (about 0.3 s).

    Args:
        home: State directory.
        run_id: Whose leases it watches.
        owner: This process.
        lease_ttl_s: Silence after which it takes the owner for hung.
        environment: For building drivers.
        driver: Driver to build in advance, so that nothing has to be imported when it matters.
        python: Interpreter.
        factory: `module:function`, called with (driver name, home, environment name).
        clock: The owner's, for `alive`.

    Raises:
        StoreError: it could not be started, or its files not be written; nothing may be injected.
    """
    directory = home.ledger / "watchers"
    name = f"{run_id}-{uuid4().hex[:8]}"
    beat, log = directory / f"{name}.beat", directory / f"{name}.log"
    write_atomic(beat, b"0\n".rjust(BEAT_BYTES, b"0"))  # written in full now: its beats need no room later
    command = [python, "-m", "mlchaos_dagster.watcher", "--home", str(home.root), "--run-id", run_id]
    command += ["--environment", environment, "--owner", json.dumps(asdict(owner)), "--ttl", str(lease_ttl_s)]
    command += ["--beat", str(beat), "--driver", driver, "--factory", factory]
    try:
        with open(log, "ab") as output:
            # The pipe's write end stays with this process alone: Python opens it close-on-exec. A session of its own,
            # so that no Ctrl-C, hang-up or killed process group takes the watchdog along with its owner.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, bufsize=0
            )
    except OSError as e:
        with contextlib.suppress(OSError):
            beat.unlink()
        raise StoreError(f"cannot start the watchdog: {e.strerror or e}") from e
    return WatchdogHandle(process, beat, log, clock or SystemClock())
