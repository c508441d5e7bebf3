"""Rollback actions for every driver of a cluster: they help a service up, whoever made the fault."""

from __future__ import annotations

from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers.cluster.driver import ClusterDriver
from mlchaos_dagster.drivers.cluster.handler import Handler
from mlchaos_dagster.drivers.kubernetes import actions
from mlchaos_dagster.errors import DriverError, DriverUnavailable
from mlchaos_dagster.kube.client import ApiRefused


class ActingDriver(ClusterDriver):
    """A driver whose verbs also make and undo rollback actions."""

    actions = frozenset(actions.HANDLERS)
    """Rollback actions that the same verbs make and undo."""

    def fault(self, kind: str) -> Handler:
        """The handler of a fault. Raises KeyError: this backend does not make it."""
        raise NotImplementedError

    def handler(self, kind: str) -> Handler:
        """As `ClusterDriver.handler`, for faults and rollback actions."""
        try:
            return actions.HANDLERS.get(kind) or self.fault(kind)
        except KeyError as e:
            known = ", ".join(sorted(self.faults))
            raise DriverError(f"{kind} is no fault of this backend. Allowed: {known}", driver=self.name) from e

    def affected(self, kind: str, target: Target, params: dict[str, Any]) -> tuple[str, ...]:
        """As `Acting.affected`."""
        site = self._reached("affected")
        try:
            return tuple(str(ref) for ref in actions.affected(site, kind, target, params))
        except ApiRefused as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="affected") from e
