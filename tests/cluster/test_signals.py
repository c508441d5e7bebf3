"""What is measured on a cluster, against what `kubectl` sees of the same moments."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, PodMetrics, Target
from mlchaos_dagster.domain.record import SignalSample
from mlchaos_dagster.errors import ProbeError
from mlchaos_dagster.kube.address import connect
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.probes.kubernetes import SIGNALS, KubernetesSignals
from mlchaos_dagster.probes.kubernetes_health import replicas_ready
from mlchaos_dagster.probes.kubernetes_metrics import MetricsReader
from mlchaos_dagster.probes.kubernetes_service import answers, filled, url_of

from .api_proxy import ApiProxy, api_proxy
from .conftest import HELPER_IMAGE, TARGET_IMAGE, deploy, eventually, kubectl, pods
from .rights import Rights

__all__ = ["api_proxy"]
pytestmark = pytest.mark.timeout(180)
CLOSE_S = 0.1
"""Our moment against kubectl's: both learn it from the same server, each through its own watch."""
READ_S = 0.05
TARGET = Target(select="app=web")


class Observed:
    """`kubectl get pods --watch`: counts over pods, with the moment at which kubectl printed each change."""

    def __init__(self, namespace: str) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.moments: dict[str, list[tuple[float, float]]] = {"ready_replicas": [], "restarts": [], "oom_kills": []}
        self.ooms: set[str] = set()
        command = ["kubectl", "get", "pods", "-n", namespace, "-l", "app=web", "--watch", "--output-watch-events"]
        self._process = subprocess.Popen([*command, "-o", "json"], stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:  # one event a line
            for line in lines:
                self._event(time.monotonic(), json.loads(line))

    def _event(self, at: float, event: dict[str, Any]) -> None:
        pod = event["object"]
        self.pods[pod["metadata"]["uid"]] = {} if event["type"] == "DELETED" else pod
        there = [p for p in self.pods.values() if p and not p["metadata"].get("deletionTimestamp")]
        statuses = [c for p in self.pods.values() if p for c in p["status"].get("containerStatuses", [])]
        for status in statuses:
            for state in (status["state"], status.get("lastState", {})):
                if state.get("terminated", {}).get("reason") == "OOMKilled":
                    self.ooms.add(state["terminated"]["containerID"])
        ready = sum(
            c["type"] == "Ready" and c["status"] == "True" for p in there for c in p["status"].get("conditions", [])
        )
        self._note("ready_replicas", at, ready)
        self._note("restarts", at, max([0, *(c["restartCount"] for c in statuses)]))
        self._note("oom_kills", at, len(self.ooms))

    def _note(self, name: str, at: float, value: float) -> None:
        if not self.moments[name] or self.moments[name][-1][1] != value:
            self.moments[name].append((at, value))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(5)


class Told:
    """Signals, gathered while a test goes on; times are monotonic."""

    def __init__(self, source: KubernetesSignals) -> None:
        self.source, self.samples = source, list[SignalSample]()
        source.start(0.0)

    def last(self, name: str) -> float | None:
        self.samples += self.source.drain()
        return next((s.value for s in reversed(self.samples) if s.name == name), None)

    def moved(self, name: str) -> list[tuple[float, float]]:
        """Moments at which a signal got another value."""
        found: list[tuple[float, float]] = []
        for s in self.samples:
            if s.name == name and (not found or found[-1][1] != s.value):
                found.append((s.t, s.value))
        return found

    def between(self, start: float, end: float) -> list[SignalSample]:
        self.samples += self.source.drain()
        return [s for s in self.samples if start < s.t < end]


@pytest.fixture
def told(cluster: Cluster, options: Kubernetes) -> Iterator[Callable[..., Told]]:
    made: list[Told] = []

    def start(on: Kubernetes = options, target: Target | None = TARGET, names: tuple[str, ...] = SIGNALS) -> Told:
        quick = connect(on.model_copy(update={"request_timeout": 1.0}))
        made.append(Told(KubernetesSignals(connect(on), quick, on, target, names, READ_S)))
        return made[-1]

    yield start
    for one in made:
        one.source.stop()


def eater(namespace: str) -> None:
    """A pod that takes more memory than it may, a second after it started."""
    code = "import time; time.sleep(1); x = bytearray(200 << 20); time.sleep(60)"
    container = {
        "name": "web",
        "image": TARGET_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", code],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "200m", "memory": "32Mi"}},
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 1}
    meta = {"name": "eater", "labels": {"app": "web"}}
    kubectl(
        "apply",
        "-n",
        namespace,
        "-f",
        "-",
        stdin=json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}),
    )


