"""Litmus in a namespace: ChaosExperiments, account, and an operator: the stand-in, or a real one that `MLCHAOS_LITMUS` names.

    MLCHAOS_LITMUS='{"operator_namespace": "chaos", "image": "registry.example/go-runner:3.31.0", "env": {"SOCKET_PATH": "…"}}'

The real one watches all namespaces. `image` stands for the one of the ChaosExperiments, `env` is `kubernetes.litmus.env`; both may
be left out. Tests that need an operator to behave badly skip with a real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlchaos_dagster.kube.client import Cluster
from tests.cluster import litmus_operator
from tests.cluster.conftest import kubectl, objects
from tests.cluster.litmus_operator import Script

DATA = Path(__file__).parents[3] / "shared" / "data" / "litmus"
"""Litmus's CRDs and ChaosExperiments, as it publishes them."""
OPERATOR = "chaos-operator-ce"
ACCOUNT = "litmus-admin"


class Real:
    """A real operator: it does what it does."""

    seen: tuple[str, ...] = ()

    @property
    def script(self) -> Script:
        return Script()

    @script.setter
    def script(self, wanted: Script) -> None:
        if dataclasses.replace(wanted, probes={}, slow_s=0.0) != Script():  # it is slow, and judges probes itself
            pytest.skip("the real Litmus behaves as it does")


def stand_in_only(litmus: litmus_operator.Litmus | Real) -> None:
    """For tests that take the operator itself away."""
    if isinstance(litmus, Real):
        pytest.skip("the real operator stays")


def real() -> dict[str, Any] | None:
    """What `MLCHAOS_LITMUS` says."""
    return json.loads(os.environ["MLCHAOS_LITMUS"]) if os.environ.get("MLCHAOS_LITMUS") else None


def options(namespace: str) -> dict[str, Any]:
    """`kubernetes.litmus` of an environment."""
    told = real()
    if told is None:
        return {"operator_namespace": namespace, "inject_within": "40s"}
    return {
        "operator_namespace": told["operator_namespace"],
        "inject_within": "90s",
        "env": {"LIB_IMAGE_PULL_POLICY": "IfNotPresent", **told.get("env", {})},
    }


def install_crds(data: Path = DATA) -> None:
    """Of the whole cluster; they stay, another session may need them."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(data / "crds"))
    for name in ("chaosengines", "chaosexperiments", "chaosresults"):
        kubectl("wait", "--for=condition=Established", f"crd/{name}.litmuschaos.io", "--timeout=30s")


@contextmanager
def installed(namespace: str, cluster: Cluster, data: Path = DATA) -> Iterator[litmus_operator.Litmus | Real]:
    """What a namespace with targets needs, and an operator."""
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(_experiments(data)))
    experiments = objects("chaosexperiments", namespace)
    kubectl("create", "serviceaccount", ACCOUNT, "-n", namespace)
    kubectl("apply", "-n", namespace, "-f", "-", stdin=litmus_operator.rules(experiments))
    bound = f"--serviceaccount={namespace}:{ACCOUNT}"
    kubectl("create", "rolebinding", ACCOUNT, "-n", namespace, f"--role={ACCOUNT}", bound)
    if real():
        yield Real()
        return
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(_operator()))
    kubectl("rollout", "status", "-n", namespace, f"deployment/{OPERATOR}", "--timeout=60s", timeout=70)
    found = litmus_operator.Litmus(cluster, namespace)
    found.start()
    try:
        yield found
    finally:
        found.stop()
        for engine in objects("chaosengines", namespace):  # nobody else lets them go now
            name, let_go = engine["metadata"]["name"], '{"metadata": {"finalizers": null}}'
            kubectl("patch", "chaosengine", name, "-n", namespace, "--type=merge", "-p", let_go, check=False)


def _experiments(data: Path) -> dict[str, Any]:
    found = [one for path in sorted((data / "faults").glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
    image = (real() or {}).get("image")
    for one in found:
        if image:
            definition = one["spec"]["definition"]
            definition |= {"image": image, "imagePullPolicy": "IfNotPresent"}
            definition["env"] = [e | {"value": image} if e["name"] == "LIB_IMAGE" else e for e in definition["env"]]
    return {"apiVersion": "v1", "kind": "List", "items": found}


def _operator() -> dict[str, Any]:
    """What looks like the operator to whoever asks whether one runs; the work is done by the stand-in."""
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
