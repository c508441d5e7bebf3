"""The run itself is a pod, and its node dies in the window: the sweeper, on another node, takes the fault away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cluster import machines
from tests.cluster.conftest import HELPER_IMAGE, deploy, eventually, kubectl, objects, ready
from tests.cluster.machines import TOLERATES, added, found
from tests.cluster.surroundings import environment
from tests.cluster.test_sweeper import (
    TTL_S,
    all_ready,
    journal,
    open_leases,
    sweeper,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(300)]
NODE, ZONE = "node-3", "local-c"
KINDS: dict[str, dict[str, Any]] = {
    "pod_failure": {},
    "network_latency": {"latency": "100ms"},
    "cpu_stress": {"cores": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _another_node() -> Iterator[None]:
    added(NODE, ZONE)
    yield
    machines.node("remove", NODE)


def files(namespace: str, kind: str) -> dict[str, str]:
    """The library of the run, as a person would put it into a ConfigMap; the cluster is known by its uid."""
    uid = kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
    written = environment(
        namespace,
        "wherever-this-file-is-used",
        "",
        kubernetes={"sweeper_ttl": f"{TTL_S:g}s", "uid": uid, "kubeconfig": ""},
        probe={"rate": 10, "timeout": "1s"},
        sampling={"baseline": "3s", "min_samples": 10},
    )
    experiment = {
        "schema": "mlchaos/v1",
        "name": "from-a-pod",
        "title": "The node of the run dies",
        "hypothesis": "Nothing is left.",
        "area": "bench",
        "owner": "ml-platform@example.com",
        "target": "web",
        "fault": {"kind": kind, **KINDS[kind]},
        "blast_radius": {"count": 1},
        "duration": "120s",
        "steady_state": [{"sli": "availability", "at_least": "1%"}],
        "recovery": {"within": "20s"},
    }
    return {"environment.yaml": yaml.safe_dump(written), "experiment.yaml": yaml.safe_dump(experiment)}


def run_in_pod(namespace: str, kind: str) -> None:
    """A Job on the other node, with the runner's account."""
    library = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "library"}, "data": files(namespace, kind)}
    places = [
        {"key": "environment.yaml", "path": "environments/test.yaml"},
        {"key": "experiment.yaml", "path": "experiments/from-a-pod.yaml"},
    ]
    command = "tini -- python3 -m mlchaos_dagster.cli.main --home /tmp/home --library /library -e test run from-a-pod"
    container = {
        "name": "run",
        "image": HELPER_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": command.split(),
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108  in the container
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "768Mi"}},
        "securityContext": {"runAsUser": 65532, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "library", "mountPath": "/library"}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
    pod = {
        "serviceAccountName": "mlchaos-runner",
        "restartPolicy": "Never",
        "nodeSelector": {"kubernetes.io/hostname": NODE},
        "tolerations": TOLERATES,
        "containers": [container],
        "volumes": [
            {"name": "library", "configMap": {"name": "library", "items": places}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "run"},
        "spec": {"backoffLimit": 0, "template": {"metadata": {"labels": {"app": "run"}}, "spec": pod}},
    }
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [library, job]})
    kubectl("apply", "-n", namespace, "-f", "-", stdin=text)


def confirmed(namespace: str) -> bool:
    """The run in the pod has seen its fault."""
    said = kubectl("logs", "-n", namespace, "job/run", "--tail=-1", check=False)
    failed = [j for j in objects("jobs", namespace) if j["metadata"]["name"] == "run" and j["status"].get("failed")]
    assert not failed, said
    return " confirmed" in said


@pytest.mark.req("R0-10", "R3-06")
@pytest.mark.parametrize("kind", KINDS)
def test_the_node_of_the_run_dies(sweeper: str, kind: str) -> None:  # noqa: F811
    added(NODE, ZONE)
    select = deploy(sweeper, replicas=2)
    run_in_pod(sweeper, kind)
    eventually(lambda: confirmed(sweeper), 90, 0.5)
    (lease,) = open_leases(sweeper)
    machines.node("kill", NODE)
    died = time.monotonic()
    try:
        eventually(lambda: not open_leases(sweeper), TTL_S + 15)
        print(f"{kind}: lease closed {time.monotonic() - died:.1f} s after the node's death")  # noqa: T201
        marked = [p for p in objects("pods", sweeper, select) if "mlchaos.dev/lease" in str(p["metadata"])]
        assert marked == []
        eventually(lambda: all_ready(sweeper, select, 2), 40)
        said = [x["kind"] for x in journal(sweeper) if x.get("lease") == lease]
        assert said == ["fenced", "recovered"]
    finally:
        machines.switched_on(NODE)
    eventually(lambda: ready(found(NODE)), 60)
    # With its node the run does not come back to make its fault again.
    eventually(lambda: not [p for p in objects("pods", sweeper, "app=run") if p["status"]["phase"] == "Running"], 60)
    assert open_leases(sweeper) == [] and objects("secrets", sweeper, "mlchaos.dev/component=undo") == []
