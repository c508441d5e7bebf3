"""Faults on the rows of a feature store: drift, nulls, staleness. Acts on its SQLite file from outside, as any writer may.

Where a fault must act to last: ingestion derives what is served from the table `source` every few seconds. So drift and
nulls damage the source (and what was derived from it, so that nobody waits for the next pass), and for staleness a trigger
drops every later update of the frozen rows and their stamps are set back. A table named after the lease marks the rows.

Each verb is one transaction: it happened or it did not, wherever a process dies. The fault has no deadline of its own, and
it is in the file: it outlives the sandbox, and is taken away without one, too. What others wrote meanwhile is kept: a row is
put back only while it still holds our damage. (An update that the trigger dropped is lost, as it is when rows freeze.)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import sqlite3
import time
from collections.abc import Generator, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.feature_rows import (
    Found,
    Row,
    damage,
    digest,
    is_store,
    look,
    marked_rows,
    marks,
    put_back,
    recorded,
    transaction,
)
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.sandbox import api
from mlchaos_dagster.sandbox.tombstones import read_tombstones

NAME = "features"
_PREFIX = "features:"
_BUSY_S = 2.0
"""How long to wait for somebody else's transaction; theirs take milliseconds."""
_STEP_ROWS = 1000
_HEADER = b"SQLite format 3\0"
_ASK_S = 1.0
_LOOKED_AT = 5
"""Touched rows that the store itself is asked for."""


