"""Faults, backend-neutral: a kind and its typed parameters.

A new fault is one class here, one handler in a driver and one YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlchaos_dagster.domain.units import Duration, DurationOrZero, Fraction


class FaultBase(BaseModel):
    """What every fault has: nothing but its kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def params(self) -> dict[str, Any]:
        """Parameters as SI numbers, as drivers take them (`latency_s`, `fraction`, …)."""
        return {}


class PodDelete(FaultBase):
    """Kill the targets' processes; the platform is expected to bring them back."""

    kind: Literal["pod_delete"]
    interval: Duration | None = None
    """Kill again every `interval` until the window ends; absent: once."""
    signal: Literal["kill", "term"] = "kill"
    """`kill` gives no chance to finish requests; `term` lets a graceful shutdown show itself."""

    def params(self) -> dict[str, Any]:
        """`interval_s` (None: once), `signal`."""
        return {"interval_s": self.interval, "signal": self.signal}


class PodFailure(FaultBase):
    """Take the targets down and hold them down for the whole window."""

    kind: Literal["pod_failure"]


class NetworkLatency(FaultBase):
    """Delay the traffic of the targets' links: round trip + `latency` ± `jitter`."""

    kind: Literal["network_latency"]
    latency: Duration
    jitter: DurationOrZero = 0.0

    def params(self) -> dict[str, Any]:
        """`latency_s`, `jitter_s`."""
        return {"latency_s": self.latency, "jitter_s": self.jitter}


class NetworkLoss(FaultBase):
    """Lose a fraction of what the targets' links carry."""

    kind: Literal["network_loss"]
    fraction: Annotated[Fraction, Field(gt=0)]

    def params(self) -> dict[str, Any]:
        """`fraction`, 0–1."""
        return {"fraction": self.fraction}


class NetworkPartition(FaultBase):
    """No byte passes the targets' links."""

    kind: Literal["network_partition"]


Fault = Annotated[PodDelete | PodFailure | NetworkLatency | NetworkLoss | NetworkPartition, Field(discriminator="kind")]

FAULTS: dict[str, type[FaultBase]] = {
    "pod_delete": PodDelete,
    "pod_failure": PodFailure,
    "network_latency": NetworkLatency,
    "network_loss": NetworkLoss,
    "network_partition": NetworkPartition,
}

ALIASES = {"pod_kill": "pod_delete", "network_delay": "network_latency"}
"""Other tools' words, accepted by `mlchaos run --type` (R4-02)."""