@pytest.mark.req("RX-06")
def test_scaling_deleting_restarting_and_killing_are_seen_when_kubectl_sees_them(
    namespace: str, told: Callable[..., Told]
) -> None:
    deploy(namespace, replicas=1)
    observed, ours = Observed(namespace), told()
    try:
        eventually(lambda: ours.last("ready_replicas") == 1 and observed.moments["ready_replicas"])
        kubectl("scale", "-n", namespace, "deployment/web", "--replicas=2")
        eventually(lambda: ours.last("ready_replicas") == 2)
        assert ours.last("desired_replicas") == 2
        first = pods(namespace, "app=web")[0]["metadata"]["name"]
        kubectl("delete", "pod", "-n", namespace, first, "--wait=false")
        eventually(lambda: ours.last("ready_replicas") == 1)
        eventually(lambda: ours.last("ready_replicas") == 2)
        assert ours.last("restarts") == 1  # one pod in the place of another
        second = pods(namespace, "app=web")[0]["metadata"]["name"]
        kubectl("exec", "-n", namespace, second, "--", "kill", "1")
        eventually(lambda: ours.last("restarts") == 2)
        eater(namespace)
        eventually(lambda: ours.last("oom_kills") == 1, within=60)
        eventually(lambda: ours.last("ready_replicas") == 2 and observed.moments["ready_replicas"][-1][1] == 2)
    finally:
        observed.stop()
    _same_moments(observed.moments["ready_replicas"], ours.moved("ready_replicas"))
    _same_moments(observed.moments["oom_kills"][:2], ours.moved("oom_kills")[:2])
    restart, ours_restart = observed.moments["restarts"][1], ours.moved("restarts")[2]
    assert abs(restart[0] - ours_restart[0]) < CLOSE_S
    running = [v for _, v in ours.moved("running_replicas")]
    assert min(running) == 1 and running.count(1) >= 2  # deleted; killed; and told apart from being ready


