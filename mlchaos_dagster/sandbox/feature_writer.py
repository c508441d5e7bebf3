"""Ingestion: derives every row that the feature store serves from the source, again and again, and stamps it.

One statement in one transaction, so that whoever else writes comes before or after a whole refresh. GET /state says how it
goes.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

from .feature_store import create
from .lifeline import Lifeline

EVERY_S = 2.0
_BUSY_S = 1.0
_REFRESH = """
    INSERT INTO features (entity_id, vector, updated_at) SELECT entity_id, vector, ? FROM source WHERE true
    ON CONFLICT (entity_id) DO UPDATE SET vector = excluded.vector, updated_at = excluded.updated_at
"""


def refresh(database: sqlite3.Connection) -> int:
    """Refresh every row; how many were. Raises sqlite3.Error: none was."""
    with database:
        return database.execute(_REFRESH, (time.time(),)).rowcount


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Counter

    from .service import Service

    service = Service(lifeline)
    path = Path(service.config["database"])
    create(path, service.config["entities"], service.config["seed"])
    database = sqlite3.connect(path, timeout=_BUSY_S)
    database.execute("PRAGMA synchronous=NORMAL")  # in WAL mode a crash of the machine loses a refresh, no more
    passes = Counter("sandbox_ingestion_passes_total", "Refreshes by result", ["result"], registry=service.registry)
    state: dict[str, Any] = {"passes": 0, "failed": 0, "rows": 0, "last_error": ""}

    def once() -> None:
        try:
            state["rows"] = refresh(database)
        except sqlite3.Error as error:  # somebody else holds the database, or broke it: the next pass may succeed
            state["failed"] += 1
            state["last_error"] = str(error)
            passes.labels("failed").inc()
            service.set_ready(False, f"features are not refreshed: {error}")
        else:
            state["passes"] += 1
            passes.labels("ok").inc()
            service.set_ready()

    async def say(request: web.Request) -> web.Response:
        return web.json_response(state)

    async def work() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            once()

    # Before anybody hears of us: from then on rows are expected to be fresh.
    once()
    service.app.router.add_get("/state", say)
    working = asyncio.get_running_loop().create_task(work())
    await service.serve()
    working.cancel()
