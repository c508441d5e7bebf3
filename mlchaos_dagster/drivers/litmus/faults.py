"""From a fault to an experiment of Litmus and its variables. Pure.

Read in litmus-go, `pkg/generic/*/environment`: numbers are whole there (a fraction reads as 0), durations are bare seconds,
`CPU_CORES=0` means all of the node's, and an experiment that is given `TARGET_PODS` and an interval fails in its second
round, when pods of those names are gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlchaos_dagster.drivers.kubernetes.faults.network_policy import LABEL
from mlchaos_dagster.kube.objects import items, text

DRAIN, PARTITION = "node-drain", "pod-network-partition"
_MIB = 1 << 20

EXPERIMENTS = {
    "pod_delete": "pod-delete",
    "container_kill": "container-kill",
    "cpu_stress": "pod-cpu-hog",
    "memory_stress": "pod-memory-hog",
    "network_latency": "pod-network-latency",
    "network_loss": "pod-network-loss",
    "network_partition": PARTITION,
    "network_isolation": PARTITION,
}
"""Neutral kind → experiment that means the same. Not among them: `dns_failure`, since Litmus answers queries with an error
instead of losing them; `node_drain`, since Litmus drains namespaces that did not opt in and uncordons what was cordoned
before."""
BROUGHT = "litmus_engine"
ON_NODES = frozenset(
    {
        DRAIN,
        "node-cpu-hog",
        "node-memory-hog",
        "node-io-stress",
        "node-taint",
        "node-restart",
        "node-poweroff",
        "kubelet-service-kill",
        "docker-service-kill",
    }
)
"""Experiments whose targets are nodes."""
MANY_NODES = frozenset({"node-cpu-hog", "node-memory-hog", "node-io-stress"})
"""Of these, those that take `TARGET_NODES`; the others one `TARGET_NODE`."""
KILLS = frozenset({"pod-delete", "container-kill"})
"""Experiments that act again at every `CHAOS_INTERVAL`."""
OURS = frozenset({"TARGET_PODS", "TARGET_NODE", "TARGET_NODES", "NODE_LABEL", "PODS_AFFECTED_PERC", "INSTANCE_ID"})
"""Variables of a brought engine that are replaced: whom it hits is frozen, and its result is found by its engine."""


@dataclass(frozen=True)
class Selection:
    """Whom an experiment hits, frozen."""

    namespace: str
    pods: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    workloads: tuple[tuple[str, str], ...] = ()
    """(kind, name) of what owns the pods, in lower case: for deletions at an interval, where all of its pods are hit."""
    stable: bool = False
    """Pods that are deleted come back by the same name."""
    kind: str = ""
    """Of the pods' owner, in lower case."""
    container: str = ""
    """Of the pods; empty: the first."""

    @property
    def comes_back(self) -> bool:
        """Whether the same selection means the replacements, too."""
        return self.stable or bool(self.workloads)


@dataclass(frozen=True)
class Plan:
    """One experiment."""

    experiment: str
    env: dict[str, str] = field(default_factory=dict[str, str])
    ramp_s: float = 0.0
    """Before and after the fault."""


def experiment_of(kind: str, params: Mapping[str, Any]) -> str:
    """Name of the ChaosExperiment. Raises KeyError: Litmus has none that means the same."""
    return str(entry_of(params)["name"]) if kind == BROUGHT else EXPERIMENTS[kind]


def entry_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The one experiment of a brought engine."""
    return params["engine"]["experiments"][0]


def env_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Plain variables of an experiment's entry."""
    given = items(entry, "spec", "components", "env")
    return {text(e, "name"): text(e, "value") for e in given if "valueFrom" not in e}


