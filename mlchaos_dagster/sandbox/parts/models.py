"""The model registry in the object store, and the rollout of new versions with a canary."""

from __future__ import annotations

from . import Part, Process, View


def _read(view: View) -> dict[str, float]:
    rollout = view.states.get("rollout")
    return {} if rollout is None else {"model_rollbacks": rollout["rollbacks"]}


PART = Part(
    name="models",
    describe="Model registry and the rollout of new versions",
    requires=("storage", "model_health"),
    processes=(Process("rollout", "rollout"),),
    links={"rollout->object-store": ("proxy-object-store", "object-store")},
    peers={
        "inference-*": {"object_store": "inference->object-store", "rollout": "rollout"},
        "rollout": {"object_store": "rollout->object-store", "canary": "inference-1"},
    },
    signals=("model_rollbacks",),
    read=_read,
)