class FeaturesDriver:
    """Driver for the feature store of the sandbox in one directory. Every call is bounded to about five seconds, with 100,000 rows and half of them
    touched, too.

    Undo data is about 200 bytes for each touched row.
    """

    name = NAME
    faults = frozenset({"feature_drift", "feature_nulls", "feature_stale"})
    self_limiting: frozenset[str] = frozenset()
    """A row has no deadline."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def resolve(self, target: Target) -> tuple[str, ...]:
        """`features:NAME` for each database file of the sandbox that matches one of the globs, sorted.

        Raises:
            DriverUnavailable: no sandbox is up.
        """
        if not api.is_alive(self.directory):
            raise DriverUnavailable(f"no sandbox is up in {self.directory}", driver=NAME, verb="resolve")
        globs = [glob.strip() for glob in target.select.split(",")]
        names = (path.name for path in (self.directory / "data").glob("*.sqlite"))
        return tuple(sorted(_PREFIX + name for name in names if any(fnmatchcase(name, glob) for glob in globs)))

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target | None = None,
        backup: Path | None = None,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """The rows that will be touched, as they are, and the SHA-256 over them; which, is drawn by the backup's name.

        Raises:
            DriverUnavailable: no sandbox with ingestion is up, or its database cannot be read.
            DriverError: a target is no feature store, or has a fault of this kind already.
        """
        state = api.read_state(self.directory) or {}
        if not api.is_alive(self.directory) or "features" not in state.get("parts", ()):
            said = f"no sandbox with part features is up in {self.directory}: nobody would refresh features"
            raise DriverUnavailable(said, driver=NAME, verb="undo")
        rng = random.Random(backup.name if backup is not None else None)
        files: dict[str, Any] = {}
        for done, one in enumerate(targets):
            step(done, len(targets))
            with _opened(self._path(one), DriverUnavailable, "undo", "", read_only=True) as database:
                files[one] = self._snapshot(database, one, float(params["fraction"]), rng)
        return {"directory": str(self.directory.resolve()), "files": files}

    def _snapshot(
        self, database: sqlite3.Connection, target: str, fraction: float, rng: random.Random
    ) -> dict[str, Any]:
        if not is_store(database):
            raise DriverError(f"{target} is no feature store", driver=NAME, verb="undo")
        if left := marks(database):
            said = f"{target} still has the fault of {left[0]} in it; mlchaos recover takes it away"
            raise DriverError(said, driver=NAME, verb="undo")
        ids = [entity for (entity,) in database.execute("SELECT entity_id FROM source ORDER BY entity_id")]
        if not ids:
            raise DriverError(f"{target} has no rows", driver=NAME, verb="undo")
        picked = set(rng.sample(ids, max(1, round(fraction * len(ids)))))
        every = database.execute("SELECT entity_id, vector FROM source ORDER BY entity_id").fetchall()
        rows = [[entity, vector] for entity, vector in every if entity in picked]
        std = [value for (value,) in database.execute("SELECT std FROM schema ORDER BY feature")]
        return {"rows": rows, "std": std, "sha256": digest(vector for _, vector in rows)}

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Damage the rows, in one transaction for each file. Rows that others changed since the lease are left alone.

        Raises:
            DriverUnavailable: the database cannot be written; nothing was touched.
            InjectFailed: refused (fenced, too late, nothing left to damage). On failure: earlier targets have the fault.
        """
        directory = self._directory(lease)
        for target in lease.targets:
            rows = recorded(lease, target)
            with _opened(self._path(target, directory), DriverUnavailable, "inject", lease.id) as database:
                with transaction(database):
                    # Under the lock: whoever recovers buries first and then waits for us.
                    if lease.id in read_tombstones(directory):
                        said = "the lease was recovered and can never inject again"
                        raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
                    if time.time() >= lease.deadline_wall:
                        said = "the lease's deadline has passed"
                        raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
                    if not damage(database, lease, _stepping(rows, step)):
                        said = f"{target}: every row was changed by others since the lease was written"
                        raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Drop the trigger, put back what still holds our damage, and refuse the lease for ever.

        A file that is gone holds no fault. Without undo data the marks in the file tell what was there.

        Raises:
            RecoverFailed: a database cannot be written, there is none to look at for a lease whose content was lost, or
                the lease cannot be buried. What could be put back is.
        """
        directory, failed = self._directory(lease), list[str]()
        try:
            api.bury(directory, lease.id)
        except OSError as error:  # a full disk must not keep the fault; it is told last
            failed.append(f"the lease could not be buried: {error}")
        files = self._files(lease, directory, RecoverFailed, "recover")
        for done, (target, path) in enumerate(files):
            step(done, len(files))
            try:
                if not path.exists() or _is_foreign(path):
                    continue
                with _opened(path, RecoverFailed, "recover", lease.id) as database, transaction(database):
                    if is_store(database):
                        put_back(database, lease, recorded(lease, target))
            except OSError as error:
                failed.append(f"{path}: {error}")
            except RecoverFailed as error:
                failed.append(str(error).removeprefix(f"{NAME}.recover: "))
        if failed:
            raise RecoverFailed("; ".join(failed), driver=NAME, verb="recover", lease_id=lease.id)

    def active(self, lease: Lease) -> Evidence:
        """What the file holds, and what the store serves for a few of the touched rows.

        ``effective`` needs both: most rows hold our damage, and the store serves it.

        Raises:
            DriverUnavailable: the database cannot be read, or there is none to look at for a lease whose content was lost.
        """
        directory = self._directory(lease)
        present, effective, lines = False, bool(lease.targets), list[str]()
        for target, path in self._files(lease, directory, DriverUnavailable, "active"):
            if not path.exists():
                lines.append(f"{target}: the file is gone, no fault can be there")
                effective = False
                continue
            if _is_foreign(path):
                lines.append(f"{target}: the file is no database any more, no fault can be there")
                effective = False
                continue
            with _opened(path, DriverUnavailable, "active", lease.id, read_only=True) as database:
                if not is_store(database):
                    lines.append(f"{target}: the file is no feature store any more, no fault can be there")
                    effective = False
                    continue
                rows = marked_rows(database, lease) or recorded(lease, target)
                found = look(database, lease, rows)
            served = _served(directory, lease, rows)
            # Old rows may be old without us: of those only the file can say that it was us.
            told = lease.kind != "feature_stale" and any(served.values())
            present |= found.marked or found.damaged > 0 or told
            effective &= found.damaged > len(rows) / 2 and bool(served) and all(served.values())
            lines += _words(lease, target, rows, found, served)
        return Evidence(present=present, effective=effective and present, lines=tuple(lines))

    def _directory(self, lease: Lease) -> Path:
        """The lease's own sandbox; a lease whose file was damaged has only ours."""
        return Path(lease.undo.get("directory") or self.directory)

    def _path(self, target: str, directory: Path | None = None) -> Path:
        name = target.removeprefix(_PREFIX)
        if not target.startswith(_PREFIX) or Path(name).name != name or not name:
            raise DriverError(f"{target} is no target of mine. Allowed: {_PREFIX}NAME", driver=NAME)
        return (directory or self.directory) / "data" / name

    def _files(self, lease: Lease, directory: Path, failure: type[DriverError], verb: str) -> list[tuple[str, Path]]:
        """Targets and their files; of a lease whose content was lost, every feature store that there is."""
        if lease.targets:
            return [(target, self._path(target, directory)) for target in lease.targets]
        found: list[tuple[str, Path]] = []
        for path in sorted((directory / "data").glob("*.sqlite")):
            if _is_foreign(path):
                continue
            with _opened(path, failure, verb, lease.id, read_only=True) as database:
                if is_store(database):
                    found.append((_PREFIX + path.name, path))
        if not found:
            said = f"the lease's undo data is lost, and there is no feature store in {directory / 'data'} to look at"
            raise failure(said, driver=NAME, verb=verb, lease_id=lease.id)
        return found


