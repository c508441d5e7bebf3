"""Faults through the real Chaos Mesh: its controller, its daemons and its webhooks, and an observer that is neither.

All in one file, one after the other: some of these tests stop the controller, which all share.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import ChaosMesh, Kubernetes, Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.chaos_mesh.driver import ChaosMeshDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import Cluster
from tests.cluster.api_proxy import ApiProxy, api_proxy  # noqa: F401  a fixture
from tests.cluster.conftest import Faulting, deploy, eventually, kubectl, objects, pods, ready

pytestmark = pytest.mark.timeout(300)
SYSTEM = "chaos-mesh"


@pytest.fixture(scope="module", autouse=True)
def there(admin_kubeconfig: str) -> None:
    """Its controller and a daemon run."""
    found = kubectl("get", "pods", "-n", SYSTEM, "-o", "name", check=False)
    if "controller-manager" not in found or "daemon" not in found:
        pytest.skip("Chaos Mesh does not run in namespace chaos-mesh")


@pytest.fixture
def options(options: Kubernetes) -> Kubernetes:
    """With time, for machines on which much else goes on."""
    return options.model_copy(update={"chaos_mesh": ChaosMesh.model_validate({"inject_within": "60s"})})


@pytest.fixture
def mesh(context: str, kubeconfig: str, options: Kubernetes) -> ChaosMeshDriver:
    """Patient: every write passes three webhooks, which have five seconds each on a busy machine."""
    return ChaosMeshDriver.at(Cluster(context, kubeconfig, timeout_s=15.0), options)


class Patient(Faulting):
    """Webhooks have five seconds; on a machine without CPU they miss them, which is an objection, and a true one."""

    def lease(self, *arguments: Any, **options: Any) -> Lease:
        for _ in range(10):
            try:
                return super().lease(*arguments, **options)
            except AssertionError as e:
                if "webhook" not in str(e):
                    raise
        return super().lease(*arguments, **options)


@pytest.fixture
def by_mesh(mesh: ChaosMeshDriver, tmp_path: Path) -> Faulting:
    return Patient(mesh, tmp_path)  # type: ignore[arg-type]  the verbs are the same


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


# -- what goes wrong ------------------------------------------------------------------------------------------------------

INJECTS = """
import pickle, sys
from mlchaos_dagster.drivers.chaos_mesh.driver import ChaosMeshDriver
from mlchaos_dagster.kube.client import Cluster
lease, options, context, kubeconfig = pickle.load(sys.stdin.buffer)
ChaosMeshDriver.at(Cluster(context, kubeconfig, timeout_s=15.0), options).inject(lease)
print("injected", flush=True)
sys.stdin.read()
import time; time.sleep(600)
"""


@pytest.mark.req("RX-01")
@pytest.mark.parametrize(
    ("kind", "when"), [*((c.kind, "half-way") for c in CASES), *((c.kind, "injected") for c in CASES if c.held)]
)
def test_killed_and_recovered_by_another_process(
    kind: str, when: str, by_mesh: Faulting, namespace: str, options: Kubernetes, context: str, kubeconfig: str
) -> None:
    """SIGKILL as soon as the resource exists, or when it is on; whoever comes next knows nothing but the lease."""
    deploy(namespace)
    case = next(c for c in CASES if c.kind == kind)
    if case.link or kind == "network_isolation":
        deploy(namespace, "far", 1)
    before = pods(namespace, "app=web")
    lease = by_mesh.lease(kind, f"app=web{case.link}", count=1, **case.params)
    process = subprocess.Popen(
        [sys.executable, "-c", INJECTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdin and process.stdout
        process.stdin.write(pickle.dumps((lease, options, context, kubeconfig)))
        process.stdin.flush()
        if when == "injected":
            assert process.stdout.readline() == b"injected\n"
        else:
            eventually(lambda: resources(namespace, case.plural), 60, 0.05)
    finally:
        process.kill()
        process.communicate()
    began = time.monotonic()
    by_mesh.driver.recover(lease)
    print(f"{kind} killed {when}: recovered in {time.monotonic() - began:.2f} s")
    clean(by_mesh, lease, namespace, case)
    eventually(lambda: sum(map(ready, pods(namespace, "app=web"))) == 2, 90)
    if case.held and kind != "pod_failure":
        assert not case.seen(namespace, [p for p in before if p["metadata"]["uid"] in lease.targets[0]])


def brought(kind: str, **spec: Any) -> dict[str, Any]:
    """A team's own resource, as `chaos_mesh_resource` takes it."""
    chosen = {"mode": "one", "duration": "1h", "selector": {"labelSelectors": {"app": "web"}}}
    return {"resource": {"kind": kind, "spec": {**chosen, **spec}}}


