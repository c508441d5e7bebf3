"""Litmus's real objects in the real API server, its operator and experiments by a stand-in (`litmus_operator.py`)."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, Litmus
from mlchaos_dagster.drivers.litmus.driver import LitmusDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import InjectFailed
from mlchaos_dagster.kube.client import Cluster
from tests.cluster import litmus_operator
from tests.cluster.conftest import TARGET_IMAGE, Faulting, deploy, eventually, kubectl, objects, pods, ready
from tests.cluster.litmus_operator import Script

DATA = Path(__file__).parents[3] / "shared" / "data" / "litmus"
pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout (../shared/data/litmus)"),
    pytest.mark.timeout(180),
]
OPERATOR = "chaos-operator-ce"
LEFT = "chaosengines,chaosresults,jobs,networkpolicies"


@pytest.fixture(scope="session")
def crds(admin_kubeconfig: str) -> None:
    """Of the whole cluster; they stay, another session may need them."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(DATA / "crds"))
    for name in ("chaosengines", "chaosexperiments", "chaosresults"):
        kubectl("wait", "--for=condition=Established", f"crd/{name}.litmuschaos.io", "--timeout=30s")


@pytest.fixture
def litmus(crds: None, namespace: str, admin_kubeconfig: str, context: str) -> Iterator[litmus_operator.Litmus]:
    """Litmus in the test's namespace: experiments, service account, an operator's Deployment, and the stand-in."""
    kubectl("apply", "-n", namespace, "-f", str(DATA / "faults"))
    experiments = objects("chaosexperiments", namespace)
    kubectl("create", "serviceaccount", "litmus-admin", "-n", namespace)
    kubectl("apply", "-n", namespace, "-f", "-", stdin=litmus_operator.rules(experiments))
    bound = f"--serviceaccount={namespace}:litmus-admin"
    kubectl("create", "rolebinding", "litmus-admin", "-n", namespace, "--role=litmus-admin", bound)
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(_operator()))
    kubectl("rollout", "status", "-n", namespace, f"deployment/{OPERATOR}", "--timeout=60s", timeout=70)
    found = litmus_operator.Litmus(Cluster(context, admin_kubeconfig), namespace)
    found.start()
    try:
        yield found
    finally:
        found.stop()
        for engine in objects("chaosengines", namespace):  # nobody else lets them go now
            drop = '{"metadata": {"finalizers": null}}'
            kubectl("patch", "chaosengine", engine["metadata"]["name"], "-n", namespace, "--type=merge", "-p", drop)


def _operator() -> dict[str, Any]:
    labels = {"name": "chaos-operator"}
    container = {"name": "chaos-operator", "image": "local/pause:1", "resources": litmus_operator.TINY}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": OPERATOR},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


@pytest.fixture
def options(options: Kubernetes, namespace: str) -> Kubernetes:
    return options.model_copy(update={"litmus": Litmus(operator_namespace=namespace, inject_within="40s")})


@pytest.fixture
def driver(cluster: Cluster, options: Kubernetes) -> LitmusDriver:
    return LitmusDriver.at(cluster, options)


class Leasing(Faulting):
    """Leases of this backend."""

    def lease(self, *arguments: Any, **given: Any) -> Lease:
        return dataclasses.replace(super().lease(*arguments, **given), driver="litmus")


@pytest.fixture
def faulting(driver: LitmusDriver, tmp_path: Path) -> Leasing:
    return Leasing(driver, tmp_path)  # type: ignore[arg-type]


def nothing_left(namespace: str) -> bool:
    """Of Litmus's doing, as kubectl sees it."""
    uids = [p for p in objects("pods", namespace) if "chaosUID" in p["metadata"].get("labels", {})]
    return not objects(LEFT, namespace) and not uids


def names(namespace: str, selector: str) -> set[str]:
    return {p["metadata"]["name"] for p in pods(namespace, selector)}


@pytest.mark.req("R1-01", "R1-04")
def test_pod_delete_takes_the_frozen_pods_and_leaves_nothing(
    litmus: litmus_operator.Litmus, namespace: str, driver: LitmusDriver, faulting: Leasing
) -> None:
    select = deploy(namespace, replicas=3)
    before = names(namespace, select)
    lease = faulting.lease("pod_delete", select, count=1, duration_s=30, signal="kill")
    victim = lease.targets[0].split("/")[2].partition("@")[0]
    driver.inject(lease)
    evidence = driver.active(lease)
    assert evidence.present and evidence.effective, evidence.lines
    assert victim not in names(namespace, select) and len(before & names(namespace, select)) == 2
    engine = objects("chaosengines", namespace)[0]
    assert engine["spec"]["terminationGracePeriodSeconds"] == 30
    assert engine["metadata"]["finalizers"] == [litmus_operator.FINALIZER]
    started = time.monotonic()
    driver.recover(lease)
    took = time.monotonic() - started
    assert not driver.active(lease).present
    assert nothing_left(namespace) and took < 15, took
    assert len(before & names(namespace, select)) == 2  # no second round
    eventually(lambda: all(map(ready, pods(namespace, select))) and len(pods(namespace, select)) == 3)
