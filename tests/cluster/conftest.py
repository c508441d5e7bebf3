"""Fixtures for tests on a real cluster: namespaces of their own, small targets, and an observer that is not our code."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.leases import KEPT, NOWHERE

if TYPE_CHECKING:
    from tests.cluster.rights import Rights

HERE = Path(__file__).parent
HELPER_IMAGE = os.environ.get("MLCHAOS_TEST_IMAGE", "local/mlchaos:1")
TARGET_IMAGE = os.environ.get("MLCHAOS_TEST_TARGET_IMAGE", "python:3.11-slim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.cluster)


def kubectl(*arguments: str, stdin: str = "", check: bool = True, timeout: float = 60) -> str:
    """The observer: what `kubectl` says, not what our client does."""
    done = subprocess.run(
        ["kubectl", *arguments], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def objects(kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
    """Objects as kubectl sees them."""
    where = ["-n", namespace] if namespace else []
    return json.loads(kubectl("get", kind, *where, *(["-l", selector] if selector else []), "-o", "json"))["items"]


def eventually(look: Callable[[], Any], within: float = 30.0, every: float = 0.1) -> Any:
    """The first true answer; fails with the last one."""
    end, said = time.monotonic() + within, None
    while time.monotonic() < end:
        said = look()
        if said:
            return said
        time.sleep(every)
    raise AssertionError(f"not within {within:g} s; last: {said!r}")


@pytest.fixture(scope="session")
def admin_kubeconfig() -> str:
    """The observer's; these tests are only run where there is one (`make test-cluster`)."""
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        pytest.fail("KUBECONFIG is not set: make test-cluster KUBECONFIG=…")
    return path


@pytest.fixture(scope="session")
def rights(admin_kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rights | None]:
    """The account that our client works with: it may what `manifests/rbac` allows. None with `RIGHTS=admin`."""
    if os.environ.get("RIGHTS") == "admin":
        yield None
        return
    from tests.cluster.rights import Rights

    found = Rights(tmp_path_factory.mktemp("rights"))
    try:
        yield found
    finally:
        found.remove()


@pytest.fixture(scope="session")
def kubeconfig(admin_kubeconfig: str, rights: Rights | None) -> str:
    """Path of the kubeconfig of our client."""
    path = str(rights.kubeconfig) if rights else admin_kubeconfig
    os.environ["MLCHAOS_TEST_OURS"] = path  # for programs of the tests that are processes of their own
    return path


@pytest.fixture(scope="session")
def context(admin_kubeconfig: str) -> str:
    """The current context: tests use that and no other."""
    return kubectl("config", "current-context").strip()


@pytest.fixture(scope="session")
def cluster(kubeconfig: str, context: str) -> Cluster:
    """Our client."""
    return Cluster(context, kubeconfig)


@pytest.fixture
def namespace(cluster: Cluster, rights: Rights | None) -> Iterator[str]:
    """A namespace that opted in and where our client has its rights, gone afterwards."""
    name = f"mlchaos-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, "mlchaos.dev/allow=true", "mlchaos.dev/test=true")
    try:
        if rights:
            rights.admit(name)
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false", check=False)


@pytest.fixture
def options(context: str, kubeconfig: str, namespace: str) -> Kubernetes:
    """What an environment would say; the ledger is in the test's own namespace."""
    return Kubernetes(
        context=context,
        kubeconfig=f"file:{kubeconfig}",
        namespace=namespace,
        control_namespace=namespace,
        helper_image=HELPER_IMAGE,
    )


@pytest.fixture
def site(cluster: Cluster, options: Kubernetes) -> Site:
    return Site(cluster, options)


@pytest.fixture
def driver(cluster: Cluster, options: Kubernetes) -> KubernetesDriver:
    return KubernetesDriver.at(cluster, options)


SERVER = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"ok"
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8080), Answer).serve_forever()
"""
"""A service of a dozen lines: what a fault does to it is seen from outside."""


def deploy(namespace: str, name: str = "web", replicas: int = 2, *, limits: dict[str, str] | None = None) -> str:
    """A Deployment of small web servers with a Service, ready when this returns; its selector."""
    container = {
        "name": "web",
        "image": TARGET_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", SERVER],
        "ports": [{"containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1},
        "resources": {
            "requests": {"cpu": "20m", "memory": "32Mi"},
            "limits": limits or {"cpu": "200m", "memory": "128Mi"},
        },
    }
    labels = {"app": name}
    manifests: list[dict[str, Any]] = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [container], "terminationGracePeriodSeconds": 5},
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        },
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    kubectl("apply", "-n", namespace, "-f", "-", stdin=text)
    kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=60s", timeout=70)
    return f"app={name}"


def pods(namespace: str, selector: str) -> list[dict[str, Any]]:
    """Pods that are not on their way out."""
    return [p for p in objects("pods", namespace, selector) if not p["metadata"].get("deletionTimestamp")]


def ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


class Faulting:
    """The engine's part of a fault, small: undo → lease → inject, with everything a handler may ask for."""

    def __init__(self, driver: KubernetesDriver, tmp_path: Path) -> None:
        self.driver, self.tmp_path = driver, tmp_path

    def lease(
        self,
        kind: str,
        select: str,
        *,
        count: int | None = None,
        duration_s: float = 60.0,
        objects: KubernetesObjects | None = None,
        **params: Any,
    ) -> Lease:
        """A lease on the first `count` targets (None: all); `params` as the driver takes them."""
        target = Target(select=select, kubernetes=objects or KubernetesObjects())
        ids = self.driver.resolve(target)
        assert ids, f"{select} matches nothing"
        chosen = ids[: count or len(ids)]
        lease_id = f"mlchaos-test-{uuid.uuid4().hex[:10]}"
        refused = self.driver.preflight(kind, chosen, ids, params, target=target)
        assert not refused, refused
        undo = self.driver.undo(kind, chosen, params, target=target, backup=self.tmp_path / lease_id)
        undo[KEPT] = NOWHERE  # a handler alone is tested; with a ledger: test_ledger.py
        now = time.time()
        return Lease(
            id=lease_id,
            run_id=uuid.uuid4().hex,
            experiment="test",
            environment="test",
            driver="kubernetes",
            kind=kind,
            targets=chosen,
            params=params,
            undo=undo,
            duration_s=duration_s,
            opened_wall=now,
            deadline_wall=now + duration_s,
            owner=current_owner(),
            token=1,
        )


@pytest.fixture
def faulting(driver: KubernetesDriver, tmp_path: Path) -> Faulting:
    return Faulting(driver, tmp_path)
