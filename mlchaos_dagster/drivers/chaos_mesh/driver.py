"""The backend Chaos Mesh: its controller and daemons make the faults."""

from __future__ import annotations

from mlchaos_dagster.drivers.chaos_mesh.faults import HANDLERS
from mlchaos_dagster.drivers.cluster.handler import Handler
from mlchaos_dagster.drivers.kubernetes.acting import ActingDriver


class ChaosMeshDriver(ActingDriver):
    """Faults through resources of Chaos Mesh."""

    name = "chaos_mesh"
    faults = frozenset(HANDLERS)
    self_limiting = frozenset(kind for kind, handler in HANDLERS.items() if handler.self_limiting)
    """Chaos Mesh's controller ends them at their duration, whoever of us is dead."""

    def fault(self, kind: str) -> Handler:
        """As `ActingDriver.fault`."""
        return HANDLERS[kind]
