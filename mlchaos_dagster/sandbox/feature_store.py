"""The feature store: SQLite behind HTTP. GET /features/{entity_id}; GET /features for all (to prime caches)."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path

from .lifeline import Lifeline
from .model import FEATURES


def create(path: Path, entities: int, seed: int) -> None:
    """Make the table if it is not there; the same seed gives the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows = [(entity, json.dumps([rng.gauss(0, 1) for _ in range(FEATURES)])) for entity in range(entities)]
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS features (entity_id INTEGER PRIMARY KEY, vector TEXT NOT NULL)")
        database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Counter

    from .service import Service

    service = Service(lifeline)
    path = Path(service.config["database"])
    create(path, service.config["entities"], service.config["seed"])
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    reads = Counter("sandbox_feature_reads_total", "Feature reads by result", ["result"], registry=service.registry)

    async def one(request: web.Request) -> web.Response:
        row = None
        if (text := request.match_info["entity_id"]).isdecimal() and len(text) < 19:
            row = database.execute("SELECT vector FROM features WHERE entity_id = ?", (int(text),)).fetchone()
        if row is None:
            reads.labels("unknown").inc()
            return web.json_response({"error": f"no entity {text!r}"}, status=404)
        reads.labels("ok").inc()
        return web.json_response({"entity_id": int(text), "features": json.loads(row[0])})

    async def every(request: web.Request) -> web.Response:
        limit = int(request.query.get("limit", "1000"))
        rows = database.execute("SELECT entity_id, vector FROM features ORDER BY entity_id LIMIT ?", (limit,))
        return web.json_response({"features": {str(entity): json.loads(vector) for entity, vector in rows}})

    async def started() -> None:
        service.set_ready()

    service.app.router.add_get("/features/{entity_id}", one)
    service.app.router.add_get("/features", every)
    await service.serve(started)
