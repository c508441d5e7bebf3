"""What one agent is to do: written by the driver into the container's arguments, read by the agent."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

LATENCY, LOSS, PARTITION, ISOLATION, DNS = (
    "network_latency",
    "network_loss",
    "network_partition",
    "network_isolation",
    "dns_failure",
)
KINDS = (LATENCY, LOSS, PARTITION, ISOLATION, DNS)
CUTS = (PARTITION, ISOLATION)
"""Kinds that drop what leaves the pod, too."""
MOST_PORTS = 15
"""Of the kernel's multiport match."""
_LEASE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_PROBE = re.compile(r"tcp:.+:\d+|dns:.+")


@dataclass(frozen=True)
class Plan:
    """One fault in one pod's network."""

    lease: str
    kind: str
    duration_s: float
    """From `go` on."""
    peers: tuple[str, ...] = ()
    """Addresses at the other end; empty: everybody but `spare`."""
    ports: tuple[int, ...] = ()
    """Of the peers; where there are none, of either end. Empty: all traffic."""
    spare: tuple[str, ...] = ()
    """Addresses of the node: its probes are no traffic of the pod with others."""
    families: tuple[int, ...] = (4,)
    """IP versions of the pod's addresses."""
    probes: tuple[str, ...] = ()
    """Where the effect is measured: `tcp:ADDRESS:PORT` (a connection), `dns:ADDRESS` (a query)."""
    latency_s: float = 0.0
    jitter_s: float = 0.0
    fraction: float = 0.0
    """Of incoming packets that are lost, 0–1."""
    only_look: bool = False
    """Measure, and make nothing: somebody else makes the fault (a NetworkPolicy)."""

    @property
    def short(self) -> str:
        """Name of this lease in chains and containers: see `short_name`."""
        return short_name(self.lease)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in a line. Raises ValueError: what is wrong, what is allowed."""
        try:
            found: Any = json.loads(text)
            made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
            plan = cls(**made)
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"plan: {e}") from e
        plan._check()
        return plan

    def _check(self) -> None:
        if not _LEASE.fullmatch(self.lease):
            raise ValueError(f'lease: "{self.lease}" is no name. Allowed: lower-case letters, digits, - and .')
        if self.kind not in KINDS:
            raise ValueError(f'kind: "{self.kind}". Allowed: {", ".join(KINDS)}')
        if self.duration_s <= 0:
            raise ValueError(f"duration_s: {self.duration_s:g}. Allowed: above 0")
        if self.latency_s < 0 or self.jitter_s < 0 or self.jitter_s > self.latency_s:
            raise ValueError(f"jitter_s: {self.jitter_s:g} with latency_s {self.latency_s:g}. Allowed: 0 to latency_s")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction: {self.fraction:g}. Allowed: 0 to 1")
        if len(self.ports) > MOST_PORTS or any(not 1 <= p <= 65535 for p in self.ports):
            raise ValueError(f"ports: {self.ports}. Allowed: at most {MOST_PORTS}, from 1 to 65535")
        if not set(self.families) <= {4, 6}:
            raise ValueError(f"families: {self.families}. Allowed: 4, 6")
        for address in (*self.peers, *self.spare):
            ipaddress.ip_address(address)
        for probe in self.probes:
            if not _PROBE.fullmatch(probe):
                raise ValueError(f'probes: "{probe}". Allowed: tcp:ADDRESS:PORT, dns:ADDRESS')


def short_name(lease: str) -> str:
    """What tells a lease from all others in few letters: the random end of its id."""
    return re.sub(r"[^a-z0-9]", "", lease.rpartition("-")[2])[-16:] or "lease"


def of_family(addresses: tuple[str, ...], family: int) -> list[str]:
    """Those of one IP version."""
    return [a for a in addresses if ipaddress.ip_address(a).version == family]
