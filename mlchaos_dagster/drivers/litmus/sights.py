"""Which eyes look at which experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlchaos_dagster.drivers.litmus import faults
from mlchaos_dagster.drivers.litmus.eyes import Eyes, Gone, Node, Restarted, Standing, Told
from mlchaos_dagster.drivers.litmus.eyes_load import Load
from mlchaos_dagster.drivers.litmus.eyes_network import Wire

_MIB = 1 << 20
_OPENINGS = ("POD_SELECTOR", "NAMESPACE_SELECTOR", "DESTINATION_IPS", "DESTINATION_HOSTS", "PORTS")
"""Variables of a partition that leave something open."""


def chosen(kind: str, params: Mapping[str, Any]) -> Eyes:
    """The eyes for a fault; a brought engine's experiment is looked at as the neutral fault that it is."""
    neutral = {e: k for k, e in reversed(faults.EXPERIMENTS.items())}
    if kind != faults.BROUGHT:
        return _native(kind, params)
    entry = faults.entry_of(params)
    name, env = str(entry["name"]), faults.env_of(entry)
    if name == faults.PARTITION:
        whole = not any(env.get(v) for v in _OPENINGS) and env.get("POLICY_TYPES", "all").lower() == "all"
        return Wire("network_isolation", {}) if whole else Standing()
    if name == faults.DRAIN:
        return Node()
    meant = _meant(name, env) if name in neutral else None
    return _native(neutral[name], meant) if meant is not None else Told()


def _native(kind: str, params: Mapping[str, Any]) -> Eyes:
    if kind == "pod_delete":
        return Gone()
    if kind == "container_kill":
        return Restarted()
    if kind == "cpu_stress":
        return Load({"cores": float(params["cores"]) * float(params["load"])})
    if kind == "memory_stress":
        return Load({"bytes": float(params["bytes"])})
    return Wire(kind, dict(params))


def _meant(experiment: str, env: Mapping[str, str]) -> dict[str, Any] | None:
    """The neutral parameters behind an experiment's variables, its defaults included; None: they are no plain numbers."""
    try:
        if experiment == "pod-cpu-hog":
            cores = float(env.get("CPU_CORES") or 1) or 1.0  # 0: all of the node's; one of them is enough to be seen
            return {"cores": cores, "load": float(env.get("CPU_LOAD") or 100) / 100}
        if experiment == "pod-memory-hog":
            return {"bytes": float(env.get("MEMORY_CONSUMPTION") or 500) * _MIB}
        if experiment == "pod-network-latency":
            jitter = float(env.get("JITTER") or 0) / 1000
            return {"latency_s": float(env.get("NETWORK_LATENCY") or 2000) / 1000, "jitter_s": jitter}
        if experiment == "pod-network-loss":
            return {"fraction": float(env.get("NETWORK_PACKET_LOSS_PERCENTAGE") or 100) / 100}
    except ValueError:
        return None
    return {}
