"""A bad model version through a real Argo Rollout: taken back by its analysis, or by us; and who else changes it, wins.

The service is `manifests/rollouts` in a namespace of the test's own. Who observes is kubectl, and a client of a dozen lines
that asks for golden predictions through the Service and counts the wrong ones.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import InjectFailed
from mlchaos_dagster.kube.client import Cluster
from tests.cluster import test_sweeper as sweeping
from tests.cluster.conftest import HELPER_IMAGE, HERE, Faulting, eventually, kubectl, objects, ready
from tests.cluster.rights import Rights
from tests.cluster.surroundings import CommandLine

MANIFESTS = HERE.parents[1] / "manifests" / "rollouts"
LIBRARY = HERE.parents[1] / "mlchaos_dagster" / "library"
GOLDEN = json.loads((MANIFESTS / "base" / "golden" / "golden.json").read_text())
OBJECTS = KubernetesObjects(kind="Rollout", version_variable="MODEL_VERSION", bad_version="v2")
TARGET = Target(select="app=inference", kubernetes=OBJECTS)

pytestmark = pytest.mark.timeout(900)


def shipped(overlay: str, namespace: str) -> list[dict[str, Any]]:
    """The manifests, in the test's namespace."""
    found: list[dict[str, Any]] = []
    for one in yaml.safe_load_all(kubectl("kustomize", str(MANIFESTS / overlay))):
        if one["kind"] != "Namespace":
            one["metadata"]["namespace"] = namespace
            text = json.dumps(one).replace("local/mlchaos:1", HELPER_IMAGE)
            found.append(json.loads(text))
    return found


def apply(overlay: str, namespace: str) -> None:
    kubectl(
        "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": shipped(overlay, namespace)})
    )


def rested(namespace: str, within: int = 150) -> None:
    """Healthy, of this very spec, with one version. By a watch: four replicas take their time on a machine with two cores."""
    kubectl(
        "wait", "rollout/inference", "-n", namespace, "--for=jsonpath={.status.phase}=Healthy", f"--timeout={within}s",
        timeout=within + 10,
    )  # fmt: skip
    eventually(lambda: healthy(namespace), within, every=1)


def rollout(namespace: str) -> dict[str, Any]:
    return objects("rollout", namespace)[0]


def healthy(namespace: str) -> bool:
    found = rollout(namespace)
    status = found.get("status", {})
    return (
        status.get("phase") == "Healthy"
        and status.get("observedGeneration") == str(found["metadata"]["generation"])
        and status.get("stableRS") == status.get("currentPodHash")
    )


def pods_of(namespace: str, version: str) -> int:
    """Pods that serve a version, those on their way out included."""
    return sum(
        {"name": "MODEL_VERSION", "value": version} in p["spec"]["containers"][0]["env"]
        for p in objects("pods", namespace, "app=inference")
    )


def marks(namespace: str) -> list[str]:
    """Everything of ours on the Rollout and its ReplicaSets."""
    there = [*objects("rollout", namespace), *objects("rs", namespace, "app=inference")]
    return [k for o in there for k in o["metadata"].get("annotations", {}) if k.startswith("mlchaos.dev/")]


class Callers:
    """Ask for golden predictions at a steady pace, each over a connection of its own."""

    def __init__(self, namespace: str) -> None:
        service = next(s for s in objects("services", namespace) if s["metadata"]["name"] == "inference")
        addresses = objects("nodes", "")[0]["status"]["addresses"]
        node = next(a["address"] for a in addresses if a["type"] == "InternalIP")
        self.url = f"http://{node}:{service['spec']['ports'][0]['nodePort']}/predict"
        self.seen: list[tuple[float, str]] = []

    def one(self, i: int = 0) -> str:
        """`right`, `wrong`, or `none`: nobody answered."""
        row, agreed = GOLDEN["rows"][i % 5], GOLDEN["scores"][i % 5]
        try:
            request = urllib.request.Request(self.url, json.dumps({"features": row}).encode())
            with urllib.request.urlopen(request, timeout=3) as response:
                return "right" if abs(json.load(response)["score"] - agreed) <= GOLDEN["tolerance"] else "wrong"
        except OSError:
            return "none"

    @contextmanager
    def asking(self, per_s: float = 20.0) -> Iterator[Callers]:
        over = threading.Event()

        def ask() -> None:
            i = 0
            while not over.wait(1 / per_s):
                self.seen.append((time.monotonic(), self.one(i := i + 1)))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def share(self, what: str, since: float = 0.0) -> float:
        said = [answer for t, answer in self.seen if t >= since]
        assert said, "nobody asked"
        return said.count(what) / len(said)

    def all_say(self, what: str, times: int = 20) -> bool:
        return all(self.one(i) == what for i in range(times))


