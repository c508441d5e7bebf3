"""How a person, a signal or another process says stop: files, the lever, signals, the lease.

Files, because they work when Dagster does not, from any shell, and (empty) on a full disk. Nothing in here stops
anything: the watch loop asks, and decides.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mlchaos_dagster.engine.ports import Ledger
from mlchaos_dagster.errors import SpecError, StoreError
from mlchaos_dagster.settings import Home

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_UNSAID = "no reason was recorded"


class StopFiles:
    """Stop requests by run id, and the lever that stops everything and keeps new runs out."""

    def __init__(self, home: Home) -> None:
        self.directory = home.stops

    def request(self, run_id: str, reason: str) -> None:
        """Ask one run to stop.

        Raises:
            SpecError: that is no run id.
            StoreError: it could not be written.
        """
        if not RUN_ID.fullmatch(run_id):
            raise SpecError(f"{run_id!r} is not a run id: letters, digits, '-', '_' and '.' are allowed", "run")
        _mark(self.directory / f"run-{run_id}", reason)

    def requested(self, run_id: str) -> str | None:
        """The reason, once asked. A request that cannot be read is a request."""
        return _read(self.directory / f"run-{run_id}")

    def forget(self, run_id: str) -> None:
        """The run is over; its request may go. Never raises."""
        with contextlib.suppress(OSError):
            (self.directory / f"run-{run_id}").unlink()

    def pull_lever(self, reason: str) -> None:
        """Stop everything, keep new runs out until released. Raises StoreError."""
        _mark(self.directory / "lever", reason)

    def release_lever(self) -> bool:
        """Let runs in again; False when it was not pulled. Raises StoreError."""
        try:
            (self.directory / "lever").unlink()
        except FileNotFoundError:
            return False
        except OSError as e:
            raise StoreError(f"cannot release the lever: {e.strerror or e}") from e
        return True

    def lever(self) -> str | None:
        """The reason while pulled. A lever that cannot be read counts as pulled: unknown is never safe."""
        return _read(self.directory / "lever")


def _mark(path: Path, reason: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as e:
        raise StoreError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        with contextlib.suppress(OSError):  # the file's existence is the request; a full disk only loses the words
            os.write(descriptor, reason.encode(errors="replace"))
    finally:
        os.close(descriptor)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or _UNSAID
    except FileNotFoundError:
        return None
    except OSError as e:
        return f"{path.name} cannot be read: {e.strerror or e}"


class FileStop:
    """The stop file of one run, and the lever."""

    def __init__(self, stops: StopFiles, run_id: str) -> None:
        self.stops, self.run_id = stops, run_id

    def requested(self) -> tuple[str, str] | None:
        """(`lever` | `stop`, reason) once asked."""
        if (reason := self.stops.lever()) is not None:
            return ("lever", reason)
        if (reason := self.stops.requested(self.run_id)) is not None:
            return ("stop", reason)
        return None


class LeaseStop:
    """`stop_requested` on an open lease of the run, for who can reach the ledger only."""

    def __init__(self, ledger: Ledger, run_id: str) -> None:
        self.ledger, self.run_id = ledger, run_id

    def requested(self) -> tuple[str, str] | None:
        """(`stop`, reason) once asked. 50 µs a lease that is open."""
        try:
            leases = self.ledger.leases()
        except StoreError:
            return None  # renewals fail on it, too, and end the window with its reason
        for lease in leases:
            if lease.run_id == self.run_id and lease.stop_requested:
                return ("stop", lease.stop_requested)
        return None


class SignalStop:
    """Signals become a word that the watch loop reads; they never raise inside inject or recover.

    A context manager. The handlers assign attributes and nothing else: no lock that the interrupted code might
    hold (a `threading.Event` has one). Outside the main thread it installs nothing, since Python allows none there.
    """

    def __init__(self) -> None:
        self.name = ""
        """The first signal's name."""
        self.count = 0
        """All signals so far; the second one changes nothing else."""
        self._depth = 0
        self._former: dict[signal.Signals, Any] = {}

    def requested(self) -> tuple[str, str] | None:
        """(`signal`, its name) once one came."""
        return ("signal", f"{self.name} received") if self.name else None

    def __enter__(self) -> SignalStop:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            while self._former:
                number, handler = self._former.popitem()
                signal.signal(number, handler)

    def _install(self) -> None:
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        for number in (signal.Signals[n] for n in names if hasattr(signal, n)):
            former = signal.getsignal(number)
            if former is None:
                continue  # installed by C code: it could not be put back
            if number.name == "SIGHUP" and former is signal.SIG_IGN:
                continue  # nohup: the user wants the run to outlive the terminal
            self._former[number] = former
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        self.count += 1
