"""Fault kind → handler. A new fault is one module here and one line below."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from mlchaos_dagster.drivers.cluster.handler import Handler

_HERE = "mlchaos_dagster.drivers.kubernetes.faults"
PLACES = {
    "pod_delete": "pod_delete:PodDelete",
    "container_kill": "container_kill:ContainerKill",
    "pod_failure": "pod_failure:PodFailure",
    "scale_to_zero": "scale:ScaleToZero",
    "network_latency": "network:Latency",
    "network_loss": "network:Loss",
    "network_partition": "network:Partition",
    "network_isolation": "network:Isolation",
    "dns_failure": "network:DnsFailure",
    "cpu_stress": "stress:CpuStress",
    "memory_stress": "stress:MemoryStress",
    "gpu_memory_hog": "gpu:GpuMemoryHog",
    "model_corruption": "model_file:ModelCorruption",
    "bad_model": "bad_model:BadModel",
    "node_drain": "nodes:NodeDrain",
    "zone_failure": "nodes:ZoneFailure",
    "credential_rotation": "rotation:CredentialRotation",
    "certificate_rotation": "rotation:CertificateRotation",
}
"""Kind → `module:class`, imported when first needed."""


@cache
def handler(kind: str) -> Handler:
    """The handler of a kind. Raises KeyError: there is none."""
    module, _, name = PLACES[kind].partition(":")
    return cast(Handler, getattr(import_module(f"{_HERE}.{module}"), name)())