@pytest.fixture(scope="module")
def service(cluster: Cluster, rights: Rights | None) -> Iterator[str]:
    """The model service in a namespace that opted in."""
    crds = kubectl("get", "crd", "rollouts.argoproj.io", "--ignore-not-found", "-o", "name")
    if not crds.strip():
        pytest.skip("Argo Rollouts is not installed: there is no CRD rollouts.argoproj.io")
    look = ("get", "pods", "-A", "-l", "app.kubernetes.io/name=argo-rollouts", "-o", "json")
    if not json.loads(kubectl(*look))["items"]:
        pytest.skip("Argo Rollouts is installed, and no controller of it runs")
    eventually(lambda: any(map(ready, json.loads(kubectl(*look))["items"])), 120, every=1)
    name = f"mlchaos-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, "mlchaos.dev/allow=true", "mlchaos.dev/test=true")
    try:
        if rights:
            rights.admit(name)
        apply("base", name)
        rested(name, 240)
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false", check=False)


@pytest.fixture
def namespace(service: str) -> Iterator[str]:
    """As shipped, at rest; again afterwards."""
    yield service
    if not objects("rollout", service):
        apply("base", service)
    kubectl("annotate", "rollout/inference", "-n", service, "mlchaos.dev/lease-", "mlchaos.dev/undo-", check=False)
    apply("base", service)
    rested(service)


@pytest.fixture
def driver(cluster: Cluster, options: Kubernetes) -> KubernetesDriver:
    return KubernetesDriver.at(cluster, options)


def ship(faulting: Faulting, driver: KubernetesDriver) -> Lease:
    """The bad version, shipped."""
    lease = faulting.lease("bad_model", "app=inference", objects=OBJECTS)
    driver.inject(lease)
    return lease


