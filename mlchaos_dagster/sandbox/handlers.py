"""Faults that are neither a kill nor a rule of a proxy: one handler for each kind, imported when it is first asked for."""

from __future__ import annotations

import asyncio
import importlib
import math
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .faults import Fault, Refused

if TYPE_CHECKING:
    from .supervisor import Supervisor

HANDLERS: dict[str, str] = {
    "model_chaos": "chaotic:ModelChaos",
    "cpu_stress": "stress:CpuStress",
    "memory_stress": "stress:MemoryStress",
    "queue_overflow": "overload:QueueOverflow",
    "certificate_rotation": "rotation:CertificateRotation",
    "credential_rotation": "rotation:CredentialRotation",
    "network_isolation": "isolation:NetworkIsolation",
}
"""Kind → ``module:Class`` under ``sandbox/``. A class is built once, with the supervisor."""


class Handler(Protocol):
    """Verbs on one kind of fault. Called under the book's lock, on the supervisor's event loop: never block it.

    The deadline, tombstones, fencing and the truth log's `fault_added`, `fault_removed`, `fault_expired` are the
    book's. Whatever a handler starts must die with the supervisor (children: see ``lifeline``).
    """

    def targets(self) -> Collection[str]:
        """Process names that this kind can be put on now."""
        ...

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, checked to the last field. Raises Refused(400)."""
        ...

    async def inject(self, fault: Fault) -> None:
        """Make it, within a second and a half. Raises Refused: ``clear`` is called, nothing may be left."""
        ...

    async def clear(self, fault: Fault) -> None:
        """Take it away and see that it is gone; idempotent. Raises Refused(503): it may still be there."""
        ...

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """(effective, evidence lines, further facts), read from the target now; None: nothing of it is there."""
        ...


@runtime_checkable
class Tracing(Protocol):
    """A handler whose targets can say by themselves what they have, whatever the book remembers."""

    async def traces(self) -> list[tuple[str, str]]:
        """(lease id, target) of everything of this kind that is there now; targets that do not answer are left out."""
        ...


async def told(handlers: Mapping[str, Handler]) -> list[Fault]:
    """What targets say they have of these kinds, as faults without parameters whose time is up."""
    asked = {kind: handler.traces() for kind, handler in handlers.items() if isinstance(handler, Tracing)}
    answers = zip(asked, await asyncio.gather(*asked.values()), strict=True)
    return [Fault(lease, 0, kind, target, {}, time.monotonic()) for kind, found in answers for lease, target in found]


def build(kind: str, supervisor: Supervisor) -> Handler:
    """The handler of a kind."""
    module, _, name = HANDLERS[kind].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)(supervisor)


def number(
    kind: str, given: Mapping[str, Any], name: str, low: float, high: float, default: float | None = None
) -> float:
    """One numeric parameter, low ≤ value ≤ high. Raises Refused(400)."""
    value = given.get(name, default)
    if value is None:
        raise Refused(400, f"{kind} needs {name}")
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if wrong or not low <= value <= high:
        raise Refused(400, f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def only(kind: str, given: Mapping[str, Any], *allowed: str) -> None:
    """Refuse parameters that this kind does not have. Raises Refused(400)."""
    for name in given:
        if name not in allowed:
            raise Refused(400, f"{kind} has no parameter {name!r}; allowed: {', '.join(allowed) or 'none'}")
