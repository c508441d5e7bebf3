"""Neutral kind → its handler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.drivers.chaos_mesh import specs
from mlchaos_dagster.drivers.chaos_mesh.brought import Brought
from mlchaos_dagster.drivers.chaos_mesh.handler import Fault
from mlchaos_dagster.drivers.chaos_mesh.inside_eyes import NetworkEyes, StressEyes
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import ImageEyes, StartEyes, container_of, status_of
from mlchaos_dagster.drivers.chaos_mesh.pod_kill import PodKill
from mlchaos_dagster.drivers.chaos_mesh.resolver_eyes import ResolverEyes
from mlchaos_dagster.drivers.chaos_mesh.specs import Made
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Handler, Request
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.objects import mapping

_CUTS = ("network_partition", "network_isolation")


def _pod_failure(site: Site, request: Request, before: dict[str, Any]) -> Made:
    return specs.pod_failure(request.refs)


def _container_kill(site: Site, request: Request, before: dict[str, Any]) -> Made:
    return specs.container_kill(request.refs, _containers(site, request))


def _cpu_stress(site: Site, request: Request, before: dict[str, Any]) -> Made:
    return specs.cpu_stress(request.refs, _containers(site, request), request.params)


def _memory_stress(site: Site, request: Request, before: dict[str, Any]) -> Made:
    return specs.memory_stress(request.refs, _containers(site, request), request.params)


def _dns_failure(site: Site, request: Request, before: dict[str, Any]) -> Made:
    return specs.dns_failure(request.refs, _containers(site, request))


def _network(site: Site, request: Request, before: dict[str, Any]) -> Made:
    """Both ends of a link; without a link, or isolated: everybody but the pods' own nodes, as their kubelets ask."""
    peers: list[str] = before["peers"] if request.kind != "network_isolation" else []
    if peers:
        places = specs.with_ports(peers, before["ports"])
    else:
        places = specs.everything_but(before["spare"])
    if not places:
        raise DriverError("the other end has no IPv4 address, and Chaos Mesh makes its rules for IPv4 only")
    return specs.network(request.kind, request.refs, request.params, places)


def _containers(site: Site, request: Request) -> list[str]:
    """Names of the containers that are meant: one, or the first of each pod where none is named."""
    pods = frozen.read_all(site, request.refs).values()
    return sorted({name for pod in pods if (name := container_of(pod, request.target.kubernetes.container))})


def _runs(site: Site, request: Request) -> Iterator[Objection]:
    for ref, pod in frozen.read_all(site, request.refs).items():
        if pod is not None and "running" not in mapping(status_of(pod, request.target.kubernetes.container), "state"):
            name = request.target.kubernetes.container or "(the first)"
            yield Objection(f"container {name} of {ref.shown} does not run", "a container that runs")


def _no_ports(site: Site, request: Request) -> Iterator[Objection]:
    if request.target.kubernetes.ports and (not request.target.is_link or request.kind not in _CUTS):
        yield Objection(
            f"{request.kind} through Chaos Mesh is on all ports",
            "no kubernetes.ports (only a partition of a link takes them); or the backend kubernetes",
        )


HANDLERS: dict[str, Handler] = {
    "pod_delete": PodKill(),
    "pod_failure": Fault("PodChaos", _pod_failure, ImageEyes()),
    "container_kill": Fault("PodChaos", _container_kill, StartEyes(), against=_runs),
    "network_latency": Fault("NetworkChaos", _network, NetworkEyes(), against=_no_ports),
    "network_loss": Fault("NetworkChaos", _network, NetworkEyes(), against=_no_ports),
    "network_partition": Fault("NetworkChaos", _network, NetworkEyes(), against=_no_ports),
    "network_isolation": Fault("NetworkChaos", _network, NetworkEyes(), against=_no_ports),
    "cpu_stress": Fault("StressChaos", _cpu_stress, StressEyes()),
    "memory_stress": Fault("StressChaos", _memory_stress, StressEyes()),
    "dns_failure": Fault("DNSChaos", _dns_failure, ResolverEyes(), against=_runs),
    "chaos_mesh_resource": Brought(),
}
"""Every neutral kind that Chaos Mesh has, and a team's own resource."""