@pytest.mark.req("R0-07")
def test_a_bad_version_is_aborted_and_the_stable_one_serves_everything(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    before = rollout(namespace)
    callers = Callers(namespace)
    assert callers.all_say("right")
    with callers.asking():
        began = time.monotonic()
        lease = ship(faulting, driver)
        eventually(lambda: driver.active(lease).effective, 150, every=0.5)
        eventually(lambda: rollout(namespace)["status"].get("abort"), 150, every=0.5)
        eventually(lambda: pods_of(namespace, "v2") == 0 and pods_of(namespace, "v1") == 4, 150, every=0.5)
        safe = time.monotonic()
        time.sleep(3)  # a while in which nothing may be wrong any more
    assert 0 < callers.share("wrong") <= 0.3, "a quarter of the pods, and the luck of the draw"
    assert callers.share("right", since=safe) == 1.0
    assert callers.share("none") <= 0.01
    print(
        f"shipped → stable serves everything {safe - began:.1f} s; wrong {callers.share('wrong'):.1%} of {len(callers.seen)}"
    )
    now = rollout(namespace)
    assert now["status"]["phase"] == "Degraded" and now["status"]["stableRS"] == before["status"]["stableRS"]
    assert driver.active(lease).present, "what was shipped is in the template still"
    recovered(driver, lease)
    after = eventually(lambda: healthy(namespace) and rollout(namespace), 150, every=0.5)
    assert after["spec"]["template"] == before["spec"]["template"]
    assert after["status"]["currentPodHash"] == before["status"]["currentPodHash"]
    assert marks(namespace) == []
    driver.recover(lease)  # again
    assert healthy(namespace) and rollout(namespace)["metadata"]["generation"] == after["metadata"]["generation"]


@pytest.mark.req("R0-07")
def test_without_analysis_all_answers_are_wrong_until_recovery(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    apply("teeth/no-analysis", namespace)
    rested(namespace)
    before = rollout(namespace)["spec"]["template"]
    callers = Callers(namespace)
    lease = ship(faulting, driver)
    eventually(lambda: pods_of(namespace, "v1") == 0 and callers.all_say("wrong"), 150, every=0.5)
    found = rollout(namespace)["status"]
    assert found["phase"] == "Healthy", "nobody noticed"
    assert driver.active(lease).effective
    recover_elsewhere(lease)
    recovered(driver, lease)
    eventually(lambda: healthy(namespace) and callers.all_say("right"), 150, every=0.5)
    assert not driver.active(lease).present and pods_of(namespace, "v2") == 0
    assert rollout(namespace)["spec"]["template"] == before and marks(namespace) == []


def recovered(driver: KubernetesDriver, lease: Lease) -> None:
    """As the engine does it: until the target says so. Bounds are for what hangs, not for a busy controller."""

    def gone() -> bool:
        driver.recover(lease)
        return not driver.active(lease).present

    eventually(gone, 180, every=1)


def recover_elsewhere(lease: Lease) -> None:
    """In another Python process, which knows the lease and no more."""
    program = (
        "import pickle, sys\n"
        "from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver\n"
        "from mlchaos_dagster.domain.environment import Kubernetes\n"
        "from mlchaos_dagster.kube.client import Cluster\n"
        "lease = pickle.load(sys.stdin.buffer); options = Kubernetes.model_validate(lease.undo['options'])\n"
        "cluster = Cluster(options.context, options.kubeconfig.removeprefix('file:'))\n"
        "KubernetesDriver.at(cluster, options).recover(lease)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(lease), capture_output=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.req("R0-07", "R0-10")
def test_recovered_in_the_middle_of_the_canary_there_is_no_bad_pod_left(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    before, callers = rollout(namespace), Callers(namespace)
    lease = ship(faulting, driver)
    eventually(lambda: pods_of(namespace, "v2") == 1, 150, every=0.5)
    assert not rollout(namespace)["status"].get("abort")
    recovered(driver, lease)
    assert pods_of(namespace, "v2") == 0
    rested(namespace)
    assert rollout(namespace)["spec"]["template"] == before["spec"]["template"]
    assert callers.all_say("right")


def test_a_rollout_that_is_deleted_takes_the_fault_along(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    lease = ship(faulting, driver)
    kubectl("delete", "rollout/inference", "-n", namespace, "--wait=true")
    found = driver.active(lease)
    assert not found.present and "is gone" in found.lines[0]
    driver.recover(lease)
    apply("base", namespace)  # another one of its name
    driver.recover(lease)
    rested(namespace)
    assert pods_of(namespace, "v2") == 0


def test_what_people_ship_meanwhile_stays(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    """Between undo and inject: nothing is shipped. In the window: recovery takes its marks away, and nothing else."""

    def people(version: str) -> None:
        path = "/spec/template/spec/containers/0/env/0/value"
        patch = json.dumps([{"op": "replace", "path": path, "value": version}])
        kubectl("patch", "rollout/inference", "-n", namespace, "--type=json", "-p", patch)

    lease = faulting.lease("bad_model", "app=inference", objects=OBJECTS)
    people("v0")
    with pytest.raises(InjectFailed, match="not as it was: MODEL_VERSION is v0, it was v1"):
        driver.inject(lease)
    recovered(driver, lease)
    assert marks(namespace) == []
    people("v1")
    rested(namespace)
    lease = ship(faulting, driver)
    people("v0")
    generation = rollout(namespace)["metadata"]["generation"]
    template = copy.deepcopy(rollout(namespace)["spec"]["template"])
    driver.recover(lease)
    now = rollout(namespace)
    assert now["spec"]["template"] == template and now["metadata"]["generation"] == generation
    recovered(driver, lease)
    assert marks(namespace) == []


@pytest.mark.req("R3-09")
def test_a_rollout_is_aborted_and_resumed_as_a_rollback_action(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    kubectl(
        "patch",
        "rollout/inference",
        "-n",
        namespace,
        "--type=json",
        "-p",
        json.dumps([{"op": "replace", "path": "/spec/strategy/canary/steps/1", "value": {"pause": {}}}]),
    )
    rested(namespace)
    assert driver.affected("abort_rollout", TARGET, {}) == driver.affected("resume_rollout", TARGET, {}) == ()
    people = '[{"op":"replace","path":"/spec/template/spec/containers/0/env/0/value","value":"v2"}]'
    kubectl("patch", "rollout/inference", "-n", namespace, "--type=json", "-p", people)
    eventually(lambda: driver.affected("resume_rollout", TARGET, {"retry": False}), 150, every=0.5)
    resume = faulting.lease("resume_rollout", "app=inference", objects=OBJECTS, retry=False)
    driver.inject(resume)
    eventually(lambda: rollout(namespace)["status"]["currentStepIndex"] > 1, 150, every=0.5)
    assert not driver.active(resume).present
    abort = faulting.lease("abort_rollout", "app=inference", objects=OBJECTS)
    driver.inject(abort)
    found = eventually(lambda: (s := rollout(namespace)["status"]) and s["phase"] == "Degraded" and s, 150, every=0.5)
    assert found["abort"] is True and not driver.active(abort).present
    eventually(lambda: pods_of(namespace, "v2") == 0, 150, every=0.5)
    assert driver.affected("resume_rollout", TARGET, {"retry": False}) == ()
    assert driver.affected("resume_rollout", TARGET, {"retry": True}) == driver.resolve(TARGET)
    driver.recover(abort)
    assert rollout(namespace)["status"]["phase"] == "Degraded", "an act is not undone"


# -- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def line(namespace: str, context: str, kubeconfig: str, tmp_path: Path) -> Iterator[CommandLine]:
    """`mlchaos` on the environment and the experiment that are shipped, with a sweeper in the test's namespace."""
    sweeping.install(namespace)
    kubectl("rollout", "status", "-n", namespace, "deployment/mlchaos-sweeper", "--timeout=60s", timeout=70)
    eventually(lambda: sweeping.heart(namespace), 150, every=0.5)
    environment = yaml.safe_load(
        (LIBRARY / "environments" / "rollouts.yaml").read_text().replace("mlrollouts", namespace)
    )
    where = {"context": context, "kubeconfig": f"file:{kubeconfig}", "control_namespace": namespace}
    environment["name"] = "test"
    environment["kubernetes"] |= {**where, "sweeper_ttl": f"{sweeping.TTL_S:g}s", "helper_image": HELPER_IMAGE}
    experiment = yaml.safe_load((LIBRARY / "experiments" / "model" / "canary-bad-model.yaml").read_text())
    # Longer than shipped: on a busy machine an analysis takes its time.
    experiment |= {"name": "canary-of-test", "duration": "120s", "recovery": {"within": "180s"}}
    try:
        yield CommandLine(tmp_path, environment, experiment)
    finally:
        for kind in ("clusterrole", "clusterrolebinding"):
            names = [x["metadata"]["name"] for x in objects(kind, "", "app.kubernetes.io/managed-by=mlchaos")]
            mine = [n for n in names if n.endswith(namespace)]
            kubectl("delete", kind, *mine, "--ignore-not-found", check=False)
        kubectl("delete", "deployment/mlchaos-sweeper", "-n", namespace, check=False)


@pytest.mark.req("R0-07")
@pytest.mark.parametrize(("overlay", "outcome"), [("base", "HELD"), ("teeth/no-analysis", "DEVIATED")])
def test_the_experiment_holds_with_the_analysis_and_deviates_without(
    namespace: str, line: CommandLine, overlay: str, outcome: str
) -> None:
    apply(overlay, namespace)
    rested(namespace)
    code, said, trouble = line("run", "canary-of-test", "-o", "json", timeout=450)
    found = json.loads(said)
    assert found["outcome"] == outcome, (code, said[-3000:], trouble[-2000:])
    if outcome == "DEVIATED":
        reasons = json.dumps(found)
        assert "golden_error_rate" in reasons and "rolled_back" in reasons
    assert sweeping.open_leases(namespace) == [] and marks(namespace) == []
    eventually(lambda: healthy(namespace) and Callers(namespace).all_say("right"), 150, every=0.5)


@pytest.mark.req("R0-10", "RX-01")
def test_a_run_that_is_killed_in_mid_canary_is_cleaned_up_by_the_sweeper(namespace: str, line: CommandLine) -> None:
    before = rollout(namespace)["spec"]["template"]
    run = line.start("run", "canary-of-test")
    eventually(lambda: pods_of(namespace, "v2") == 1 or run.poll() is not None, 150, every=0.5)
    assert run.poll() is None, (line.home / "run.log").read_text()[-2000:]
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    for pid in (*map(int, children), run.pid):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    eventually(lambda: not sweeping.open_leases(namespace), sweeping.TTL_S + 150, every=1)
    assert rollout(namespace)["spec"]["template"] == before and marks(namespace) == [] and pods_of(namespace, "v2") == 0
    rested(namespace)
