"""CPU and memory stress in the targets' own cgroups: seen by the kernel's files, the HPA and the container's status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverUnavailable

from .conftest import TARGET_IMAGE, Faulting, deploy, eventually, kubectl, objects, pods

SMALL = {"cpu": "100m", "memory": "64Mi"}
MIB = 1 << 20
SERVICE = "import asyncio, http.server, signal; signal.pause()"
"""As big as a small service."""


def inside(namespace: str, pod: str, script: str) -> str:
    """The observer in the container: `kubectl exec`, not our client."""
    return kubectl("exec", "-n", namespace, pod, "--", "sh", "-c", script)


def marked(namespace: str, pod: str, lease: str) -> int:
    """Processes in the container whose arguments name the lease."""
    return int(inside(namespace, pod, f"grep -lz 'MLCHAOS_LEAS[E]={lease}' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"))


def cpu_used(namespace: str, pod: str, seconds: float = 2.0) -> float:
    """Cores that the container's cgroup used, as the kernel counts (v1 or v2)."""
    read = (
        "cat /sys/fs/cgroup/cpuacct/cpuacct.usage 2>/dev/null || "
        "awk '/^usage_usec/{print $2*1000}' /sys/fs/cgroup/cpu.stat"
    )
    first, _, second = inside(namespace, pod, f"({read}); sleep {seconds}; ({read})").partition("\n")
    return (float(second) - float(first)) / 1e9 / seconds


def memory_used(namespace: str, pod: str) -> int:
    read = "cat /sys/fs/cgroup/memory/memory.usage_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.current"
    return int(inside(namespace, pod, read))


def only(namespace: str, selector: str) -> dict[str, Any]:
    (pod,) = pods(namespace, selector)
    return pod


def status(namespace: str, pod: str) -> dict[str, Any]:
    (found,) = [p for p in objects("pods", namespace) if p["metadata"]["name"] == pod]
    return found["status"]["containerStatuses"][0]


