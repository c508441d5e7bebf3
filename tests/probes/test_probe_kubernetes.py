"""Signals of a cluster, on a scripted API: what a watch may do to a mirror, and what must never be told."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster import wiring
from mlchaos_dagster.domain.environment import Environment, Kubernetes, KubernetesObjects, PodMetrics, Target
from mlchaos_dagster.domain.record import SignalSample
from mlchaos_dagster.errors import DriverUnavailable, ProbeError
from mlchaos_dagster.kube.client import Forbidden, Gone
from mlchaos_dagster.probes import kubernetes, kubernetes_service, kubernetes_watch
from mlchaos_dagster.probes.kubernetes import KubernetesSignals, serves, written
from mlchaos_dagster.probes.kubernetes_metrics import MetricsReader, series
from mlchaos_dagster.probes.kubernetes_pods import Owner, PodBook
from mlchaos_dagster.probes.kubernetes_service import filled, url_of
from mlchaos_dagster.settings import Home

Object = dict[str, Any]
PODS = "/api/v1/namespaces/shop/pods"


def pod(name: str, version: int = 1, *, ready: bool = True, going: bool = False, **status: Any) -> Object:
    """A pod with one container `app`, owned by the Deployment web."""
    container = {"name": "app", "restartCount": 0, "state": {"running": {}}, **status}
    meta: Object = {
        "name": name,
        "uid": f"uid-{name}",
        "namespace": "shop",
        "resourceVersion": str(version),
        "labels": {"app": "web", "pod-template-hash": "5d"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": "web-5d", "controller": True}],
    }
    if going:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {
        "metadata": meta,
        "spec": {"containers": [{"name": "app"}]},
        "status": {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "containerStatuses": [container],
        },
    }


def ended_for_memory(container_id: str) -> Object:
    return {"terminated": {"reason": "OOMKilled", "containerID": container_id}}


class Api:
    """A cluster that does what the test says. An exception in `says` breaks the watch; `down` refuses every call."""

    context, server = "", "https://10.0.0.9:6443"

    def __init__(self, *pods: Object) -> None:
        self.there: dict[str, list[Object]] = {PODS: list(pods)}
        self.down: Exception | None = None
        self.hangs = threading.Event()
        self.lists: list[str] = []
        self.watched_from: list[str] = []
        self.says: queue.Queue[tuple[str, Object] | Exception] = queue.Queue()
        self.found: dict[str, Object] = {}

    def _up(self) -> None:
        if self.down is not None:
            raise self.down

    def list_at(self, path: str, *, labels: str = "", fields: str = "") -> tuple[list[Object], str]:
        self._up()
        self.lists.append(path)
        return list(self.there.get(path, ())), f"{path}#{len(self.lists)}"

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[Object]:
        self._up()
        return list(self.there.get(path, ()))

    def get(self, path: str, **query: str) -> Object | None:
        self._up()
        return self.found.get(path)

    def get_text(self, path: str) -> str:
        raise DriverUnavailable("no way")

    def watch(
        self, path: str, resource_version: str, *, labels: str = "", fields: str = "", timeout_s: float = 60.0
    ) -> Iterator[tuple[str, Object]]:
        self._up()
        self.watched_from.append(resource_version)
        while path == PODS:
            said = self.says.get(timeout=10)
            if isinstance(said, Exception):
                raise said
            yield said
        self.hangs.wait(10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in milliseconds."""
    monkeypatch.setattr(kubernetes, "_PULSE_S", 0.01)
    monkeypatch.setattr(kubernetes, "_RETRY_S", 0.01)
    monkeypatch.setattr(kubernetes_watch, "_FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(kubernetes_watch, "_LONGEST_PAUSE_S", 0.01)


class Running:
    """Signals of `app=web`, and all they have told."""

    def __init__(self, api: Api, *, pulse: Api | None = None, names: tuple[str, ...] = kubernetes.SIGNALS) -> None:
        options = Kubernetes(context="x", namespace="shop")
        self.source = KubernetesSignals(api, pulse or api, options, Target(select="app=web"), names, 0.01)
        self.told: list[SignalSample] = []
        self.source.start(time.monotonic())

    def last(self, name: str) -> float | None:
        self.told += self.source.drain()
        return next((s.value for s in reversed(self.told) if s.name == name), None)

    def until(self, name: str, value: float) -> None:
        eventually(lambda: self.last(name) == value, f"{name} {value:g}; it is {self.last(name)}")

    def is_silent(self, for_s: float = 0.1) -> bool:
        self.source.drain()
        time.sleep(for_s)  # the very thing that is looked at: nothing is told meanwhile
        return not self.source.drain()


def eventually(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 5
    while not look():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.002)


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(*args: Any, **kwargs: Any) -> Running:
        made.append(Running(*args, **kwargs))
        return made[-1]

    yield start
    for one in made:
        one.source.stop()


@pytest.mark.req("RX-06")
def test_what_moves_is_told_by_the_watch_and_a_watch_that_is_too_old_lists_anew(
    running: Callable[..., Running],
) -> None:
    api = Api(pod("a"), pod("b"))
    signals = running(api)
    signals.until("ready_replicas", 2)
    api.says.put(("MODIFIED", pod("a", 2, going=True)))
    signals.until("running_replicas", 1)
    assert signals.last("ready_replicas") == 1
    api.says.put(("DELETED", pod("a", 3, going=True)))
    for _ in range(3):  # the same event again changes nothing
        api.says.put(("ADDED", pod("c", 4, ready=False)))
    signals.until("running_replicas", 2)
    assert (signals.last("ready_replicas"), signals.last("restarts")) == (1, 1)
    api.there[PODS] = [pod("c", 5)]  # b went, and c became ready, while nobody told us
    api.says.put(Gone("too old", 410))
    signals.until("ready_replicas", 1)
    eventually(lambda: signals.last("running_replicas") == 1, "b is gone")
    assert [p for p in api.lists if p == PODS] == [PODS, PODS]


def test_a_watch_that_ends_goes_on_from_where_it_was(running: Callable[..., Running]) -> None:
    class Ending(Api):
        def watch(self, path: str, resource_version: str, **_: Any) -> Iterator[tuple[str, Object]]:
            if path == PODS:
                self.watched_from.append(resource_version)
                yield self.says.get(timeout=10)  # type: ignore[misc]
            else:
                self.hangs.wait(10)

    api = Ending(pod("a"))
    signals = running(api)
    api.says.put(("BOOKMARK", {"metadata": {"resourceVersion": "77"}}))
    api.says.put(("MODIFIED", pod("a", 78, ready=False)))
    signals.until("ready_replicas", 0)
    eventually(lambda: len(api.watched_from) >= 3, "three watches")
    assert api.watched_from[1:3] == ["77", "78"]
    assert api.lists.count(PODS) == 1


def test_an_outage_is_a_gap_and_what_happened_meanwhile_is_seen_after_it(running: Callable[..., Running]) -> None:
    api, pulse = Api(pod("a")), Api()
    signals = running(api, pulse=pulse)
    signals.until("ready_replicas", 1)
    api.down = DriverUnavailable("connection refused")
    api.says.put(DriverUnavailable("the watch broke"))
    eventually(lambda: "refused" in signals.source.trouble, "the outage is noticed")
    assert signals.is_silent()
    api.there[PODS], api.down = [], None
    signals.until("ready_replicas", 0)


@pytest.mark.req("R4-05")
def test_a_network_that_swallows_everything_is_a_gap_though_the_watch_stays_open(
    running: Callable[..., Running],
) -> None:
    api, pulse = Api(pod("a")), Api()
    signals = running(api, pulse=pulse)
    signals.until("ready_replicas", 1)
    pulse.down = DriverUnavailable("no answer in 1 s")
    eventually(lambda: signals.source.trouble != "", "the pulse fails")
    assert signals.is_silent()
    # The old watch hangs on; a new one must be made, since its silence proves nothing.
    api.there[PODS], pulse.down = [], None
    signals.until("ready_replicas", 0)


def test_nothing_is_told_before_an_answer_that_was_asked_for_later(running: Callable[..., Running]) -> None:
    first_question, over = threading.Event(), threading.Event()

    class Late(Api):
        def list_at(self, path: str, *, labels: str = "", fields: str = "") -> tuple[list[Object], str]:
            first_question.wait(10)  # whatever the threads' order: nothing is read before the first question
            return super().list_at(path, labels=labels, fields=fields)

    class Slow(Api):
        answers: queue.Queue[None] = queue.Queue()
        asked = 0

        def get(self, path: str, **query: str) -> Object | None:
            self.asked += 1
            first_question.set()
            while not over.is_set():
                with contextlib.suppress(queue.Empty):
                    return self.answers.get(timeout=0.05) or {}
            return {}

    pulse = Slow()
    signals = running(Late(pod("a")), pulse=pulse)
    try:
        assert signals.is_silent()
        pulse.answers.put(None)  # to a question from before anything was read
        eventually(lambda: pulse.asked == 2, "the next question")
        assert not signals.source.drain()
        pulse.answers.put(None)
        signals.until("ready_replicas", 1)
    finally:
        over.set()


def test_a_permission_that_is_withdrawn_is_a_gap_and_names_the_rule(running: Callable[..., Running]) -> None:
    api = Api(pod("a"))
    signals = running(api, pulse=Api(), names=("ready_replicas",))
    signals.until("ready_replicas", 1)
    api.down = Forbidden("not allowed: pods is forbidden", 403)
    api.says.put(Gone("too old", 410))
    eventually(lambda: 'resources: ["pods"], verbs: ["watch"]' in signals.source.trouble, "the rule")
    assert "Role in namespace shop" in signals.source.trouble
    assert signals.is_silent()


def test_an_object_that_cannot_be_read_is_a_gap(running: Callable[..., Running]) -> None:
    api = Api(pod("a"))
    signals = running(api, pulse=Api(), names=("ready_replicas",))
    signals.until("ready_replicas", 1)
    api.there[PODS] = [{"metadata": {}}]
    api.says.put(Gone("too old", 410))
    eventually(lambda: "KeyError" in signals.source.trouble, "it is noticed")
    assert signals.is_silent(0.05)


def test_workloads_autoscalers_jobs_and_models_of_the_target_and_no_others(running: Callable[..., Running]) -> None:
    def named(name: str, **more: Any) -> Object:
        return {"metadata": {"name": name, "uid": name, "resourceVersion": "1"}, **more}

    def scaler(name: str, wants: int) -> Object:
        reference = {"kind": "Deployment", "name": name}
        return named(name, spec={"scaleTargetRef": reference}, status={"desiredReplicas": wants})

    api = Api(pod("a"))
    api.there |= {
        "/apis/apps/v1/namespaces/shop/deployments": [
            named("web", spec={"replicas": 4}),
            named("other", spec={"replicas": 9}),
        ],
        "/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers": [scaler("web", 5), scaler("other", 9)],
        "/apis/batch/v1/namespaces/shop/jobs": [named("train", status={"active": 2, "failed": 1})],
        "/apis/serving.kserve.io/v1beta1/namespaces/shop/inferenceservices": [
            named("m", status={"conditions": [{"type": "Ready", "status": "True"}]})
        ],
    }
    signals = running(api)
    wanted = {
        "desired_replicas": 4,
        "hpa_replicas": 5,
        "job_active": 2,
        "job_failed": 1,
        "job_succeeded": 0,
        "isvc_ready": 1,
    }
    for name, value in wanted.items():
        signals.until(name, value)


def test_ready_alone_does_not_make_a_model_served() -> None:
    def isvc(state: str, seen: int = 2) -> Object:
        conditions = [{"type": "Ready", "status": "True"}]
        model = {"states": {"activeModelState": state}}
        status = {"conditions": conditions, "observedGeneration": seen, "modelStatus": model}
        return {"metadata": {"generation": 2}, "status": status}

    assert serves(isvc("Loaded"))
    assert not serves(isvc("FailedToLoad"))
    assert not serves(isvc("Loaded", seen=1))


def test_restarts_never_fall_and_a_kill_for_memory_counts_once() -> None:
    book = PodBook()
    old = {"restartCount": 5, "lastState": ended_for_memory("c-old")}
    book.update([pod("a", **old), pod("g", going=True)], [])
    book.look()
    assert (book.values()["restarts"], book.values()["oom_kills"]) == (0, 0)
    book.update([pod("a", 2, **(old | {"state": ended_for_memory("c-1")}))], [pod("g", going=True)])
    assert book.values()["oom_kills"] == 1
    assert book.values()["running_replicas"] == 0
    book.update([pod("a", 3, restartCount=6, lastState=ended_for_memory("c-1"))], [])
    assert (book.values()["restarts"], book.values()["oom_kills"]) == (1, 1)
    book.update([], [pod("a", 4, restartCount=6)])
    book.update([pod("b", 5)], [])
    assert book.values()["lost_replicas"] == 1
    assert book.values()["restarts"] == 2  # b in the place of a; g went before the first look
    book.update([pod("c", 6)], [])
    assert book.values()["restarts"] == 2  # more pods than before are no restart
    assert book.owners == {Owner("Deployment", "web")}


def test_a_selector_is_written_as_the_api_wants_it() -> None:
    expressions = [
        {"key": "tier", "operator": "In", "values": ["a", "b"]},
        {"key": "old", "operator": "DoesNotExist"},
        {"key": "x", "operator": "Exists"},
        {"key": "y", "operator": "NotIn", "values": ["z"]},
    ]
    selector = {"matchLabels": {"app": "web"}, "matchExpressions": expressions}
    assert written(selector) == "app=web,tier in (a,b),!old,x,y notin (z)"


def test_a_workload_as_the_target_counts_the_pods_that_it_selects(running: Callable[..., Running]) -> None:
    seen: list[str] = []

    class Api2(Api):
        def list_at(self, path: str, *, labels: str = "", fields: str = "") -> tuple[list[Object], str]:
            seen.append(f"{path.rpartition('/')[2]} {labels}")
            return super().list_at(path, labels=labels)

    api = Api2(pod("a"))
    web = {"metadata": {"name": "web", "uid": "w"}, "spec": {"replicas": 0, "selector": {"matchLabels": {"run": "w"}}}}
    api.there["/apis/apps/v1/namespaces/shop/deployments"] = [web]
    target = Target(select="app=web", kubernetes=KubernetesObjects(kind="Deployment"))
    source = KubernetesSignals(api, api, Kubernetes(context="x", namespace="shop"), target, ("desired_replicas",), 0.01)
    source.start(time.monotonic())
    try:
        told: list[SignalSample] = []
        eventually(lambda: bool(told.extend(source.drain()) or told), "desired replicas")
        assert {(s.name, s.value) for s in told} == {("desired_replicas", 0.0)}
        assert "pods run=w" in seen
    finally:
        source.stop()


# -- what pods tell of themselves ---------------------------------------------------------------------------------------


def test_series_of_a_page_by_name_and_labels_and_fields_of_json() -> None:
    page = '# TYPE r counter\nr_total{code="200",by="a"} 3\nr_total{code="200",by="b"} 4\nr_total{code="500"} 1\nup 1\n'
    assert series(page, {'r_total{code="200"}', "r_total", "missing"}) == {'r_total{code="200"}': 7.0, "r_total": 8.0}
    assert series('{"queue": {"backlog": 3}, "name": "x"}', {"queue.backlog", "name", "no.such"}) == {
        "queue.backlog": 3.0
    }


def reader(api: Api, **signals: Any) -> MetricsReader:
    entry = PodMetrics.model_validate({"select": "app=web", "port": 8080, "signals": signals})
    made = MetricsReader(api, entry, "shop", signals)
    made.start()
    eventually(lambda: made.mirror.live, "the pods are known")
    return made


def test_pods_become_one_number_and_a_counter_that_begins_anew_does_not_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: dict[str, dict[str, float] | None] = {"a": {"x": 1, "n": 10}, "b": {"x": 2, "n": 5}}

    def ask(self: MetricsReader, one: Object) -> dict[str, float] | None:
        return pages[one["metadata"]["name"]]

    monkeypatch.setattr(MetricsReader, "_ask", ask)
    total = {"metric": "n", "kind": "total"}
    one = reader(
        Api(pod("a"), pod("b")),
        x={},
        low={"metric": "x", "reduce": "min"},
        all={"metric": "x", "reduce": "sum"},
        n=total,
    )
    try:
        assert one.read() == {"x": 2, "low": 1, "all": 3, "n": 15}
        pages["a"] = {"x": 1, "n": 2}  # its process began anew
        assert one.read()["n"] == 17
        pages["b"] = None  # running and silent: a sum would be too low
        assert one.read() == {"x": 1, "low": 1, "n": 17}
        pages["a"] = None
        assert one.read() == {}
    finally:
        one.stop()


def test_a_pod_that_answered_once_is_never_asked_through_the_api_server(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [None, {"x": 1.0}, None, None, None, None, None]
    monkeypatch.setattr(MetricsReader, "_ask", lambda self, one: answers.pop(0))
    one = reader(Api(pod("a")), x={})
    try:
        assert [one.read() for _ in range(6)] == [{}, {"x": 1.0}, {}, {}, {}, {}]
        assert one._direct
    finally:
        one.stop()


# -- Services ---------------------------------------------------------------------------------------------------------


SERVICE = "/api/v1/namespaces/shop/services/web"


def service(api: Api, *, node_port: int = 0, kind: str = "ClusterIP", **port: Any) -> Api:
    ports = [{"port": 80, "name": "http", **({"nodePort": node_port} if node_port else {}), **port}]
    api.found[SERVICE] = {"metadata": {"name": "web"}, "spec": {"type": kind, "clusterIP": "10.96.0.7", "ports": ports}}
    return api


def node(name: str, address: str) -> Object:
    ready = [{"type": "Ready", "status": "True"}]
    return {
        "metadata": {"name": name},
        "status": {"conditions": ready, "addresses": [{"type": "InternalIP", "address": address}]},
    }


def test_a_service_is_reached_by_name_inside_and_by_a_node_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    tried: list[str] = []

    def answers(host: str, port: int) -> bool:
        tried.append(f"{host}:{port}")
        return host != "10.0.0.9"

    monkeypatch.setattr(kubernetes_service, "answers", answers)
    api = service(Api(), node_port=30080, kind="NodePort")
    api.there["/api/v1/nodes"] = [node("a", "10.0.0.1"), node("z", "10.0.0.9")]
    assert filled("{service:shop/web:80}/predict", lambda: api) == "http://10.0.0.1:30080/predict"
    assert tried == ["10.0.0.9:30080", "10.0.0.1:30080"]  # first the node that the API server is on
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert url_of(api, "shop", "web", "http") == "http://web.shop.svc:80"
    lookup = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.96.9.9", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: lookup)
    api.context = "another"  # in a pod, but is it one of that cluster? The name does not lead to the Service's address
    assert url_of(api, "shop", "web", "80") == "http://10.0.0.1:30080"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{service:shop/web:81}", "has no port 81. Allowed: 80 (http)"),
        ("{service:shop/api:80}", "the cluster has no service shop/api"),
        ("{service:web:80}", "Allowed: {service:NAMESPACE/NAME:PORT}"),
        ("{service:shop/web:80}", "of type ClusterIP"),
    ],
)
def test_a_service_that_cannot_be_reached_is_one_clear_line(
    place: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ProbeError) as error:
        filled(place, lambda: service(Api()))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# -- wiring -----------------------------------------------------------------------------------------------------------


