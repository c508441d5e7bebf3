"""The sweeper as a pod with the rights that are shipped: whatever becomes of a run or of it, the fault goes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mlchaos_dagster.engine.ports import Owner, SystemClock
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.kube.leases import ClusterLedger
from mlchaos_dagster.kube.pulse import Pulse
from tests.cluster.conftest import HELPER_IMAGE, HERE, deploy, eventually, kubectl, objects, pods, ready

TTL_S = 6.0
ROOT = HERE.parents[1]


def install(namespace: str, *folders: str) -> None:
    """`manifests/kubernetes` and the bindings, into the test's namespace, with a short time to live; or other folders."""
    folders = folders or ("kubernetes", "rbac/namespace")
    shipped = "---\n".join(kubectl("kustomize", str(ROOT / "manifests" / folder)) for folder in folders)
    found: list[dict[str, Any]] = []
    for thing in yaml.safe_load_all(shipped):
        kind, meta = thing["kind"], thing["metadata"]
        if kind in ("Namespace", "PriorityClass"):
            continue
        if kind in ("ClusterRole", "ClusterRoleBinding"):
            meta["name"] = f"{meta['name']}-{namespace}"
        else:
            meta["namespace"] = namespace
        if thing.get("roleRef", {}).get("kind") == "ClusterRole":
            thing["roleRef"]["name"] += f"-{namespace}"
        for subject in thing.get("subjects", ()):
            subject["namespace"] = namespace
        if kind == "Deployment":
            pod = thing["spec"]["template"]["spec"]
            del pod["priorityClassName"]
            pod["containers"][0]["image"] = HELPER_IMAGE
            pod["containers"][0]["args"] = ["--namespace", "$(NAMESPACE)", "--ttl", str(TTL_S)]
        found.append(thing)
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": found}))


def grant(namespace: str, tool: str) -> None:
    """The rights that runner and sweeper need for faults of another tool (`litmus`, `chaos_mesh`), as they are shipped."""
    install(namespace, f"rbac/{tool}", f"rbac/{tool}/namespace")


def bind(namespace: str, sweeper: str) -> None:
    """Give the sweeper that is installed in `sweeper` its rights in another namespace."""
    subject = f"--serviceaccount={sweeper}:mlchaos-sweeper"
    kubectl("create", "rolebinding", "reach", "-n", namespace, f"--clusterrole=mlchaos-recovery-{sweeper}", subject)


@pytest.fixture
def sweeper(namespace: str) -> Iterator[str]:
    """A running sweeper; its namespace."""
    install(namespace)
    try:
        kubectl("rollout", "status", "-n", namespace, "deployment/mlchaos-sweeper", "--timeout=60s", timeout=70)
        eventually(lambda: heart(namespace), 30)
        yield namespace
    finally:
        for kind in ("clusterrole", "clusterrolebinding"):
            names = [x["metadata"]["name"] for x in objects(kind, "", "app.kubernetes.io/managed-by=mlchaos")]
            mine = [n for n in names if n.endswith(namespace)]
            kubectl("delete", kind, *mine, "--ignore-not-found", check=False)


def heart(namespace: str) -> str:
    """Who leads, and his last beat."""
    found = [x for x in objects("lease", namespace) if x["metadata"]["name"] == "mlchaos-sweeper"]
    return found[0]["spec"].get("holderIdentity", "") if found else ""


def open_leases(namespace: str) -> list[str]:
    return [
        x["metadata"]["name"]
        for x in objects("lease", namespace, "mlchaos.dev/component=lease,app.kubernetes.io/managed-by=mlchaos")
    ]


