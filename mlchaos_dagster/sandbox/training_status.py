"""Training as a whole: what its workers told last, dead ones included, and the gauges over all of them.

PUT /progress/{worker} (see ``remote_progress``), GET /progress/{worker} → 404 while that worker never told anything.
Kept on disk, too, so that a restart of this process does not make the workers' past unknown.

POST /slots {holder} → {worker}: which worker a pod is, whose Job does not say it; 409 while all are taken. A worker is
free when its holder gave it back (DELETE /slots/{worker}) or was silent for ``_SLOT_S``; who then speaks for it is refused
(409), so that nobody else writes the checkpoints of the one that came after.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from .background import background
from .lifeline import Lifeline
from .progress import Progress, summary
from .remote_progress import HOLDER_HEADER, heard, told
from .service import Service
from .signal_gauges import export
from .trainer import WORKERS

_ALIVE_S = 1.0
"""A worker that was silent this long is not training: it speaks ten times a second."""
_KEEP_EVERY_S = 0.5
_SLOT_S = 4.0
_START_S = 30.0
"""From being given a worker to its first word: the object store may have to be waited for."""
_NAME = re.compile(r"[a-z0-9-]{1,63}")


class Taken(Exception):
    """Another pod is this worker."""


class Status:
    """The workers' progress, each on the clock of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, Progress] = {}
        self.told_at: dict[str, float] = {}
        """When each worker spoke last; those that only the file knows are not here."""
        self._slots: dict[str, tuple[str, float]] = {}
        """Worker → (who it is, until when without a further word)."""
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            away = max(0.0, time.time() - content["at"])
            for name, one in content["workers"].items():
                self.known[name] = heard({**one, "updated_at": one["updated_at"] + away})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.known = {}  # none, or half of one: as if nothing had been told

    def take(self, name: str, content: Any, holder: str = "") -> None:
        """A worker speaks. Raises KeyError, TypeError, ValueError: it makes no sense; Taken: it is another one now."""
        now = time.monotonic()
        if holder:
            held = self._slots.get(name, (holder, 0.0))[0]
            if held != holder:
                raise Taken(f"{name} is {held} now")
            self._slots[name] = (holder, now + _SLOT_S)
        self.known[name], self.told_at[name] = heard(content), now

    def give(self, holder: str) -> str:
        """A worker for this pod, the same one when it asks again. Raises Taken: all are."""
        now = time.monotonic()
        names = [f"trainer-{number}" for number in range(WORKERS)]
        mine = [name for name in names if self._slots.get(name, ("", 0.0))[0] == holder]
        for name in [*mine, *names]:
            if name in mine or self._slots.get(name, ("", 0.0))[1] <= now:
                self._slots[name] = (holder, now + _START_S)
                return name
        raise Taken("all workers have their pods")

    def give_back(self, name: str, holder: str) -> None:
        """It ends; the next pod need not wait."""
        if self._slots.get(name, ("", 0.0))[0] == holder:
            self._slots[name] = (holder, 0.0)

    def alive(self, now: float) -> set[str]:
        """Workers that train now."""
        return {name for name, at in self.told_at.items() if now - at < _ALIVE_S}

    def signals(self) -> dict[str, float | None]:
        """What /metrics tells under the names of signals."""
        now = time.monotonic()
        alive = self.alive(now)
        found: dict[str, float | None] = {"training_workers_ready": len(alive)}
        return {**found, **summary(self.known, alive, now)} if len(self.known) >= WORKERS else found

    async def keep(self) -> None:
        """Task: write it down."""
        while True:
            await asyncio.sleep(_KEEP_EVERY_S)
            partial = self._path.with_suffix(".partial")
            workers = {name: told(progress) for name, progress in self.known.items()}
            partial.write_text(json.dumps({"at": time.time(), "workers": workers}))
            os.replace(partial, self._path)


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    status = Status(Path(service.config["data"]) / "training-status.json")
    export(service.registry, status.signals)

    async def take(request: web.Request) -> web.Response:
        name = request.match_info["worker"]
        if not _NAME.fullmatch(name):
            return web.json_response({"error": f"{name!r} is no worker's name"}, status=400)
        try:
            status.take(name, await request.json(), request.headers.get(HOLDER_HEADER, ""))
        except Taken as error:
            return web.json_response({"error": str(error)}, status=409)
        except (KeyError, TypeError, ValueError) as error:
            return web.json_response({"error": f"not progress: {error!r}"}, status=400)
        return web.json_response({})

    async def give(request: web.Request) -> web.Response:
        try:
            return web.json_response({"worker": status.give(str((await request.json())["holder"]))})
        except Taken as error:
            return web.json_response({"error": str(error)}, status=409)
        except (KeyError, TypeError, ValueError) as error:
            return web.json_response({"error": f"no holder: {error!r}"}, status=400)

    async def give_back(request: web.Request) -> web.Response:
        status.give_back(request.match_info["worker"], request.headers.get(HOLDER_HEADER, ""))
        return web.json_response({})

    async def tell(request: web.Request) -> web.Response:
        progress = status.known.get(request.match_info["worker"])
        return web.json_response(told(progress) if progress else {}, status=200 if progress else 404)

    async def state(request: web.Request) -> web.Response:
        alive = status.alive(time.monotonic())
        workers = {name: {**vars(progress), "alive": name in alive} for name, progress in status.known.items()}
        return web.json_response({"signals": status.signals(), "workers": workers})

    async def started() -> None:
        background(status.keep())
        service.set_ready()

    service.app.router.add_put("/progress/{worker}", service.guarded(take))
    service.app.router.add_get("/progress/{worker}", service.guarded(tell))
    service.app.router.add_post("/slots", service.guarded(give))
    service.app.router.add_delete("/slots/{worker}", service.guarded(give_back))
    service.app.router.add_get("/state", state)
    await service.serve(started)
