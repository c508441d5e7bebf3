"""What a pod knows about its own network: its name servers and its way out."""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import replace
from pathlib import Path

from mlchaos_dagster.agent.network_plan import DNS, Plan

_RESOLVER = Path("/etc/resolv.conf")
_ROUTES = Path("/proc/net/route")
_ROUTES_6 = Path("/proc/net/ipv6_route")


def at_home(plan: Plan, resolver: str | None = None, routes: str | None = None, routes_6: str | None = None) -> Plan:
    """The plan with what only the pod knows. Raises ValueError: the fault cannot be made here.

    A failure of name service is made on the pod's name servers. Traffic with the pod's own node is left alone, as a
    NetworkPolicy leaves it alone: kubelet's probes come from the node's address or from that of the pod's gateway.
    """
    servers = name_servers(_RESOLVER.read_text() if resolver is None else resolver)
    if plan.kind == DNS:
        mine = tuple(s for s in servers if not ipaddress.ip_address(s).is_loopback)
        if not mine:
            raise ValueError("the pod asks no name server outside of itself (/etc/resolv.conf)")
        return replace(plan, peers=mine, spare=(), ports=(), probes=tuple(f"dns:{s}" for s in mine[:1]))
    found = gateways(_read(_ROUTES) if routes is None else routes, _read(_ROUTES_6) if routes_6 is None else routes_6)
    spare = tuple(sorted({*plan.spare, *found}))
    if not plan.peers and not plan.probes and (not plan.ports or 53 in plan.ports):
        plan = replace(plan, probes=tuple(f"dns:{s}" for s in servers[:1] if s not in spare))
    return replace(plan, spare=spare)


def name_servers(resolver: str) -> tuple[str, ...]:
    """Addresses in a resolv.conf."""
    words = (line.split() for line in resolver.splitlines())
    return tuple(w[1].partition("%")[0] for w in words if len(w) > 1 and w[0] == "nameserver")


def gateways(routes: str, routes_6: str = "") -> tuple[str, ...]:
    """Next hops of the default routes, from /proc/net/route and /proc/net/ipv6_route."""
    found: list[str] = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and int(fields[1], 16) == 0 and int(fields[7], 16) == 0 and int(fields[2], 16):
            found.append(socket.inet_ntoa(struct.pack("=I", int(fields[2], 16))))
    for line in routes_6.splitlines():
        fields = line.split()
        if len(fields) > 4 and int(fields[0], 16) == 0 and int(fields[1], 16) == 0 and int(fields[4], 16):
            found.append(str(ipaddress.IPv6Address(bytes.fromhex(fields[4]))))
    return tuple(found)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # no such IP version here
