"""The watchdog's process: `python -m mlchaos_dagster.watcher`, started by `engine.watchdog.start_watchdog`.

Small on purpose: it starts in a fraction of a second, and drivers are imported in a thread, beside the heartbeat.
Its standard input is a pipe that only its owner holds open.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

from mlchaos_dagster import wiring
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import Driver, Lease, Owner, SystemClock
from mlchaos_dagster.engine.processes import SystemProcesses
from mlchaos_dagster.engine.watchdog import BEAT_BYTES, GIVE_UP_S, TICK_S, Pipe, Watchdog
from mlchaos_dagster.settings import Home


class OwnersPipe:
    """Standard input: it ends when the owner does, however that happens."""

    def __init__(self, descriptor: int = 0) -> None:
        self.descriptor = descriptor
        self._said, self._ended = b"", False

    def state(self) -> Pipe:
        """Reads what is there; never blocks."""
        while not self._ended and select.select([self.descriptor], [], [], 0)[0]:
            try:
                chunk = os.read(self.descriptor, 64)
            except OSError:
                chunk = b""
            self._said += chunk
            self._ended = not chunk
        if not self._ended:
            return "open"
        return "bye" if self._said.startswith(b"bye") else "eof"

    def wait(self, seconds: float) -> None:
        """Until something comes, but not longer."""
        if self._ended:
            time.sleep(seconds)
        else:
            select.select([self.descriptor], [], [], seconds)


class Beat:
    """The heartbeat: a counter written in place, which needs no room on the disk. Moves only after a tick that worked."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def move(self) -> None:
        """One beat. Never raises: who cannot beat must watch all the same."""
        self.count += 1
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, f"{self.count}\n".rjust(BEAT_BYTES, "0").encode(), 0)
            finally:
                os.close(descriptor)
        except OSError as e:
            log(f"no heartbeat: {e}")


class Prepared:
    """Drivers by name and environment, built once, and in advance as soon as a lease shows which.

    A failure is not kept: the next call tries again.
    """

    def __init__(self, factory: str, home: Home, environment: str) -> None:
        self.factory, self.home, self.environment = factory, home, environment
        self._built: dict[tuple[str, str], Driver] = {}
        self._lock = threading.Lock()
        self._asked: set[tuple[str, str]] = set()

    def __call__(self, name: str, environment: str) -> Driver:
        """Build it, or wait for the thread that does. Raises whatever the factory raises."""
        key = (name, environment or self.environment)
        with self._lock:
            if key not in self._built:
                module, _, function = self.factory.partition(":")
                make: Callable[[str, Home, str], Driver] = getattr(importlib.import_module(module), function)
                self._built[key] = make(name, self.home, key[1])
            return self._built[key]

    def ahead(self, name: str, environment: str) -> None:
        """Start building it, if nobody has."""
        key = (name, environment or self.environment)
        if name and key not in self._asked:
            self._asked.add(key)
            threading.Thread(target=self._try, args=key, name="prepare-driver", daemon=True).start()

    def _try(self, name: str, environment: str) -> None:
        try:
            self(name, environment)
        except Exception as e:  # noqa: BLE001 - only an attempt; the call that needs it reports
            log(f"driver {name!r} cannot be built yet: {type(e).__name__}: {e}")


def log(line: str) -> None:
    """One line into the log file; a full disk must not stop a recovery."""
    try:
        os.write(2, f"{time.strftime('%H:%M:%S')} {line}\n".encode())
    except OSError:
        pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch until the run is over and none of its leases is open."""
    leave: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        leave.append(number)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), note)
    options = _parse(arguments)
    home, clock = Home(Path(options.home)), SystemClock()
    prepared = Prepared(options.factory, home, options.environment)
    pipe = OwnersPipe()
    watchdog = Watchdog(
        options.run_id,
        Owner(**json.loads(options.owner)),
        wiring.ledger(home),
        prepared,
        clock,
        IncidentLog(home.incidents, clock),
        ttl_s=options.ttl,
        pipe=pipe.state,
        processes=SystemProcesses(),
        told=log,
    )
    beat, well_at = Beat(Path(options.beat)), clock.monotonic()
    while True:
        try:
            if not watchdog.tick(leave=bool(leave)):
                return 0
            beat.move()
            well_at = clock.monotonic()
            prepared.ahead(options.driver, "")
            _prepare(prepared, watchdog.known.values())
        except Exception as e:  # noqa: BLE001 - the last ring must not break; without beats the owner aborts
            log(f"{type(e).__name__}: {e}")
            if pipe.state() != "open" and clock.monotonic() - well_at > GIVE_UP_S:
                return 1
            clock.sleep(TICK_S)
        pipe.wait(TICK_S)


def _prepare(prepared: Prepared, leases: Iterable[Lease]) -> None:
    for lease in leases:
        prepared.ahead(lease.driver, lease.environment)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlchaos_dagster.watcher", description=__doc__)
    parser.add_argument("--home", required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--owner", required=True, help="JSON of ports.Owner")
    parser.add_argument("--ttl", type=float, required=True, help="seconds of silence after which the owner is hung")
    parser.add_argument("--beat", required=True, help="heartbeat file, written by the owner beforehand")
    parser.add_argument("--driver", default="")
    parser.add_argument("--factory", default="mlchaos_dagster.wiring:driver")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