def plan(
    kind: str, params: Mapping[str, Any], targets: Selection, duration_s: float, peers: Mapping[str, Any] | None = None
) -> Plan:
    """The experiment for a fault that lasts `duration_s`; `peers`: the other end of a link (`network_links.other_end`)."""
    experiment, seconds = experiment_of(kind, params), math.ceil(duration_s)
    brought = env_of(entry_of(params)) if kind == BROUGHT else {}
    env = {k: v for k, v in brought.items() if k not in OURS}
    if kind != BROUGHT:
        env |= {"SEQUENCE": "parallel", "RAMP_TIME": "0", **_own(kind, params, peers or {})}
        if targets.container and experiment not in ("pod-delete", PARTITION):
            env["TARGET_CONTAINER"] = targets.container
    env |= {"TOTAL_CHAOS_DURATION": str(seconds), **_whom(experiment, targets)}
    if experiment in KILLS:
        again = experiment == "container-kill" or targets.comes_back
        if kind != BROUGHT:
            interval = params.get("interval_s") if again else None
            env["CHAOS_INTERVAL"] = str(max(1, round(interval)) if interval else seconds)
        elif not again:  # a second round would look for pods that are gone, and fail
            env["CHAOS_INTERVAL"] = str(seconds)
    ramp = brought.get("RAMP_TIME", "")
    return Plan(experiment, env, float(ramp) if ramp.isdecimal() else 0.0)


def repeats(kind: str, params: Mapping[str, Any]) -> bool:
    """Whether pods are to be deleted again, at an interval."""
    if kind != BROUGHT:
        return bool(params.get("interval_s"))
    env = env_of(entry_of(params))
    interval, total = env.get("CHAOS_INTERVAL", ""), env.get("TOTAL_CHAOS_DURATION", "")
    once = interval.isdecimal() and total.isdecimal() and int(interval) >= int(total)
    return entry_of(params)["name"] == "pod-delete" and not once


def _whom(experiment: str, targets: Selection) -> dict[str, str]:
    if targets.nodes:
        name = "TARGET_NODES" if experiment in MANY_NODES else "TARGET_NODE"
        return {name: ",".join(targets.nodes)}
    if experiment == PARTITION:  # it knows labels only
        return {}
    if targets.workloads:
        return {"PODS_AFFECTED_PERC": "100"}
    return {"TARGET_PODS": ",".join(targets.pods), "PODS_AFFECTED_PERC": "100"}


def _own(kind: str, params: Mapping[str, Any], peers: Mapping[str, Any]) -> dict[str, str]:
    """What a neutral fault's parameters are called there."""
    if kind == "pod_delete":
        return {"FORCE": "true" if params.get("signal", "kill") == "kill" else "false"}
    if kind == "container_kill":
        return {"SIGNAL": "SIGKILL"}
    if kind == "cpu_stress":
        workers = max(1, math.ceil(float(params["cores"])))
        load = 100 * float(params["cores"]) * float(params["load"]) / workers
        return {"CPU_CORES": str(workers), "CPU_LOAD": str(max(1, round(load)))}
    if kind == "memory_stress":
        return {"MEMORY_CONSUMPTION": str(math.ceil(int(params["bytes"]) / _MIB)), "NUMBER_OF_WORKERS": "1"}
    if kind == "network_latency":
        latency = {"NETWORK_LATENCY": _ms(params["latency_s"]), "JITTER": str(round(1000 * params["jitter_s"]))}
        return {**latency, **_there(peers)}
    if kind == "network_loss":
        return {"NETWORK_PACKET_LOSS_PERCENTAGE": f"{100 * float(params['fraction']):g}", **_there(peers)}
    # What is named is what the policy shuts out; with nothing named it lets nothing pass.
    return {"POLICY_TYPES": "all", **({"DESTINATION_IPS": ",".join(peers["peers"])} if peers.get("peers") else {})}


def _ms(seconds: float) -> str:
    return str(max(1, round(1000 * seconds)))


def _there(peers: Mapping[str, Any]) -> dict[str, str]:
    """To which addresses and ports; Litmus joins the two only in the form `address|port|port`."""
    ports = "".join(f"|{port}" for port in peers.get("ports") or ())
    if peers.get("peers"):
        return {"DESTINATION_IPS": ",".join(f"{ip}{ports}" for ip in peers["peers"])}
    return {"DESTINATION_PORTS": ports.strip("|").replace("|", ",")} if ports else {}


def label_of(lease_id: str) -> str:
    """The label of frozen pods, for experiments that know labels only."""
    return f"{LABEL}={lease_id}"
