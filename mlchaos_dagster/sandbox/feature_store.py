"""The feature store: SQLite behind HTTP.

GET /features/{entity_id} answers one row: its features (null where there is none) and ``age_s``, the seconds since
ingestion refreshed it (null on a platform without ingestion: nobody promised freshness). GET /features answers many, with
the schema: what each feature looked like when the store was made. GET /quality says what the rows are like now.

Rows come from the table ``source``, the offline truth, by ingestion (``feature_writer``). Nothing is kept in memory
between requests but the numbers of /quality, and those only until somebody writes.
"""

from __future__ import annotations

import json
import math
import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from .feature_checks import OUT_OF_RANGE
from .lifeline import Lifeline
from .model import FEATURES

INGESTION = "ingestion"
"""Peer whose address, known or not, says whether this platform refreshes its features."""
BUSY_S = 5.0
"""How long a writer waits for another one."""
_QUALITY_LASTS_S = 0.25
_QUALITY_ROWS = 5000
"""Of more rows than about this a sample is looked at: /quality must not hold predictions up."""
_VERSION = 2
_TABLES = """
    DROP TABLE IF EXISTS features;
    DROP TABLE IF EXISTS source;
    DROP TABLE IF EXISTS schema;
    DROP TABLE IF EXISTS made;
    CREATE TABLE features (entity_id INTEGER PRIMARY KEY, vector TEXT NOT NULL, updated_at REAL NOT NULL);
    CREATE TABLE source (entity_id INTEGER PRIMARY KEY, vector TEXT NOT NULL);
    CREATE TABLE schema (feature INTEGER PRIMARY KEY, mean REAL NOT NULL, std REAL NOT NULL);
    CREATE TABLE made (entities INTEGER NOT NULL, seed INTEGER NOT NULL);
"""


