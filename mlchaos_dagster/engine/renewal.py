"""Showing that the owner of a lease lives: what the watchdog and the sweeper wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run

RENEW_EVERY_S = 0.5
"""A tenth of the default time to live: one slow look does not lose the lease."""


class Renewal:
    """Shows the watchdog that the owner lives. Called by the loop itself: a hung loop must look hung."""

    def __init__(self, run: Run, lease: Lease) -> None:
        self.run, self.lease, self.last = run, lease, -RENEW_EVERY_S

    def look(self, t: float) -> None:
        """Renew when it is time. Raises LeaseRefused (fenced) or StoreError."""
        if t - self.last >= RENEW_EVERY_S:
            self.last = t
            self.run.kit.ledger.renew(self.lease)


def renew_anyway(run: Run, lease: Lease) -> None:
    """Renew while the fault is taken away. Fenced or on a full disk: the recovery goes on, it is idempotent."""
    try:
        run.kit.ledger.renew(lease)
    except StoreError:
        pass


class Kept(Renewal):
    """Renewal while the fault is taken away: fenced or on a full disk, recovery goes on regardless."""

    def look(self, t: float) -> None:
        """Renew when it is time; never raises."""
        if t - self.last >= RENEW_EVERY_S:
            self.last = t
            renew_anyway(self.run, self.lease)
