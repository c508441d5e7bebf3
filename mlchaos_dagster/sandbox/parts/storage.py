"""Object storage: an S3 API with versioned buckets for training data, checkpoints and models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Part, Process

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.supervisor import Supervisor

STORE = "object-store"


def _facts(supervisor: Supervisor) -> dict[str, Any]:
    from mlchaos_dagster.sandbox.sigv4 import credentials

    port = supervisor.slots[STORE].last_port
    access, secret = credentials(supervisor.child_token)
    if not port:
        return {}
    return {"object_store": {"url": f"http://127.0.0.1:{port}", "access_key": access, "secret_key": secret}}


PART = Part(
    name="storage",
    describe="Object store (S3 API) with training data, checkpoints and models",
    processes=(Process(STORE, "object_store"), Process("proxy-object-store", "proxy")),
    links={
        "trainer->object-store": ("proxy-object-store", STORE),
        "inference->object-store": ("proxy-object-store", STORE),
    },
    facts=_facts,
)
