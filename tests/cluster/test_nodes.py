"""Nodes are drained, zones fail, and nodes die under other faults; seen by kubectl and by requests, not by our driver."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.drivers.kubernetes.faults import nodes as handlers
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.kube.client import Cluster
from tests.cluster import machines
from tests.cluster.conftest import Faulting, eventually, kubectl, objects, pods, ready
from tests.cluster.machines import added, found, placed

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(120)]

NODE, ZONE = "node-2", "local-b"
SELECT = f"kubernetes.io/hostname={NODE}"
NODES = KubernetesObjects(kind="Node")

ELSEWHERE = """
import json, sys
from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.kube.address import connect
given = json.load(sys.stdin)
lease = given["lease"]
lease = Lease(**{**lease, "targets": tuple(lease["targets"]), "owner": Owner(**lease["owner"])})
options = Kubernetes.model_validate(given["options"])
getattr(KubernetesDriver.at(connect(options), options), sys.argv[1])(lease)
"""
"""Another process, which knows the lease and nothing else."""


@pytest.fixture(scope="module", autouse=True)
def _second_node() -> Iterator[None]:
    added(NODE, ZONE)
    yield
    machines.node("remove", NODE)


@pytest.fixture(autouse=True)
def _nobody_left(_second_node: None) -> None:
    """The pods of the test before are gone."""
    there = ("get", "pods", "-A", "--field-selector", f"spec.nodeName={NODE}", "-o", "name")
    eventually(lambda: not kubectl(*there), 60)


def elsewhere(verb: str, lease: Lease, options: Kubernetes) -> subprocess.Popen[str]:
    """A verb in another process, begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, verb],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"lease": dataclasses.asdict(lease), "options": options.model_dump(mode="json")}))
    process.stdin.close()
    process.stdin = None
    return process


def recovered_elsewhere(lease: Lease, options: Kubernetes) -> None:
    """Recover from a process that did not inject."""
    process = elsewhere("recover", lease, options)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said


def on(node: str, namespace: str, selector: str) -> list[dict[str, Any]]:
    """Pods on a node that are not on their way out."""
    return [p for p in pods(namespace, selector) if p["spec"].get("nodeName") == node]


def cordoned(name: str) -> bool:
    return bool(found(name)["spec"].get("unschedulable"))


def marks(name: str) -> list[str]:
    """Our annotations on a node."""
    return [a for a in found(name)["metadata"]["annotations"] if a.startswith("mlchaos.dev/")]


def budget(namespace: str, app: str, least: str) -> None:
    kubectl(
        "create", "poddisruptionbudget", "web", "-n", namespace, f"--selector=app={app}", f"--min-available={least}"
    )


class Watching:
    """How many pods of a Deployment are available, four times a second, until it is over."""

    def __init__(self, namespace: str, name: str) -> None:
        self.seen: list[int] = []
        self._over = threading.Event()
        self._what = ("get", "deployment", name, "-n", namespace, "-o", "jsonpath={.status.availableReplicas}")
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.25):
            self.seen.append(int(kubectl(*self._what) or 0))

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.req("R3-06")
def test_a_drain_moves_the_pods_one_by_one_where_the_budget_says_so(
    faulting: Faulting, namespace: str, options: Kubernetes
) -> None:
    select = placed(namespace, "web", NODE, replicas=2)
    budget(namespace, "web", "1")
    assert len(on(NODE, namespace, select)) == 2
    eventually(lambda: objects("pdb", namespace)[0]["status"].get("disruptionsAllowed") == 1)
    lease = faulting.lease("node_drain", SELECT, objects=NODES, grace_s=1.0)
    with Watching(namespace, "web") as watching:
        faulting.driver.inject(lease)
    assert min(watching.seen) >= 1, "the budget was not respected"
    assert on(NODE, namespace, select) == [] and cordoned(NODE)
    evidence = faulting.driver.active(lease)
    assert evidence.present and evidence.effective, evidence
    assert any("2 of those had an emptyDir" in line for line in evidence.lines), evidence
    eventually(lambda: [ready(p) for p in pods(namespace, select)] == [True, True])
    faulting.driver.inject(lease)  # a second one must not take our cordon for somebody else's
    recovered_elsewhere(lease, options)
    assert not cordoned(NODE) and marks(NODE) == []
    assert not faulting.driver.active(lease).present
    assert on(NODE, namespace, select) == []  # what moved stays where it is


