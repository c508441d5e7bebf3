"""One inference replica: POST /predict {"features": [...]} → score of the checked model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from .lifeline import Lifeline


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Counter, Histogram

    from .service import Service

    service = Service(lifeline)
    config = service.config
    model: Any = None
    predictions = Counter("sandbox_predictions_total", "Predictions by result", ["result"], registry=service.registry)
    seconds = Histogram("sandbox_prediction_seconds", "Time in the model", registry=service.registry)

    async def predict(request: web.Request) -> web.Response:
        if model is None:
            predictions.labels("unready").inc()
            return web.json_response({"error": f"not ready: {service.reason}"}, status=503)
        try:
            features = (await request.json())["features"]
            with seconds.time():
                score = float(model.predict_proba([features])[0, 1])
        except (ValueError, KeyError, TypeError) as error:
            predictions.labels("bad_request").inc()
            return web.json_response({"error": f"features: {error}"}, status=400)
        predictions.labels("ok").inc()
        return web.json_response({"score": score, "model": config["model_sha256"][:12], "replica": config["name"]})

    def load_model() -> Any:
        from .model import load

        return load(Path(config["model_dir"]), config["model_sha256"])

    async def started() -> None:
        nonlocal model
        from .model import ModelRejected

        try:
            # In a thread, so that /healthz answers while scikit-learn is being imported.
            model = await asyncio.get_running_loop().run_in_executor(None, load_model)
        except ModelRejected as error:
            service.set_ready(False, f"model rejected: {error}")
            return
        service.set_ready()

    service.app.router.add_post("/predict", predict)
    await service.serve(started)