OWN = "chaos_mesh_resource"
CANNOT: list[tuple[str, str, str, dict[str, Any], str]] = [
    ("networkchaos", "network_latency", "->app=far", {"latency_s": 0.2, "jitter_s": 0.0}, "qdisc|unable to set tcs"),
    ("networkchaos", "network_loss", "->app=far", {"fraction": 0.5}, "qdisc|unable to set tcs"),
    ("iochaos", OWN, "", brought("IOChaos", action="latency", delay="100ms", volumePath="/tmp", percent=100), "toda"),
    ("httpchaos", OWN, "", brought("HTTPChaos", target="Request", port=8080, abort=True), "apply config|tproxy"),
]
"""What a daemon fails to do on a kernel without netem, and when it was built without its helper programs."""


@pytest.mark.req("R0-02", "R3-05")
@pytest.mark.parametrize(("plural", "kind", "link", "params", "said"), CANNOT, ids=["latency", "loss", "io", "http"])
def test_what_the_daemon_cannot_do_fails_in_its_words_and_hangs_nowhere(
    plural: str, kind: str, link: str, params: dict[str, Any], said: str, by_mesh: Faulting, namespace: str
) -> None:
    """Never injected, never recovered by Chaos Mesh, and its deletion hangs, unless its note is cleared."""
    if link and subprocess.run(["modprobe", "sch_netem"], capture_output=True, check=False).returncode == 0:
        pytest.skip("this kernel can delay packets")
    deploy(namespace)
    if link:
        deploy(namespace, "far", 1)
    lease = by_mesh.lease(kind, f"app=web{link}", count=1, **params)
    try:
        by_mesh.driver.inject(lease)
    except InjectFailed as e:
        assert re.search(said, str(e)), e
    else:
        by_mesh.driver.recover(lease)
        pytest.skip("this daemon has its helper programs")
    began = time.monotonic()
    if plural == "httpchaos":  # its own word is all there is, and that is that it failed to take it away
        with pytest.raises(RecoverFailed, match=r"goes with the pod: kubectl delete pod") as told:
            by_mesh.driver.recover(lease)
        kubectl(*str(told.value).partition("kubectl ")[2].split())
    by_mesh.driver.recover(lease)
    left = by_mesh.driver.active(lease)
    print(f"{plural}: recovered in {time.monotonic() - began:.2f} s", *left.lines, sep="\n   ")
    assert resources(namespace, plural) == []
    assert not left.present, left.lines
    for note in objects(f"pod{plural}.chaos-mesh.org", namespace):
        assert not any(note["spec"].get(key) for key in ("tcs", "actions", "rules")), "the daemon would try for ever"
    eventually(lambda: sum(map(ready, pods(namespace, "app=web"))) == 2, 60)


@pytest.fixture
def no_controller(there: None) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Stop Chaos Mesh's controller; it is back afterwards."""
    scale = ["scale", "-n", SYSTEM, "deployment/chaos-controller-manager"]

    def gone() -> bool:
        label = "app.kubernetes.io/component=controller-manager"
        return not objects("pods", SYSTEM, label)

    def stop() -> None:
        kubectl(*scale, "--replicas=0")
        eventually(gone, 60)

    def start() -> None:
        kubectl(*scale, "--replicas=1")
        kubectl("rollout", "status", "-n", SYSTEM, "deployment/chaos-controller-manager", "--timeout=120s", timeout=130)

    try:
        yield stop, start
    finally:
        start()


