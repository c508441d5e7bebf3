"""Neutral kind → its handler."""

from __future__ import annotations

from typing import Any

from mlchaos_dagster.drivers.chaos_mesh import specs
from mlchaos_dagster.drivers.chaos_mesh.handler import Fault
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import ImageEyes
from mlchaos_dagster.drivers.chaos_mesh.specs import Made
from mlchaos_dagster.drivers.cluster.handler import Handler, Request
from mlchaos_dagster.kube.client import Site


def _pod_failure(site: Site, request: Request, before: dict[str, Any]) -> Made:
    return specs.pod_failure(request.refs)


HANDLERS: dict[str, Handler] = {
    "pod_failure": Fault("PodChaos", _pod_failure, ImageEyes()),
}
"""Every neutral kind that Chaos Mesh has."""