def create(path: Path, entities: int, seed: int) -> None:
    """Make the database if it is not there; the same seed gives the same rows.

    One that is there is left as it is, as a database that outlives its server is: with what others did to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as database:
        if _is_made(database, entities, seed):
            return
        database.execute("PRAGMA journal_mode=WAL")
        rng, now = random.Random(seed), time.time()
        vectors = [[rng.gauss(0, 1) for _ in range(FEATURES)] for _ in range(entities)]
        source = [(entity, json.dumps(vector)) for entity, vector in enumerate(vectors)]
        database.execute("BEGIN IMMEDIATE")
        for statement in _TABLES.split(";"):
            database.execute(statement)
        database.executemany("INSERT INTO source VALUES (?, ?)", source)
        database.execute("INSERT INTO features SELECT entity_id, vector, ? FROM source", (now,))
        database.executemany("INSERT INTO schema VALUES (?, ?, ?)", _expectations(vectors))
        database.execute("INSERT INTO made VALUES (?, ?)", (entities, seed))
        database.execute(f"PRAGMA user_version={_VERSION}")
        database.execute("COMMIT")


def _is_made(database: sqlite3.Connection, entities: int, seed: int) -> bool:
    if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
        return False
    return database.execute("SELECT entities, seed FROM made").fetchone() == (entities, seed)


def _expectations(vectors: list[list[float]]) -> list[tuple[int, float, float]]:
    """(feature, mean, standard deviation) over all rows."""
    found: list[tuple[int, float, float]] = []
    for feature in range(FEATURES):
        values = [vector[feature] for vector in vectors]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        found.append((feature, mean, std or 1.0))
    return found


def read_schema(database: sqlite3.Connection) -> dict[str, list[float]]:
    """What each feature looked like when the store was made: ``{"mean": [...], "std": [...]}``."""
    rows = database.execute("SELECT mean, std FROM schema ORDER BY feature").fetchall()
    return {"mean": [mean for mean, _ in rows], "std": [std for _, std in rows]}


class Quality:
    """What the rows are like, read again only when somebody wrote since."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._schema = read_schema(database)
        self._version: int | None = None
        self._at = -math.inf
        self._values: dict[str, float] = {}
        self._stamps: list[float] = []

    def now(self, with_ages: bool) -> dict[str, float | None]:
        """Rates are 0–1; ``drift``: how far the worst feature's mean is from the schema's, in standard deviations."""
        if time.monotonic() - self._at >= _QUALITY_LASTS_S:
            (version,) = self._database.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                self._read()
                self._version = version
            self._at = time.monotonic()
        ages: dict[str, float | None] = dict.fromkeys(("age_median_s", "age_p95_s", "age_oldest_s"))
        if with_ages and self._stamps:
            now, newest = time.time(), len(self._stamps) - 1
            # Stamps are sorted, oldest first.
            ages = {
                "age_median_s": max(0.0, now - self._stamps[newest - newest // 2]),
                "age_p95_s": max(0.0, now - self._stamps[newest - math.ceil(0.95 * newest)]),
                "age_oldest_s": max(0.0, now - self._stamps[0]),
            }
        return {**self._values, **ages}

    def _read(self) -> None:
        (rows,) = self._database.execute("SELECT count(*) FROM features").fetchone()
        every = max(1, rows // _QUALITY_ROWS)
        picked = self._database.execute(
            "SELECT vector, updated_at FROM features WHERE entity_id % ? = 0 ORDER BY updated_at", (every,)
        ).fetchall()
        self._stamps = [stamp for _, stamp in picked]
        vectors: list[list[float | None]] = json.loads(f"[{','.join(vector for vector, _ in picked)}]")
        nulls = wild = total = 0
        drift = 0.0
        for feature, (mean, std) in enumerate(zip(self._schema["mean"], self._schema["std"], strict=True)):
            values = [value for vector in vectors if (value := vector[feature]) is not None]
            total += len(vectors)
            nulls += len(vectors) - len(values)
            low, high = mean - OUT_OF_RANGE * std, mean + OUT_OF_RANGE * std
            wild += sum(not low <= value <= high for value in values)
            if values:
                drift = max(drift, abs(math.fsum(values) / len(values) - mean) / std)
        self._values = {
            "rows": rows,
            "sampled": len(vectors),
            "null_rate": nulls / total if total else 0.0,
            "out_of_range_rate": wild / total if total else 0.0,
            "drift": drift,
        }


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Counter, Gauge

    from .service import Service

    service = Service(lifeline)
    path = Path(service.config["database"])
    create(path, service.config["entities"], service.config["seed"])
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.1)
    quality = Quality(database)
    reads = Counter("sandbox_feature_reads_total", "Feature reads by result", ["result"], registry=service.registry)
    for name, text in (
        ("null_rate", "Share of feature values that are null"),
        ("out_of_range_rate", "Share of feature values far outside the schema"),
        ("drift", "Largest distance of a feature's mean from the schema's, in standard deviations"),
    ):
        gauge = Gauge(f"sandbox_feature_{name}", text, registry=service.registry)
        gauge.set_function(lambda name=name: quality.now(False)[name] or 0.0)

    def age_s(updated_at: float) -> float | None:
        return round(max(0.0, time.time() - updated_at), 3) if service.peers.get(INGESTION) else None

    async def one(request: web.Request) -> web.Response:
        row = None
        if (text := request.match_info["entity_id"]).isdecimal() and len(text) < 19:
            row = database.execute(
                "SELECT vector, updated_at FROM features WHERE entity_id = ?", (int(text),)
            ).fetchone()
        if row is None:
            reads.labels("unknown").inc()
            return web.json_response({"error": f"no entity {text!r}"}, status=404)
        reads.labels("ok").inc()
        return web.json_response({"entity_id": int(text), "features": json.loads(row[0]), "age_s": age_s(row[1])})

    async def every(request: web.Request) -> web.Response:
        limit = int(request.query.get("limit", "1000"))
        rows: dict[str, Any] = {}
        ages: dict[str, float | None] = {}
        for entity, vector, updated_at in database.execute(
            "SELECT entity_id, vector, updated_at FROM features ORDER BY entity_id LIMIT ?", (limit,)
        ):
            rows[str(entity)], ages[str(entity)] = json.loads(vector), age_s(updated_at)
        return web.json_response({"features": rows, "ages_s": ages, "schema": read_schema(database)})

    async def state(request: web.Request) -> web.Response:
        return web.json_response(quality.now(bool(service.peers.get(INGESTION))))

    async def started() -> None:
        service.set_ready()

    service.app.router.add_get("/features/{entity_id}", one)
    service.app.router.add_get("/features", every)
    service.app.router.add_get("/quality", state)
    service.app.router.add_get("/state", state)
    await service.serve(started)