@pytest.mark.req("R0-02", "RX-01")
def test_without_its_controller_the_target_is_mended_by_us(
    by_mesh: Faulting, namespace: str, no_controller: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    """Its webhooks refuse every change then, so the resource waits and the lease stays open; the pods do not wait."""
    stop, start = no_controller
    select = deploy(namespace)
    before = images(namespace, select)
    lease = by_mesh.lease("pod_failure", select, count=1)
    by_mesh.driver.inject(lease)
    eventually(lambda: sum(map(ready, pods(namespace, select))) == 1)
    stop()
    began = time.monotonic()
    with pytest.raises(RecoverFailed, match="seen clean"):
        by_mesh.driver.recover(lease)
    print(f"without its controller: clean in {time.monotonic() - began:.2f} s")
    assert images(namespace, select) == before
    left = by_mesh.driver.active(lease)
    assert left.present and any("can inject nothing any more" in line for line in left.lines), left.lines
    target = Target(select=select)
    ids = by_mesh.driver.resolve(target)
    said = by_mesh.driver.preflight("pod_failure", ids[:1], ids, {}, target=target)
    assert any("controller of Chaos Mesh does not run" in o.saw for o in said), said
    start()

    def recovered() -> bool:
        try:
            by_mesh.driver.recover(lease)
            return True
        except DriverError as e:
            print(e)
            return False

    eventually(recovered, 120)
    assert resources(namespace, "podchaos") == [] and not by_mesh.driver.active(lease).present


@pytest.mark.req("R0-02", "R3-05")
def test_a_teams_own_resource(by_mesh: Faulting, namespace: str) -> None:
    """TimeChaos: taken as it is but for name, pods and duration; never called seen, since nobody can see it."""
    select = deploy(namespace)
    spec = {
        "timeOffset": "-10m",
        "clockIds": ["CLOCK_REALTIME"],
        "mode": "one",
        "duration": "1h",
        "selector": {"labelSelectors": {"app": "web"}},
    }
    mine = {"kind": "TimeChaos", "spec": spec, "labels": {"team": "ml"}}
    lease = by_mesh.lease("chaos_mesh_resource", select, count=1, resource=mine)
    try:
        by_mesh.driver.inject(lease)
    except InjectFailed as e:  # a daemon that was built without its helper says so
        assert "fake image" in str(e), e
    found = resources(namespace, "timechaos")
    assert len(found) == 1
    made = found[0]
    assert made["metadata"]["labels"]["team"] == "ml"
    assert made["spec"]["timeOffset"] == "-10m" and made["spec"]["duration"] == "120s"
    assert list(made["spec"]["selector"]["pods"].values()) == [[lease.targets[0].split("/")[2].split("@")[0]]]
    seen = by_mesh.driver.active(lease)
    assert seen.present and not seen.effective, seen.lines
    by_mesh.driver.recover(lease)
    assert resources(namespace, "timechaos") == []
    assert not by_mesh.driver.active(lease).present


@pytest.mark.parametrize(
    ("resource", "said"),
    [
        ({"kind": "StressChaos", "spec": {"stressors": {"memory": {"workers": 1, "size": "lots"}}}}, "size"),
        ({"kind": "NetworkChaos", "spec": {"action": "explode"}}, "spec.action"),
        ({"kind": "NoChaos", "spec": {}}, "knows no NoChaos"),
        ({"kind": "PodChaos", "spec": {"action": "pod-kill", "remoteCluster": "far"}}, "remoteCluster"),
    ],
)
def test_what_a_webhook_or_schema_refuses_is_told_before_anything_is_measured(
    resource: dict[str, Any], said: str, mesh: ChaosMeshDriver, namespace: str
) -> None:
    target = Target(select=deploy(namespace))
    ids = mesh.resolve(target)
    told = mesh.preflight("chaos_mesh_resource", ids[:1], ids, {"resource": resource}, target=target)
    print(*told, sep="\n")
    assert len(told) == 1 and said in told[0].saw, told


def test_two_runs_do_not_meet_on_a_pod(by_mesh: Faulting, namespace: str) -> None:
    """The resource of the first is a rival of the second; of itself it is none."""
    select = deploy(namespace)
    lease = by_mesh.lease("pod_failure", select, count=1)
    by_mesh.driver.inject(lease)
    try:
        target = Target(select=select)
        ids = by_mesh.driver.resolve(target)
        told = by_mesh.driver.preflight("pod_failure", lease.targets, ids, {}, target=target)
        assert any("PodChaos" in o.saw for o in told), told
        with pytest.raises(InjectFailed, match="exists already"):
            by_mesh.driver.inject(lease)
    finally:
        by_mesh.driver.recover(lease)
    assert resources(namespace, "podchaos") == []


@pytest.mark.req("R0-10")
def test_an_api_server_that_goes_away_meanwhile(
    by_mesh: Faulting,
    namespace: str,
    options: Kubernetes,
    api_proxy: ApiProxy,  # noqa: F811
) -> None:
    """Recovery says so within seconds, and succeeds when it is back."""
    select = deploy(namespace)
    before = images(namespace, select)
    lease = by_mesh.lease("pod_failure", select, count=1)
    through = ChaosMeshDriver.at(Cluster(api_proxy.context, str(api_proxy.kubeconfig), timeout_s=10.0), options)
    through.inject(lease)
    api_proxy.cut()
    began = time.monotonic()
    with pytest.raises(DriverError):
        through.recover(lease)
    assert time.monotonic() - began < 10
    with pytest.raises(DriverUnavailable):
        through.active(lease)
    api_proxy.restore()
    through.recover(lease)
    assert images(namespace, select) == before and resources(namespace, "podchaos") == []
