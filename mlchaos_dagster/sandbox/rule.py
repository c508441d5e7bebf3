"""A rule on a link: one lease's fault, with its own deadline and the count of what it has touched."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

SLOW = ("network_latency", "s3_slow")
REFUSING = ("s3_unavailable", "database_unavailable", "network_isolation")
_COUNTERS = ("delayed", "lost", "dropped", "resets", "refused", "throttled")


@dataclass
class Rule:
    """One lease's fault on one link; times are seconds of the shared monotonic clock."""

    lease_id: str
    token: int
    link: str
    kind: str
    params: dict[str, float]
    deadline: float
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTERS, 0))
    first_effect: float | None = None

    def count(self, what: str) -> None:
        """Count a chunk (or connection, or request) this rule has touched."""
        self.counters[what] += 1
        if self.first_effect is None:
            self.first_effect = time.monotonic()

    def to_dict(self) -> dict[str, Any]:
        """The live rule as JSON."""
        return {
            "lease_id": self.lease_id,
            "token": self.token,
            "link": self.link,
            "kind": self.kind,
            "params": self.params,
            "remaining_s": round(max(0.0, self.deadline - time.monotonic()), 3),
            "counters": dict(self.counters),
            "first_effect": self.first_effect,
        }
