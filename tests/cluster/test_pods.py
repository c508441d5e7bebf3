"""Faults on pods and workloads, seen by kubectl and HTTP; recovered, killed and woken late from other processes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import InjectFailed
from mlchaos_dagster.kube.client import Site
from tests.cluster.conftest import TARGET_IMAGE, Faulting, deploy, eventually, kubectl, objects, pods, ready

OTHER = """
import json, sys
from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import LeaseRefused, MlChaosError
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Cluster

told = json.loads(sys.stdin.readline())
options = Kubernetes.model_validate(told["options"])
lease = Lease(**{**told["lease"], "targets": tuple(told["lease"]["targets"]), "owner": Owner(**told["lease"]["owner"])})
driver = KubernetesDriver.at(Cluster(options.context, options.kubeconfig.removeprefix("file:")), options)
asked = 0

def held(site, lease):
    global asked
    asked += 1
    if told["pause"] == "held":
        if asked > 1:
            raise LeaseRefused("taken over meanwhile")
        print("paused", flush=True)
        sys.stdin.readline()

def step(done, total):
    if told["pause"] == "step":
        print("paused", flush=True)
        sys.stdin.readline()

leases.held = held
try:
    getattr(driver, told["verb"])(lease, step)
    print("done", flush=True)
except MlChaosError as e:
    print(f"{type(e).__name__}: {e}", flush=True)
"""
"""Another process that knows the lease and nothing else. `pause: held`: it sleeps between asking for its lease and its
first change, and finds the lease taken over when it asks again; `pause: step`: after its first target."""


@contextmanager
def another(verb: str, lease: Lease, options: Kubernetes, pause: str = "") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        told = {"verb": verb, "lease": dataclasses.asdict(lease), "pause": pause}
        process.stdin.write(json.dumps({**told, "options": options.model_dump(mode="json")}) + "\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def elsewhere(verb: str, lease: Lease, options: Kubernetes) -> str:
    """What a verb says when another process calls it."""
    with another(verb, lease, options) as process:
        return read(process)


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> str:
    """Wake a paused process; its last word."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    return read(process)


def uids(namespace: str, selector: str) -> set[str]:
    return {p["metadata"]["uid"] for p in pods(namespace, selector)}


def uid_of(lease: Lease) -> set[str]:
    return {target.partition("@")[2] for target in lease.targets}


def spec_of(pod: dict[str, Any]) -> dict[str, Any]:
    """What recovery must leave as it was."""
    meta = pod["metadata"]
    return {"images": [c["image"] for c in pod["spec"]["containers"]], "annotations": meta.get("annotations", {})}


def answers(pod: dict[str, Any]) -> bool:
    try:
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8080/", timeout=1) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def all_ready(namespace: str, selector: str, count: int) -> bool:
    found = pods(namespace, selector)
    return len(found) == count and all(ready(p) and answers(p) for p in found)


def stateful(namespace: str, name: str = "db", replicas: int = 1) -> str:
    selector = deploy(namespace, name, replicas)
    found = objects("deployment", namespace)[0]
    kubectl("delete", "-n", namespace, f"deployment/{name}", "--wait=true")
    template = found["spec"]["template"]
    body = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "selector": found["spec"]["selector"],
            "template": {"metadata": {"labels": template["metadata"]["labels"]}, "spec": template["spec"]},
        },
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    eventually(lambda: all_ready(namespace, selector, replicas))
    return selector


# -- pod_delete -----------------------------------------------------------------------------------------------------


