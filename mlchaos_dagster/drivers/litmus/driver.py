"""The backend Litmus: neutral faults through its experiments, and ChaosEngines that a team brings along."""

from __future__ import annotations

from mlchaos_dagster.domain.record import Finding
from mlchaos_dagster.drivers.cluster.beside import beside
from mlchaos_dagster.drivers.cluster.driver import injection_of
from mlchaos_dagster.drivers.kubernetes.acting import ActingDriver
from mlchaos_dagster.drivers.litmus.faults import BROUGHT, EXPERIMENTS
from mlchaos_dagster.drivers.litmus.handler import LitmusFault
from mlchaos_dagster.drivers.litmus.recovery import NAME
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable
from mlchaos_dagster.kube.client import ApiRefused


class LitmusDriver(ActingDriver):
    """Faults of Litmus's making."""

    name = NAME
    faults = frozenset({*EXPERIMENTS, BROUGHT})
    self_limiting = frozenset({"pod_delete", "container_kill"})
    """The others end at their duration only as long as their experiment and its helpers live: those undo them."""

    def fault(self, kind: str) -> LitmusFault:
        """As `ActingDriver.fault`."""
        if kind not in self.faults:
            raise KeyError(kind)
        return LitmusFault(kind)

    def findings(self, lease: Lease, step: Step = no_step) -> tuple[Finding, ...]:
        """As `Judging.findings`: of a brought engine, its probes and its verdict."""
        if lease.kind != BROUGHT:
            return ()
        site = self._of(lease, "findings")
        try:
            chosen, injection = self.fault(lease.kind), injection_of(lease)
            return beside(lambda told: chosen.findings(site, injection, told), step)
        except ApiRefused as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="findings", lease_id=lease.id) from e
        except DriverUnavailable:
            raise
        except DriverError as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="findings", lease_id=lease.id) from e
