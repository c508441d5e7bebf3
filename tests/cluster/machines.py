"""Further nodes for tests, by the command `node` in `MLCHAOS_CLUSTER` (`node add|kill|revive|partition|heal|remove NAME`).

Every node of a test carries a taint from its first second, so that nobody else's pods land on it, and `placed()` puts a
test's own pods there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import SERVER, TARGET_IMAGE, eventually, kubectl, objects, ready

_ROOT = Path(__file__).parents[2]
TAINT = "mlchaos.dev/test-node"
TOLERATES = [{"key": TAINT, "operator": "Exists"}]


def command() -> str:
    """Path of the command; skips the test where there is none."""
    path = _ROOT / os.environ.get("MLCHAOS_CLUSTER", "../shared/cluster") / "node"
    if not path.exists():
        pytest.skip("MLCHAOS_CLUSTER has no command `node`: no second node is to be had here")
    return str(path)


def node(*words: str, timeout: float = 60) -> str:
    """Run the command."""
    done = subprocess.run([command(), *words], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"node {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}"
    return done.stdout


def added(name: str, zone: str) -> None:
    """A node that is Ready, takes pods of tests only, and is whole whatever an earlier test did to it."""
    if any(o["metadata"]["name"] == name for o in objects("nodes", "")):
        subprocess.run([command(), "heal", name], capture_output=True, check=False, timeout=60)
        switched_on(name)
    else:
        _added(name, zone)
    kubectl("taint", "node", name, f"{TAINT}=true:NoSchedule", "--overwrite")
    kubectl("uncordon", name)
    eventually(lambda: ready(found(name)), 60)


def switched_on(name: str) -> None:
    """A node that was killed, back. On a busy machine it may take longer to start than the command waits for it."""
    for attempt in range(4):
        try:
            node("revive", name, timeout=120)
            return
        except AssertionError:
            if attempt == 3:
                raise


def _added(name: str, zone: str) -> None:
    """On a machine that is busy a kubelet may take longer than the command waits: it then takes the node away again."""
    for attempt in range(4):
        try:
            node("add", name, "--zone", zone)
            return
        except AssertionError:
            if attempt == 3:
                raise


def found(name: str) -> dict[str, Any]:
    """The node as kubectl sees it."""
    return json.loads(kubectl("get", "node", name, "-o", "json"))


def placed(
    namespace: str,
    name: str,
    on: str,
    *,
    replicas: int = 1,
    app: str = "",
    only: bool = False,
    program: str = SERVER,
    labels: dict[str, str] | None = None,
    wait: bool = True,
) -> str:
    """A Deployment of small web servers whose pods go to a node while it takes any (`only`: or nowhere); its selector."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [on]}]}
    affinity: dict[str, Any] = {
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term}]
    }
    if only:
        affinity = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    container = {
        "name": "web",
        "image": TARGET_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-u", "-c", program],
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"cpu": "200m", "memory": "128Mi"}},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    if program is SERVER:
        container["readinessProbe"] = {
            "httpGet": {"path": "/", "port": 8080},
            "periodSeconds": 1,
            "failureThreshold": 1,
        }
    pod = {
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 2,
        "tolerations": TOLERATES,
        "affinity": {"nodeAffinity": affinity},
    }
    every = {"app": app or name, "deployment": name, **(labels or {})}
    manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"deployment": name}},
            "template": {"metadata": {"labels": every}, "spec": pod},
        },
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))
    if wait:
        kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=60s", timeout=70)
    return f"deployment={name}"
