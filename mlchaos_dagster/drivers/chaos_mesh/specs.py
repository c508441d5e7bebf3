"""Neutral fault → kind and spec of a Chaos Mesh resource. Pure; the duration is set when it is created.

Links: Chaos Mesh finds the other end by its pods' addresses, but inside a pod a packet to a Service carries the Service's
address. So the other end is given as addresses (`externalTargets`), those of its pods and of the Services before them, as
they are when the fault is planned. Rules are then made in the frozen pods only, never in the pods at the other end.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from typing import Any

from mlchaos_dagster.drivers.chaos_mesh.resources import frozen_selector, lasting
from mlchaos_dagster.kube.objects import Object
from mlchaos_dagster.kube.refs import Ref

_MIB = 1 << 20
Made = tuple[str, Object]
"""Kind and spec."""


def pod_kill(refs: Sequence[Ref], grace_s: int) -> Made:
    """Delete the pods; `grace_s` 0: at once."""
    return "PodChaos", {"action": "pod-kill", "gracePeriod": grace_s, **frozen_selector(refs)}


def pod_failure(refs: Sequence[Ref]) -> Made:
    """Swap the images of the pods."""
    return "PodChaos", {"action": "pod-failure", **frozen_selector(refs)}


def container_kill(refs: Sequence[Ref], containers: Sequence[str]) -> Made:
    """Kill a container of each pod."""
    return "PodChaos", {"action": "container-kill", "containerNames": list(containers), **frozen_selector(refs)}


def cpu_stress(refs: Sequence[Ref], containers: Sequence[str], params: dict[str, Any]) -> Made:
    """Burners in the container's cgroup. They are all equally busy: a fraction of a core is spread over them."""
    workers = math.ceil(float(params["cores"]))
    load = round(100 * float(params["load"]) * float(params["cores"]) / workers)
    stressors = {"cpu": {"workers": workers, "load": max(1, load)}}
    return "StressChaos", {"stressors": stressors, "containerNames": list(containers), **frozen_selector(refs)}


def memory_stress(refs: Sequence[Ref], containers: Sequence[str], params: dict[str, Any]) -> Made:
    """One process that holds so much, in the container's cgroup."""
    stressors = {"memory": {"workers": 1, "size": f"{math.ceil(int(params['bytes']) / _MIB)}MB"}}
    return "StressChaos", {"stressors": stressors, "containerNames": list(containers), **frozen_selector(refs)}


def dns_failure(refs: Sequence[Ref], containers: Sequence[str]) -> Made:
    """Every name is answered with an error."""
    return "DNSChaos", {"action": "error", "containerNames": list(containers), **frozen_selector(refs)}


def network(kind: str, refs: Sequence[Ref], params: dict[str, Any], places: Sequence[str]) -> Made:
    """On what the frozen pods exchange with `places` (addresses, networks, with a port where only that is meant).

    Delay and loss are made on what leaves the pods, so a round trip takes longer by the delay, once. A cut drops both
    directions; with ports only what leaves, since what comes back goes to other ports, and nothing is answered anyway.
    """
    spec: Object = {"direction": "to", "externalTargets": list(places), **frozen_selector(refs)}
    if kind == "network_latency":
        delay = {"latency": _fine(params["latency_s"]), "jitter": _fine(params["jitter_s"])}
        return "NetworkChaos", {"action": "delay", "delay": delay, **spec}
    if kind == "network_loss":
        return "NetworkChaos", {"action": "loss", "loss": {"loss": f"{100 * params['fraction']:g}"}, **spec}
    with_ports = any(":" in place for place in places)
    return "NetworkChaos", {"action": "partition", **spec, "direction": "to" if with_ports else "both"}


def everything_but(addresses: Sequence[str]) -> list[str]:
    """IPv4 networks that hold every address but these. Chaos Mesh makes its rules for IPv4 only."""
    left = [ipaddress.IPv4Network("0.0.0.0/1"), ipaddress.IPv4Network("128.0.0.0/1")]
    for address in addresses:
        if ":" in address:
            continue
        one = ipaddress.IPv4Network(address)
        left = [part for net in left for part in (net.address_exclude(one) if one.subnet_of(net) else (net,))]
    return [str(net) for net in sorted(left)]


def with_ports(addresses: Sequence[str], ports: Sequence[int]) -> list[str]:
    """Of an end: IPv4 addresses, each with every port; all ports where none is named."""
    here = [a for a in addresses if ":" not in a]
    return [f"{a}:{p}" for a in here for p in ports] if ports else here


def held_for(spec: Object, seconds: float) -> Object:
    """The spec with our duration."""
    return {**spec, "duration": lasting(seconds)}


def _fine(seconds: float) -> str:
    return f"{max(0.0, float(seconds)) * 1000:g}ms"
