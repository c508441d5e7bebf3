"""How leases lie on the disk: names, loading, slots written in place, the fencing counter, the mutex.

The layout is drawn in ledger.py, which owns the protocol. Here is what each file operation promises when the disk is
full, a process is stopped in the middle of it, or two of them meet. Knows nothing of who may do what.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from mlchaos_dagster.engine.files import sync_directory, write_atomic, write_json
from mlchaos_dagster.engine.ports import Clock, Lease
from mlchaos_dagster.errors import StoreError

_T = TypeVar("_T")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
"""Lease ids: no dots, so that a file name has one reading."""
DRIVER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(rf"({ID.pattern})\.({DRIVER.pattern})(?:\.t(\d{{1,18}}))?\.json")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEASE = TypeAdapter(Lease)
_UNDO_MAX = 64 * 1024
"""Bytes of undo data kept inside a lease."""
_BALLAST = 64 * 1024
"""Bytes given up when the disk is full: a directory block and some, on a file system that copies on write."""
_CLOSED_KEPT = 1000
"""Files kept in `closed/`; records keep the evidence for good."""
_POLL_S = 0.005
# Slots of a beat file: renewal counter, stop request, who fenced. Written in place, never in one another's way.
SLOT_STOP, SLOT_FENCE, SLOT_END = 32, 544, 1024
_ENVIRONMENT_BYTES = 128
"""Behind the slots: the lease's environment, so that a lease whose file is damaged is still looked for where it is."""


@dataclass(frozen=True)
class Entry:
    """A lease file, as far as its name tells."""

    path: Path
    lease_id: str
    driver: str
    token: int | None
    """From the name, after a take-over; it overrules the content."""