def _same_moments(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> None:
    # What was there before both looked has no moment of its own.
    pairs = list(zip(theirs[::-1], ours[::-1], strict=False))[:-1]
    assert [t[1] for t, _ in pairs] == [o[1] for _, o in pairs], (theirs, ours)
    apart = [abs(t[0] - o[0]) for t, o in pairs]
    assert pairs and max(apart) < CLOSE_S, apart


@pytest.mark.req("R4-05")
@pytest.mark.parametrize("how", ["cut", "hang"])
def test_an_api_server_that_is_away_is_a_gap(
    how: str, api_proxy: ApiProxy, options: Kubernetes, namespace: str, told: Callable[..., Told]
) -> None:
    deploy(namespace, replicas=1)
    ours = told(options.model_copy(update={"kubeconfig": f"file:{api_proxy.kubeconfig}"}))
    eventually(lambda: ours.last("ready_replicas") == 1)
    getattr(api_proxy, how)()
    gone = time.monotonic()
    kubectl("scale", "-n", namespace, "deployment/web", "--replicas=2")
    kubectl("rollout", "status", "-n", namespace, "deployment/web", "--timeout=60s")
    time.sleep(max(0.0, gone + 4 - time.monotonic()))  # an outage lasts as long as it lasts
    back = time.monotonic()
    api_proxy.restore()
    eventually(lambda: ours.last("ready_replicas") == 2, within=10)
    assert ours.between(gone + READ_S, back) == []
    again = min(s.t for s in ours.samples if s.t > back)
    assert again - back < 4, again - back
    assert not [s for s in ours.samples if s.t > back and s.name == "ready_replicas" and s.value == 1]


@pytest.fixture
def account(options: Kubernetes, namespace: str, tmp_path: Path) -> Kubernetes:
    """The options of somebody who may look at pods of the namespace, by the RoleBinding `looker`, and no more."""
    kubectl("create", "serviceaccount", "looker", "-n", namespace)
    kubectl("create", "role", "looker", "-n", namespace, "--verb=list,watch,get", "--resource=pods")
    _allow(namespace)
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    token = kubectl("create", "token", "looker", "-n", namespace).strip()
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = tmp_path / "looker.kubeconfig"
    path.write_text(json.dumps(config))
    return options.model_copy(update={"kubeconfig": f"file:{path}"})


def _allow(namespace: str) -> None:
    kubectl("create", "rolebinding", "looker", "-n", namespace, "--role=looker", f"--serviceaccount={namespace}:looker")


@pytest.mark.req("R4-05")
def test_a_permission_withdrawn_in_the_window_is_a_gap(
    account: Kubernetes, namespace: str, told: Callable[..., Told]
) -> None:
    deploy(namespace, replicas=1)
    ours = told(account, names=("ready_replicas",))
    eventually(lambda: ours.last("ready_replicas") == 1)
    kubectl("delete", "rolebinding", "looker", "-n", namespace)
    trouble = eventually(lambda: ours.source.trouble, within=5)
    assert "pods is forbidden" in trouble
    since = time.monotonic()
    time.sleep(1.5)  # the watch is still open, and what it says is not ours to know any more
    assert ours.between(since, time.monotonic()) == []
    _allow(namespace)
    back = time.monotonic()
    eventually(lambda: ours.between(back, time.monotonic()), within=10)


def test_before_a_run_a_missing_permission_is_one_line_with_the_rule(account: Kubernetes, namespace: str) -> None:
    deploy(namespace, replicas=2)
    kubectl("create", "role", "looker2", "-n", namespace, "--verb=get", "--resource=deployments.apps")
    kubectl(
        "create", "rolebinding", "looker2", "-n", namespace, "--role=looker2", f"--serviceaccount={namespace}:looker"
    )
    score, said = replicas_ready(connect(account), account, [TARGET])
    assert (score, said) == (1.0, f"2 of 2 replicas of {namespace}/web ready")
    kubectl("scale", "-n", namespace, "deployment/web", "--replicas=0")
    patch = json.dumps([{"op": "replace", "path": "/rules/0/verbs", "value": ["list"]}])
    kubectl("patch", "role", "looker", "-n", namespace, "--type=json", "-p", patch)
    with pytest.raises(ProbeError) as error:
        eventually(lambda: replicas_ready(connect(account), account, [TARGET]) is None)
    rule = f'add Role in namespace {namespace}: {{apiGroups: [""], resources: ["pods"], verbs: ["watch"]}}'
    assert rule in str(error.value)


ISVC_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "inferenceservices.serving.kserve.io", "labels": {"mlchaos.dev/test": "true"}},
    "spec": {
        "group": "serving.kserve.io",
        "scope": "Namespaced",
        "names": {"plural": "inferenceservices", "singular": "inferenceservice", "kind": "InferenceService"},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


@pytest.fixture
def kserve(tmp_path: Path) -> Iterator[None]:
    """The definition of InferenceService, without KServe; left alone where it is there already."""
    there = kubectl("get", "crd", ISVC_CRD["metadata"]["name"], check=False)
    if not there:
        kubectl("apply", "-f", "-", stdin=json.dumps(ISVC_CRD))
        kubectl("wait", "--for=condition=established", f"crd/{ISVC_CRD['metadata']['name']}", "--timeout=20s")
    yield
    if not there:
        kubectl("delete", "crd", ISVC_CRD["metadata"]["name"], "--wait=false")


@pytest.mark.usefixtures("kserve")
def test_an_inference_service_is_ready_with_its_model_loaded(namespace: str, told: Callable[..., Told]) -> None:
    def says(ready: str, model: str) -> None:
        conditions = [{"type": "Ready", "status": ready}]
        status = {"conditions": conditions, "modelStatus": {"states": {"activeModelState": model}}}
        patch = json.dumps({"status": status})
        kubectl("patch", "inferenceservice", "m", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)

    isvc = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "m"},
        "spec": {},
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(isvc))
    ours = told(target=None, names=("isvc_ready",))
    eventually(lambda: ours.last("isvc_ready") == 0)
    says("True", "Loaded")
    eventually(lambda: ours.last("isvc_ready") == 1)
    says("True", "FailedToLoad")  # it crashes at every start, and is still called ready
    eventually(lambda: ours.last("isvc_ready") == 0)


