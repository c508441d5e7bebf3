"""The Job that holds a GPU's memory: refused without a device, and its life on a node that offers one by name only.

There is no GPU in these clusters, so the program of the Job ends with the truth about that; what a device does is tested
in tests/drivers/test_gpu.py. Placement, deadline, clean-up and the way its words come back are real here.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import pytest

from mlchaos_dagster.domain.environment import KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.drivers.kubernetes.faults import gpu, handler
from mlchaos_dagster.errors import InjectFailed

from .conftest import Faulting, eventually, kubectl, objects

NODES = KubernetesObjects(kind="Node")
HERE = "kubernetes.io/os=linux"


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An extended resource, of which the first node has one."""
    name = f"test-{uuid.uuid4().hex[:6]}.example.com/gpu"
    node = objects("nodes", "")[0]["metadata"]["name"]
    escaped = name.replace("/", "~1")

    def patch(change: dict[str, str]) -> None:
        body = json.dumps([change])
        kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", body)

    patch({"op": "add", "path": f"/status/capacity/{escaped}", "value": "1"})
    monkeypatch.setattr(handler("gpu_memory_hog"), "resource", name)
    eventually(lambda: name in objects("nodes", "")[0]["status"]["allocatable"], within=30)
    yield node
    patch({"op": "remove", "path": f"/status/capacity/{escaped}"})


def test_without_a_gpu_it_is_refused(driver: KubernetesDriver) -> None:
    target = Target(select=HERE, kubernetes=NODES)
    ids = driver.resolve(target)
    (found, *_) = driver.preflight("gpu_memory_hog", ids[:1], ids, {"fraction": 0.5}, target=target)
    assert "offers no nvidia.com/gpu" in found.saw and "device plugin" in found.needs


@pytest.mark.req("R3-03")
def test_the_job_runs_where_it_is_to_and_says_why_it_failed(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, offered: str
) -> None:
    lease = faulting.lease("gpu_memory_hog", f"kubernetes.io/hostname={offered}", objects=NODES, fraction=0.5)
    with pytest.raises(InjectFailed, match="no CUDA device"):
        driver.inject(lease)
    (job,) = objects("jobs", namespace, f"mlchaos.dev/lease={lease.id}")
    assert 60 <= job["spec"]["activeDeadlineSeconds"] <= 65 and job["spec"]["backoffLimit"] == 0
    (pod,) = objects("pods", namespace, f"mlchaos.dev/lease={lease.id}")
    assert pod["spec"]["nodeName"] == offered
    evidence = driver.active(lease)
    assert not evidence.effective and "no CUDA device" in evidence.lines[0]
    driver.recover(lease)
    assert not objects("jobs", namespace) and not objects("pods", namespace)
    assert not driver.active(lease).present
    driver.recover(lease)


@pytest.mark.req("R3-03", "RX-01")
def test_what_holds_is_seen_and_removed(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program says `holding` as it would on a device; everything around it is the real thing."""
    said = "import sys,time,pathlib;p=pathlib.Path(sys.argv[1]);p.mkdir();(p/(sys.argv[2]+'.held')).write_text('{\"state\": \"holding\"}');time.sleep(99)"
    made = gpu.GpuMemoryHog._job

    def job(*arguments: object) -> dict[str, object]:
        body = made(*arguments)  # pyright: ignore[reportArgumentType]
        container = body["spec"]["template"]["spec"]["containers"][0]
        container["command"] = ["tini", "--", "python3", "-c", said, *container["command"][5:]]
        return body

    monkeypatch.setattr(gpu.GpuMemoryHog, "_job", job)
    lease = faulting.lease("gpu_memory_hog", f"kubernetes.io/hostname={offered}", objects=NODES, fraction=0.5)
    driver.inject(lease)
    evidence = driver.active(lease)
    assert evidence.present and evidence.effective and offered in evidence.lines[0]

    second = faulting.lease("gpu_memory_hog", f"kubernetes.io/hostname={offered}", objects=NODES, fraction=0.5)
    with pytest.raises(InjectFailed, match="cannot be scheduled.*Insufficient"):
        driver.inject(second)
    driver.recover(second)

    driver.recover(lease)
    assert not objects("pods", namespace) and not objects("jobs", namespace)
    assert not driver.active(lease).present


@pytest.mark.req("RX-01")
def test_it_ends_at_its_deadline(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody recovers: the Job's own deadline ends a program that hangs."""
    made = gpu.GpuMemoryHog._job

    def job(*arguments: object) -> dict[str, object]:
        body = made(*arguments)  # pyright: ignore[reportArgumentType]
        container = body["spec"]["template"]["spec"]["containers"][0]
        container["command"] = ["tini", "--", "sleep", "99"]
        container["readinessProbe"]["exec"]["command"] = ["true"]
        return body

    monkeypatch.setattr(gpu.GpuMemoryHog, "_job", job)
    lease = faulting.lease(
        "gpu_memory_hog", f"kubernetes.io/hostname={offered}", objects=NODES, duration_s=8, fraction=0.5
    )
    driver.inject(lease)
    assert driver.active(lease).effective
    eventually(lambda: not driver.active(lease).present, within=8 + 5 + 10, every=0.5)
