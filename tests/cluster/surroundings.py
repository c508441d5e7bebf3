"""An environment of a test's own namespace as files, and the real command line on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.conftest import HELPER_IMAGE, kubectl

EXPERIMENT: dict[str, Any] = {
    "schema": "mlchaos/v1",
    "name": "web-down",
    "title": "The web service survives losing a pod",
    "hypothesis": "It keeps answering.",
    "area": "serving",
    "owner": "ml-platform@example.com",
    "target": "web",
    "fault": {"kind": "pod_failure"},
    "blast_radius": {"count": 1},
    "duration": "5s",
    "steady_state": [{"sli": "availability", "at_least": "90%"}],
    "recovery": {"within": "30s"},
}


def environment(namespace: str, context: str, kubeconfig: str, **changes: Any) -> dict[str, Any]:
    """As a platform engineer would write it, with short phases."""
    kinds = ["pod_failure", "pod_delete", "container_kill", "network_latency", "network_partition", "cpu_stress"]
    found: dict[str, Any] = {
        "schema": "mlchaos/v1",
        "name": "test",
        "backends": {"kubernetes": kinds},
        "kubernetes": {
            "context": context,
            "kubeconfig": f"file:{kubeconfig}",
            "namespace": namespace,
            "control_namespace": namespace,
            "helper_image": HELPER_IMAGE,
        },
        "targets": {"web": {"select": "app=web"}, "nothing": {"select": "app=nothing"}},
        "probe": {"url": f"{{service:{namespace}/web:80}}/", "method": "GET", "rate": 20},
        "slis": {"availability": {"measure": "availability"}, "latency_p95": {"measure": "latency_p95"}},
        "sampling": {"baseline": "3s", "min_samples": 20, "recovery_timeout": "30s"},
    }
    for key, value in changes.items():
        found[key] = {**found[key], **value} if isinstance(found.get(key), dict) else value
    return found


class CommandLine:
    """`mlchaos` in a state directory and library of its own."""

    def __init__(self, root: Path, written: dict[str, Any], *experiments: dict[str, Any]) -> None:
        self.home, self.library = root / "home", root / "library"
        for folder, files in (("environments", [written]), ("experiments/test", experiments or (EXPERIMENT,))):
            (self.library / folder).mkdir(parents=True, exist_ok=True)
            for one in files:
                (self.library / folder / f"{one['name']}.yaml").write_text(yaml.safe_dump(one, sort_keys=False))

    def words(self, *arguments: str) -> list[str]:
        """The command line."""
        base = [sys.executable, "-m", "mlchaos_dagster.cli.main", "--home", str(self.home)]
        return [*base, "--library", str(self.library), "-e", "test", *arguments]

    def __call__(self, *arguments: str, timeout: float = 120) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        done = subprocess.run(self.words(*arguments), capture_output=True, text=True, timeout=timeout, check=False)
        return done.returncode, done.stdout, done.stderr

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """In the background, in a session of its own."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "run.log").open("ab") as log:
            return subprocess.Popen(self.words(*arguments), stdout=log, stderr=log, start_new_session=True)


def account(namespace: str, rules: list[dict[str, Any]], directory: Path, *, seconds: int = 3600) -> str:
    """Path of a kubeconfig for a new ServiceAccount with exactly these cluster-wide rules and a token of that life."""
    name = f"{namespace}-limited"
    subject = {"kind": "ServiceAccount", "name": "limited", "namespace": namespace}
    api = "rbac.authorization.k8s.io/v1"
    role = {"kind": "ClusterRole", "name": name, "apiGroup": "rbac.authorization.k8s.io"}
    manifests = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "limited", "namespace": namespace}},
        {"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules},
        {
            "apiVersion": api,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": role,
            "subjects": [subject],
        },
    ]
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))
    token = kubectl("create", "token", "limited", "-n", namespace, f"--duration={seconds}s").strip()
    admin = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    cluster = admin["clusters"][0]["cluster"]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "limited",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "limited", "context": {"cluster": "c", "user": "u"}}],
    }
    path = directory / "limited.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def forget_account(namespace: str) -> None:
    """The cluster-wide half of `account`."""
    for kind in ("clusterrole", "clusterrolebinding"):
        kubectl("delete", kind, f"{namespace}-limited", "--ignore-not-found")
