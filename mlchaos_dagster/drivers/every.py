"""The drivers of a cluster by name, for who has the connection already: the sweeper, `mlchaos clean`, `mlchaos doctor`."""

from __future__ import annotations

from importlib import import_module

from mlchaos_dagster.domain.environment import ON_CLUSTERS, Kubernetes
from mlchaos_dagster.drivers.cluster import PLACES
from mlchaos_dagster.drivers.cluster.driver import ClusterDriver
from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube.client import Cluster


def of_cluster(name: str, cluster: Cluster, options: Kubernetes) -> ClusterDriver:
    """The driver of a lease. Raises DriverUnavailable: it is none of a cluster."""
    if name not in PLACES:
        raise DriverUnavailable(f"{name} is no backend of a cluster. Allowed: {', '.join(ON_CLUSTERS)}", driver=name)
    module, _, attribute = PLACES[name].partition(":")
    found: type[ClusterDriver] = getattr(import_module(f"mlchaos_dagster.drivers.{module}"), attribute)
    return found.at(cluster, options)
