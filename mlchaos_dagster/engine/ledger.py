"""The lease ledger as files: who may fault what, who holds which target, who took over from whom.

    open/<lease_id>.<driver>.json        a lease; its presence here means that a fault may be live
    open/<lease_id>.<driver>.t<N>.json   the same after a take-over: the fencing token N is in the name
    beats/<lease_id>                     preallocated slots: renewals, stop request, who fenced
    closed/                              leases whose fault was proven gone, and the evidence
    undo/                                undo data too large for a lease, by address and SHA-256
    mutex, token, ballast                lock, fencing counter, 64 KiB to give up when the disk is full

What must work on a full disk is a rename or a write in place: fencing, renewing, stopping, closing. Opening may fail,
and then nothing is injected. Knows nothing of drivers, recovery and processes: see sweep.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from mlchaos_dagster.engine.files import sync_directory, write_atomic, write_json
from mlchaos_dagster.engine.ports import Clock, Lease, Owner
from mlchaos_dagster.engine.processes import boot_id, is_local
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.errors import InternalError, LeaseRefused, StoreError
from mlchaos_dagster.settings import Home

_T = TypeVar("_T")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_DRIVER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,127})\.([A-Za-z0-9_-]{1,64})(?:\.t(\d{1,18}))?\.json")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEASE = TypeAdapter(Lease)
_UNDO_MAX = 64 * 1024
_BALLAST = 64 * 1024
_CLOSED_KEPT = 500
"""Closed leases kept; records keep the evidence for good."""
_NOBODY = Owner(pid=0, started=0.0, boot_id="", host="")
# Slots of a beat file: renewal counter, stop request, who fenced. Written in place, never in one another's way.
_SLOT_STOP, _SLOT_FENCE, _SLOT_END = 32, 544, 1024


@dataclass(frozen=True)
class _Entry:
    """A lease file, as far as its name tells."""

    path: Path
    lease_id: str
    driver: str
    token: int | None
    """From the name, after a take-over; it overrules the content."""


class FileLedger:
    """`ports.Ledger` in a directory that all processes of this host (or a shared disk with flock) see.

    Args:
        directory: `Home.ledger`; made at the first `open`.
        clock: For waiting and for deadlines.
        stops: Where the lever is; default: beside `directory`.
        mutex_wait_s: How long `open` waits for another process that is opening.
        takeover_wait_s: How long fencing and closing wait for the mutex before they go on without it: its holder may
            be stopped (SIGSTOP), and a fault must go all the same. Both are single renames; `open` looks twice.
    """

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        stops: StopFiles | None = None,
        *,
        mutex_wait_s: float = 5.0,
        takeover_wait_s: float = 1.0,
    ) -> None:
        self.directory, self.clock = directory, clock
        self.stops = stops or StopFiles(Home(directory.parent))
        self.mutex_wait_s, self.takeover_wait_s = mutex_wait_s, takeover_wait_s
        self._open, self._closed = directory / "open", directory / "closed"
        self._beats, self._undo = directory / "beats", directory / "undo"

    # -- the owner's verbs ------------------------------------------------------------------------------------------

    def open(self, lease: Lease) -> Lease:
        """Write the lease durably and lock its targets, both under one mutex.

        Returns:
            The lease with its token.

        Raises:
            LeaseRefused: a target is held, a lease file is unreadable, or the lever is pulled.
            StoreError: it could not be written, or the mutex is stuck.

        On failure: no lease is left; nothing may be injected.
        """
        if not _ID.fullmatch(lease.id) or not _DRIVER.fullmatch(lease.driver) or not lease.targets:
            raise InternalError(f"not a lease: id {lease.id!r}, driver {lease.driver!r}, targets {lease.targets!r}")
        try:
            self._prepare()
            with self._mutex(self.mutex_wait_s) as held:
                if not held:
                    raise StoreError(
                        f"the ledger {self.directory} is locked by {self._mutex_holder()} for more than"
                        f" {self.mutex_wait_s:g} s; nothing was injected"
                    )
                self._refuse(lease)
                lease = replace(lease, token=self._next_token())
                self._store_token(lease.token)
                self._ensure_ballast()
                self._write(lease)
                try:
                    self._refuse(lease)  # once more: a take-over that could not wait for the mutex may have hidden one
                except LeaseRefused:
                    self._discard(lease)
                    raise
                self._tidy()
        except OSError as e:
            raise StoreError(f"cannot write the lease {lease.id}: {e.strerror or e}") from e
        return lease

    def renew(self, lease: Lease) -> None:
        """Count one renewal, in place.

        Raises:
            LeaseRefused: fenced, closed or gone.
            StoreError: it could not be counted; observers will soon take the lease over.
        """
        self.check(lease)
        try:
            self._making_room(lambda: self._count(lease.id))
        except OSError as e:
            raise StoreError(f"cannot renew the lease {lease.id}: {e.strerror or e}") from e

    def check(self, lease: Lease) -> None:
        """Read the file: before every mutation.

        Raises:
            LeaseRefused: the lease is fenced, closed, gone or unreadable.
        """
        base = f"{lease.id}.{lease.driver}"
        if (self._open / f"{base}.t{lease.token}.json").exists():
            return
        try:
            found = json.loads((self._open / f"{base}.json").read_bytes())["token"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise LeaseRefused(f"lease {lease.id} is no longer ours: {self._fate(lease)}") from e
        if found != lease.token:
            raise LeaseRefused(f"lease {lease.id} has token {found}, ours is {lease.token}")

    def close(self, lease: Lease, evidence: Sequence[str]) -> None:
        """Give the targets back. Only after `active` is false.

        The rename comes first: it needs no room, and evidence that cannot be written must not keep a lease open.
        Closing twice is fine (the first answer may have been lost).

        Raises:
            LeaseRefused: somebody took the lease over; closing is theirs now.
            StoreError: the file could be neither renamed nor removed; the lease stays open.
        """
        with self._mutex(self.takeover_wait_s):
            entry = self._find(lease.id)
            if entry is None:
                if self._closed_by(lease):
                    return
                raise LeaseRefused(f"lease {lease.id} cannot be closed: {self._fate(lease)}")
            token = self._token(entry)
            if token != lease.token:
                raise LeaseRefused(f"lease {lease.id} has token {token}, ours is {lease.token}: {self._fate(lease)}")
            try:
                self._put_away(entry)
            except OSError as e:
                raise StoreError(f"cannot close the lease {lease.id}: {e.strerror or e}") from e
        for leftover in (self._beats / lease.id, self._undo / f"{lease.id}.json"):
            with contextlib.suppress(OSError):
                leftover.unlink()
        with contextlib.suppress(StoreError):
            facts = {"lease": lease.id, "token": lease.token, "at": self.clock.wall(), "evidence": list(evidence)}
            write_json(self._closed / f"{lease.id}.{lease.driver}.evidence.json", facts)

    # -- the observers' verbs ---------------------------------------------------------------------------------------

    def fence(self, lease_id: str, by: str) -> Lease:
        """Take the lease over: it gets a new name with a new token, which needs no room on the disk.

        Returns:
            The lease with its new token; of an unreadable file, its `stub`. The owner stays, to be killed.

        Raises:
            LeaseRefused: there is no such open lease.
            StoreError: not even a rename was possible.
        """
        with self._mutex(self.takeover_wait_s):
            for _ in range(5):  # without the mutex, another take-over may rename under our eyes
                entry = self._find(lease_id)
                if entry is None:
                    raise LeaseRefused(f"no open lease {lease_id}")
                token = self._next_token()
                with contextlib.suppress(OSError):  # the name carries it; a lost counter is made up for at the next one
                    self._store_token(token)
                path = self._open / f"{lease_id}.{entry.driver}.t{token}.json"
                try:
                    self._making_room(lambda old=entry.path, new=path: os.rename(old, new))
                except FileNotFoundError:
                    continue
                except OSError as e:
                    raise StoreError(f"cannot fence the lease {lease_id}: {e.strerror or e}") from e
                with contextlib.suppress(OSError):  # visible to all at once; durable only matters to a dead owner
                    sync_directory(self._open)
                with contextlib.suppress(OSError):
                    self._write_slot(lease_id, _SLOT_FENCE, _SLOT_END, by)
                lease = self.stub(path)
                try:
                    return self._load(_Entry(path, lease_id, entry.driver, token))
                except (OSError, ValueError):
                    if lease is not None:
                        return lease
        raise StoreError(f"cannot fence the lease {lease_id}: it keeps changing")

    def request_stop(self, lease_id: str, reason: str) -> None:
        """Ask the owner to stop; it shows in `Lease.stop_requested`. In place: works on a full disk.

        Raises:
            LeaseRefused: there is no such open lease.
            StoreError: it could not be written.
        """
        if self._find(lease_id) is None:
            raise LeaseRefused(f"no open lease {lease_id}")
        try:
            self._making_room(lambda: self._write_slot(lease_id, _SLOT_STOP, _SLOT_FENCE, reason or "stop"))
        except OSError as e:
            raise StoreError(f"cannot write the stop request of {lease_id}: {e.strerror or e}") from e

    def leases(self) -> tuple[Lease, ...]:
        """All open leases that can be read, by id."""
        return tuple(sorted((x for x in map(self._try_load, self._entries()) if x is not None), key=lambda x: x.id))

    def read(self, lease_id: str) -> Lease | None:
        """One open lease, or None when it is closed, gone or unreadable."""
        entry = self._find(lease_id)
        return None if entry is None else self._try_load(entry)

    def unreadable(self) -> tuple[str, ...]:
        """Paths in `open/` that should be leases and cannot be read. Half-written temp files are none of them."""
        bad: list[str] = []
        for name in self._names():
            path = self._open / name
            entry = _parse(path)
            try:
                if entry is None:
                    raise ValueError("not the name of a lease")
                self._load(entry)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                bad.append(str(path))
        return tuple(bad)

    def stub(self, path: Path | str) -> Lease | None:
        """An unreadable lease, rebuilt from its name: enough for a driver that labels its faults with the lease id.

        Owner, environment, targets and undo data are unknown (empty). None when the name tells nothing.
        """
        entry = _parse(Path(path))
        if entry is None:
            return None
        return Lease(
            id=entry.lease_id,
            run_id="",
            experiment="",
            environment="",
            driver=entry.driver,
            kind="",
            targets=(),
            params={},
            undo={},
            duration_s=0.0,
            opened_wall=0.0,
            deadline_wall=0.0,
            owner=_NOBODY,
            token=entry.token or 0,
        )

    def beat(self, lease_id: str) -> int:
        """The renewal counter; 0 when it cannot be read (an observer then sees no renewals)."""
        return _number(self._slots(lease_id)[:_SLOT_STOP])

    def overdue(self, lease: Lease) -> float:
        """Seconds past the deadline on the monotonic clock that owner and observer share; -inf when they share none.

        Wall time would let a clock step, or another host's clock, take a fault from a live owner.
        """
        entry = self._find(lease.id)
        if entry is None or not is_local(lease.owner) or lease.owner.boot_id != boot_id():
            return float("-inf")
        try:
            opened = float(json.loads(entry.path.read_bytes())["opened_mono"])
        except (OSError, ValueError, KeyError, TypeError):
            return float("-inf")
        return self.clock.monotonic() - opened - (lease.deadline_wall - lease.opened_wall)

    @contextlib.contextmanager
    def recovering(self, lease_id: str, wait_s: float) -> Generator[bool, None, None]:
        """Be the only sweeper of this lease: flock on the file itself, which follows it through its renames.

        Yields:
            True when ours; False when another sweeper still has it after `wait_s` seconds (it may be stopped: fence
            it), or when there is nothing to lock.
        """
        entry = self._find(lease_id)
        descriptor = -1
        if entry is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        if descriptor < 0:
            yield False
            return
        try:
            yield self._flock(descriptor, wait_s)
        finally:
            os.close(descriptor)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        made = not self.directory.is_dir()
        for path in (self._open, self._closed, self._beats, self._undo):
            path.mkdir(parents=True, exist_ok=True)
        if made:
            sync_directory(self.directory)
            sync_directory(self.directory.parent)

    def _refuse(self, lease: Lease) -> None:
        """Raises LeaseRefused unless every target is free and the ledger is whole."""
        if (reason := self.stops.lever()) is not None:
            raise LeaseRefused(f"the lever is pulled: {reason}")
        if bad := self.unreadable():
            raise LeaseRefused(f"unreadable lease files, a fault may be live: {', '.join(bad)}; mlchaos recover")
        for other in self.leases():
            if other.id == lease.id and other.token != lease.token:
                raise LeaseRefused(f"lease {lease.id} is open already")
            if other.id != lease.id and (shared := sorted(set(other.targets) & set(lease.targets))):
                raise LeaseRefused(
                    f"{', '.join(shared)} held by run {other.run_id} ({other.experiment}), lease {other.id}"
                )

    def _write(self, lease: Lease) -> None:
        """All or nothing. Raises StoreError, OSError."""
        try:
            undo = json.dumps(lease.undo).encode()
            stored: dict[str, Any] = {**asdict(lease), "opened_mono": self.clock.monotonic()}
            if len(undo) > _UNDO_MAX:
                write_atomic(self._undo / f"{lease.id}.json", undo)
                stored["undo"] = {}
                stored["undo_file"] = {"name": f"{lease.id}.json", "sha256": hashlib.sha256(undo).hexdigest()}
            # A real write, not a hole: renewals find their block reserved. Durable with the directory below.
            write_atomic(self._beats / lease.id, _number_slot(0) + b" " * (_SLOT_END - _SLOT_STOP))
            write_json(self._open / f"{lease.id}.{lease.driver}.json", stored)
        except BaseException:  # also an interrupt: a lease that open() did not return must not stay
            self._discard(lease)
            raise

    def _discard(self, lease: Lease) -> None:
        name = f"{lease.id}.{lease.driver}.json"
        for path in (self._open / name, self._beats / lease.id, self._undo / f"{lease.id}.json"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _tidy(self) -> None:
        """Under the mutex nobody else writes: temp files in `open/` are of the dead. Never raises."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._open):
                if name.startswith(".tmp-"):
                    (self._open / name).unlink()
            closed = list(self._closed.iterdir())
            if len(closed) > 4 * _CLOSED_KEPT:
                closed.sort(key=lambda p: p.stat().st_mtime)
                for path in closed[: -2 * _CLOSED_KEPT]:
                    path.unlink()

    def _put_away(self, entry: _Entry) -> None:
        try:
            self._making_room(lambda: os.rename(entry.path, self._closed / entry.path.name))
        except OSError:
            entry.path.unlink()  # better no trace of a closed lease than an open one; raises OSError
        for directory in (self._open, self._closed):
            with contextlib.suppress(OSError):
                sync_directory(directory)

    def _names(self) -> list[str]:
        """Names in `open/`, listed until two listings agree: one during a rename may miss both names."""
        before: list[str] | None = None
        for _ in range(10):
            try:
                names = sorted(n for n in os.listdir(self._open) if n.endswith(".json") and not n.startswith("."))
            except FileNotFoundError:
                return []
            except OSError as e:
                raise StoreError(f"cannot read the ledger {self._open}: {e.strerror or e}") from e
            if names == before:
                break
            before = names
        return before or []

    def _entries(self) -> list[_Entry]:
        return [e for e in (_parse(self._open / n) for n in self._names()) if e is not None]

    def _find(self, lease_id: str) -> _Entry | None:
        found = [e for e in self._entries() if e.lease_id == lease_id]
        return max(found, key=lambda e: e.token or 0, default=None)

    def _try_load(self, entry: _Entry) -> Lease | None:
        try:
            return self._load(entry)
        except (OSError, ValueError):
            return None

    def _load(self, entry: _Entry) -> Lease:
        """Raises OSError, ValueError."""
        data = json.loads(entry.path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("not a lease")
        stored: dict[str, Any] = {**data}
        if "undo_file" in stored:
            undo = (self._undo / str(stored["undo_file"]["name"])).read_bytes()
            if hashlib.sha256(undo).hexdigest() != stored["undo_file"]["sha256"]:
                raise ValueError("the undo data is damaged")
            stored["undo"] = json.loads(undo)
        lease = _LEASE.validate_python(stored)
        if (lease.id, lease.driver) != (entry.lease_id, entry.driver):
            raise ValueError("name and content differ")
        stop = self._slots(lease.id)[_SLOT_STOP:_SLOT_FENCE].decode(errors="replace").strip()
        return replace(lease, token=entry.token or lease.token, stop_requested=stop or lease.stop_requested)

    def _token(self, entry: _Entry) -> int:
        if entry.token is not None:
            return entry.token
        lease = self._try_load(entry)
        return 0 if lease is None else lease.token

    def _closed_by(self, lease: Lease) -> bool:
        for path in self._closed.glob(f"{lease.id}.{lease.driver}*.json"):
            entry = _parse(path)
            if entry is not None and self._token(entry) == lease.token:
                return True
        return False

    def _fate(self, lease: Lease) -> str:
        by = self._slots(lease.id)[_SLOT_FENCE:].decode(errors="replace").strip()
        if self._find(lease.id) is None:
            return "it is closed or gone"
        return f"taken over by {by}" if by else "it was taken over, or its file is unreadable"

    # -- tokens, slots, room ----------------------------------------------------------------------------------------

    def _next_token(self) -> int:
        try:
            counted = _number((self.directory / "token").read_bytes())
        except OSError:
            counted = 0
        known = [counted, *(self._token(e) for e in self._entries())]
        if not counted:  # first use, or a damaged counter: what was closed tells how far it got
            known += [self._token(e) for p in self._closed.glob("*.json") if (e := _parse(p)) is not None]
        return max(known) + 1

    def _store_token(self, token: int) -> None:
        def write() -> None:
            descriptor = os.open(self.directory / "token", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(descriptor, _number_slot(token), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        self._making_room(write)

    def _ensure_ballast(self) -> None:
        path = self.directory / "ballast"
        if not path.exists():
            write_atomic(path, os.urandom(_BALLAST))  # random: a compressing file system must keep the room, too

    def _making_room(self, act: Callable[[], _T]) -> _T:
        """Do it; on a full disk give the ballast up and do it again. Raises OSError."""
        try:
            return act()
        except OSError as e:
            if e.errno not in _FULL:
                raise
            with contextlib.suppress(OSError):
                (self.directory / "ballast").unlink()
            return act()

    def _slots(self, lease_id: str) -> bytes:
        try:
            return (self._beats / lease_id).read_bytes().replace(b"\0", b" ")
        except OSError:
            return b""

    def _count(self, lease_id: str) -> None:
        descriptor = os.open(self._beats / lease_id, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, _number_slot(_number(os.pread(descriptor, _SLOT_STOP, 0)) + 1), 0)
        finally:
            os.close(descriptor)

    def _write_slot(self, lease_id: str, start: int, end: int, text: str) -> None:
        data = " ".join(text.split()).encode()[: end - start]
        descriptor = os.open(self._beats / lease_id, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, data.ljust(end - start), start)
        finally:
            os.close(descriptor)

    # -- the mutex --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _mutex(self, wait_s: float) -> Generator[bool, None, None]:
        """Around 'read open leases, write mine'. Yields whether it was got in time."""
        descriptor = -1
        with contextlib.suppress(OSError):
            descriptor = os.open(self.directory / "mutex", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            held = descriptor >= 0 and self._flock(descriptor, wait_s)
            if held:
                with contextlib.suppress(OSError):  # only so that a stuck mutex can be explained
                    os.pwrite(descriptor, f"{os.getpid():<20d}\n".encode(), 0)
            yield held
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _flock(self, descriptor: int, wait_s: float) -> bool:
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
            self.clock.sleep(0.005)

    def _mutex_holder(self) -> str:
        try:
            return f"process {(self.directory / 'mutex').read_text().strip()}"
        except OSError:
            return "another process"


def _parse(path: Path) -> _Entry | None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return _Entry(path, match[1], match[2], int(match[3]) if match[3] else None)


def _number(slot: bytes) -> int:
    text = slot.split(b"\n")[0].strip()
    return int(text) if text.isdigit() else 0


def _number_slot(number: int) -> bytes:
    return f"{number:020d}\n".encode().ljust(_SLOT_STOP)