def test_a_run_that_is_killed_in_the_middle_of_a_drain_is_undone_by_another(
    faulting: Faulting, namespace: str, options: Kubernetes
) -> None:
    select = placed(namespace, "web", NODE)
    lease = faulting.lease("node_drain", SELECT, objects=NODES)
    budget(namespace, "web", "1")  # after the guards: now the drain never ends
    eventually(lambda: objects("pdb", namespace)[0]["status"].get("currentHealthy") == 1)
    run = elsewhere("inject", lease, options)
    eventually(lambda: cordoned(NODE))
    run.kill()
    run.communicate()
    evidence = faulting.driver.active(lease)
    assert evidence.present and not evidence.effective, evidence
    faulting.driver.recover(lease)
    faulting.driver.recover(lease)
    assert not cordoned(NODE) and marks(NODE) == []
    assert len(on(NODE, namespace, select)) == 1
    assert not faulting.driver.active(lease).present


def test_a_node_that_was_cordoned_before_stays_cordoned(faulting: Faulting) -> None:
    kubectl("cordon", NODE)
    try:
        lease = faulting.lease("node_drain", SELECT, objects=NODES)
        faulting.driver.inject(lease)
        assert faulting.driver.active(lease).effective
        faulting.driver.recover(lease)
        assert cordoned(NODE) and marks(NODE) == []
        assert not faulting.driver.active(lease).present
    finally:
        kubectl("uncordon", NODE)


