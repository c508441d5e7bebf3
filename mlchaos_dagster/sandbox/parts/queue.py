"""Batch scoring: a queue with a bounded backlog, two workers, and the usual load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Part, Process, View

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.supervisor import Supervisor


def _settings(supervisor: Supervisor, name: str) -> dict[str, Any]:
    return {"data": str(supervisor.directory / "data")} if name == "queue" else {}


def _read(view: View) -> dict[str, float]:
    queue, client = view.states.get("queue", {}), view.states.get("batch-client", {})
    found = {
        "backlog": queue.get("backlog"),
        "jobs_rejected_rate": queue.get("rejected_rate"),
        "job_wait": client.get("wait_p95_s"),
    }
    if queue and client:
        found["jobs_lost"] = queue["dropped_total"] + client["lost"]
    return {name: float(value) for name, value in found.items() if value is not None}


PART = Part(
    name="queue",
    describe="Queue and two workers for batch scoring, with their usual load",
    processes=(
        Process("queue", "queue_server"),
        Process("worker-1", "worker"),
        Process("worker-2", "worker"),
        Process("batch-client", "batch_client"),
    ),
    peers={"worker-*": {"queue": "queue"}, "batch-client": {"queue": "queue"}},
    signals=("backlog", "jobs_lost", "jobs_rejected_rate", "job_wait"),
    read=_read,
    settings=_settings,
)
