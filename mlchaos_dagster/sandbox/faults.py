"""What a fault request may say, and what the supervisor keeps of one. Validation only: no processes, no I/O."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_DEADLINE_S = 86_400.0
POD_KINDS = ("pod_delete", "pod_failure", "container_kill")
S3_KINDS = ("s3_unavailable", "s3_slow", "s3_throttled")
"""Only on links to an object store."""
NETWORK_KINDS = ("network_latency", "network_loss", "network_partition", "database_unavailable", *S3_KINDS)
"""Rules of the proxy that a link runs through."""

_REQUIRED = {
    "network_latency": ("latency_ms",),
    "network_loss": ("fraction",),
    "s3_slow": ("latency_ms",),
    "s3_throttled": ("fraction",),
}
_OPTIONAL = {
    "pod_delete": ("interval_s", "signal"),
    "pod_failure": ("signal",),
    "network_latency": ("jitter_ms",),
    "s3_slow": ("jitter_ms",),
}
_RANGES = {
    "latency_ms": (0.0, 60_000.0),
    "jitter_ms": (0.0, 60_000.0),
    "fraction": (0.0, 1.0),
    "interval_s": (0.1, 3600.0),
}
SIGNALS = ("SIGKILL", "SIGTERM")


class Refused(Exception):
    """The answer is no; ``status`` is the HTTP status that says why (400 bad input, 409 fenced, 503 cannot now)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """One lease's fault on one target, as the supervisor means it; what is really there is asked at the target."""

    lease_id: str
    token: int
    kind: str
    target: str
    params: dict[str, Any]
    deadline: float
    """Monotonic seconds."""
    started_at: float = field(default_factory=time.time)
    killed: list[int] = field(default_factory=list)
    effective_logged: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a second request the same request."""
        return (self.lease_id, self.target, self.kind)

    @property
    def hold_key(self) -> str:
        """Names this fault among the holds of a slot."""
        return f"{self.lease_id}/{self.kind}"

    @property
    def remaining_s(self) -> float:
        """Seconds until it ends by itself."""
        return max(0.0, self.deadline - time.monotonic())

    def to_dict(self, *, effective: bool, evidence: list[str], **details: Any) -> dict[str, Any]:
        """The fault as JSON, with what was seen of it at the target."""
        return {
            "lease_id": self.lease_id,
            "token": self.token,
            "target": self.target,
            "kind": self.kind,
            "params": self.params,
            "started_at": self.started_at,
            "remaining_s": round(self.remaining_s, 3),
            "effective": effective,
            "evidence": evidence,
            **details,
        }


class Kind(Protocol):
    """What a kind of fault allows, where this module does not know it itself (see ``handlers``)."""

    def targets(self) -> Collection[str]:
        """Names it can be put on now."""
        ...

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, checked. Raises Refused."""
        ...


def parse(
    body: Any, processes: Collection[str], links: Collection[str], others: Mapping[str, Callable[[], Kind]]
) -> Fault:
    """Check a request to the last field. ``others``: kinds that have a handler.

    Raises:
        Refused: 400, with what is wrong and what is allowed.
    """
    if not isinstance(body, Mapping):
        raise Refused(400, "a fault is a JSON object")
    fields = ("lease_id", "token", "kind", "target", "params", "deadline_s")
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise Refused(400, f"unknown field {unknown[0]!r}; allowed: {', '.join(fields)}")
    for name in fields:
        if name not in body and name != "params":
            raise Refused(400, f"{name} is missing")
    lease, token, kind, target = body["lease_id"], body["token"], body["kind"], body["target"]
    if not isinstance(lease, str) or not 0 < len(lease) <= 200 or "/" in lease:
        raise Refused(400, "lease_id must be 1 to 200 characters without '/'")
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise Refused(400, f"token must be a whole number, 0 or more, not {token!r}")
    known = (*POD_KINDS, *NETWORK_KINDS, *others)
    if kind not in known:
        raise Refused(400, f"unknown kind {kind!r}; allowed: {', '.join(known)}")
    other = others[kind]() if kind in others else None
    if kind in S3_KINDS:
        links = [name for name in links if name.endswith("->object-store")]
    allowed = sorted(other.targets() if other else links if kind in NETWORK_KINDS else processes)
    if target not in allowed:
        raise Refused(400, f"{kind} has no target {target!r}; allowed: {', '.join(allowed) or 'none'}")
    deadline_s = _number("deadline_s", body["deadline_s"], 0.0, MAX_DEADLINE_S)
    given = body.get("params") or {}
    if not isinstance(given, Mapping):
        raise Refused(400, "params must be a JSON object")
    params = other.params(given) if other else _params(kind, given)
    return Fault(lease, token, kind, target, params, time.monotonic() + deadline_s)


def _params(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    required, optional = _REQUIRED.get(kind, ()), _OPTIONAL.get(kind, ())
    for name in given:
        if name not in required + optional:
            raise Refused(400, f"{kind} has no parameter {name!r}; allowed: {', '.join(required + optional) or 'none'}")
    params: dict[str, Any] = {}
    for name in required + optional:
        value = given.get(name)
        if value is None:
            if name in required:
                raise Refused(400, f"{kind} needs {name}")
        elif name == "signal":
            if value not in SIGNALS:
                raise Refused(400, f"signal must be one of {', '.join(SIGNALS)}, not {value!r}")
            params[name] = value
        else:
            params[name] = _number(name, value, *_RANGES[name])
    if "latency_ms" in params:
        params.setdefault("jitter_ms", 0.0)
        if params["jitter_ms"] > params["latency_ms"]:
            raise Refused(400, "jitter_ms must not be more than latency_ms")
    return params


def _number(name: str, value: Any, low: float, high: float) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    # Zero is out everywhere but for jitter: a fault of strength nothing is a mistake.
    if wrong or not low <= value <= high or (value == 0 and name != "jitter_ms"):
        raise Refused(400, f"{name} must be a number from {low:g} (0 excluded) to {high:g}, not {value!r}")
    return float(value)