def test_a_change_that_was_prepared_before_the_recovery_is_refused_after_it(
    faulting: Faulting, cluster: Cluster, namespace: str
) -> None:
    lease = faulting.lease("node_drain", SELECT, objects=NODES)
    late = handlers._cordoned(before := found(NODE))
    faulting.driver.recover(lease)  # nothing is there yet
    assert found(NODE)["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]
    late["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
    with pytest.raises(Exception, match="409"):
        cluster.patch(f"/api/v1/nodes/{NODE}", late)
    assert not cordoned(NODE) and marks(NODE) == []


def refused(driver: KubernetesDriver, kind: str, select: str, count: int | None = None) -> str:
    """What speaks against it, in one text."""
    target = Target(select=select, kubernetes=NODES)
    ids = driver.resolve(target)
    return "\n".join(f"{o.saw} | {o.needs}" for o in driver.preflight(kind, ids[:count], ids, {}, target=target))


def test_the_node_of_the_sweeper_is_spared(
    driver: KubernetesDriver, cluster: Cluster, options: Kubernetes, namespace: str
) -> None:
    placed(namespace, "sweeper", NODE, labels={"mlchaos.dev/component": "sweeper"})
    assert "the sweeper runs there" in refused(driver, "node_drain", SELECT)
    bold = KubernetesDriver.at(cluster, options.model_copy(update={"spare_sweeper_node": False}))
    assert refused(bold, "node_drain", SELECT) == ""


def test_what_did_not_opt_in_or_would_be_lost_is_named(
    driver: KubernetesDriver, namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    select = placed(namespace, "web", NODE)
    alone = {"image": machines.TARGET_IMAGE, "nodeName": NODE, "restartPolicy": "Always"}
    spec = {"apiVersion": "v1", "spec": {"terminationGracePeriodSeconds": 0, **alone}}
    kubectl("run", "alone", "-n", namespace, f"--image={machines.TARGET_IMAGE}", f"--overrides={json.dumps(spec)}")
    budget(namespace, "web", "1")
    eventually(lambda: objects("pdb", namespace)[0]["status"].get("currentHealthy") == 1)
    said = refused(driver, "node_drain", SELECT)
    assert f"nothing would make these pods anew: {namespace}/alone" in said
    assert "PodDisruptionBudget" in said and "allows no eviction now" in said
    assert "PodDisruptionBudget" not in refused(driver, "zone_failure", f"topology.kubernetes.io/zone={ZONE}")
    kubectl("label", "namespace", namespace, "mlchaos.dev/allow-")
    said = refused(driver, "node_drain", SELECT)
    assert f"have not opted in are there: {namespace}/alone, {namespace}/web-" in said
    # This process, as if it ran in the pod that is on the node.
    (tmp_path / "namespace").write_text(namespace)
    monkeypatch.setattr(handlers, "_OWN_NAMESPACE", tmp_path / "namespace")
    (own,) = on(NODE, namespace, select)
    monkeypatch.setattr("socket.gethostname", lambda: own["metadata"]["name"])
    assert f"this run's own pod is on node {NODE}" in refused(driver, "node_drain", SELECT)


def test_the_last_node_half_a_zone_and_a_control_plane_are_refused(driver: KubernetesDriver) -> None:
    everywhere = "kubernetes.io/os=linux"
    assert "no other node is ready and takes pods" in refused(driver, "node_drain", everywhere)
    assert "in the zones local-a, local-b" in refused(driver, "zone_failure", everywhere)
    kubectl("label", "node", NODE, "topology.kubernetes.io/zone=local-a", "--overwrite")
    kubectl("label", "node", NODE, "node-role.kubernetes.io/control-plane=")
    try:
        zone = "topology.kubernetes.io/zone=local-a"
        assert "1 of the 2 nodes of zone local-a would be hit" in refused(driver, "zone_failure", zone, count=1)
        assert "carries the control plane" in refused(driver, "node_drain", SELECT)
        assert refused(driver, "node_drain", f"{SELECT},node-role.kubernetes.io/control-plane") == ""
    finally:
        kubectl("label", "node", NODE, f"topology.kubernetes.io/zone={ZONE}", "--overwrite")
        kubectl("label", "node", NODE, "node-role.kubernetes.io/control-plane-")


CLIENT = """
import time, urllib.request
while True:
    begun = time.time()
    try:
        said = urllib.request.urlopen("http://web", timeout=1).status
    except Exception as e:
        said = type(e).__name__
    print(f"{begun:.3f} {said}")
    time.sleep(0.05)
"""


@pytest.mark.req("R3-06", "R4-11")
def test_the_other_zone_serves_while_one_is_lost(faulting: Faulting, namespace: str, options: Kubernetes) -> None:
    away = placed(namespace, "web-b", NODE, replicas=2, app="web", wait=False)
    here = placed(namespace, "web-a", "node-1", replicas=2, app="web", only=True)
    kubectl("rollout", "status", "-n", namespace, "deployment/web-b", "--timeout=60s", timeout=70)
    budget(namespace, "web", "100%")  # a zone does not ask
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(service))
    placed(namespace, "client", "node-1", only=True, program=CLIENT)
    lost = {p["metadata"]["uid"] for p in on(NODE, namespace, away)}
    assert len(lost) == 2
    eventually(lambda: " 200" in kubectl("logs", "-n", namespace, "deployment/client", "--tail=3"))
    lease = faulting.lease("zone_failure", f"topology.kubernetes.io/zone={ZONE}", objects=NODES)
    begun = time.time()
    faulting.driver.inject(lease)
    gone = time.time()
    assert gone - begun < 10
    evidence = faulting.driver.active(lease)
    assert evidence.present and evidence.effective, evidence
    assert not lost & {p["metadata"]["uid"] for p in objects("pods", namespace)}
    eventually(lambda: [ready(p) for p in pods(namespace, away)] == [True, True])  # in the zone that is left
    assert on(NODE, namespace, away) == [] and len(on("node-1", namespace, here)) == 2

    def asked() -> list[tuple[float, str]]:
        lines = kubectl("logs", "-n", namespace, "deployment/client").splitlines()
        return [(float(t), said) for t, said in map(str.split, lines) if float(t) >= begun]

    eventually(lambda: len([t for t, _ in asked() if t > gone + 1]) > 50)
    window = asked()
    assert {said for t, said in window if t > gone + 1} == {"200"}, window
    assert sum(said == "200" for _, said in window) >= 0.9 * len(window), window
    assert faulting.driver.active(lease).effective  # it holds
    recovered_elsewhere(lease, options)
    assert not cordoned(NODE) and marks(NODE) == []
    assert not faulting.driver.active(lease).present