@pytest.mark.req("R1-01", "R3-02")
def test_deleted_pods_go_and_others_come(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = deploy(namespace, replicas=2)
    lease = faulting.lease("pod_delete", selector, count=1, interval_s=None, signal="kill")
    before = uids(namespace, selector)
    driver.inject(lease)
    seen = driver.active(lease)
    assert seen.effective and not seen.present, seen
    assert not uid_of(lease) & uids(namespace, selector)
    assert before - uid_of(lease) <= uids(namespace, selector), "an untouched pod is gone"
    eventually(lambda: all_ready(namespace, selector, 2))
    now = uids(namespace, selector)
    assert elsewhere("inject", lease, options) == "done", "inject twice"
    driver.recover(lease)
    driver.recover(lease)
    assert uids(namespace, selector) == now, "what replaced the frozen pod was hit"


def test_an_interval_hits_the_replacements_until_recover(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    selector = deploy(namespace, replicas=3)
    lease = faulting.lease("pod_delete", selector, count=1, interval_s=2.0, signal="kill")
    before = uids(namespace, selector)
    driver.inject(lease)
    first = eventually(lambda: uids(namespace, selector) - before)
    eventually(lambda: not first & uids(namespace, selector), within=8)
    assert before - uid_of(lease) <= uids(namespace, selector), "more than the replacement of the frozen pod was hit"
    eventually(lambda: driver.active(lease).present and driver.active(lease).effective)
    driver.recover(lease)
    assert not driver.active(lease).present
    eventually(lambda: all_ready(namespace, selector, 3))
    now = uids(namespace, selector)
    time.sleep(2.5)  # the thing to see is that nothing happens
    assert uids(namespace, selector) == now


def test_an_interval_ends_at_its_deadline(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    selector = deploy(namespace, replicas=1)
    lease = faulting.lease("pod_delete", selector, duration_s=5.0, interval_s=2.0, signal="kill")
    driver.inject(lease)
    assert driver.active(lease).present
    eventually(lambda: not driver.active(lease).present, within=10)
    rounds = re.search(r"in (\d) rounds", driver.active(lease).lines[0])
    assert rounds and 1 < int(rounds[1]) <= 3


def test_a_budget_refuses_the_eviction(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, site: Site
) -> None:
    selector = deploy(namespace, replicas=2)
    lease = faulting.lease("pod_delete", selector, count=1, interval_s=None, signal="kill", evict=True)
    kubectl("create", "pdb", "keep", "-n", namespace, f"--selector={selector}", "--min-available=2")
    eventually(lambda: objects("pdb", namespace)[0]["status"].get("currentHealthy") == 2)
    before = uids(namespace, selector)
    with pytest.raises(InjectFailed, match=f"PodDisruptionBudget {namespace}/keep does not let"):
        driver.inject(lease)
    assert uids(namespace, selector) == before
    target = Target(select=selector)
    willing = KubernetesDriver.at(site.cluster, site.options.model_copy(update={"ignore_budgets": True}))
    said = willing.preflight("pod_delete", lease.targets, driver.resolve(target), lease.params, target=target)
    assert [o.saw for o in said] == [f"PodDisruptionBudget {namespace}/keep allows 0 evictions now, and 1 are wanted"]
    kubectl("delete", "pdb", "keep", "-n", namespace)
    driver.inject(lease)
    assert not uid_of(lease) & uids(namespace, selector)


def test_a_pod_that_nobody_brings_back_is_refused(namespace: str, driver: KubernetesDriver) -> None:
    kubectl("run", "alone", "-n", namespace, f"--image={TARGET_IMAGE}", "--command", "--", "sleep", "1000")
    eventually(lambda: all(ready(p) for p in pods(namespace, "run=alone")))
    target = Target(select="run=alone")
    ids = driver.resolve(target)
    said = driver.preflight("pod_delete", ids, ids, {"interval_s": None, "signal": "kill"}, target=target)
    assert any("would not come back: no controller owns it" in o.saw for o in said), said


def test_a_replacement_of_the_same_name_is_not_the_frozen_pod(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = stateful(namespace)
    lease = faulting.lease("pod_delete", selector, interval_s=None, signal="kill")
    failure = faulting.lease("pod_failure", selector)
    kubectl("delete", "pod", "db-0", "-n", namespace, "--grace-period=0", "--force")
    eventually(lambda: all_ready(namespace, selector, 1))
    before = pods(namespace, selector)[0]
    driver.inject(lease)
    with pytest.raises(InjectFailed, match="is gone: it was not hit"):
        driver.inject(failure)
    seen = driver.active(lease)
    assert not seen.effective and "was not deleted by this run" in " ".join(seen.lines), "somebody else's doing"
    seen = driver.active(failure)
    assert not seen.present and not seen.effective and "what replaced it is untouched" in seen.lines[0]
    assert elsewhere("recover", failure, options) == "done"
    after = pods(namespace, selector)[0]
    assert (after["metadata"]["uid"], spec_of(after)) == (before["metadata"]["uid"], spec_of(before))


# -- killed, late, twice: all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pod_delete", "pod_failure", "container_kill"])
def test_a_process_that_wakes_up_after_recover_changes_nothing(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes, kind: str
) -> None:
    selector = deploy(namespace, replicas=1)
    params = {"interval_s": None, "signal": "kill"} if kind == "pod_delete" else {}
    lease = faulting.lease(kind, selector, **params)
    before = pods(namespace, selector)[0]
    with another("inject", lease, options, pause="held") as late:
        assert read(late) == "paused"
        driver.recover(lease)
        assert go_on(late) == "LeaseRefused: taken over meanwhile"
    after = pods(namespace, selector)[0]
    assert (after["metadata"]["uid"], spec_of(after)) == (before["metadata"]["uid"], spec_of(before))
    assert not driver.active(lease).effective


# -- pod_failure ----------------------------------------------------------------------------------------------------


@pytest.mark.req("R1-01")
def test_failed_pods_are_down_for_the_window_and_serve_again(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = deploy(namespace, replicas=2)
    lease = faulting.lease("pod_failure", selector, count=1)
    before = {p["metadata"]["uid"]: spec_of(p) for p in pods(namespace, selector)}

    def hit() -> dict[str, Any]:
        return next(p for p in pods(namespace, selector) if p["metadata"]["uid"] in uid_of(lease))

    driver.inject(lease)
    eventually(lambda: driver.active(lease).effective, within=5)
    assert not answers(hit()) and not ready(hit())
    driver.inject(lease)
    eventually(lambda: driver.active(lease).effective, within=5)
    others = [p for p in pods(namespace, selector) if p["metadata"]["uid"] not in uid_of(lease)]
    assert len(others) == 1 and answers(others[0]), "only the frozen pod is down, and nobody replaced it"
    time.sleep(3)  # the thing to see is that it stays down
    assert not answers(hit())
    began = time.monotonic()
    assert elsewhere("recover", lease, options) == "done"
    assert not driver.active(lease).present
    eventually(lambda: all_ready(namespace, selector, 2), within=30)
    assert time.monotonic() - began < 30, "R1-01"
    assert {p["metadata"]["uid"]: spec_of(p) for p in pods(namespace, selector)} == before
    driver.recover(lease)
    assert {p["metadata"]["uid"]: spec_of(p) for p in pods(namespace, selector)} == before


def test_a_pod_that_the_kubelet_would_start_late_is_replaced(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    selector = deploy(namespace, replicas=1)
    first = faulting.lease("pod_failure", selector)
    for lease in (first, second := dataclasses.replace(first, id=first.id + "-2")):
        driver.inject(lease)
        eventually(lambda lease=lease: driver.active(lease).effective, within=5)
        driver.recover(lease)
        assert not driver.active(lease).present
        eventually(lambda: all_ready(namespace, selector, 1), within=8)
    assert not uid_of(second) & uids(namespace, selector), (
        "it came back in time without being replaced: test another way"
    )


def test_killed_between_two_pods_the_rest_is_untouched_and_all_comes_back(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = deploy(namespace, replicas=2)
    lease = faulting.lease("pod_failure", selector)
    before = {p["metadata"]["uid"]: spec_of(p) for p in pods(namespace, selector)}
    with another("inject", lease, options, pause="step") as owner:
        assert read(owner) == "paused"
        owner.kill()
    held = [p for p in pods(namespace, selector) if "mlchaos.dev/lease" in p["metadata"].get("annotations", {})]
    assert len(held) == 1 and driver.active(lease).present
    driver.recover(lease)
    assert not driver.active(lease).present
    eventually(lambda: all_ready(namespace, selector, 2), within=10)
    assert {p["metadata"]["uid"]: spec_of(p) for p in pods(namespace, selector)} == before


def test_a_failed_pod_that_is_deleted_meanwhile_leaves_nothing(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = deploy(namespace, replicas=1)
    lease = faulting.lease("pod_failure", selector)
    driver.inject(lease)
    eventually(lambda: driver.active(lease).effective, within=5)
    kubectl("delete", "deployment/web", "-n", namespace, "--wait=true")
    eventually(lambda: not objects("pods", namespace, selector))
    seen = driver.active(lease)
    assert not seen.present and not seen.effective
    assert elsewhere("recover", lease, options) == "done"


def test_the_pod_itself_tells_how_it_is_mended(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    selector = deploy(namespace, replicas=1)
    lease = faulting.lease("pod_failure", selector)
    driver.inject(lease)
    lost = dataclasses.replace(lease, undo={**lease.undo, "fault": {"images": {}}})
    driver.recover(lost)
    assert [c["image"] for c in pods(namespace, selector)[0]["spec"]["containers"]] == [TARGET_IMAGE]
    assert not driver.active(lease).present


# -- container_kill -------------------------------------------------------------------------------------------------

NO_HANDLER = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8080)"


def bare_web(namespace: str, name: str, command: list[str], **spec: Any) -> str:
    """One web server under a Deployment, started by `command`; `spec`: of the pod."""
    selector = deploy(namespace, name, 1)
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "web", "command": command}], **spec}}}}
    kubectl("patch", "-n", namespace, f"deployment/{name}", "-p", json.dumps(patch))
    kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=60s", timeout=70)
    eventually(lambda: len(objects("pods", namespace, selector)) == 1 and all_ready(namespace, selector, 1))
    return selector


def container(pod: dict[str, Any]) -> dict[str, Any]:
    return pod["status"]["containerStatuses"][0]


@pytest.mark.parametrize(
    ("command", "spec"),
    [
        (["python3", "-c", NO_HANDLER], {}),
        (["tini", "--", "python3", "-c", NO_HANDLER], {}),
        (["python3", "-c", NO_HANDLER], {"shareProcessNamespace": True}),
        (["python3", "-c", NO_HANDLER], {"securityContext": {"runAsUser": 1000, "runAsNonRoot": True}}),
    ],
    ids=["process 1", "behind tini", "shared process namespace", "not root"],
)
def test_the_main_process_dies_by_sigkill_and_is_started_again(
    namespace: str,
    driver: KubernetesDriver,
    faulting: Faulting,
    options: Kubernetes,
    command: list[str],
    spec: dict[str, Any],
) -> None:
    selector = bare_web(namespace, "app", command, **spec)
    lease = faulting.lease("container_kill", selector)
    pod = pods(namespace, selector)[0]
    assert not driver.active(lease).effective
    driver.inject(lease)
    eventually(lambda: driver.active(lease).effective, within=10)
    killed = eventually(lambda: [p for p in pods(namespace, selector) if container(p)["restartCount"] == 1])[0]
    assert killed["metadata"]["uid"] == pod["metadata"]["uid"]
    last = container(killed)["lastState"].get("terminated") or container(killed)["state"]["terminated"]
    assert last["exitCode"] == 137 and last["containerID"] == container(pod)["containerID"]
    assert elsewhere("inject", lease, options) == "done", "again"
    assert elsewhere("recover", lease, options) == "done"
    assert not driver.active(lease).present
    eventually(lambda: all_ready(namespace, selector, 1))
    assert container(pods(namespace, selector)[0])["restartCount"] == 1, "one lease, one kill"


def test_pod_security_that_keeps_the_helper_out_is_an_objection(namespace: str, driver: KubernetesDriver) -> None:
    selector = deploy(namespace, "app", 1)
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=baseline")
    target = Target(select=selector)
    ids = driver.resolve(target)
    said = driver.preflight("container_kill", ids, ids, {}, target=target)
    assert len(said) == 1 and "does not let a helper container in" in said[0].saw, said


def test_a_helper_that_comes_too_late_kills_nothing(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = deploy(namespace, "app", 1)
    lease = faulting.lease("container_kill", selector)
    monkeypatch.setattr("mlchaos_dagster.drivers.kubernetes.faults.container_kill._STARTS_WITHIN_S", -1.0)
    driver.inject(lease)
    eventually(lambda: "too late" in driver.active(lease).lines[0], within=10)
    seen = driver.active(lease)
    assert not seen.effective and not seen.present
    assert container(pods(namespace, selector)[0])["restartCount"] == 0


# -- scale_to_zero --------------------------------------------------------------------------------------------------

WORKLOADS = {"deployment": KubernetesObjects(kind="Deployment"), "statefulset": KubernetesObjects(kind="StatefulSet")}


def workload(namespace: str, kind: str, name: str) -> dict[str, Any]:
    return next(o for o in objects(kind, namespace) if o["metadata"]["name"] == name)


def label(namespace: str, kind: str, name: str) -> str:
    """Workloads are selected by their own labels, not by those of their pods."""
    kubectl("label", "-n", namespace, kind, name, f"app={name}", "--overwrite")
    return f"app={name}"


def marks(found: list[dict[str, Any]]) -> list[str]:
    return [k for o in found for k in o["metadata"].get("annotations", {}) if k.startswith("mlchaos.dev/")]


@pytest.mark.parametrize("kind", ["deployment", "statefulset"])
def test_a_workload_has_no_replicas_for_the_window_and_then_as_many_as_before(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes, kind: str
) -> None:
    selector = deploy(namespace, "web", 2) if kind == "deployment" else stateful(namespace, "web", 2)
    lease = faulting.lease("scale_to_zero", label(namespace, kind, "web"), objects=WORKLOADS[kind])
    driver.inject(lease)
    driver.inject(lease)
    eventually(lambda: driver.active(lease).effective, within=10)
    assert workload(namespace, kind, "web")["spec"]["replicas"] == 0
    eventually(lambda: not objects("pods", namespace, selector))
    assert elsewhere("recover", lease, options) == "done"
    eventually(lambda: not driver.active(lease).present)
    eventually(lambda: all_ready(namespace, selector, 2))
    driver.recover(lease)
    assert workload(namespace, kind, "web")["spec"]["replicas"] == 2
    eventually(lambda: not driver.active(lease).present)
    assert not marks([workload(namespace, kind, "web"), *objects("replicasets", namespace)])


def test_who_scales_meanwhile_wins(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    deploy(namespace, "web", 2)
    where = WORKLOADS["deployment"]
    lease = faulting.lease("scale_to_zero", label(namespace, "deployment", "web"), objects=where)
    driver.inject(lease)
    kubectl("scale", "-n", namespace, "deployment/web", "--replicas=1")
    assert not driver.active(lease).effective
    driver.recover(lease)
    found = workload(namespace, "deployment", "web")
    assert found["spec"]["replicas"] == 1 and not marks([found])
    assert "before the fault: 2; somebody set others meanwhile" in driver.active(lease).lines[0]


def test_an_autoscaler_leaves_no_replicas_alone_and_an_operator_is_refused(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    selector = deploy(namespace, "web", 2)
    where = WORKLOADS["deployment"]
    kubectl("autoscale", "-n", namespace, "deployment/web", "--min=2", "--max=3", "--cpu-percent=80")
    lease = faulting.lease("scale_to_zero", label(namespace, "deployment", "web"), objects=where)
    driver.inject(lease)
    disabled = "ScalingDisabled"
    eventually(lambda: disabled in json.dumps(objects("hpa", namespace)[0]["status"]), within=40)
    assert driver.active(lease).effective, "the autoscaler saw it, and left it alone"
    driver.recover(lease)
    eventually(lambda: all_ready(namespace, selector, 2))
    kubectl(
        "patch", "-n", namespace, "deployment/web", "--field-manager=serving-operator", "-p", '{"spec":{"replicas":3}}'
    )
    target = Target(select="app=web", kubernetes=where)
    ids = driver.resolve(target)
    said = driver.preflight("scale_to_zero", ids, ids, {}, target=target)
    assert [o.needs for o in said] == ["field manager serving-operator paused"], said


def test_a_scale_process_that_wakes_up_late_or_dies_half_way_leaves_nothing(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    for name in ("web", "api"):
        deploy(namespace, name, 1)
        kubectl("label", "-n", namespace, "deployment", name, "tier=front")
    lease = faulting.lease("scale_to_zero", "tier=front", objects=WORKLOADS["deployment"])
    with another("inject", lease, options, pause="held") as late:
        assert read(late) == "paused"
        driver.recover(lease)
        assert go_on(late) == "LeaseRefused: taken over meanwhile"
    assert [o["spec"]["replicas"] for o in objects("deployment", namespace)] == [1, 1]
    with another("inject", lease, options, pause="step") as owner:
        assert read(owner) == "paused"
        owner.kill()
    assert sorted(o["spec"]["replicas"] for o in objects("deployment", namespace)) == [0, 1]
    kubectl("delete", "-n", namespace, "deployment/web")  # one of the two; it holds no fault then
    driver.recover(lease)
    eventually(lambda: not driver.active(lease).present)
    assert [o["spec"]["replicas"] for o in objects("deployment", namespace)] == [1]
    assert not marks([*objects("deployment", namespace), *objects("replicasets", namespace)])


# -- rollback actions -----------------------------------------------------------------------------------------------


def acted(driver: KubernetesDriver, faulting: Faulting, kind: str, target: Target, **params: Any) -> Lease:
    """The engine's part of an action: affected → undo → lease."""
    ids = eventually(lambda: driver.affected(kind, target, params))
    frame = faulting.lease("scale_to_zero", "app=web", objects=WORKLOADS["deployment"])
    fault = driver.undo(kind, ids, params, target=target, backup=faulting.tmp_path)["fault"]
    undo = {**frame.undo, "fault": fault}
    return dataclasses.replace(frame, kind=kind, targets=ids, params=params, undo=undo)


@pytest.mark.req("R3-09")
def test_scale_up_below_the_minimum_and_as_before_when_undone(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    selector = deploy(namespace, "web", 1)
    label(namespace, "deployment", "web")
    target = Target(select=selector, kubernetes=WORKLOADS["deployment"])
    assert not driver.affected("scale_up", target, {"at_least": 1}), "one is enough"
    ids = driver.resolve(target)
    assert not driver.preflight("scale_up", ids, ids, {"at_least": 3}, target=target)
    lease = acted(driver, faulting, "scale_up", target, at_least=3)
    driver.inject(lease)
    driver.inject(lease)
    eventually(lambda: all_ready(namespace, selector, 3))
    assert driver.active(lease).present and driver.active(lease).effective
    assert elsewhere("recover", lease, options) == "done"
    eventually(lambda: not driver.active(lease).present)
    eventually(lambda: all_ready(namespace, selector, 1))
    assert not marks([*objects("deployment", namespace), *objects("replicasets", namespace)])


@pytest.mark.req("R3-09")
def test_only_pods_that_stay_unready_are_restarted(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    selector = deploy(namespace, "web", 2)
    label(namespace, "deployment", "web")
    target = Target(select=selector)
    sick, well = (p["metadata"] for p in pods(namespace, selector))
    kubectl("set", "image", "-n", namespace, f"pod/{sick['name']}", "web=no.invalid/SUCH-IMAGE")
    eventually(lambda: [p for p in pods(namespace, selector) if not ready(p)])
    waiting = {"after_s": 60.0, "interval_s": None, "signal": "term"}
    assert not driver.affected("restart_unhealthy", target, waiting), "not for that long"
    lease = acted(driver, faulting, "restart_unhealthy", target, **{**waiting, "after_s": 1.0})
    assert uid_of(lease) == {sick["uid"]}
    driver.inject(lease)
    seen = driver.active(lease)
    assert seen.effective and not seen.present
    eventually(lambda: all_ready(namespace, selector, 2))
    assert well["uid"] in uids(namespace, selector) and sick["uid"] not in uids(namespace, selector)
