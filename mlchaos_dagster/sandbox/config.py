"""What a sandbox is made of, and the errors its API raises. Standard library only: a fast CLI imports this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MECHANISMS = (
    "restart",
    "breaker",
    "fallback",
    "retries",
    "readiness",
    "checkpoints",
    "data_validation",
    "model_check",
    "golden_check",
    "canary",
    "feature_validation",
    "autoscaler",
    "backpressure",
    "spool",
    "failover",
    "cert_reload",
    "credential_overlap",
    "segmentation",
    "degraded",
)
"""Resilience mechanisms that can be switched off at start.

- ``restart``: the supervisor restarts a process that exited (proxies, which are the network, always are).
- ``breaker``: circuit breaker on the feature store, and ejection of single replicas that fail again and again.
- ``fallback``: features that were seen before answer when the feature store does not.
- ``retries``: a second try at the feature store; up to two more tries on other replicas; a trainer repeats what the
  object store refused, and goes on from memory meanwhile; off = the first failed request ends it.
- ``readiness``: balance over ready replicas only; off = over all replicas, ready or not.
- ``checkpoints``: a trainer writes checkpoints and resumes from the last valid one; off = it begins anew.
- ``data_validation``: a trainer checks its data against the manifest; off = it trains on what it gets.
- ``model_check``: a replica checks a model's checksum before it loads it.
- ``golden_check``: a replica checks a model's golden predictions before it serves it.
- ``canary``: one replica serves a new version first; it is rolled back when its answers are not as expected.
- ``feature_validation``: null rate, range and freshness of features are checked; a bad row is answered from the cache.
- ``autoscaler``: replicas are added while their CPU is busy.
- ``backpressure``: a full queue says so (429) instead of taking what it cannot keep.
- ``spool``: the workflow runner keeps what it could not log and logs it later.
- ``failover``: the tracking server goes on with its standby database when the first one is damaged.
- ``cert_reload``: the edge takes a new certificate without closing connections.
- ``credential_overlap``: old and new API credentials are both accepted for a while.
- ``segmentation``: a process that was isolated is taken out of rotation before requests are lost on it.
- ``degraded``: with every replica ejected, the last prediction for the same entity is the answer.
"""

MAX_REPLICAS = 20


class SandboxError(Exception):
    """Anything that went wrong with the sandbox itself; the base of the two below."""


class SandboxUnavailable(SandboxError):
    """No sandbox answered: nobody knows (yet) whether a fault is present. Look at the processes."""


class SandboxRefused(SandboxError):
    """The sandbox answered no; ``status`` is the HTTP status (400 bad input, 403 token, 409 fenced or busy)."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


class SandboxConfigError(SandboxError, ValueError):
    """A configuration that cannot be; nothing was started."""


def _all_on() -> dict[str, bool]:
    return dict.fromkeys(MECHANISMS, True)


@dataclass(frozen=True)
class SandboxConfig:
    """Sizes and switches of one sandbox; fixed from ``up`` to ``down`` (but for the number of replicas)."""

    replicas: int = 3
    """Inference replicas at start."""
    mechanisms: Mapping[str, bool] = field(default_factory=_all_on)
    """Name of each mechanism → on; names that are left out are on."""
    entities: int = 500
    """Rows in the feature store: entity ids 0 … entities-1."""
    deadline_s: float = 1.0
    """The gateway answers within this time, with an error if need be."""
    feature_timeout_s: float = 0.2
    """One try at the feature store."""
    replica_timeout_s: float = 0.15
    """One try at an inference replica."""
    breaker_open_s: float = 2.0
    """How long an open breaker keeps traffic away before it lets one trial through."""
    feature_stale_s: float = 10.0
    """Features that ingestion refreshed longer ago than this are stale; it does so every 2 s."""
    feature_cache_limit_s: float = 300.0
    """Features that were seen before answer for this long after their last refresh, where they are refreshed at all."""
    backoff_initial_s: float = 0.3
    """Wait before the first restart; doubled for each further exit, reset after ``backoff_reset_s`` of running."""
    backoff_max_s: float = 10.0
    """Longest wait before a restart."""
    backoff_reset_s: float = 10.0
    """A process that ran this long is healthy: its next exit counts as its first."""
    memory_limit_bytes: int = 400 * 2**20
    """Of each inference replica, with what runs inside its limit; it needs about 160 MiB itself (see ``limits``)."""
    seed: int = 7
    """Seed of the features, the training data and the model."""
    object_store: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    """An S3 endpoint in place of the embedded store: ``endpoint``, ``access_key`` and ``secret_key`` (``env:NAME`` or
    ``file:PATH``), ``region``. Empty: the embedded one."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.mechanisms) - set(MECHANISMS))
        if unknown:
            raise SandboxConfigError(f"unknown mechanism {unknown[0]!r}; allowed: {', '.join(MECHANISMS)}")
        for name, value in self.mechanisms.items():
            if not isinstance(value, bool):
                raise SandboxConfigError(f"mechanisms.{name} must be true or false, not {value!r}")
        object.__setattr__(self, "mechanisms", {**_all_on(), **self.mechanisms})
        _integer("replicas", self.replicas, 1, MAX_REPLICAS)
        _integer("entities", self.entities, 1, 100_000)
        _integer("memory_limit_bytes", self.memory_limit_bytes, 2**24, 2**50)
        _integer("seed", self.seed, 0, 2**31 - 1)
        _object_store(self.object_store)
        for name in (
            "deadline_s",
            "feature_timeout_s",
            "replica_timeout_s",
            "breaker_open_s",
            "feature_stale_s",
            "feature_cache_limit_s",
            "backoff_initial_s",
            "backoff_max_s",
            "backoff_reset_s",
        ):
            _seconds(name, getattr(self, name))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SandboxConfig:
        """Build from plain data.

        Raises:
            SandboxConfigError: an unknown field, a wrong type or an impossible value; the message says what is allowed.
        """
        allowed = list(cls.__dataclass_fields__)
        unknown = sorted(set(data) - set(allowed))
        if unknown:
            raise SandboxConfigError(f"unknown sandbox field {unknown[0]!r}; allowed: {', '.join(allowed)}")
        mechanisms = data.get("mechanisms", {})
        if not isinstance(mechanisms, Mapping):
            raise SandboxConfigError(f"mechanisms must map names to true or false, not {mechanisms!r}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` takes back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["mechanisms"] = dict(self.mechanisms)
        plain["object_store"] = dict(self.object_store)
        return plain


def _object_store(given: Mapping[str, str]) -> None:
    if not given:
        return
    needed = ("endpoint", "access_key", "secret_key")
    for name in needed:
        if name not in given:
            raise SandboxConfigError(f"object_store needs {', '.join(needed)}; {name} is missing")
    if unknown := sorted(set(given) - {*needed, "region"}):
        raise SandboxConfigError(f"unknown field object_store.{unknown[0]}; allowed: {', '.join(needed)}, region")
    if not given["endpoint"].startswith(("http://", "https://")):
        raise SandboxConfigError(f"object_store.endpoint must be http://… or https://…, not {given['endpoint']!r}")
    for name in needed[1:]:
        if not given[name].startswith(("env:", "file:")):
            raise SandboxConfigError(f"object_store.{name} must be a reference: env:NAME or file:PATH")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SandboxConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 3600:
        raise SandboxConfigError(f"{name} must be seconds, more than 0 and at most 3600, not {value!r}")
