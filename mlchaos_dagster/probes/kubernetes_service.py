"""Where a Service of the cluster is reached from here: `NAMESPACE/NAME:PORT` → URL.

Inside the cluster by its name; outside through its load balancer, else through a node's port. Not through the API server:
a probe that goes that way measures the API server, too, and takes its outage for the service's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from mlchaos_dagster.domain.environment import SERVICE_PLACE
from mlchaos_dagster.errors import DriverError, ProbeError
from mlchaos_dagster.kube.client import Permission
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import collection

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_CONNECT_S = 0.5
_MOST_NODES = 5
"""So many nodes are tried: a cluster that this machine has no route to is said to be so within seconds."""


class ServiceApi(Protocol):
    """What is needed of `kube.client.Cluster`."""

    context: str

    @property
    def server(self) -> str:
        """URL of the API server."""
        ...

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """One object."""
        ...

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """All objects."""
        ...


def filled(text_: str, connect: Callable[[], ServiceApi]) -> str:
    """Text with the places of Services filled in; the cluster is only asked when there are any.

    Raises:
        ProbeError: a Service cannot be reached from here, or a place is not written as one.
    """
    if SERVICE_PLACE.search(text_):
        api = connect()
        text_ = SERVICE_PLACE.sub(lambda found: url_of(api, found["namespace"], found["name"], found["port"]), text_)
    if "{service:" in text_:
        raise ProbeError(f'"{text_}" has a place that is none. Allowed: {{service:NAMESPACE/NAME:PORT}}')
    return text_


def url_of(api: ServiceApi, namespace: str, name: str, port: str) -> str:
    """`http://HOST:PORT` of a Service, without a slash at the end; https where its port says so.

    Raises:
        ProbeError: no such Service or port, or no way there from here; says what to do.
    """
    where = f"service {namespace}/{name}"
    try:
        service = api.get(f"{collection('service', namespace)}/{name}")
    except DriverError as e:
        raise ProbeError(f"{where}: {_with_rule(e, Permission('get', 'services', namespace))}") from e
    if service is None:
        raise ProbeError(f"the cluster has no {where}")
    ports = items(service, "spec", "ports")
    one = next((p for p in ports if port in (str(p.get("port")), p.get("name"))), None)
    if one is None:
        there = ", ".join(f"{p.get('port')}{' (' + p['name'] + ')' if p.get('name') else ''}" for p in ports)
        raise ProbeError(f"{where} has no port {port}. Allowed: {there or '(it has none)'}")
    scheme = "https" if _is_tls(one) else "http"
    if _is_inside(api, service, f"{name}.{namespace}.svc"):
        return f"{scheme}://{name}.{namespace}.svc:{one['port']}"
    tried: list[str] = []
    for host, number in _doors(api, service, one):
        if answers(host, number):
            return f"{scheme}://{host}:{number}"
        tried.append(f"{host}:{number}")
    raise ProbeError(f"{where} cannot be reached from here: {_why(service, one, tried)}")


def answers(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def _is_inside(api: ServiceApi, service: Object, name: str) -> bool:
    """Whether this process is in a pod of that very cluster: in another one the same name is another service."""
    if not _ACCOUNT.is_file() and "KUBERNETES_SERVICE_HOST" not in os.environ:
        return False
    if not api.context:
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)}
    except OSError:
        return False
    return text(service, "spec", "clusterIP") in found


def _doors(api: ServiceApi, service: Object, port: Object) -> Iterator[tuple[str, int]]:
    """Ways in from outside, the best first."""
    for one in items(service, "status", "loadBalancer", "ingress"):
        if host := one.get("ip") or one.get("hostname"):
            yield str(host), int(port["port"])
    if not port.get("nodePort"):
        return
    try:
        nodes = api.list("/api/v1/nodes")
    except DriverError as e:
        raise ProbeError(f"nodes of the cluster: {_with_rule(e, Permission('list', 'nodes'))}") from e
    host_of_api = urlsplit(api.server).hostname
    # Not a node that an experiment is likely to take away: first the one that carries the control plane.
    nodes.sort(key=lambda n: (not _is_ready(n), not _is_control(n), _address(n) != host_of_api, n["metadata"]["name"]))
    for node in nodes[:_MOST_NODES]:
        if address := _address(node):
            yield address, int(port["nodePort"])


def _why(service: Object, port: Object, tried: list[str]) -> str:
    if tried:
        return f"no answer at {', '.join(tried)}. Needed: a route from here to one of them, or a run inside the cluster"
    kind = text(service, "spec", "type") or "ClusterIP"
    return (
        f"it is of type {kind}, with no door to the outside. Needed: a Service of type NodePort or LoadBalancer, a run inside "
        f"the cluster, or another URL (kubectl port-forward service/{service['metadata']['name']} 8080:{port['port']} gives one)"
    )


def _is_tls(port: Object) -> bool:
    protocol, name = str(port.get("appProtocol") or ""), str(port.get("name") or "")
    return protocol == "https" or name == "https" or name.startswith("https-") or port.get("port") == 443


def _is_ready(node: Object) -> bool:
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in items(node, "status", "conditions"))


def _is_control(node: Object) -> bool:
    return "node-role.kubernetes.io/control-plane" in mapping(node, "metadata", "labels")


def _address(node: Object) -> str:
    found = {str(a.get("type")): str(a.get("address")) for a in items(node, "status", "addresses")}
    return found.get("InternalIP") or found.get("ExternalIP") or ""


def _with_rule(error: DriverError, permission: Permission) -> str:
    return f"{error}; add {permission.rule}" if getattr(error, "code", 0) == 403 else str(error)