def elsewhere(lease: Lease, options: Kubernetes, *, verb: str, then: str = "") -> subprocess.Popen[str]:
    """A verb in another process, which then does `then`."""
    script = f"""
        import json, os, sys, threading, time
        from mlchaos_dagster.domain.environment import Kubernetes
        from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
        from mlchaos_dagster.engine.ports import Lease, Owner
        from mlchaos_dagster.kube.client import Cluster
        given = json.load(sys.stdin)
        owner = Owner(**given["lease"].pop("owner"))
        targets = tuple(given["lease"].pop("targets"))
        lease = Lease(**given["lease"], owner=owner, targets=targets)
        options = Kubernetes.model_validate(given["options"])
        driver = KubernetesDriver.at(Cluster(options.context, options.kubeconfig.removeprefix("file:")), options)
        driver.{verb}(lease)
        print("done", flush=True)
        {then}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"lease": asdict(lease), "options": options.model_dump(mode="json")}))
    process.stdin.close()
    return process


def said_done(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "done"


@pytest.mark.req("R1-04")
def test_cpu_is_burnt_in_the_cgroup_and_quiet_again(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    selector = deploy(namespace, replicas=1, limits=SMALL)
    name = only(namespace, selector)["metadata"]["name"]
    quiet = cpu_used(namespace, name)
    lease = faulting.lease("cpu_stress", selector, cores=2.0, load=1.0)
    driver.inject(lease)
    try:
        evidence = eventually(lambda: (e := driver.active(lease)).effective and e, within=10)
        assert marked(namespace, name, lease.id) == 3, "a supervisor and two burners"
        during = cpu_used(namespace, name)
        assert quiet < 0.05 < 0.08 < during < 0.13, (quiet, during, evidence.lines)
        assert "its limit is 0.1" in evidence.lines[0] and "2 burners" in evidence.lines[0]
    finally:
        driver.recover(lease)
    assert not driver.active(lease).present
    assert marked(namespace, name, lease.id) == 0
    assert cpu_used(namespace, name) < 0.05
    driver.recover(lease)


def test_a_load_is_a_duty_cycle(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    selector = deploy(namespace, replicas=1, limits={"cpu": "500m", "memory": "64Mi"})
    name = only(namespace, selector)["metadata"]["name"]
    lease = faulting.lease("cpu_stress", selector, cores=0.5, load=0.4)
    driver.inject(lease)
    try:
        assert 0.08 < cpu_used(namespace, name, 4) < 0.28, "half a core at 40 %"
        assert driver.active(lease).effective
    finally:
        driver.recover(lease)


@pytest.mark.req("R1-04")
def test_the_autoscaler_counts_what_is_burnt(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    selector = deploy(namespace, replicas=1, limits=SMALL)
    hpa = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "web"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            "minReplicas": 1,
            "maxReplicas": 2,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 100}},
                }
            ],
        },
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(hpa))
    lease = faulting.lease("cpu_stress", selector, cores=1.0, load=1.0, duration_s=120)
    driver.inject(lease)
    try:
        eventually(lambda: len(pods(namespace, selector)) == 2, within=90, every=1)
    finally:
        driver.recover(lease)


@pytest.mark.req("R1-05")
def test_beyond_the_limit_the_container_is_oom_killed_once(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    selector = deploy(namespace, replicas=1, limits=SMALL)
    name = only(namespace, selector)["metadata"]["name"]
    lease = faulting.lease("memory_stress", selector, bytes=500 * MIB)
    driver.inject(lease)
    try:
        evidence = eventually(lambda: seen(driver, lease), within=20)
        assert evidence.present, "as long as the run has not taken it away"
        assert "OOMKilled, exit code 137" in evidence.lines[0]
        found = eventually(lambda: (s := status(namespace, name))["ready"] and s, within=30)
        assert found["lastState"]["terminated"]["reason"] == "OOMKilled"
        assert found["lastState"]["terminated"]["exitCode"] == 137
        time.sleep(6)  # a fault that came back would kill again within its second of filling
        assert status(namespace, name)["restartCount"] == 1
        assert marked(namespace, name, lease.id) == 0
        assert inside(namespace, name, "cat /proc/1/oom_score_adj").strip() == str(adj_of(lease))
    finally:
        driver.recover(lease)
    after = driver.active(lease)
    assert not after.present and after.effective
    assert status(namespace, name)["restartCount"] == 1


@pytest.mark.req("R1-05")
def test_the_service_dies_though_another_process_is_the_containers_first(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    """`tini` is PID 1 and tiny: the kernel is left no doubt all the same."""
    bare(namespace, "tiny", ["tini", "--", "python3", "-c", SERVICE], SMALL)
    lease = faulting.lease("memory_stress", "app=tiny", bytes=500 * MIB)
    driver.inject(lease)
    try:
        evidence = eventually(lambda: seen(driver, lease), within=20)
        assert "OOMKilled, exit code 137" in evidence.lines[0]
    finally:
        driver.recover(lease)


def test_what_fits_is_held_and_nothing_is_killed(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    selector = deploy(namespace, replicas=1, limits={"cpu": "200m", "memory": "128Mi"})
    name = only(namespace, selector)["metadata"]["name"]
    before = memory_used(namespace, name)
    lease = faulting.lease("memory_stress", selector, bytes=48 * MIB)
    driver.inject(lease)
    try:
        eventually(lambda: driver.active(lease).effective, within=15)
        assert memory_used(namespace, name) - before > 45 * MIB
        assert inside(namespace, name, "cat /proc/1/oom_score_adj").strip() == str(adj_of(lease)), "no victim is chosen"
    finally:
        driver.recover(lease)
    assert not driver.active(lease).present
    eventually(lambda: memory_used(namespace, name) - before < 10 * MIB, within=5)
    assert status(namespace, name)["restartCount"] == 0


@pytest.mark.req("RX-01")
@pytest.mark.parametrize("kind", ["cpu_stress", "memory_stress"])
def test_it_ends_with_the_process_that_made_it(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes, kind: str
) -> None:
    selector = deploy(namespace, replicas=1, limits=SMALL)
    name = only(namespace, selector)["metadata"]["name"]
    params: dict[str, Any] = {"cores": 1.0, "load": 1.0} if kind == "cpu_stress" else {"bytes": 20 * MIB}
    lease = faulting.lease(kind, selector, duration_s=120, **params)
    with elsewhere(lease, options, verb="inject", then="threading.Event().wait(60)") as run:
        said_done(run)
        assert marked(namespace, name, lease.id) >= 1
        assert driver.active(lease).present
        run.send_signal(signal.SIGKILL)
    eventually(lambda: marked(namespace, name, lease.id) == 0, within=5)
    assert not driver.active(lease).present


@pytest.mark.req("RX-01")
def test_it_ends_at_its_deadline_with_the_run_stopped(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    """A stopped run (SIGSTOP) keeps its connections: only the program's own clock is left."""
    selector = deploy(namespace, replicas=1, limits=SMALL)
    name = only(namespace, selector)["metadata"]["name"]
    lease = faulting.lease("cpu_stress", selector, duration_s=8, cores=1.0, load=1.0)
    with elsewhere(lease, options, verb="inject", then="os.kill(os.getpid(), 19)") as run:
        try:
            said_done(run)
            assert marked(namespace, name, lease.id) == 2
            left = max(0.0, lease.deadline_wall - time.time())
            eventually(lambda: marked(namespace, name, lease.id) == 0, within=left + 3)
            assert time.time() >= lease.deadline_wall - 1
        finally:
            run.kill()


