"""Faults through the real Chaos Mesh: its controller, its daemons and its webhooks, and an observer that is neither.

All in one file, one after the other: some of these tests stop the controller, which all share.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.chaos_mesh.driver import ChaosMeshDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverUnavailable
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


@dataclass(frozen=True)
class Case:
    """A fault, and what an observer outside of it sees while it is on."""

    kind: str
    plural: str
    params: dict[str, Any]
    link: str = ""
    seen: Callable[[str, list[dict[str, Any]]], bool] = lambda namespace, before: True
    """`seen(namespace, target pods before)`."""
    held: bool = True


def _one_down(namespace: str, before: list[dict[str, Any]]) -> bool:
    return sum(map(ready, pods(namespace, "app=web"))) < len(before)


def _one_replaced(namespace: str, before: list[dict[str, Any]]) -> bool:
    now = {p["metadata"]["uid"] for p in pods(namespace, "app=web")}
    return bool({p["metadata"]["uid"] for p in before} - now)


def _one_restarted(namespace: str, before: list[dict[str, Any]]) -> bool:
    return any(s["restartCount"] for p in pods(namespace, "app=web") for s in p["status"]["containerStatuses"])


def _link_is_cut(namespace: str, before: list[dict[str, Any]]) -> bool:
    """From one of the pods on the left, by its own Python, through the Service."""
    return any(not _reaches(namespace, p["metadata"]["name"], "far") for p in before)


def _nobody_reaches_it(namespace: str, before: list[dict[str, Any]]) -> bool:
    far = pods(namespace, "app=far")[0]["metadata"]["name"]
    return any(not _reaches(namespace, far, p["status"]["podIP"], 8080) for p in before)


def _burns(namespace: str, before: list[dict[str, Any]]) -> bool:
    """The container's own CPU account: of 200m at least half within a second."""
    return any(_cpu_s(namespace, p, 1.0) > 0.1 for p in before)


def _fills(namespace: str, before: list[dict[str, Any]]) -> bool:
    return any(_in_container(namespace, p, MEMORY) > 60 * 2**20 for p in before)


CASES = [
    Case("pod_delete", "podchaos", {"signal": "kill"}, seen=_one_replaced, held=False),
    Case("container_kill", "podchaos", {}, seen=_one_restarted, held=False),
    Case("pod_failure", "podchaos", {}, seen=_one_down),
    Case("network_partition", "networkchaos", {}, link="->app=far", seen=_link_is_cut),
    Case("network_isolation", "networkchaos", {}, seen=_nobody_reaches_it),
    Case("cpu_stress", "stresschaos", {"cores": 1.0, "load": 1.0}, seen=_burns),
    Case("memory_stress", "stresschaos", {"bytes": 60 * 2**20}, seen=_fills),
]
MEMORY = "/sys/fs/cgroup/memory/memory.usage_in_bytes"
CPU = "/sys/fs/cgroup/cpuacct/cpuacct.usage"


def _in_container(namespace: str, pod: dict[str, Any], path: str) -> int:
    return int(kubectl("exec", "-n", namespace, pod["metadata"]["name"], "-c", "web", "--", "cat", path))


def _cpu_s(namespace: str, pod: dict[str, Any], seconds: float) -> float:
    before = _in_container(namespace, pod, CPU)
    time.sleep(seconds)
    return (_in_container(namespace, pod, CPU) - before) / 1e9


def _reaches(namespace: str, pod: str, host: str, port: int = 80) -> bool:
    code = f"import socket; socket.create_connection(({host!r}, {port}), 1).close()"
    command = ["kubectl", "exec", "-n", namespace, pod, "-c", "web", "--", "python3", "-c", code]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.mark.req("R0-02", "R1-01")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.kind)
def test_fires_is_aborted_and_leaves_nothing(case: Case, by_mesh: Faulting, namespace: str) -> None:
    """Seen by an observer, by our own eyes, taken away, and again seen to be gone by both."""
    deploy(namespace)
    if case.link or case.kind == "network_isolation":
        deploy(namespace, "far", 1)
    before = pods(namespace, "app=web")
    lease = by_mesh.lease(case.kind, f"app=web{case.link}", count=1, **case.params)
    hit = [p for p in before if p["metadata"]["uid"] in lease.targets[0]]
    assert not case.seen(namespace, before), "nothing of it before"
    by_mesh.driver.inject(lease)
    eventually(lambda: case.seen(namespace, before))
    seen = eventually(lambda: effective(by_mesh, lease), 60)
    print(case.kind, *seen.lines, sep="\n   ")
    assert seen.present
    began = time.monotonic()
    by_mesh.driver.recover(lease)
    took = time.monotonic() - began
    print(f"   recovered in {took:.2f} s")
    assert took < 15, "the engine's recover_timeout"
    clean(by_mesh, lease, namespace, case)
    if case.held and case.kind != "pod_failure":
        assert not case.seen(namespace, hit)
    by_mesh.driver.recover(lease)
    eventually(lambda: sum(map(ready, pods(namespace, "app=web"))) == 2, 60)


def effective(by_mesh: Faulting, lease: Lease) -> Evidence | None:
    """What our eyes see once they see the effect; a busy node lets a look fail."""
    try:
        return e if (e := by_mesh.driver.active(lease)).effective else None
    except DriverUnavailable as error:
        print(error)
        return None


def clean(by_mesh: Faulting, lease: Lease, namespace: str, case: Case) -> None:
    """No resource, and our own eyes see nothing."""
    assert resources(namespace, case.plural) == []
    left = by_mesh.driver.active(lease)
    assert not left.present, left.lines
