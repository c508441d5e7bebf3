"""The rows of a feature store's SQLite file under a fault: damaged, put back, looked at. One lease, one open connection.

Knows the tables of the store and nothing of sandboxes. Callers hold the transaction. Raises sqlite3.Error throughout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from mlchaos_dagster.engine.ports import Lease

MARK = "mlchaos:"
"""What the names of tables and triggers of ours begin with; then the lease."""


@dataclass(frozen=True)
class Row:
    """One touched row. `before` and `after` are the JSON of its vector, equal when only its stamp is changed."""

    entity: int
    before: str
    after: str
    stamp: float
    """When it had been refreshed; Unix time, 0 where only the file's marks tell."""
    stamp_after: float | None
    """What the fault sets it to, if it does."""


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Generator[None, None, None]:
    """All or nothing, and on disk when left: ingestion's own commits need not be."""
    database.execute("PRAGMA synchronous = FULL")
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def is_store(database: sqlite3.Connection) -> bool:
    """Whether the file has the tables of a feature store."""
    return all(_exists(database, table) for table in ("source", "features", "schema"))


def _mark(lease: Lease) -> str:
    return '"' + f"{MARK}{lease.id}".replace('"', '""') + '"'


def recorded(lease: Lease, target: str) -> list[Row]:
    """The rows of the undo data, and what becomes of them."""
    found = lease.undo.get("files", {}).get(target)
    if found is None:
        return []
    old = lease.opened_wall - float(lease.params["age_s"]) if lease.kind == "feature_stale" else None
    return [Row(entity, vector, _changed(lease, vector, found["std"]), 0.0, old) for entity, vector in found["rows"]]


def _changed(lease: Lease, vector: str, std: Sequence[float]) -> str:
    if lease.kind == "feature_nulls":
        return json.dumps([None] * len(json.loads(vector)))
    if lease.kind == "feature_drift":
        shift = float(lease.params["shift"])
        pairs = zip(json.loads(vector), std, strict=True)
        return json.dumps([None if value is None else value + shift * spread for value, spread in pairs])
    return vector


def damage(database: sqlite3.Connection, lease: Lease, rows: Iterable[Row]) -> int:
    """Put the fault on rows that are still as recorded; how many that are. They are in the table of the lease."""
    mark = _mark(lease)
    if marked := marked_rows(database, lease):
        return len(marked)
    columns = "entity_id INTEGER PRIMARY KEY, before TEXT, after TEXT, stamp REAL, stamp_after REAL"
    database.execute(f"CREATE TABLE {mark} ({columns})")
    database.executemany(
        f"INSERT INTO {mark} SELECT entity_id, ?, ?, updated_at, ? FROM source JOIN features USING (entity_id)"
        " WHERE entity_id = ? AND source.vector = ?",
        ((row.before, row.after, row.stamp_after, row.entity, row.before) for row in rows),
    )
    if lease.kind == "feature_stale":
        database.execute(
            f"UPDATE features SET updated_at = (SELECT stamp_after FROM {mark} WHERE entity_id = features.entity_id)"
            f" WHERE entity_id IN (SELECT entity_id FROM {mark})"
        )
        database.execute(
            f'CREATE TRIGGER {mark[:-1]}/frozen" BEFORE UPDATE ON features'
            f" WHEN OLD.entity_id IN (SELECT entity_id FROM {mark}) BEGIN SELECT RAISE(IGNORE); END"
        )
    else:
        for table in ("source", "features"):
            database.execute(
                f"UPDATE {table} SET vector = (SELECT after FROM {mark} WHERE entity_id = {table}.entity_id)"
                f" WHERE entity_id IN (SELECT entity_id FROM {mark})"
            )
    return int(database.execute(f"SELECT count(*) FROM {mark}").fetchone()[0])


def put_back(database: sqlite3.Connection, lease: Lease, known: list[Row]) -> None:
    """Every row that still holds the lease's damage as it was; trigger and table dropped.

    Args:
        database: within a transaction.
        lease: whose damage.
        known: the rows of the undo data, for a file whose own marks are gone.
    """
    mark = _mark(lease)
    rows = marked_rows(database, lease) or known
    database.execute(f'DROP TRIGGER IF EXISTS {mark[:-1]}/frozen"')
    # The stamps as they were: true, and the next pass of ingestion renews them.
    database.executemany(
        "UPDATE features SET updated_at = ? WHERE entity_id = ? AND updated_at = ?",
        ((row.stamp or lease.opened_wall, row.entity, row.stamp_after) for row in rows if row.stamp_after is not None),
    )
    changed = [row for row in rows if row.before != row.after]
    database.executemany(
        "UPDATE source SET vector = ? WHERE entity_id = ? AND vector = ?",
        ((row.before, row.entity, row.after) for row in changed),
    )
    # As ingestion would: from a source that somebody else may have rewritten.
    database.executemany(
        "UPDATE features SET vector = coalesce((SELECT vector FROM source WHERE entity_id = features.entity_id), ?)"
        " WHERE entity_id = ? AND vector = ?",
        ((row.before, row.entity, row.after) for row in changed),
    )
    database.execute(f"DROP TABLE IF EXISTS {mark}")


def marked_rows(database: sqlite3.Connection, lease: Lease) -> list[Row]:
    """The rows that the file itself says the lease touched."""
    if not _exists(database, f"{MARK}{lease.id}"):
        return []
    return [Row(*found) for found in database.execute(f"SELECT * FROM {_mark(lease)}")]


def marks(database: sqlite3.Connection) -> list[str]:
    """Leases whose marks are in the file."""
    names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    return [name.removeprefix(MARK) for (name,) in names if name.startswith(MARK)]


def _exists(database: sqlite3.Connection, name: str) -> bool:
    return database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


@dataclass(frozen=True)
class Found:
    """What a file holds of a lease."""

    marked: bool
    """Its table or its trigger is there."""
    damaged: int
    """Touched rows that hold our damage, in the source or as served."""
    others: int
    """Touched rows with a vector that is neither ours nor the one before: somebody else wrote them."""
    sha256: str
    """Over the served vectors of the touched rows."""
    sha256_before: str
    oldest_s: float
    """Age of the touched row that was refreshed longest ago."""


def look(database: sqlite3.Connection, lease: Lease, rows: Sequence[Row]) -> Found:
    """What is in the file now."""
    source: dict[int, str] = dict(database.execute("SELECT entity_id, vector FROM source"))
    served: dict[int, tuple[str, float]] = {
        entity: (vector, stamp)
        for entity, vector, stamp in database.execute("SELECT entity_id, vector, updated_at FROM features")
    }
    damaged = others = 0
    for row in rows:
        vector, stamp = served.get(row.entity, ("", 0.0))
        if row.before != row.after:
            damaged += row.after in (vector, source.get(row.entity))
        else:
            damaged += stamp == row.stamp_after
        others += vector not in (row.before, row.after)
    now = [served[row.entity] for row in rows if row.entity in served]
    return Found(
        marked=_exists(database, f"{MARK}{lease.id}") or _exists(database, f"{MARK}{lease.id}/frozen"),
        damaged=damaged,
        others=others,
        sha256=digest(vector for vector, _ in now),
        sha256_before=digest(row.before for row in rows),
        oldest_s=max((time.time() - stamp for _, stamp in now), default=0.0),
    )


def digest(vectors: Iterable[str]) -> str:
    """SHA-256 over vectors, one on each line."""
    content = hashlib.sha256()
    for vector in vectors:
        content.update(vector.encode() + b"\n")
    return content.hexdigest()
