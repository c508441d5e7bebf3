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
import os
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from mlchaos_dagster.engine.files import sync_directory, write_json
from mlchaos_dagster.engine.lease_files import (
    DRIVER,
    ID,
    SLOT_END,
    SLOT_FENCE,
    SLOT_STOP,
    Entry,
    LeaseFiles,
    number,
    parse,
)
from mlchaos_dagster.engine.ports import Clock, Lease, Owner
from mlchaos_dagster.engine.processes import boot_id, is_local
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.errors import InternalError, LeaseRefused, StoreError
from mlchaos_dagster.settings import Home

_NOBODY = Owner(pid=0, started=0.0, boot_id="", host="")


_BACKUP_KEPT_S = 86_400.0


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
        self._files = LeaseFiles(directory, clock)

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
        if not ID.fullmatch(lease.id) or not DRIVER.fullmatch(lease.driver) or not lease.targets:
            raise InternalError(f"not a lease: id {lease.id!r}, driver {lease.driver!r}, targets {lease.targets!r}")
        try:
            self._files.prepare()
            with self._files.mutex(self.mutex_wait_s) as held:
                if not held:
                    raise StoreError(
                        f"the ledger {self.directory} is locked by {self._files.mutex_holder()} for more than"
                        f" {self.mutex_wait_s:g} s; nothing was injected"
                    )
                self._refuse(lease)
                lease = replace(lease, token=self._files.next_token())
                self._files.store_token(lease.token)
                self._files.ensure_ballast()
                self._files.write(lease)
                try:
                    self._refuse(lease)  # once more: a take-over that could not wait for the mutex may have hidden one
                except LeaseRefused:
                    self._files.discard(lease)
                    raise
                self._files.tidy()
                self._tidy_backups()
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
            self._files.making_room(lambda: self._files.count(lease.id))
        except OSError as e:
            self.check(lease)  # closed by another since the check above?
            raise StoreError(f"cannot renew the lease {lease.id}: {e.strerror or e}") from e

    def check(self, lease: Lease) -> None:
        """Read the file: before every mutation.

        Raises:
            LeaseRefused: the lease is fenced, closed, gone or unreadable.
        """
        base = f"{lease.id}.{lease.driver}"
        if (self._files.open / f"{base}.t{lease.token}.json").exists():
            return
        try:
            found = self._files.peek(self._files.open / f"{base}.json")["token"]
        except (OSError, ValueError, KeyError) as e:
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
        with self._files.mutex(self.takeover_wait_s):
            entry = self._files.find(lease.id)
            if entry is None:
                if self._closed_by(lease):
                    return
                raise LeaseRefused(f"lease {lease.id} cannot be closed: {self._fate(lease)}")
            token = self._files.token_of(entry)
            if token != lease.token:
                raise LeaseRefused(f"lease {lease.id} has token {token}, ours is {lease.token}: {self._fate(lease)}")
            try:
                self._files.put_away(entry)
            except OSError as e:
                raise StoreError(f"cannot close the lease {lease.id}: {e.strerror or e}") from e
        for leftover in (self._files.beats / lease.id, self._files.undo / f"{lease.id}.json"):
            with contextlib.suppress(OSError):
                leftover.unlink()
        if lease.targets:  # of a lease whose content was lost nobody can say that its backup is not needed
            shutil.rmtree(self.directory / "backups" / lease.id, ignore_errors=True)
        with contextlib.suppress(StoreError):
            facts = {"lease": lease.id, "token": lease.token, "at": self.clock.wall(), "evidence": list(evidence)}
            write_json(self._files.closed / f"{lease.id}.{lease.driver}.evidence.json", facts)

    # -- the observers' verbs ---------------------------------------------------------------------------------------

    def fence(self, lease_id: str, by: str) -> Lease:
        """Take the lease over: it gets a new name with a new token, which needs no room on the disk.

        Returns:
            The lease with its new token; of an unreadable file, its `stub`. The owner stays, to be killed.

        Raises:
            LeaseRefused: there is no such open lease.
            StoreError: not even a rename was possible.
        """
        with self._files.mutex(self.takeover_wait_s):
            for _ in range(5):  # without the mutex, another take-over may rename under our eyes
                entry = self._files.find(lease_id)
                if entry is None:
                    raise LeaseRefused(f"no open lease {lease_id}")
                token = self._files.next_token()
                with contextlib.suppress(OSError):  # the name carries it; a lost counter is made up for at the next one
                    self._files.store_token(token)
                path = self._files.open / f"{lease_id}.{entry.driver}.t{token}.json"
                try:
                    self._files.making_room(lambda old=entry.path, new=path: os.rename(old, new))
                except FileNotFoundError:
                    continue
                except OSError as e:
                    raise StoreError(f"cannot fence the lease {lease_id}: {e.strerror or e}") from e
                with contextlib.suppress(OSError):  # visible to all at once; durable only matters to a dead owner
                    sync_directory(self._files.open)
                with contextlib.suppress(OSError):
                    self._files.write_slot(lease_id, SLOT_FENCE, SLOT_END, by)
                lease = self.stub(path)
                try:
                    return self._files.load(Entry(path, lease_id, entry.driver, token))
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
        if self._files.find(lease_id) is None:
            raise LeaseRefused(f"no open lease {lease_id}")
        try:
            self._files.making_room(lambda: self._files.write_slot(lease_id, SLOT_STOP, SLOT_FENCE, reason or "stop"))
        except OSError as e:
            raise StoreError(f"cannot write the stop request of {lease_id}: {e.strerror or e}") from e

    def leases(self) -> tuple[Lease, ...]:
        """All open leases that can be read, by id."""
        return tuple(
            sorted((x for x in map(self._files.try_load, self._files.entries()) if x is not None), key=lambda x: x.id)
        )

    def read(self, lease_id: str) -> Lease | None:
        """One open lease, or None when it is closed, gone or unreadable."""
        entry = self._files.find(lease_id)
        return None if entry is None else self._files.try_load(entry)

    def is_open(self, lease_id: str) -> bool:
        """Whether there is an open lease of this id, readable or not."""
        return self._files.find(lease_id) is not None

    def unreadable(self) -> tuple[str, ...]:
        """Paths in `open/` that should be leases and cannot be read. Half-written temp files are none of them."""
        bad: list[str] = []
        for name in self._files.names():
            path = self._files.open / name
            entry = parse(path)
            try:
                if entry is None:
                    raise ValueError("not the name of a lease")
                self._files.load(entry)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                bad.append(str(path))
        return tuple(bad)

    def stub(self, path: Path | str) -> Lease | None:
        """An unreadable lease, rebuilt from its name: enough for a driver that labels its faults with the lease id.

        Owner, targets and undo data are unknown (empty), the environment is read from the beat file where that is whole.
        None when the name tells nothing.
        """
        entry = parse(Path(path))
        if entry is None:
            return None
        return Lease(
            id=entry.lease_id,
            run_id="",
            experiment="",
            environment=self._files.environment_of(entry.lease_id),
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

    def settled(self) -> bool:
        """Wait until every `open` that is under way has ended: what it wrote is in `leases` from then on.

        A barrier after pulling the lever, for an `open` that looked at the lever before.

        Returns:
            False when the mutex is stuck, after `takeover_wait_s`; its holder will meet the lever when it goes on, since
            `open` looks again after it has written.
        """
        if not self.directory.is_dir():
            return True
        with self._files.mutex(self.takeover_wait_s) as held:
            return held

    def beat(self, lease_id: str) -> int:
        """The renewal counter; 0 when it cannot be read (an observer then sees no renewals)."""
        return number(self._files.slots(lease_id)[:SLOT_STOP])

    def overdue(self, lease: Lease) -> float:
        """Seconds past the deadline on the monotonic clock that owner and observer share; -inf when they share none.

        Wall time would let a clock step, or another host's clock, take a fault from a live owner.
        """
        entry = self._files.find(lease.id)
        if entry is None or not is_local(lease.owner) or lease.owner.boot_id != boot_id():
            return float("-inf")
        try:
            opened = float(self._files.peek(entry.path)["opened_mono"])
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
        descriptor = -1
        while descriptor < 0 and (entry := self._files.find(lease_id)) is not None:
            try:
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another sweeper fenced it between these two lines: it has a new name
            except OSError:
                break
        if descriptor < 0:
            yield False
            return
        try:
            yield self._files.flock(descriptor, wait_s)
        finally:
            os.close(descriptor)

    # -- inside -----------------------------------------------------------------------------------------------------

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

    def _tidy_backups(self) -> None:
        """Copies of processes that died between copy and lease. Old ones only: a copy is made before its lease is written."""
        with contextlib.suppress(OSError):
            for path in (self.directory / "backups").iterdir():
                old = time.time() - path.stat().st_mtime > _BACKUP_KEPT_S
                if old and self._files.find(path.name) is None and not self._was_lost(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _was_lost(self, lease_id: str) -> bool:
        """Whether a lease of this id was closed without being readable: then its backup is kept for people."""
        return any(self._files.closed.glob(f"{lease_id}.*"))

    def _closed_by(self, lease: Lease) -> bool:
        for path in self._files.closed.glob(f"{lease.id}.{lease.driver}*.json"):
            entry = parse(path)
            if entry is not None and self._files.token_of(entry) == lease.token:
                return True
        return False

    def _fate(self, lease: Lease) -> str:
        by = self._files.slots(lease.id)[SLOT_FENCE:SLOT_END].decode(errors="replace").strip()
        if self._files.find(lease.id) is None:
            return "it is closed or gone"
        return f"taken over by {by}" if by else "it was taken over, or its file is unreadable"
