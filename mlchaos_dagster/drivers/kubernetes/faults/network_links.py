"""The two ends of a link in a cluster: which addresses a pod's packets carry when they go to the right-hand pods.

Inside a pod a packet to a Service carries the Service's cluster IP (it is rewritten on the node), a packet to a pod
carries the pod's. Cluster IPs stay when the right-hand pods are replaced during the window; a new pod that is called by
its own address (a headless Service, a mesh) is not among the frozen ones, and the evidence says so.
"""

from __future__ import annotations

from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import NAME, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text, words
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.kube.selecting import far, matching, namespace_of

_MOST_PROBES = 2


def other_end(site: Site, target: Target) -> dict[str, Any]:
    """`peers` (addresses), `ports`, `probes`, `services` (names) of a link's right side; all empty where there is none.

    Raises:
        DriverError: nothing is there.
    """
    labels, ports = far(target.select), list(target.kubernetes.ports)
    if not labels:
        return {"peers": [], "ports": ports, "probes": [], "services": []}
    namespace = namespace_of(site, target)
    pods = far_pods(site, namespace, labels)
    if not pods:
        raise DriverError(f"the link's right side, {labels}, matches no pod in namespace {namespace}", driver=NAME)
    if any(text(p, "spec", "hostNetwork") == "True" for p in pods):
        raise DriverError(
            f"the link's right side, {labels}, is in its node's network: its address is the node's", driver=NAME
        )
    services = [s for s in site.cluster.list(collection("service", namespace)) if _serves(s, pods)]
    return ends(pods, services, ports)


def far_pods(site: Site, namespace: str, labels: str) -> list[Object]:
    """The pods on the right side, as they are now."""
    return matching(site, "pod", namespace, labels)


def ends(pods: list[Object], services: list[Object], wanted: list[int]) -> dict[str, Any]:
    """As `other_end`, from objects. A port of a Service stands for the port behind it, too, and the other way round."""
    ports = set(wanted)
    probes: list[str] = []
    cluster_ips: list[str] = []
    for service in services:
        own = [ip for ip in words(service, "spec", "clusterIPs") if ip != "None"]
        cluster_ips += own
        for port in items(service, "spec", "ports"):
            number, behind = int(part(port, "port") or 0), _behind(port, pods)
            if wanted and not {number, behind} & set(wanted):
                continue
            if wanted:
                ports |= {number, behind} - {0}
            if text(port, "protocol") in ("", "TCP"):
                probes += [f"tcp:{_host(ip)}:{number}" for ip in own[:1]]
                if not own and behind:
                    probes.append(f"tcp:{_host(text(pods[0], 'status', 'podIP'))}:{behind}")
    if not probes:
        containers = items(pods[0], "spec", "containers")
        declared = [int(part(p, "containerPort") or 0) for c in containers for p in items(c, "ports")]
        open_ports = [p for p in (wanted or declared) if p]
        probes = [f"tcp:{_host(text(pods[0], 'status', 'podIP'))}:{p}" for p in open_ports]
    pod_ips = [ip for pod in pods for ip in addresses(pod)]
    return {
        "peers": sorted(set(cluster_ips + pod_ips)),
        "ports": sorted(ports),
        "probes": probes[:_MOST_PROBES],
        "services": sorted(text(s, "metadata", "name") for s in services),
    }


def addresses(pod: Object) -> list[str]:
    """Of a pod, all IP versions."""
    return [text(ip, "ip") for ip in items(pod, "status", "podIPs")]


def node_addresses(pod: Object) -> list[str]:
    """Of the node that a pod is on."""
    found = [text(ip, "ip") for ip in items(pod, "status", "hostIPs")]
    return found or [ip for ip in [text(pod, "status", "hostIP")] if ip]


def _serves(service: Object, pods: list[Object]) -> bool:
    selector = mapping(service, "spec", "selector")
    return bool(selector) and any(selector.items() <= mapping(p, "metadata", "labels").items() for p in pods)


def _behind(port: Object, pods: list[Object]) -> int:
    target = part(port, "targetPort")
    if isinstance(target, int):
        return target
    for pod in pods:
        for container in items(pod, "spec", "containers"):
            for declared in items(container, "ports"):
                if target and text(declared, "name") == target:
                    return int(part(declared, "containerPort") or 0)
    return int(part(port, "port") or 0) if not target else 0


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
