"""Guards of the Kubernetes backend against a cluster that is a dictionary: words and decisions, no network."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.cluster import preflight, rivals
from mlchaos_dagster.drivers.cluster.handler import Handler, Request
from mlchaos_dagster.engine.ports import Clock, Objection
from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube import reach
from mlchaos_dagster.kube.client import Cluster, Forbidden, Permission, Site
from mlchaos_dagster.kube.refs import Ref

NODE = {"metadata": {"name": "n1"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
CHAOS_KINDS = {
    "resources": [
        {"name": name, "kind": kind, "verbs": ["list"]}
        for name, kind in {
            "podchaos": "PodChaos",
            "podnetworkchaos": "PodNetworkChaos",
            "schedules": "Schedule",
            "workflows": "Workflow",
        }.items()
    ]
}

LITMUS_KINDS = {
    "resources": [
        {"name": "chaosengines", "kind": "ChaosEngine", "verbs": ["list"]},
        {"name": "chaosschedules", "kind": "ChaosSchedule", "verbs": ["list"]},
    ]
}


def pod(name: str, *, ready: bool = True, lease: str = "") -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ml",
            "uid": f"uid-{name}",
            "labels": {"app": "inference"},
            "annotations": {"mlchaos.dev/lease": lease} if lease else {},
        },
        "spec": {"nodeName": "n1"},
        "status": {"conditions": [{"type": "Ready", "status": str(ready)}]},
    }


class Paper:
    """`Cluster` whose objects are given; collections are lists, objects are mappings."""

    def __init__(self, pods: list[dict[str, Any]], **places: Any) -> None:
        space = {"metadata": {"name": "ml", "labels": {"mlchaos.dev/allow": "true"}}}
        self.places: dict[str, Any] = {
            "/api/v1/namespaces/ml": space,
            "/api/v1/namespaces/ml/pods": pods,
            "/api/v1/nodes/n1": copy.deepcopy(NODE),
        }
        self.denied: set[str] = set()

    def get(self, path: str) -> Any:
        return self.places.get(path)

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[Any]:
        if isinstance(found := self.places.get(path, []), Exception):
            raise found
        return found

    def allowed(self, permission: Permission) -> bool:
        return permission.resource not in self.denied


class Needs:
    kinds = frozenset({"pod"})
    self_limiting = False

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        return [Permission("delete", "pods", "ml")]

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        return []


PODS = [pod("a"), pod("b"), pod("c")]


def asked(cluster: Paper, *, hit: tuple[str, ...] = ("a",), kind: str = "pod_failure", **options: Any) -> list[str]:
    """What the guards say, `saw | needs`."""
    site = Site(cast(Cluster, cluster), Kubernetes(context="x", namespace="ml", **options))
    existing = tuple(Ref("pod", "ml", n, f"uid-{n}") for n in ("a", "b", "c"))
    refs = tuple(r for r in existing if r.name in hit)
    target = Target(select="app=inference", kubernetes=KubernetesObjects())
    found = preflight.objections(site, Request(kind, refs, existing, {}, target), cast(Handler, Needs()))
    return [f"{o.saw} | {o.needs}" for o in found]


def budget(allowed: int, **labels: str) -> list[dict[str, Any]]:
    selector = {"matchLabels": labels or {"app": "inference"}}
    return [{"metadata": {"name": "keep"}, "spec": {"selector": selector}, "status": {"disruptionsAllowed": allowed}}]


def test_nothing_speaks_against_a_sound_target() -> None:
    assert asked(Paper(PODS)) == []


def test_a_namespace_that_did_not_opt_in_is_told_with_the_command_and_nothing_else_is_asked() -> None:
    cluster = Paper(PODS)
    cluster.places["/api/v1/namespaces/ml"]["metadata"]["labels"] = {"mlchaos.dev/allow": "false"}
    assert asked(cluster) == [
        "namespace ml has not opted in to faults | kubectl label namespace ml mlchaos.dev/allow=true"
    ]


def test_a_missing_permission_is_told_as_the_rule_to_add() -> None:
    cluster = Paper(PODS)
    cluster.denied = {"poddisruptionbudgets"}
    assert asked(cluster) == [
        'no permission to list poddisruptionbudgets in ml | Role in namespace ml: {apiGroups: ["policy"], '
        'resources: ["poddisruptionbudgets"], verbs: ["list"]}'
    ]


@pytest.mark.parametrize(
    ("pods", "hit", "saw"),
    [
        ([pod("a", ready=False), *PODS[1:]], ("a",), "not ready before the fault: pod ml/a"),
        (
            [PODS[0], pod("b", ready=False), pod("c", ready=False)],
            ("a",),
            "0 of the 2 pods that stay untouched are ready",
        ),
        ([pod("a", lease="mlchaos-x"), *PODS[1:]], ("a",), "pod ml/a carries the fault of lease mlchaos-x"),
    ],
)
def test_pods_that_are_not_well_or_already_under_a_fault(pods: list[Any], hit: tuple[str, ...], saw: str) -> None:
    (said,) = asked(Paper(pods), hit=hit)
    assert said.startswith(saw)


def test_all_pods_may_be_hit_at_once() -> None:
    assert asked(Paper(PODS), hit=("a", "b", "c")) == []


def test_a_disruption_budget_that_would_be_violated() -> None:
    cluster = Paper(PODS)
    place = "/apis/policy/v1/namespaces/ml/poddisruptionbudgets"
    cluster.places[place] = budget(1)
    assert asked(cluster, hit=("a",)) == []
    (said,) = asked(cluster, hit=("a", "b"))
    assert said.startswith("PodDisruptionBudget ml/keep allows 1 pods to be down, and 2 would be | ")
    assert asked(cluster, hit=("a", "b"), ignore_budgets=True) == []
    assert asked(cluster, hit=("a", "b"), kind="network_latency") == []
    cluster.places[place] = budget(0, app="other")
    assert asked(cluster, hit=("a", "b")) == []


def test_a_node_under_pressure() -> None:
    cluster = Paper(PODS)
    cluster.places["/api/v1/nodes/n1"]["status"]["conditions"].append({"type": "MemoryPressure", "status": "True"})
    assert asked(cluster) == ["node n1: MemoryPressure is True | a node that is well under the targets"]


def chaos(phase: str = "Injected", record: str = "ml/a/web", **spec: Any) -> dict[str, Any]:
    records = [{"id": record, "phase": phase}] if record else []
    return {
        "metadata": {"name": "theirs", "namespace": "chaos-testing"},
        "spec": spec or {"action": "pod-failure", "selector": {"namespaces": ["ml"]}},
        "status": {"experiment": {"desiredPhase": "Run", "containerRecords": records}},
    }


@pytest.mark.parametrize(
    ("theirs", "at_work"),
    [
        (chaos(), True),
        (chaos(record="other/a/web"), False),
        (chaos(phase="Not Injected"), False),
        (chaos(record=""), True),  # accepted a moment ago: it may select our target
        (chaos(record="", selector={"namespaces": ["elsewhere"]}), False),
        (chaos(action="pod-kill"), False),  # it struck once and is over
    ],
)
def test_chaos_mesh_on_the_target(theirs: dict[str, Any], at_work: bool) -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/chaos-mesh.org/v1alpha1"] = CHAOS_KINDS
    cluster.places["/apis/chaos-mesh.org/v1alpha1/podchaos"] = [theirs]
    expected = "PodChaos chaos-testing/theirs is at work on the target | its end, or its deletion"
    assert asked(cluster) == ([expected] if at_work else [])


@pytest.mark.parametrize(
    ("status", "at_work"), [("initialized", True), ("", True), ("completed", False), ("stopped", False)]
)
def test_a_litmus_engine_on_the_target(status: str, at_work: bool) -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/litmuschaos.io/v1alpha1"] = LITMUS_KINDS
    engine = {
        "metadata": {"name": "theirs", "namespace": "litmus"},
        "spec": {"appinfo": {"appns": "ml"}, "engineState": "active"},
        "status": {"engineStatus": status} if status else {},
    }
    cluster.places["/apis/litmuschaos.io/v1alpha1/chaosengines"] = [engine]
    assert bool(asked(cluster)) is at_work


@pytest.mark.parametrize(
    ("spec", "at_work"),
    [
        ({"selectors": {"workloads": [{"kind": "deployment", "namespace": "ml", "names": "web"}]}}, True),
        ({"selectors": {"pods": [{"namespace": "bank"}, {"namespace": "ml"}]}, "appinfo": {"appns": "bank"}}, True),
        ({"selectors": {"pods": [{"namespace": "bank"}]}}, False),
    ],
)
def test_a_litmus_engine_is_where_its_selectors_are(spec: dict[str, Any], at_work: bool) -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/litmuschaos.io/v1alpha1"] = LITMUS_KINDS
    engine = {"metadata": {"name": "theirs", "namespace": "litmus"}, "spec": {"engineState": "active", **spec}}
    cluster.places["/apis/litmuschaos.io/v1alpha1/chaosengines"] = [engine]
    assert bool(asked(cluster)) is at_work


def test_chaos_that_may_not_be_seen_is_not_taken_for_absent() -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/litmuschaos.io/v1alpha1"] = LITMUS_KINDS
    cluster.places["/apis/litmuschaos.io/v1alpha1/chaosengines"] = Forbidden("no", 403)
    (said,) = asked(cluster)
    assert said.startswith("no permission to list chaosengines, which may be at work on the target | ClusterRole: ")


OURS = {"app.kubernetes.io/managed-by": "mlchaos", "mlchaos.dev/lease": "mlchaos-a"}


def test_what_an_open_lease_of_ours_made_is_no_rival_and_what_a_lost_one_left_is_told() -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/chaos-mesh.org/v1alpha1"] = CHAOS_KINDS
    ours = chaos()
    ours["metadata"]["labels"] = OURS
    cluster.places["/apis/chaos-mesh.org/v1alpha1/podchaos"] = [ours]
    told = "PodChaos chaos-testing/theirs was left by lease mlchaos-a, which is open no more | mlchaos clean"
    assert asked(cluster) == [told]
    cluster.places["/apis/coordination.k8s.io/v1/namespaces/mlchaos-system/leases/mlchaos-a"] = {"metadata": {}}
    assert asked(cluster) == []


def test_a_fault_that_a_deleted_resource_left_in_the_pod() -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/chaos-mesh.org/v1alpha1"] = CHAOS_KINDS
    empty = {"metadata": {"namespace": "ml", "name": "a"}, "spec": {"iptables": None, "tcs": []}}
    cluster.places["/apis/chaos-mesh.org/v1alpha1/podnetworkchaos"] = [empty]
    assert asked(cluster) == []  # it stays, empty, after every NetworkChaos
    empty["spec"] = {"iptables": [{"name": "x", "source": "ml/gone"}]}
    assert asked(cluster) == ["ml/gone, which is deleted, has left its fault in pod ml/a | kubectl delete pod a -n ml"]
    assert asked(cluster, hit=("b",)) == []


NIGHTLY = {"metadata": {"name": "nightly", "namespace": "ml"}}


@pytest.mark.parametrize(
    ("cron", "selector", "near"),
    [
        ("*/10 * * * *", {}, True),
        ("*/10 * * * *", {"namespaces": ["elsewhere"]}, False),
        ("30 2 * * *", {}, False),
        ("0 15 9 * * 1-5", {}, True),  # with seconds; it is a Monday, 9 o'clock
        ("15 9 * * sat,sun", {}, False),
        ("15 9 13 * fri", {}, False),
        ("15 9 2 * fri", {}, True),  # cron: the day of the month or the day of the week
        ("CRON_TZ=Asia/Tokyo 30 18 * * *", {}, True),
        ("CRON_TZ=Asia/Tokyo 30 9 * * *", {}, False),
        ("@daily", {}, False),
        ("@every 2h", {}, True),
        ("at noon", {}, True),  # what nobody understands may be now
    ],
)
def test_a_schedule_that_may_start_chaos_on_the_target(
    monkeypatch: pytest.MonkeyPatch, cron: str, selector: dict[str, Any], near: bool
) -> None:
    monkeypatch.setattr(rivals, "_now", lambda: datetime(2026, 11, 2, 9, 0, 30, tzinfo=timezone.utc))
    cluster = Paper(PODS)
    cluster.places["/apis/chaos-mesh.org/v1alpha1"] = CHAOS_KINDS
    schedule = NIGHTLY | {"spec": {"schedule": cron, "type": "PodChaos", "podChaos": {"selector": selector}}}
    cluster.places["/apis/chaos-mesh.org/v1alpha1/schedules"] = [schedule]
    said = asked(cluster)
    assert [o.partition(" | ")[0] for o in said] == (
        ["Schedule ml/nightly may start chaos on the target within the hour"] if near else []
    )
    schedule["metadata"] = NIGHTLY["metadata"] | {"annotations": {"experiment.chaos-mesh.org/pause": "true"}}
    assert asked(cluster) == []


@pytest.mark.parametrize(
    ("plan", "near"),
    [
        ({"now": True}, True),
        ({"once": {"executionTime": "2026-11-02T09:30:00Z"}}, True),
        ({"once": {"executionTime": "2026-11-02T11:30:00Z"}}, False),
        ({"repeat": {"properties": {"minChaosInterval": {"hour": {"everyNthHour": 8}}}}}, True),
        ({"repeat": {"workHours": {"includedHours": "2-4"}}}, False),
        ({"repeat": {"workDays": {"includedDays": "Mon,Tue"}}}, True),
        ({"repeat": {"workDays": {"includedDays": "Sat,Sun"}}}, False),
        ({"repeat": {"timeRange": {"endTime": "2026-11-01T00:00:00Z"}}}, False),
    ],
)
def test_a_litmus_schedule_that_may_start_an_engine(
    monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], near: bool
) -> None:
    monkeypatch.setattr(rivals, "_now", lambda: datetime(2026, 11, 2, 9, 0, 30, tzinfo=timezone.utc))
    cluster = Paper(PODS)
    cluster.places["/apis/litmuschaos.io/v1alpha1"] = LITMUS_KINDS
    template = {"appinfo": {"appns": "ml"}}
    schedule = NIGHTLY | {"spec": {"schedule": plan, "engineTemplateSpec": template}}
    cluster.places["/apis/litmuschaos.io/v1alpha1/chaosschedules"] = [schedule]
    assert len(asked(cluster)) == near
    schedule["spec"]["scheduleState"] = "halt"
    assert asked(cluster) == []


@pytest.mark.parametrize(("accomplished", "namespace"), [("True", "ml"), ("False", "elsewhere"), ("False", "ml")])
def test_a_workflow_that_runs_may_start_more(accomplished: str, namespace: str) -> None:
    cluster = Paper(PODS)
    cluster.places["/apis/chaos-mesh.org/v1alpha1"] = CHAOS_KINDS
    inner = {"templateType": "StressChaos", "stressChaos": {"selector": {"namespaces": [namespace]}}}
    workflow = {
        "metadata": {"name": "day", "namespace": "chaos-testing"},
        "spec": {"templates": [{"templateType": "Serial"}, inner]},
        "status": {"conditions": [{"type": "Accomplished", "status": accomplished}]},
    }
    cluster.places["/apis/chaos-mesh.org/v1alpha1/workflows"] = [workflow]
    at_work = ["Workflow chaos-testing/day is at work on the target | its end, or its deletion"]
    assert asked(cluster) == (at_work if (accomplished, namespace) == ("False", "ml") else [])


def test_controllers_that_put_an_object_back_are_told_apart_from_people() -> None:
    by_hand: dict[str, Any] = {"metadata": {"managedFields": [{"manager": "kubectl-client-side-apply"}]}}
    assert rivals.controllers(by_hand) == set()
    by_hand["metadata"]["managedFields"].append({"manager": "argocd-controller"})
    by_hand["metadata"]["labels"] = {"kustomize.toolkit.fluxcd.io/name": "apps"}
    assert rivals.controllers(by_hand) == {"Argo CD", "Flux"}


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"matchLabels": {"app": "x"}}, True),
        ({"matchLabels": {"app": "y"}}, False),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["x", "z"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["x"]}]}, False),
        ({"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, False),
        ({"matchExpressions": [{"key": "app", "operator": "New"}]}, False),
    ],
)
def test_selectors_as_the_api_reads_them(selector: dict[str, Any], fits: bool) -> None:
    assert preflight.selects(selector, {"app": "x"}) is fits


def test_what_changed_during_the_baseline_is_seen_right_before_the_fault() -> None:
    def again(cluster: Paper) -> list[str]:
        site = Site(cast(Cluster, cluster), Kubernetes(context="x", namespace="ml"))
        refs = tuple(Ref("pod", "ml", n, f"uid-{n}") for n in ("a", "b", "c"))
        request = Request("pod_failure", refs[:1], refs, {}, Target(select="app=x", kubernetes=KubernetesObjects()))
        return [o.saw for o in preflight.again(site, request)]

    assert again(Paper(PODS)) == []
    closed = Paper(PODS)
    closed.places["/api/v1/namespaces/ml"]["metadata"]["labels"] = {}
    assert again(closed) == ["namespace ml has not opted in to faults"]
    assert "0 of the 2 pods" in again(Paper([pod("a"), pod("b", ready=False), pod("c", ready=False)]))[0]
    assert "carries the fault" in again(Paper([pod("a", lease="x"), pod("b"), pod("c")]))[0]


def test_a_namespace_where_the_sweeper_could_take_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_TOLD_WITHIN_S", -1.0)
    cluster = Paper(PODS)
    heart: dict[str, Any] = {"metadata": {"annotations": {reach.REACHES: "other ml"}}}
    cluster.places["/apis/coordination.k8s.io/v1/namespaces/mlchaos-system/leases/mlchaos-sweeper"] = heart
    assert asked(cluster) == []
    heart["metadata"]["annotations"][reach.REACHES] = "other ml-2"
    (said,) = asked(cluster)
    assert said.endswith("it could not take the fault away | kubectl apply -n ml -k manifests/rbac/namespace")


def test_what_another_tool_makes_the_sweeper_must_be_able_to_take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_TOLD_WITHIN_S", -1.0)
    cluster = Paper(PODS)
    heart: dict[str, Any] = {"metadata": {"annotations": {reach.REACHES: "ml"}}}
    cluster.places["/apis/coordination.k8s.io/v1/namespaces/mlchaos-system/leases/mlchaos-sweeper"] = heart

    def missed(backend: str) -> set[str]:
        return reach.beyond(cast(Cluster, cluster), "mlchaos-system", {"ml"}, backend)

    assert missed("litmus") == set(), "a sweeper that does not tell yet"
    heart["metadata"]["annotations"][reach.REACHES_TOOLS] = "ml/chaos_mesh other/litmus"
    assert (missed("litmus"), missed("chaos_mesh"), missed("kubernetes")) == ({"ml"}, set(), set())

    cluster.places["/api/v1/namespaces"] = [{"metadata": {"name": "ml"}}]
    cluster.denied = {"podchaos"}
    told = reach.Reach(cast(Cluster, cluster), cast(Clock, SimpleNamespace(monotonic=lambda: 0.0))).annotations()
    assert told == {reach.REACHES: "ml", reach.REACHES_TOOLS: "ml/litmus"}


def test_the_sweeper_tells_where_it_may_mend_and_forgets_nothing_in_an_outage() -> None:
    cluster, now = Paper([]), [0.0]
    names = [{"metadata": {"name": n}} for n in ("b", "a", "unbound")]
    cluster.places["/api/v1/namespaces"] = names
    cluster.allowed = lambda permission: permission.namespace != "unbound"  # type: ignore[method-assign]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    told = reach.Reach(cast(Cluster, cluster), cast(Clock, clock))
    assert told.told() == "a b"
    cluster.places["/api/v1/namespaces"] = DriverUnavailable("away")
    now[0] += 100
    assert told.told() == "a b"
