"""What a supervisor says of its sandbox: to whoever asks, in `state.json`, and as signals."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from .parts import View

if TYPE_CHECKING:
    from .supervisor import Supervisor

_STATE_LASTS_S = 1.0
"""What a process said of itself longer ago than this is not what it says now."""


def state(supervisor: Supervisor) -> dict[str, Any]:
    """What is written to `state.json`, for whoever looks for the sandbox."""
    children = {n: {"pid": s.pid, "create_time": s.create_time} for n, s in supervisor.slots.items() if s.pid}
    gateway = supervisor.slots["gateway"].last_port
    found: dict[str, Any] = {
        "pid": os.getpid(),
        "create_time": supervisor.me.create_time(),
        "control_url": f"http://127.0.0.1:{supervisor.control_port}",
        "token": supervisor.token,
        "gateway_url": f"http://127.0.0.1:{gateway}" if gateway else None,
        "ports": {name: slot.last_port for name, slot in supervisor.slots.items()},
        "link_ports": supervisor.link_ports(),
        "children": children,
        "config": supervisor.config.to_dict(),
        "started_at": supervisor.started_at,
        "parts": list(supervisor.parts),
    }
    for one in supervisor.parts.values():
        found |= one.facts(supervisor) if one.facts is not None else {}
    return found


async def status(supervisor: Supervisor) -> dict[str, Any]:
    """Everything, asked of the processes themselves just now."""
    slots = list(supervisor.slots.values())
    readiness, faults = await asyncio.gather(
        asyncio.gather(*(supervisor.readyz(slot) for slot in slots)), supervisor.book.present()
    )
    processes = [
        {
            "name": slot.name,
            "role": slot.role.replace("_", "-"),
            "pid": slot.pid if slot.running else None,
            "alive": slot.running,
            "ready": ready,
            "reason": reason,
            "restarts": slot.restarts,
            "oom_kills": slot.oom_kills,
            "port": slot.port,
            "url": f"http://127.0.0.1:{slot.port}" if slot.port else None,
            "held_by": sorted({hold.split("/")[0] for hold in slot.holds}),
        }
        for slot, (ready, reason) in zip(slots, readiness, strict=True)
    ]
    complete = _complete(supervisor, processes)
    links = supervisor.link_ports()
    return {
        "directory": str(supervisor.directory),
        "supervisor": {
            "pid": os.getpid(),
            "create_time": supervisor.me.create_time(),
            "started_at": supervisor.started_at,
        },
        "control_url": f"http://127.0.0.1:{supervisor.control_port}",
        "gateway_url": next((p["url"] for p in processes if p["name"] == "gateway"), None),
        "ready": complete and all(process["ready"] for process in processes),
        "replicas": supervisor.replicas,
        "parts": ["serving", *supervisor.parts],
        "mechanisms": dict(supervisor.config.mechanisms),
        "model_sha256": supervisor.model_sha256,
        "processes": processes,
        "links": {name: {"port": port, "url": f"http://127.0.0.1:{port}"} for name, port in links.items()},
        "faults": faults["faults"],
        "unanswered": faults["unanswered"],
    }


def signals(supervisor: Supervisor) -> dict[str, float]:
    """Gauges that cost nothing to read: for somebody who asks twenty times a second."""
    replicas = [slot for slot in supervisor.slots.values() if slot.role == "inference"]
    found: dict[str, float] = {
        "ready_replicas": sum(slot.ready for slot in replicas),
        "running_replicas": sum(slot.running for slot in replicas),
        "restarts": sum(slot.restarts for slot in supervisor.slots.values()),
        "oom_kills": sum(slot.oom_kills for slot in supervisor.slots.values()),
    }
    since = time.monotonic() - _STATE_LASTS_S
    states = {name: state for name, (at, state) in supervisor.states.items() if at >= since}
    view = View(supervisor.slots, states, supervisor.directory)
    for one in supervisor.parts.values():
        found |= one.read(view) if one.read is not None else {}
    return found


def _complete(supervisor: Supervisor, processes: list[dict[str, Any]]) -> bool:
    """True when all replicas have slots and the gateway was told of all that are ready."""
    ready = sum(process["ready"] for process in processes if process["role"] == "inference")
    replicas = sum(process["role"] == "inference" for process in processes)
    return replicas == supervisor.replicas and supervisor.connections.complete(ready)