def _stepping(rows: Sequence[Row], step: Step) -> Iterator[Row]:
    """The rows, with a step now and then; what it raises rolls everything back."""
    for done, row in enumerate(rows):
        if done % _STEP_ROWS == 0:
            step(done, len(rows))
        yield row


def _is_foreign(path: Path) -> bool:
    """Whether something else took the file's place: it does not begin as a SQLite file. (An empty one is none yet.)"""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(_HEADER)) not in (_HEADER, b"")
    return False


@contextlib.contextmanager
def _opened(
    path: Path, failure: type[DriverError], verb: str, lease_id: str, *, read_only: bool = False
) -> Generator[sqlite3.Connection, None, None]:
    """A connection to a file that is there, in autocommit mode. SQLite's complaints come out as `failure`."""
    mode = "ro" if read_only else "rw"
    try:
        uri = f"{path.resolve().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None)
        with contextlib.closing(database):
            yield database
    except sqlite3.Error as error:
        raise failure(f"{path}: {error}", driver=NAME, verb=verb, lease_id=lease_id) from error


def _served(directory: Path, lease: Lease, rows: Sequence[Row]) -> dict[int, bool]:
    """Entity → whether the store serves our damage, for a few of the touched rows; empty when it does not answer."""
    port = (api.read_state(directory) or {}).get("ports", {}).get("feature-store")
    if not port or not api.is_alive(directory):
        return {}
    found: dict[int, bool] = {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_S)
    try:
        for row in rows[:: max(1, len(rows) // _LOOKED_AT)][:_LOOKED_AT]:
            connection.request("GET", f"/features/{row.entity}")
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status == 200:
                found[row.entity] = _is_damage(lease, row, answer)
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return found


def _is_damage(lease: Lease, row: Row, answer: dict[str, Any]) -> bool:
    if row.before != row.after:
        return answer["features"] == json.loads(row.after)
    age_s = answer["age_s"]
    # The file tells whether the stamp is ours; here only whether people are told.
    return lease.kind == "feature_stale" and age_s is not None and age_s >= 0.99 * float(lease.params["age_s"])


def _words(lease: Lease, target: str, rows: Sequence[Row], found: Found, served: dict[int, bool]) -> list[str]:
    """Evidence lines, the most telling first."""
    asked = (
        f"the store serves it for {sum(served.values())} of {len(served)} asked" if served else "the store is silent"
    )
    if found.damaged or found.marked:
        what = {"feature_stale": f"refreshed {found.oldest_s:.0f} s ago", "feature_nulls": "null"}.get(
            lease.kind, "shifted"
        )
        return [f"{target}: {found.damaged} of {len(rows)} touched rows are {what}; {asked}"]
    lines = [f"{target} has nothing of lease {lease.id}: no trigger, no table, no touched row with its damage; {asked}"]
    if not rows:
        return lines
    same = found.sha256 == found.sha256_before
    kept = f"; {found.others} were written by others since and kept" if found.others else ""
    said = "as before the fault" if same else f"before the fault it was {found.sha256_before[:16]}…"
    lines.append(f"SHA-256 over the vectors of its {len(rows)} touched rows is {found.sha256[:16]}…, {said}{kept}")
    if lease.kind == "feature_stale":
        lines.append(f"the oldest of them was refreshed {found.oldest_s:.1f} s ago")
    return lines