COUNTING = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
hits = 0
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global hits
        hits += 1
        body = f'# TYPE hits counter\\nhits_total{{page="x"}} {hits}\\n'.encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8080), Answer).serve_forever()
"""


def test_what_pods_tell_of_themselves_directly_and_through_the_api_server(
    cluster: Cluster, namespace: str, rights: Rights | None
) -> None:
    if rights:  # not among what is shipped: docs/rbac.md, What is not there
        rights.grant(namespace, "get", "pods/proxy")
    deploy(namespace, replicas=2)
    command = json.dumps([{"op": "replace", "path": "/spec/template/spec/containers/0/command/2", "value": COUNTING}])
    kubectl("patch", "deployment", "web", "-n", namespace, "--type=json", "-p", command)
    kubectl("rollout", "status", "-n", namespace, "deployment/web", "--timeout=60s")
    eventually(lambda: len(pods(namespace, "app=web")) == 2)
    entry = PodMetrics.model_validate(
        {"select": "app=web", "port": 8080, "signals": {"hits": {"metric": 'hits_total{page="x"}', "kind": "total"}}}
    )
    for direct in (True, False):
        reader = MetricsReader(cluster, entry, namespace, ["hits"])
        reader._direct = direct
        reader.start()
        try:
            first = eventually(lambda r=reader: r.read().get("hits"), every=0.3)
            second = eventually(lambda r=reader: r.read().get("hits"), every=0.3)
            assert second >= first + 2, (direct, first, second)
        finally:
            reader.stop()


@pytest.mark.req("R1-01")
def test_a_service_is_reached_from_outside_and_from_inside(cluster: Cluster, namespace: str) -> None:
    deploy(namespace, replicas=1)
    place = f"{{service:{namespace}/web:80}}/x"
    with pytest.raises(ProbeError, match="NodePort or LoadBalancer"):
        filled(place, lambda: cluster)
    kubectl("patch", "service", "web", "-n", namespace, "-p", json.dumps({"spec": {"type": "NodePort"}}))
    url = eventually(lambda: _reached(cluster, namespace))
    host, port = url.removeprefix("http://").split(":")
    assert answers(host, int(port))
    kubectl("create", "role", "door", "-n", namespace, "--verb=get", "--resource=services")
    kubectl("create", "rolebinding", "door", "-n", namespace, "--role=door", f"--serviceaccount={namespace}:default")
    code = (
        "import urllib.request; from mlchaos_dagster.kube.client import Cluster\n"
        "from mlchaos_dagster.probes.kubernetes_service import filled\n"
        f"url = filled({place!r}, Cluster); print(url, urllib.request.urlopen(url, timeout=5).read().decode())"
    )
    limits = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}}
    container = {
        "name": "inside",
        "image": HELPER_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", code],
        "resources": limits,
    }
    spec = {"containers": [container], "restartPolicy": "Never"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inside"}, "spec": spec}
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    phase = "jsonpath={.status.phase}"
    over = ("Succeeded", "Failed")
    eventually(lambda: kubectl("get", "pod", "inside", "-n", namespace, "-o", phase) in over, within=60)
    assert kubectl("logs", "inside", "-n", namespace).strip() == f"http://web.{namespace}.svc:80/x ok"


def _reached(cluster: Cluster, namespace: str) -> str:
    try:
        return url_of(cluster, namespace, "web", "80")
    except ProbeError:
        return ""