def journal(namespace: str) -> list[dict[str, Any]]:
    said = kubectl("logs", "-n", namespace, "-l", "app.kubernetes.io/name=mlchaos-sweeper", "--tail=-1")
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def running(namespace: str, context: str, kind: str, select: str, lease_id: str, *flags: str) -> Iterator[Any]:
    """A run's process that has made its fault."""
    command = [sys.executable, "-m", "tests.cluster.lease_owner", namespace, context, kind, select, lease_id, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "injected\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def all_ready(namespace: str, select: str, count: int) -> bool:
    found = pods(namespace, select)
    return len(found) == count and all(ready(p) and "mlchaos.dev/lease" not in str(p["metadata"]) for p in found)


@pytest.mark.req("R0-10", "RX-01")
def test_what_a_killed_run_left_behind_is_taken_away_within_its_time_to_live(context: str, sweeper: str) -> None:
    select = deploy(sweeper, replicas=2)
    with running(sweeper, context, "pod_failure", select, "mlchaos-test-killed") as owner:
        eventually(lambda: not any(ready(p) for p in pods(sweeper, select)))
        time.sleep(TTL_S + 3)  # as long as it lives and renews, nobody touches its fault
        assert open_leases(sweeper) == ["mlchaos-test-killed"] and not any(ready(p) for p in pods(sweeper, select))
        owner.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        eventually(lambda: not open_leases(sweeper), TTL_S + 8)
        closed = time.monotonic() - killed
    assert TTL_S - 1 < closed < TTL_S + 6
    eventually(lambda: all_ready(sweeper, select, 2), 30)
    said = [x for x in journal(sweeper) if x.get("lease") == "mlchaos-test-killed"]
    assert [x["kind"] for x in said] == ["fenced", "recovered"]
    assert objects("secret", sweeper, "mlchaos.dev/component=undo") == []
    assert [e["reason"] for e in objects("events", sweeper) if e["reason"].startswith("Fault")] == [
        "FaultRecovered"
    ] * 2


@pytest.mark.req("R0-10", "RX-01")
def test_a_run_that_was_stopped_and_goes_on_too_late_finds_itself_taken_over(context: str, sweeper: str) -> None:
    select = deploy(sweeper, replicas=1)
    with running(sweeper, context, "pod_failure", select, "mlchaos-test-late") as owner:
        owner.send_signal(signal.SIGSTOP)
        eventually(lambda: not open_leases(sweeper), TTL_S + 8)
        owner.send_signal(signal.SIGCONT)
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith("LeaseRefused")
        eventually(lambda: all_ready(sweeper, select, 1), 30)


@pytest.mark.req("RX-01")
def test_a_sweeper_that_is_killed_is_replaced_and_its_work_goes_on(context: str, sweeper: str) -> None:
    select = deploy(sweeper, replicas=1)
    before = heart(sweeper)
    with running(sweeper, context, "pod_failure", select, "mlchaos-test-orphan") as owner:
        owner.send_signal(signal.SIGKILL)
        kubectl(
            "delete",
            "pod",
            "-n",
            sweeper,
            "-l",
            "app.kubernetes.io/name=mlchaos-sweeper",
            "--grace-period=0",
            "--force",
        )
        eventually(lambda: not open_leases(sweeper), 2 * TTL_S + 25)
    assert heart(sweeper) != before
    eventually(lambda: all_ready(sweeper, select, 1), 30)


@pytest.mark.req("R0-10")
def test_of_two_sweepers_one_works(context: str, sweeper: str) -> None:
    kubectl("scale", "-n", sweeper, "deployment/mlchaos-sweeper", "--replicas=2")
    kubectl("rollout", "status", "-n", sweeper, "deployment/mlchaos-sweeper", "--timeout=60s", timeout=70)
    select = deploy(sweeper, replicas=1)
    for i in range(3):
        with running(sweeper, context, "pod_failure", select, f"mlchaos-test-two-{i}", "--hang"):
            eventually(lambda: not open_leases(sweeper), TTL_S + 10)
        eventually(lambda: all_ready(sweeper, select, 1), 40)
    taken = [x for x in journal(sweeper) if x["kind"] == "fenced"]
    assert sorted(x["lease"] for x in taken) == [f"mlchaos-test-two-{i}" for i in range(3)]
    assert len({x["by"] for x in taken}) == 1


def test_the_lever_takes_everything_away_and_is_seen_by_runs(context: str, kubeconfig: str, sweeper: str) -> None:
    select = deploy(sweeper, replicas=1)
    cluster = Cluster(context, kubeconfig)
    pulse = Pulse(cluster, sweeper, SystemClock(), TTL_S)
    with running(sweeper, context, "pod_failure", select, "mlchaos-test-lever"):
        assert pulse.requested() is None
        eventually(pulse.alive, 5)
        ClusterLedger(cluster, sweeper, SystemClock(), Owner(1, 1.0, "b", "operator")).lever.pull("smoke", "me")
        pulled = time.monotonic()
        eventually(lambda: pulse.requested() == ("lever", "smoke"), 2, every=0.02)
        assert time.monotonic() - pulled < 2.0
        # This owner does not listen: the sweeper does it, though he still renews.
        eventually(lambda: not open_leases(sweeper), 15)
    kubectl("scale", "-n", sweeper, "deployment/mlchaos-sweeper", "--replicas=0")
    eventually(lambda: not pulse.alive(), TTL_S + 5)
    assert "kubectl apply -k manifests/kubernetes" in pulse.why_not
    pulse.close()