def environment(**changes: Any) -> Environment:
    given: dict[str, Any] = {
        "schema": "mlchaos/v1",
        "name": "shop",
        "kubernetes": {
            "context": "x",
            "namespace": "shop",
            "metrics": [
                {"select": "app=web", "port": 8080, "signals": {"breaker_state": {}}},
                {"select": "app=db", "port": 8080, "signals": {"backlog": {}}},
            ],
        },
        "backends": {"kubernetes": ["pod_delete"]},
        "targets": {"web": {"select": "app=web"}, "db": {"select": "app=db", "kubernetes": {"namespace": "data"}}},
        "probe": {"url": "{service:shop/web:80}/x"},
        "slis": {"availability": {"measure": "availability"}},
        "signals": ["ready_replicas", "breaker_state", "backlog"],
    }
    return Environment.model_validate(given | changes)


def test_replicas_are_those_of_the_target_and_what_is_needed_is_asked_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "_cluster", lambda *_, **__: Api())
    source = wiring.signal_source(environment(), Home(tmp_path), "db", {"breaker_state"})
    _, replicas, pods = source.sources  # type: ignore[attr-defined]
    assert (replicas.target.select, replicas.namespace) == ("app=db", "data")
    assert replicas.names == {"ready_replicas", "running_replicas", "lost_replicas"}
    every = {
        next(iter(r.signals)): interval for r, (_, interval) in zip(pods.readers, pods._polled.readers, strict=True)
    }
    assert every == {"breaker_state": 0.1, "backlog": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"probe": {"url": "{service:web:80}/x"}},
        {"prometheus": {"url": "{service:shop/web}"}},
        {"kubernetes": None, "backends": {"sandbox": ["pod_delete"]}},
    ],
)
def test_a_place_that_is_none_is_found_when_the_file_is_read(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="service:NAMESPACE/NAME:PORT"):
        environment(**changes)
