"""The platform from its manifests: it comes up, predicts what the model says, loses a pod, and tells Prometheus."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from mlchaos_dagster.sandbox import feature_store
from mlchaos_dagster.sandbox.config import SandboxConfig
from mlchaos_dagster.sandbox.model import scores, train, unpack
from tests.cluster.conftest import eventually, kubectl, objects, pods, ready

MANIFESTS = Path(__file__).parents[2] / "manifests" / "platform"
NAMESPACE = "mlplatform"
SERVING = ("feature-store", "gateway", "inference", "object-store", "prometheus", "rollout")


@pytest.fixture(scope="module")
def node(kubeconfig: str) -> str:
    """Applied (again), every Deployment of serving rolled out; the address of a node, for the NodePorts."""
    kubectl("apply", "-k", str(MANIFESTS / "base"))
    for name in SERVING:
        kubectl("rollout", "status", "-n", NAMESPACE, f"deployment/{name}", "--timeout=180s", timeout=190)
    addresses = objects("nodes", "")[0]["status"]["addresses"]
    return next(a["address"] for a in addresses if a["type"] == "InternalIP")


def ask(url: str, timeout: float = 2.0) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return json.load(response)


@pytest.mark.timeout(300)
def test_it_predicts_what_the_model_says(node: str, tmp_path: Path) -> None:
    """Features and model made here, from the seed alone; nothing that the platform answers is believed."""
    config = SandboxConfig()
    train(tmp_path, config.seed)
    model = unpack((tmp_path / "model.bin").read_bytes())
    feature_store.create(tmp_path / "f.sqlite", config.entities, config.seed)
    rows = dict(sqlite3.connect(tmp_path / "f.sqlite").execute("SELECT entity_id, vector FROM features"))
    entities = range(0, config.entities, 50)
    expected = scores(model, [json.loads(rows[entity]) for entity in entities])
    said = [ask(f"http://{node}:30080/predict?entity_id={entity}") for entity in entities]
    assert [answer["score"] for answer in said] == pytest.approx(expected, abs=1e-9)
    replicas = {pod["metadata"]["name"] for pod in pods(NAMESPACE, "app=inference")}
    assert {str(answer["replica"]) for answer in said} == replicas, "the gateway asks only some of the replicas"


@pytest.mark.req("R1-01")
@pytest.mark.timeout(120)
def test_a_lost_replica_is_replaced_and_callers_hardly_notice(node: str) -> None:
    codes: Counter[int] = Counter()
    over = threading.Event()

    def call() -> None:
        entity = 0
        while not over.wait(0.05):
            entity = (entity + 7) % 500
            try:
                ask(f"http://{node}:30080/predict?entity_id={entity}")
                codes[200] += 1
            except urllib.error.HTTPError as error:
                codes[error.code] += 1
            except OSError:
                codes[0] += 1

    caller = threading.Thread(target=call)
    caller.start()
    try:
        before = {pod["metadata"]["uid"] for pod in pods(NAMESPACE, "app=inference")}
        lost = pods(NAMESPACE, "app=inference")[0]["metadata"]["name"]
        began = time.monotonic()
        kubectl("delete", "pod", "-n", NAMESPACE, lost, "--grace-period=0", "--force", "--wait=false")

        def replaced() -> bool:
            now = pods(NAMESPACE, "app=inference")
            return (
                len(now) >= len(before) and all(map(ready, now)) and not {p["metadata"]["uid"] for p in now} == before
            )

        eventually(replaced, within=60, every=0.25)
        took = time.monotonic() - began
    finally:
        over.set()
        caller.join()
    asked = codes.total()
    assert took < 30, f"replaced after {took:.1f} s"
    assert asked > 20 and codes[200] >= 0.95 * asked, codes


@pytest.mark.timeout(120)
def test_every_service_is_scraped(node: str) -> None:
    """Pods that ask by annotation, as kubectl sees them, against what Prometheus could read."""

    def all_up() -> bool:
        asked = {
            pod["metadata"]["name"]
            for pod in pods(NAMESPACE, "")
            if (pod["metadata"].get("annotations") or {}).get("prometheus.io/scrape") == "true" and ready(pod)
        }
        query = urllib.parse.urlencode({"query": 'up{job="pods"} == 1'})
        answer = ask(f"http://{node}:30090/api/v1/query?{query}")
        up = {series["metric"]["pod"] for series in answer["data"]["result"]}  # type: ignore[index]
        return len(asked) >= 8 and asked <= up

    eventually(all_up, within=30, every=0.5)
    query = urllib.parse.urlencode({"query": "sum(gateway_requests_total)"})
    answer = ask(f"http://{node}:30090/api/v1/query?{query}")
    assert float(answer["data"]["result"][0]["value"][1]) > 0  # type: ignore[index]
