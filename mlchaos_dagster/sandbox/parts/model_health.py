"""What the replicas say of the model they serve."""

from __future__ import annotations

from . import Part, View


def _read(view: View) -> dict[str, float]:
    replicas = [name for name, slot in view.slots.items() if slot.role == "inference" and slot.port]
    if not replicas or any(name not in view.states for name in replicas):
        return {}  # a replica that hangs may be the very one that serves the wrong model
    models = [view.states[name]["model"] for name in replicas]
    found: dict[str, float] = {
        "models_rejected": sum(model["rejected_total"] for model in models),
        "models_unhealthy": sum(not model["healthy"] for model in models),
        "model_versions": len({model["version"] for model in models}),
    }
    # Of the bytes that were loaded, against what was approved: nobody's word, two checksums. Where a rollout approves, a
    # replica's own promise is no substitute for its word.
    if "rollout" not in view.slots:
        approved = [model["promised_sha256"] for model in models]
    elif stable := view.states.get("rollout", {}).get("stable_sha256"):
        approved = [stable] * len(models)
    else:
        return found
    wrong = sum(model["sha256"] != sha256 for model, sha256 in zip(models, approved, strict=True))
    return {**found, "artifact_mismatch": wrong}


PART = Part(
    name="model_health",
    describe="Which model each replica serves, and whether it is the one that should be",
    watches=("inference-*",),
    signals=("models_rejected", "models_unhealthy", "model_versions", "artifact_mismatch"),
    read=_read,
)
