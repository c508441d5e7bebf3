"""One inference replica: POST /predict {"features": [...]} → score of the checked model.

It starts with the model in its directory and looks whether that file changed; once it is told where the model registry
is, it serves what the rollout assigns to it. GET /model/health says what is served, and 503 while that is not what
should be. POST /model/try lets the rollout ask a candidate before it takes traffic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lifeline import Lifeline

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

    from mlchaos_dagster.chaos_model import ChaosModelWrapper

    from .registry import RegistryClient
    from .served_model import ServedModel
    from .service import Service

_LOOK_S = 0.25
"""Between two looks at the file or the registry: a rejected or a new model is known within two of them."""


class Replica:
    """Serving, and what it serves."""

    def __init__(self, service: Service, served: ServedModel) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.service, self.served, self.config = service, served, service.config
        self.directory = Path(self.config["model_dir"])
        self.session: aiohttp.ClientSession
        self.chaos: ChaosModelWrapper | None = None
        self.chaos_lease = ""
        self._registry: RegistryClient | None = None
        self._seen: tuple[str, bytes] = ("", b"")
        """Version and bytes of the registry's that were judged last."""
        registry = service.registry
        self._predictions = Counter("sandbox_predictions_total", "Predictions by result", ["result"], registry=registry)
        self._seconds = Histogram("sandbox_prediction_seconds", "Time in the model", registry=registry)
        rejected = Gauge("sandbox_models_rejected", "Models that failed a check", registry=registry)
        rejected.set_function(lambda: served.rejected_total)
        unhealthy = Gauge("sandbox_model_unhealthy", "1: what is served is not what should be", registry=registry)
        unhealthy.set_function(lambda: not served.health()["healthy"])

    # -- serving ----------------------------------------------------------------------------------------------------

    async def predict(self, request: web.Request) -> web.Response:
        """Score one vector of features."""
        from aiohttp import web

        now = self.served.now
        if now is None:
            self._predictions.labels("unready").inc()
            return web.json_response({"error": f"not ready: {self.service.reason}"}, status=503)
        try:
            features = (await request.json())["features"]
            began = time.perf_counter()
            if self.chaos is None:
                score = _score(now.model, features)
            else:  # beside the event loop: a chaotic call may sleep
                score = await asyncio.get_running_loop().run_in_executor(None, _score, self.chaos, features)
            self._seconds.observe(time.perf_counter() - began)
        except (ValueError, KeyError, TypeError) as error:
            self._predictions.labels("bad_request").inc()
            return web.json_response({"error": f"features: {error}"}, status=400)
        except (RuntimeError, TimeoutError) as error:
            self._predictions.labels("failed").inc()
            return web.json_response({"error": f"the model failed: {error}"}, status=500)
        self._predictions.labels("ok").inc()
        return web.json_response({"score": score, "model": now.version, "replica": self.config["name"]})

    # -- what is served ---------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Task: serve the file until a registry is known, then what the registry says."""
        while True:
            if self.served.file_changed(self.directory / "model.bin"):
                await _beside(self.served.take_file, self.directory)
            if self.service.peers.get("rollout"):
                await self._look_at_registry()
            ready = self.served.now is not None
            self.service.set_ready(ready, "ok" if ready else self.served.reason)
            await asyncio.sleep(_LOOK_S)

    async def _look_at_registry(self) -> None:
        import aiohttp

        from .registry import RegistryUnavailable

        try:
            url = f"{self.service.peers['rollout']}/assignment?replica={self.config['name']}"
            async with self.session.get(url) as response:
                version = (await response.json())["version"]
            if version is None:
                return
            artifact = await self.registry.artifact(version)
            if self._seen == (version, artifact):
                return
            card = await self.registry.card(version)
        except (RegistryUnavailable, aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError):
            return  # what is served goes on
        self._seen = (version, artifact)
        await _beside(self.served.take, artifact, card, "registry")

    @property
    def registry(self) -> RegistryClient:
        """Made when it is first needed: without a registry none of it is imported."""
        from .registry import RegistryClient

        if self._registry is None:
            self._registry = RegistryClient(lambda: self.service.peers.get("object_store", ""), self.config["token"])
        return self._registry

    async def health(self, request: web.Request) -> web.Response:
        """GET /model/health."""
        from aiohttp import web

        found = self.served.health()
        return web.json_response(found, status=200 if found["healthy"] else 503)

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        from aiohttp import web

        chaos = None if self.chaos is None else {"lease_id": self.chaos_lease, **self.chaos.counts._asdict()}
        return web.json_response({"model": self.served.health(), "chaos": chaos})

    async def try_out(self, request: web.Request) -> web.Response:
        """POST /model/try {"version": …, "rows": […]} → the candidate's scores; it takes no traffic."""
        from aiohttp import web

        from .model import ModelRejected
        from .registry import RegistryUnavailable

        asked = await request.json()
        try:
            artifact = await self.registry.artifact(asked["version"])
            card = await self.registry.card(asked["version"])
            found = await _beside(self.served.try_out, artifact, card, asked["rows"])
        except ModelRejected as error:
            return web.json_response({"rejected": str(error)})
        except RegistryUnavailable as error:
            return web.json_response({"error": str(error)}, status=503)
        return web.json_response({"scores": found})

    # -- a chaotic version ------------------------------------------------------------------------------------------

    async def make_chaotic(self, request: web.Request) -> web.Response:
        """PUT /chaos {"lease_id", "deadline" (monotonic), "config"}: serve through a wrapper until then."""
        from aiohttp import web

        from mlchaos_dagster.chaos_model import ChaosConfig, ChaosModelWrapper

        asked = await request.json()
        now, remaining = self.served.now, asked["deadline"] - time.monotonic()
        if now is None or remaining <= 0:
            return web.json_response({"error": "no model is served" if now is None else "too late"}, status=409)
        self.chaos = ChaosModelWrapper(now.model, ChaosConfig(**asked["config"]))
        self.chaos_lease = asked["lease_id"]
        asyncio.get_running_loop().call_later(remaining, self._calm, asked["lease_id"])
        return web.json_response({"ok": True})

    async def make_calm(self, request: web.Request) -> web.Response:
        """DELETE /chaos/{lease_id}: serve the bare model again."""
        from aiohttp import web

        self._calm(request.match_info["lease_id"])
        return web.json_response({"chaotic": self.chaos is not None})

    def _calm(self, lease_id: str) -> None:
        if self.chaos_lease == lease_id:
            self.chaos, self.chaos_lease = None, ""


def _score(model: Any, features: Any) -> float:
    return float(model.predict_proba([features])[0, 1])


async def _beside(work: Callable[..., Any], *arguments: Any) -> Any:
    """In a thread, so that /healthz answers while scikit-learn is being imported."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from .served_model import ServedModel
    from .service import Service

    service = Service(lifeline)
    served = ServedModel(service.config["mechanisms"], service.config["model_sha256"])
    replica = Replica(service, served)
    router = service.app.router
    router.add_post("/predict", replica.predict)
    router.add_get("/model/health", replica.health)
    router.add_post("/model/try", service.guarded(replica.try_out))
    router.add_get("/state", replica.state)
    router.add_put("/chaos", service.guarded(replica.make_chaotic))
    router.add_delete("/chaos/{lease_id}", service.guarded(replica.make_calm))
    watching: list[asyncio.Task[None]] = []

    async def started() -> None:
        import aiohttp

        replica.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0))
        watching.append(asyncio.get_running_loop().create_task(replica.watch()))

    await service.serve(started)
    await replica.session.close()
