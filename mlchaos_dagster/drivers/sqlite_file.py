"""One SQLite file, seen and changed from outside: a verified snapshot, pages under SQLite's own lock, what is damaged.

Knows nothing of leases, only of a `mark` that the noise on a page is made from.

Closing *any* descriptor of a file drops the POSIX locks that this process has on it, those of SQLite connections, too. So
raw reads and writes go through `raw`, which lets one thread at a time in and opens before, and closes after, any lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from mlchaos_dagster.engine.ports import Step, no_step

BUSY_S = 2.0
"""How long to wait for somebody else's transaction."""
_LOCK_BYTE = 1 << 30
"""The page that holds this offset carries SQLite's locks and no content."""
_MARK_BYTES = 24
_STEP_PAGES = 2000
_RAW = threading.Lock()


def connect(path: Path) -> sqlite3.Connection:
    """A connection to an existing file that leaves transactions to us. Raises sqlite3.Error."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None)


@contextlib.contextmanager
def raw(path: Path) -> Generator[int, None, None]:
    """A descriptor of the file for `os.pread` and `os.pwrite`. Raises OSError."""
    with _RAW:
        file = os.open(path, os.O_RDWR)
        try:
            yield file
        finally:
            os.close(file)


@contextlib.contextmanager
def locked(path: Path) -> Generator[sqlite3.Connection, None, None]:
    """Nobody else reads or writes the database meanwhile (WAL: nobody writes), and all of it is in the main file.

    When the block is left normally a commit follows that changes nothing but the change counter (WAL: the wal index), and
    makes every other connection drop the pages it keeps in memory: it sees the file as it is now.

    Raises:
        sqlite3.Error: the lock was not to be had within `BUSY_S`.
    """
    with contextlib.closing(connect(path)) as connection:
        end = time.monotonic() + BUSY_S
        while True:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            connection.execute("BEGIN EXCLUSIVE")
            wal = Path(f"{path}-wal")
            if not wal.exists() or wal.stat().st_size == 0:
                break
            connection.execute("ROLLBACK")  # somebody wrote, or read, in between
            if time.monotonic() > end:
                raise sqlite3.OperationalError("database is locked: its write-ahead log could not be emptied")
            time.sleep(0.01)
        try:
            yield connection
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def shape(file: int) -> tuple[int, int]:
    """(bytes in a page, number of pages), from the file's header."""
    header = os.pread(file, 100, 0)
    size = int.from_bytes(header[16:18], "big")
    size = 65536 if size == 1 else size
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0") or size < 512:
        raise sqlite3.DatabaseError("file is not a database")
    return size, os.fstat(file).st_size // size


def content_pages(size: int, count: int) -> list[int]:
    """Numbers (from 1) of the pages that may be damaged: not the first, so that the file opens, nor the locks' own."""
    return [page for page in range(2, count + 1) if page != _LOCK_BYTE // size + 1]


def noise(mark: str, page: int, size: int) -> bytes:
    """What a damaged page holds: told from content by its beginning, and no valid page of any kind.

    255 is no type of a B-tree page, and as the first byte of a link to a further overflow or free page it points beyond
    any file: SQLite says `malformed` instead of making something of it.
    """
    return b"\xff" + hashlib.shake_128(f"{mark}/{page}".encode()).digest(size - 1)


def damaged(path: Path, mark: str, page_size: int | None = None) -> list[int]:
    """Pages of the file that hold the noise of this mark now.

    Args:
        path: The file.
        mark: What the noise was made from.
        page_size: Of a file that has lost its header; None: all sizes that there are are tried.

    Raises:
        OSError: it cannot be read.
    """
    with raw(path) as file:
        try:
            sizes = [shape(file)[0]]
        except sqlite3.DatabaseError:
            sizes = [page_size] if page_size else [512 << power for power in range(8)]
        length = os.fstat(file).st_size
        return [
            page
            for size in sizes
            for page in content_pages(size, length // size)
            if os.pread(file, _MARK_BYTES, (page - 1) * size) == noise(mark, page, _MARK_BYTES)
        ]


def is_database(path: Path) -> bool:
    """Whether it begins as a SQLite file does; an empty one does not. Raises OSError."""
    with raw(path) as file:
        try:
            shape(file)
        except sqlite3.DatabaseError:
            return False
    return True


def problems(path: Path, most: int = 3) -> list[str]:
    """What SQLite's integrity check says; empty = intact.

    Raises:
        sqlite3.OperationalError: it could not be asked (locked, gone).
    """
    try:
        with contextlib.closing(connect(path)) as connection:
            rows = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({most})")]
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return [str(error)]
    said = [line for row in rows for line in row.splitlines() if not line.startswith("*** in database")]
    return [] if said == ["ok"] else said[:most]


def snapshot(path: Path, copy: Path, step: Step = no_step) -> None:
    """A consistent copy of a database that others may be writing, on disk when this returns.

    Raises:
        OSError, sqlite3.Error: there is no copy to rely on.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target, pages=_STEP_PAGES, progress=lambda _, left, total: step(total - left, total))
        target.execute("PRAGMA journal_mode = DELETE").fetchone()  # one file, without a log beside it
    sync(copy)


def tables(path: Path, until: dict[str, int] | None = None, step: Step = no_step) -> dict[str, dict[str, Any]]:
    """Rows and their digest of every table: {name: {rows, digest, last}}; `until`: rows up to these rowids only.

    Raises:
        sqlite3.Error: something cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    with contextlib.closing(connect(path)) as connection:
        names = [r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type='table' ORDER BY 1")]
        for name in names:
            quoted = '"' + name.replace('"', '""') + '"'
            try:
                last = connection.execute(f"SELECT max(rowid) FROM {quoted}").fetchone()[0]
                order = "rowid"
            except sqlite3.OperationalError:  # WITHOUT ROWID
                last, order = None, "1"
            bound = (until or {}).get(name)
            where = "" if bound is None or last is None else f" WHERE rowid <= {int(bound)}"
            digest, rows = hashlib.sha256(), 0
            for row in connection.execute(f"SELECT * FROM {quoted}{where} ORDER BY {order}"):
                digest.update(repr(row).encode())
                rows += 1
                if rows % 5000 == 0:
                    step(rows, rows)
            found[name] = {"rows": rows, "digest": digest.hexdigest(), "last": last}
    return found


def sync(path: Path) -> None:
    """Have a file and its name on disk. Raises OSError."""
    for place in (path, path.parent):
        file = os.open(place, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def sha256(path: Path) -> str:
    """Of a file that nobody has locked. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def keep_pages(file: int, pages: Iterable[int], size: int, kept: Path, step: Step = no_step) -> str:
    """Write these pages to a file of their own, one after the other, on disk when this returns; its SHA-256."""
    digest, wanted = hashlib.sha256(), list(pages)
    with kept.open("wb") as out:
        for done, page in enumerate(wanted):
            content = os.pread(file, size, (page - 1) * size)
            digest.update(content)
            out.write(content)
            if done % _STEP_PAGES == 0:
                step(done, 2 * len(wanted))
    sync(kept)
    return digest.hexdigest()
