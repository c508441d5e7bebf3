"""What the replicas say of the model they serve."""

from __future__ import annotations

from . import Part, View


def _read(view: View) -> dict[str, float]:
    models = [state["model"] for name, state in view.states.items() if name.startswith("inference-")]
    if not models:
        return {}
    approved = view.states.get("rollout", {}).get("stable_sha256")
    return {
        "models_rejected": sum(model["rejected_total"] for model in models),
        "models_unhealthy": sum(not model["healthy"] for model in models),
        "model_versions": len({model["version"] for model in models}),
        # Of the bytes that were loaded, against what was approved: nobody's word, two checksums.
        "artifact_mismatch": sum(model["sha256"] != (approved or model["promised_sha256"]) for model in models),
    }


PART = Part(
    name="model_health",
    describe="Which model each replica serves, and whether it is the one that should be",
    watches=("inference-*",),
    signals=("models_rejected", "models_unhealthy", "model_versions", "artifact_mismatch"),
    read=_read,
)
