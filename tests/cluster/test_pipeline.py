"""The pipeline half of the platform as pods: what is killed comes back and goes on where it was. Faults by kubectl alone."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import HELPER_IMAGE, eventually, kubectl, objects, pods, ready

pytestmark = pytest.mark.timeout(240)

MANIFESTS = Path(__file__).parents[2] / "manifests" / "platform"
NEEDED = ("object-store", "platform-token")
"""What the pipeline uses of the other half."""


def built(namespace: str) -> str:
    """The pipeline as it is shipped, for another namespace and with the image under test."""
    both = kubectl("kustomize", str(MANIFESTS / "base")), kubectl("kustomize", str(MANIFESTS / "pipeline"))
    base, pipeline = (list(yaml.safe_load_all(text)) for text in both)
    chosen = [one for one in base if one["metadata"]["name"] in NEEDED] + pipeline
    for one in chosen:
        one["metadata"]["namespace"] = namespace
        if one["kind"] == "Service":  # a node port can be had once
            one["spec"].pop("type", None)
            one["spec"]["ports"] = [{k: v for k, v in p.items() if k != "nodePort"} for p in one["spec"]["ports"]]
    return yaml.safe_dump_all(chosen).replace("local/mlchaos:1", HELPER_IMAGE)


@pytest.fixture(scope="module")
def pipeline(kubeconfig: str) -> Iterator[str]:
    """A namespace with the whole pipeline, ready."""
    name = f"mlchaos-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, "mlchaos.dev/allow=true", "mlchaos.dev/test=true")
    try:
        kubectl("apply", "-f", "-", stdin=built(name))
        for one in objects("deployments", name):
            kubectl(
                "rollout", "status", "-n", name, f"deployment/{one['metadata']['name']}", "--timeout=120s", timeout=130
            )
        eventually(lambda: len([p for p in pods(name, "app=trainer") if ready(p)]) == 2, 60)
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false", check=False)


def ask(namespace: str, service: str, path: str = "/state") -> Any:
    """GET of a service, through the API server."""
    return json.loads(kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/services/{service}:http/proxy{path}"))


def post(namespace: str, service: str, path: str, body: Any) -> Any:
    """POST to a service, through the API server."""
    where = f"/api/v1/namespaces/{namespace}/services/{service}:http/proxy{path}"
    return json.loads(kubectl("create", "--raw", where, "-f", "-", stdin=json.dumps(body)))


def peek(namespace: str, app: str) -> dict[str, Any]:
    """GET /state of a pod that no Service leads to."""
    (pod,) = pods(namespace, f"app={app}")
    where = f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}:8080/proxy/state"
    return json.loads(kubectl("get", "--raw", where))


@pytest.mark.req("R0-02")
def test_the_workers_of_a_job_resume_from_their_checkpoints_however_their_pods_end(pipeline: str) -> None:
    def workers() -> dict[str, Any]:
        return ask(pipeline, "training-status")["workers"]

    def running() -> set[str]:
        return {p["metadata"]["name"] for p in pods(pipeline, "app=trainer") if ready(p)}

    # Far enough for a beginning at 0 to be told from a resumption.
    eventually(lambda: all(w["checkpoint_step"] > 200 for w in workers().values()), 40)
    first, second = running()
    before = workers()
    kubectl("delete", "pod", "-n", pipeline, first)  # as a drain does it
    kubectl("exec", "-n", pipeline, second, "--", "pkill", "-9", "python3", check=False)  # as the OOM killer does it
    eventually(lambda: len(running()) == 2 and not running() & {first, second}, 60)
    passed = eventually(
        lambda: (w := workers()) and all(w[n]["step"] > before[n]["best"] + 20 for n in before) and w, 30
    )
    assert set(passed) == set(before) == {"trainer-0", "trainer-1"}
    # A checkpoint each two seconds of 20 steps a second.
    assert all(0 < w["lost_steps"] <= 100 for w in passed.values())
    caught_up = {"training_workers_ready": 2, "steps_behind": 0}
    eventually(lambda: caught_up.items() <= ask(pipeline, "training-status")["signals"].items(), 20)
    status = objects("jobs", pipeline)[0]["status"]
    # One slice that ended as it was told to, and none that failed by itself.
    assert (status.get("failed", 0), status.get("succeeded", 0), status["active"]) == (0, 1, 2)


@pytest.mark.req("R3-06", "R4-11")
def test_tracking_goes_on_without_its_primary_database_and_the_new_one_gets_everything(pipeline: str) -> None:
    writer, runs = uuid.uuid4().hex, [uuid.uuid4().hex for _ in range(2)]

    def log(seq: int) -> None:
        told = {"writer": writer, "seq": seq, "run": runs[seq - 1], "params": {"seq": seq}}
        assert post(pipeline, "tracking", "/runs", told)["new"] == 1

    def kept(run: str) -> bool:
        return len(ask(pipeline, "tracking", f"/runs/{run}")["records"]) == 1

    failovers = ask(pipeline, "tracking")["failovers_total"]
    log(1)
    kubectl("scale", "-n", pipeline, "deployment/tracking-db", "--replicas=0")
    kubectl("wait", "-n", pipeline, "--for=delete", "pod", "-l", "app=tracking-db", "--timeout=30s")
    assert kept(runs[0]), "the standby does not have what the primary confirmed"
    log(2)
    state = ask(pipeline, "tracking")
    assert state["on_standby"] and state["failovers_total"] == failovers + 1

    kubectl("scale", "-n", pipeline, "deployment/tracking-db", "--replicas=1")
    eventually(lambda: not ask(pipeline, "tracking")["on_standby"], 60)
    kubectl("scale", "-n", pipeline, "deployment/tracking-db-standby", "--replicas=0")
    kubectl("wait", "-n", pipeline, "--for=delete", "pod", "-l", "app=tracking-db-standby", "--timeout=30s")
    assert all(kept(run) for run in runs), "the new primary's disk was empty, and was not filled up"
    kubectl("scale", "-n", pipeline, "deployment/tracking-db-standby", "--replicas=1")
    eventually(lambda: (s := ask(pipeline, "tracking"))["standby_intact"] and not s["standby_behind"], 60)

    runner = peek(pipeline, "workflow")
    assert runner["lost"] == 0 and runner["logged_total"] > 0


@pytest.mark.req("R3-06", "R4-11")
def test_a_primary_that_comes_back_empty_at_once_is_not_believed(pipeline: str) -> None:
    """The pod is replaced faster than two checks in a row can fail, or a write does: only its identity tells."""
    writer, run = uuid.uuid4().hex, uuid.uuid4().hex
    assert post(pipeline, "tracking", "/runs", {"writer": writer, "seq": 1, "run": run})["new"] == 1
    eventually(lambda: (s := ask(pipeline, "tracking"))["standby_intact"] and not s["standby_behind"], 60)
    (pod,) = pods(pipeline, "app=tracking-db")
    # Another file under the same server: what a volume that was restored from nothing looks like.
    wipe = "rm -f /var/lib/platform/tracking-db.sqlite*; kill 1"
    kubectl("exec", "-n", pipeline, pod["metadata"]["name"], "--", "sh", "-c", wipe)
    eventually(
        lambda: (
            ready(pods(pipeline, "app=tracking-db")[0])
            and pods(pipeline, "app=tracking-db")[0]["status"]["containerStatuses"][0]["restartCount"] == 1
        ),
        60,
    )
    eventually(
        lambda: (s := ask(pipeline, "tracking"))["database_intact"] and not s["on_standby"] and not s["standby_behind"],
        60,
    )
    assert len(ask(pipeline, "tracking", f"/runs/{run}")["records"]) == 1
    assert peek(pipeline, "workflow")["lost"] == 0


@pytest.mark.req("R1-03")
def test_workflows_keep_their_pace_while_the_tracking_server_is_cut_off(pipeline: str) -> None:
    eventually(lambda: (peek(pipeline, "workflow")["rate"] or 0) >= 1.8, 30)
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "cut", "namespace": pipeline},
        "spec": {"podSelector": {"matchLabels": {"app": "workflow"}}, "policyTypes": ["Egress"], "egress": []},
    }
    kubectl("apply", "-f", "-", stdin=json.dumps(policy))
    try:
        # Until the breaker opens, each call waits for its time-out: the pace is back when that second has left the average.
        cut = eventually(
            lambda: (
                (s := peek(pipeline, "workflow"))["breaker"] == "open"
                and s["rate"] >= 1.8
                and s["spool_length"] > 20
                and s
            ),
            30,
        )
    finally:
        kubectl("delete", "networkpolicy", "-n", pipeline, "cut")
    healed = eventually(
        lambda: (s := peek(pipeline, "workflow"))["spool_length"] < 5 and s["breaker"] == "closed" and s, 30
    )
    assert healed["lost"] == 0 and healed["logged_total"] > cut["logged_total"]


@pytest.mark.req("R1-04")
def test_the_autoscaler_adds_a_worker_while_one_burns_its_cpu(pipeline: str) -> None:
    assert objects("hpa", pipeline)[0]["spec"]["minReplicas"] == 2
    eventually(lambda: len([p for p in pods(pipeline, "app=batch-worker") if ready(p)]) == 2, 90)
    busy = pods(pipeline, "app=batch-worker")[0]["metadata"]["name"]
    loop = "import time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"
    burner = subprocess.Popen(["kubectl", "exec", "-n", pipeline, busy, "--", "python3", "-c", loop])
    try:
        eventually(lambda: len([p for p in pods(pipeline, "app=batch-worker") if ready(p)]) > 2, 100)
    finally:
        burner.kill()
        burner.wait(10)
        kubectl("delete", "pod", "-n", pipeline, busy, "--wait=false")
