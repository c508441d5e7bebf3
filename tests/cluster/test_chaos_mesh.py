"""Faults through the real Chaos Mesh: its controller, its daemons and its webhooks, and an observer that is neither.

All in one file, one after the other: some of these tests stop the controller, which all share.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.chaos_mesh.driver import ChaosMeshDriver
from mlchaos_dagster.kube.client import Cluster
from tests.cluster.conftest import Faulting, deploy, eventually, kubectl, objects, pods, ready

SYSTEM = "chaos-mesh"


@pytest.fixture(scope="module", autouse=True)
def there(admin_kubeconfig: str) -> None:
    """Its controller and a daemon run."""
    found = kubectl("get", "pods", "-n", SYSTEM, "-o", "name", check=False)
    if "controller-manager" not in found or "daemon" not in found:
        pytest.skip("Chaos Mesh does not run in namespace chaos-mesh")


@pytest.fixture
def mesh(cluster: Cluster, options: Kubernetes) -> ChaosMeshDriver:
    return ChaosMeshDriver.at(cluster, options)


@pytest.fixture
def by_mesh(mesh: ChaosMeshDriver, tmp_path: Path) -> Faulting:
    return Faulting(mesh, tmp_path)  # type: ignore[arg-type]  the verbs are the same


def resources(namespace: str, kind: str) -> list[dict[str, Any]]:
    return objects(f"{kind}.chaos-mesh.org", namespace)


def images(namespace: str, selector: str) -> list[str]:
    return sorted(p["spec"]["containers"][0]["image"] for p in pods(namespace, selector))


@pytest.mark.req("R0-02", "R1-01")
def test_pod_failure_fires_and_is_taken_away(by_mesh: Faulting, namespace: str) -> None:
    select = deploy(namespace)
    before = images(namespace, select)
    lease = by_mesh.lease("pod_failure", select, count=1)
    by_mesh.driver.inject(lease)
    eventually(lambda: sum(map(ready, pods(namespace, select))) == 1)
    seen = eventually(lambda: (e := by_mesh.driver.active(lease)).effective and e)
    assert seen.present, seen.lines
    print(seen.lines)
    began = time.monotonic()
    by_mesh.driver.recover(lease)
    print("recovered in", time.monotonic() - began)
    assert images(namespace, select) == before
    assert resources(namespace, "podchaos") == []
    assert not by_mesh.driver.active(lease).present
    by_mesh.driver.recover(lease)
    eventually(lambda: sum(map(ready, pods(namespace, select))) == 2, 60)