@pytest.mark.req("RX-01")
def test_another_process_takes_it_away(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = deploy(namespace, replicas=2, limits=SMALL)
    lease = faulting.lease("cpu_stress", selector, cores=1.0, load=1.0)
    driver.inject(lease)
    with elsewhere(lease, options, verb="recover") as other:
        said_done(other)
    assert other.returncode == 0
    assert not driver.active(lease).present
    assert all(marked(namespace, p["metadata"]["name"], lease.id) == 0 for p in pods(namespace, selector))
    driver.recover(lease)


def test_a_pod_that_is_replaced_holds_no_fault(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    selector = deploy(namespace, replicas=1, limits=SMALL)
    name = only(namespace, selector)["metadata"]["name"]
    lease = faulting.lease("cpu_stress", selector, cores=1.0, load=1.0)
    driver.inject(lease)
    kubectl("delete", "pod", "-n", namespace, name, "--grace-period=1")
    evidence = driver.active(lease)
    assert not evidence.present and "is gone" in evidence.lines[0]
    driver.recover(lease)
    new = eventually(lambda: [p for p in pods(namespace, selector) if p["status"]["phase"] == "Running"])[0]
    assert marked(namespace, new["metadata"]["name"], lease.id) == 0


def test_what_speaks_against_it(namespace: str, driver: KubernetesDriver) -> None:
    bare(namespace, "unlimited", ["python3", "-c", "import signal; signal.pause()"], None)
    bare(namespace, "snakeless", ["/pause"], SMALL, image="local/pause:1")
    bare(namespace, "tiny", ["sleep", "600"], SMALL)
    memory = refusals(driver, "memory_stress", "unlimited", bytes=MIB)
    assert "has no memory limit" in memory and "resources.limits.memory" in memory
    assert "has no CPU limit" in refusals(driver, "cpu_stress", "unlimited", cores=64.0, load=1.0)
    assert not refusals(driver, "cpu_stress", "unlimited", cores=0.5, load=1.0)
    snakeless = refusals(driver, "memory_stress", "snakeless", bytes=MIB)
    assert "has no python3" in snakeless and "kubernetes.container" in snakeless
    assert "is smaller" in refusals(driver, "memory_stress", "tiny", bytes=500 * MIB)
    assert not refusals(driver, "memory_stress", "tiny", bytes=10 * MIB)


def refusals(driver: KubernetesDriver, kind: str, name: str, **params: Any) -> str:
    target = Target(select=f"app={name}", kubernetes=KubernetesObjects())
    ids = driver.resolve(target)
    return "; ".join(f"{o.saw} → {o.needs}" for o in driver.preflight(kind, ids, ids, params, target=target))


def seen(driver: KubernetesDriver, lease: Lease) -> Evidence | None:
    """Evidence of an effect; while a container dies it does not answer, and the engine would ask again, too."""
    try:
        return e if (e := driver.active(lease)).effective else None
    except DriverUnavailable:
        return None


def adj_of(lease: Lease) -> int:
    (before,) = lease.undo["fault"]["pods"].values()
    return before["adj"]


def bare(
    namespace: str, name: str, command: list[str], limits: dict[str, str] | None, image: str = TARGET_IMAGE
) -> None:
    """A pod of its own, running when this returns."""
    container: dict[str, Any] = {"name": "web", "image": image, "imagePullPolicy": "IfNotPresent", "command": command}
    if limits:
        container["resources"] = {"limits": limits, "requests": {"cpu": "10m", "memory": "16Mi"}}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 1}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    kubectl("wait", "-n", namespace, f"pod/{name}", "--for=condition=Ready", "--timeout=30s")