class LeaseFiles:
    """The files of one ledger directory.

    Args:
        directory: Made by `prepare`; reading a ledger that was never written is fine.
        clock: For waiting.
    """

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory, self.clock = directory, clock
        self.open, self.closed = directory / "open", directory / "closed"
        self._undo_seen: dict[str, tuple[tuple[str, int, int, int], dict[str, Any]]] = {}
        self.beats, self.undo = directory / "beats", directory / "undo"

    def names(self) -> list[str]:
        """Names in `open/`, listed until two listings agree: one during a rename may miss both names."""
        before: list[str] | None = None
        for _ in range(10):
            try:
                names = sorted(n for n in os.listdir(self.open) if n.endswith(".json") and not n.startswith("."))
            except FileNotFoundError:
                return []
            except OSError as e:
                raise StoreError(f"cannot read the ledger {self.open}: {e.strerror or e}") from e
            if names == before:
                break
            before = names
        return before or []

    def entries(self) -> list[Entry]:
        """All lease files with a name that can be read. Raises StoreError."""
        return [e for e in (parse(self.open / n) for n in self.names()) if e is not None]

    def find(self, lease_id: str) -> Entry | None:
        """The file of one open lease. Raises StoreError."""
        found = [e for e in self.entries() if e.lease_id == lease_id]
        return max(found, key=lambda e: e.token or 0, default=None)

    def try_load(self, entry: Entry) -> Lease | None:
        """The lease, or None when it is gone or unreadable."""
        try:
            return self.load(entry)
        except (OSError, ValueError):
            return None

    def load(self, entry: Entry) -> Lease:
        """Read one lease.

        Raises:
            FileNotFoundError: it is gone: closed, or renamed by a take-over.
            OSError, ValueError: it is there and cannot be read.
        """
        stored = self.peek(entry.path)
        if "undo_sha256" in stored:
            stored["undo"] = self._large_undo(entry.lease_id, stored["undo_sha256"])
        lease = _LEASE.validate_python(stored)
        if (lease.id, lease.driver) != (entry.lease_id, entry.driver):
            raise ValueError("name and content differ")
        stop = self.slots(lease.id)[SLOT_STOP:SLOT_FENCE].decode(errors="replace").strip()
        return replace(lease, token=entry.token or lease.token, stop_requested=stop or lease.stop_requested)

    def _large_undo(self, lease_id: str, sha256: str) -> dict[str, Any]:
        """Megabytes perhaps, and asked for ten times a second: read again only when the file is another. Raises ValueError."""
        path = self.undo / f"{lease_id}.json"
        try:
            found = path.stat()
            seen = (sha256, found.st_ino, found.st_size, found.st_mtime_ns)
            known = self._undo_seen.get(lease_id)
            if known is None or known[0] != seen:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise ValueError("its undo data is damaged")
                self._undo_seen[lease_id] = (seen, json.loads(content))
        except FileNotFoundError as e:  # not to be mistaken for a lease that is gone
            raise ValueError("its undo data is lost") from e
        return self._undo_seen[lease_id][1]

    def peek(self, path: Path) -> dict[str, Any]:
        """The raw content of a lease file. Raises OSError, ValueError."""
        try:
            return {**json.loads(path.read_bytes())}
        except (TypeError, RecursionError) as e:
            raise ValueError("not a lease") from e

    def token_of(self, entry: Entry) -> int:
        """The token now in force; 0 when neither name nor content tells."""
        if entry.token is not None:
            return entry.token
        lease = self.try_load(entry)
        return 0 if lease is None else lease.token

    # -- writing and removing ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the directories, durably. Raises OSError."""
        made = not self.directory.is_dir()
        for path in (self.open, self.closed, self.beats, self.undo):
            path.mkdir(parents=True, exist_ok=True)
        if made:
            sync_directory(self.directory)
            sync_directory(self.directory.parent)

    def write(self, lease: Lease) -> None:
        """All or nothing. Raises StoreError, OSError."""
        try:
            undo = json.dumps(lease.undo).encode()
            stored: dict[str, Any] = {**asdict(lease), "opened_mono": self.clock.monotonic()}
            if len(undo) > _UNDO_MAX:
                write_atomic(self.undo / f"{lease.id}.json", undo)
                stored["undo"] = {}
                stored["undo_sha256"] = hashlib.sha256(undo).hexdigest()
            # A real write, not a hole: renewals find their block reserved. Durable with the directory below.
            environment = lease.environment.encode()[:_ENVIRONMENT_BYTES].ljust(_ENVIRONMENT_BYTES)
            write_atomic(self.beats / lease.id, number_slot(0) + b" " * (SLOT_END - SLOT_STOP) + environment)
            write_json(self.open / f"{lease.id}.{lease.driver}.json", stored)
        except BaseException:  # also an interrupt: a lease that open() did not return must not stay
            self.discard(lease)
            raise

    def discard(self, lease: Lease) -> None:
        """Remove what `write` made. Never raises."""
        name = f"{lease.id}.{lease.driver}.json"
        for path in (self.open / name, self.beats / lease.id, self.undo / f"{lease.id}.json"):
            with contextlib.suppress(OSError):
                path.unlink()

    def tidy(self) -> None:
        """Under the mutex nobody else writes: temp files in `open/` are of the dead. Never raises."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.open):
                if name.startswith(".tmp-"):
                    (self.open / name).unlink()
            closed = list(self.closed.iterdir())
            if len(closed) > 2 * _CLOSED_KEPT:  # rarely, and then many at once
                closed.sort(key=lambda p: p.stat().st_mtime)
                for path in closed[:-_CLOSED_KEPT]:
                    path.unlink()

    def put_away(self, entry: Entry) -> None:
        """Out of `open/`, which needs no room; kept in `closed/` when that is possible. Raises OSError."""
        try:
            self.making_room(lambda: os.rename(entry.path, self.closed / entry.path.name))
        except OSError:
            entry.path.unlink()  # better no trace of a closed lease than an open one; raises OSError
        for directory in (self.open, self.closed):
            with contextlib.suppress(OSError):
                sync_directory(directory)

    # -- tokens, slots, room ----------------------------------------------------------------------------------------

    def next_token(self) -> int:
        """Greater than every token given out before. Raises StoreError."""
        try:
            counted = number((self.directory / "token").read_bytes())
        except OSError:
            counted = 0
        known = [counted, *(self.token_of(e) for e in self.entries())]
        if not counted:  # first use, or a damaged counter: what was closed tells how far it got
            known += [self.token_of(e) for p in self.closed.glob("*.json") if (e := parse(p)) is not None]
        return max(known) + 1

    def store_token(self, token: int) -> None:
        """Count it durably, in place. Raises OSError."""

        def write() -> None:
            descriptor = os.open(self.directory / "token", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(descriptor, number_slot(token), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        self.making_room(write)

    def ensure_ballast(self) -> None:
        """Reserve some room for a full disk. Raises StoreError."""
        path = self.directory / "ballast"
        if not path.exists():
            write_atomic(path, os.urandom(_BALLAST))  # random: a compressing file system must keep the room, too

    def making_room(self, act: Callable[[], _T]) -> _T:
        """Do it; on a full disk give the ballast up and do it again. Raises OSError."""
        try:
            return act()
        except OSError as e:
            if e.errno not in _FULL:
                raise
            with contextlib.suppress(OSError):
                (self.directory / "ballast").unlink()
            return act()

    def slots(self, lease_id: str) -> bytes:
        """The whole beat file; empty when it cannot be read."""
        try:
            return (self.beats / lease_id).read_bytes().replace(b"\0", b" ")
        except OSError:
            return b""

    def environment_of(self, lease_id: str) -> str:
        """Of a lease whose file cannot be read; empty when this cannot, either."""
        return self.slots(lease_id)[SLOT_END:].decode(errors="replace").strip()

    def count(self, lease_id: str) -> None:
        """One renewal: one write in place, no fsync (it means nothing after a power loss). Raises OSError."""
        descriptor = os.open(self.beats / lease_id, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, number_slot(number(os.pread(descriptor, SLOT_STOP, 0)) + 1), 0)
        finally:
            os.close(descriptor)

    def write_slot(self, lease_id: str, start: int, end: int, text: str) -> None:
        """Put one line of text into a slot. Raises OSError."""
        data = " ".join(text.split()).encode(errors="replace")[: end - start]
        descriptor = os.open(self.beats / lease_id, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, data.ljust(end - start), start)
        finally:
            os.close(descriptor)

    # -- the mutex --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def mutex(self, wait_s: float) -> Generator[bool, None, None]:
        """Around 'read open leases, write mine'. Yields whether it was got in time."""
        descriptor = -1
        with contextlib.suppress(OSError):
            descriptor = os.open(self.directory / "mutex", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            held = descriptor >= 0 and self.flock(descriptor, wait_s)
            if held:
                with contextlib.suppress(OSError):  # only so that a stuck mutex can be explained
                    os.pwrite(descriptor, f"{os.getpid():<20d}\n".encode(), 0)
            yield held
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def flock(self, descriptor: int, wait_s: float) -> bool:
        """Whether the exclusive lock was got within `wait_s` seconds."""
        end = self.clock.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as e:
                if e.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
                    return False
            if self.clock.monotonic() >= end:
                return False
            self.clock.sleep(_POLL_S)

    def mutex_holder(self) -> str:
        """Who holds the mutex, in words."""
        try:
            return f"process {(self.directory / 'mutex').read_text().strip()}"
        except OSError:
            return "another process"


def parse(path: Path) -> Entry | None:
    """Read a lease file's name; None when it is none."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return Entry(path, match[1], match[2], int(match[3]) if match[3] else None)


def number(slot: bytes) -> int:
    """A number slot's value; 0 when damaged."""
    text = slot.split(b"\n")[0].strip()
    return int(text) if text.isdigit() else 0


def number_slot(number: int) -> bytes:
    """A number, as long as its slot."""
    return f"{number:020d}\n".encode().ljust(SLOT_STOP)
