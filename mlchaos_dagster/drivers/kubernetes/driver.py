"""The native backend: faults that we make ourselves on pods, workloads, nodes and their network."""

from __future__ import annotations

from mlchaos_dagster.drivers.cluster.handler import Handler
from mlchaos_dagster.drivers.kubernetes.acting import ActingDriver
from mlchaos_dagster.drivers.kubernetes.faults import PLACES, handler
from mlchaos_dagster.kube.client import NAME, Site

_SELF_LIMITING = frozenset(  # as the handlers say it, held by a test: to ask them would import them all
    {
        "cpu_stress",
        "memory_stress",
        "gpu_memory_hog",
        "network_latency",
        "network_loss",
        "network_partition",
        "network_isolation",
        "dns_failure",
        "pod_delete",
        "container_kill",
    }
)
_BY_POLICY = frozenset({"network_partition", "network_isolation"})


class KubernetesDriver(ActingDriver):
    """Faults of our own making."""

    name = NAME
    faults = frozenset(PLACES)
    self_limiting = _SELF_LIMITING
    """Kinds that a deadline in the pod's own kernel or process ends; with `network: policy` the sweeper must."""

    def fault(self, kind: str) -> Handler:
        """As `ActingDriver.fault`."""
        return handler(kind)

    def _arrive(self, site: Site) -> Site:
        if site.options.network == "policy":  # nothing in a cluster ends a NetworkPolicy at a deadline
            self.self_limiting = _SELF_LIMITING - _BY_POLICY
        return super()._arrive(site)
