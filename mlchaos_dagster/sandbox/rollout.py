"""The rollout: decides which replica serves which version of the model, and takes a bad version back.

A version that was promoted in the registry is a candidate. With the mechanism ``canary`` one replica tries it first, on
the golden inputs that any version must answer (``golden.json``), without traffic; then it alone serves it for a moment;
then all do. A candidate that fails is rejected for good and the version before is promoted again. Without ``canary``
whatever was promoted is served by all at once. GET /assignment?replica=NAME → {"version": … | null}.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Gauge

from .lifeline import Lifeline
from .model import scores, unpack
from .registry import CURRENT, GOLDEN, RegistryClient, RegistryUnavailable
from .service import TOKEN_HEADER, Service

_LOOK_S = 0.25
_CANARY_S = 1.0
"""How long one replica alone serves a version that passed its try-out: 50 requests of the default probe."""
_TOLERANCE = 0.2
"""How far a new version may be from the agreed golden scores, in score: better models differ, too, but not by this."""
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError)


class Rollout:
    """One model's versions: which is stable, which is tried."""

    def __init__(self, service: Service) -> None:
        self.service = service
        config = service.config
        self.canary_on: bool = config["mechanisms"]["canary"]
        self.registry = RegistryClient(lambda: service.peers.get("object_store", ""), config["token"])
        directory = Path(config["model_dir"])
        self.first = (directory / "model.bin").read_bytes(), json.loads((directory / "model.json").read_text())
        self.golden: dict[str, Any] = {}
        self.stable: str | None = None
        self.approved: dict[str, str] = {}
        """Version → checksum on its card when it became stable."""
        self.canary: str | None = None
        self.rejected: dict[str, str] = {}
        self.rollbacks = 0
        self.session: aiohttp.ClientSession
        for name, text, read in (
            ("rollout_rollbacks", "Versions that were taken back", lambda: self.rollbacks),
            ("rollout_canary", "1 while a version is being tried", lambda: self.canary is not None),
        ):
            Gauge(name, text, registry=service.registry).set_function(read)

    async def watch(self) -> None:
        """Task: follow the registry."""
        while True:
            try:
                await self.look()
            except RegistryUnavailable as error:
                if self.stable is None:
                    self.service.set_ready(False, f"registry: {error}")
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """One look at what is promoted, and what follows from it. Raises RegistryUnavailable."""
        current = await self.registry.current()
        if current is None:  # a store that is new, or came back empty
            await self._begin()
            return
        promoted = str(current.get("version"))
        if promoted == self.stable or promoted in self.rejected:
            return
        if not self.golden:  # it was written before this process began
            self.golden = await self.registry.golden() or self._agreed()
        if self.stable is None and promoted == self.first[1]["version"]:
            self._settle(promoted, self.first[1]["sha256"])
        elif not self.canary_on:
            self._settle(promoted, (await self.registry.card(promoted))["sha256"])
        elif (why := await self._try(promoted)) is None:
            self._settle(promoted, (await self.registry.card(promoted))["sha256"])
        else:
            await self._roll_back(promoted, why)

    async def _begin(self) -> None:
        """Publish and promote the version that the replicas started with, and what any version must answer."""
        artifact, card = self.first
        self.golden = self._agreed()
        await self.registry.write(GOLDEN, self.golden)
        await self.registry.publish(artifact, card)
        await self.registry.write(CURRENT, {"version": card["version"], "previous": None, "promoted_by": "rollout"})
        self._settle(card["version"], card["sha256"])

    def _agreed(self) -> dict[str, Any]:
        """What the version that the replicas started with answers."""
        artifact, card = self.first
        rows = card["golden_rows"]
        return {"rows": rows, "scores": scores(unpack(artifact), rows), "tolerance": _TOLERANCE}

    def _settle(self, version: str, sha256: str) -> None:
        self.stable, self.canary = version, None
        self.approved[version] = sha256
        self.service.set_ready()

    async def _try(self, version: str) -> str | None:
        """Why a candidate is not fit to serve; None: it is. Raises RegistryUnavailable: nobody knows yet."""
        url = self.service.peers.get("canary", "")
        body = {"version": version, "rows": self.golden["rows"]}
        headers = {TOKEN_HEADER: str(self.service.config["token"])}
        try:
            async with self.session.post(
                f"{url}/model/try", json=body, headers=headers, timeout=aiohttp.ClientTimeout(total=2.0)
            ) as response:
                answer = await response.json()
        except _UNANSWERED as error:
            raise RegistryUnavailable(f"the canary does not answer: {type(error).__name__}") from error
        if "rejected" in answer:
            return str(answer["rejected"])
        if "scores" not in answer:
            raise RegistryUnavailable(f"the canary could not try it: {answer.get('error')}")
        worst = max(abs(a - b) for a, b in zip(answer["scores"], self.golden["scores"], strict=True))
        if not worst <= self.golden["tolerance"]:
            return f"golden predictions differ by {worst:.3g}, tolerated: {self.golden['tolerance']:g}"
        self.canary = version
        until = time.monotonic() + _CANARY_S
        while time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
            current = await self.registry.current()
            if current is None or current.get("version") != version:
                self.canary = None
                return "it was taken back while it was a canary"
        return None

    async def _roll_back(self, version: str, why: str) -> None:
        self.rejected[version], self.canary = why, None
        self.rollbacks += 1
        # Of a process that has just begun and knows no stable version, the one that the replicas started with.
        stable = self.stable or self.first[1]["version"]
        before = {"version": stable, "previous": version, "promoted_by": "rollout", "because": why}
        await self.registry.write(CURRENT, before)

    async def assignment(self, request: web.Request) -> web.Response:
        """GET /assignment?replica=NAME."""
        name = request.query.get("replica", "")
        version = self.canary if self.canary and name == "inference-1" else self.stable
        return web.json_response({"version": version})

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        return web.json_response(
            {
                "stable": self.stable,
                "stable_sha256": self.approved.get(self.stable or ""),
                "canary": self.canary,
                "rejected": self.rejected,
                "rollbacks": self.rollbacks,
            }
        )


async def main(lifeline: Lifeline) -> None:
    """Follow the registry until told to stop."""
    service = Service(lifeline)
    rollout = Rollout(service)
    service.app.router.add_get("/assignment", rollout.assignment)
    service.app.router.add_get("/state", rollout.state)

    async def started() -> None:
        await service.peers_known.wait()
        rollout.watching = asyncio.get_running_loop().create_task(rollout.watch())  # type: ignore[attr-defined]

    rollout.session = aiohttp.ClientSession()
    async with rollout.session:
        await service.serve(started)
