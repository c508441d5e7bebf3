"""`bad_model` on a Rollout, call by call on a scripted API server."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes import rollout_actions
from mlchaos_dagster.drivers.kubernetes.faults import bad_model, handler
from mlchaos_dagster.engine.ports import no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable
from mlchaos_dagster.kube.client import Cluster, NotFound, Site
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.rollouts import HASH
from mlchaos_dagster.kube.selecting import select
from tests.kube.fake_api import Api, Crash
from tests.kube.test_leases import a_lease

Object = dict[str, Any]
ROLLOUT, SETS = "/apis/argoproj.io/v1alpha1/namespaces/ml/rollouts/web", "/apis/apps/v1/namespaces/ml/replicasets"
PODS = "/api/v1/namespaces/ml/pods"
REF = Ref("rollout", "ml", "web", "uid-web")
WHERE = KubernetesObjects(kind="Rollout", version_variable="MODEL_VERSION", bad_version="v2")


def containers(version: str) -> list[Object]:
    """The second one says the version, beside what else it is told."""
    told = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {}}}, {"name": "MODEL_VERSION", "value": version}]
    return [{"name": "proxy", "image": "p:1"}, {"name": "model", "image": "m:1", "env": told}]


def replica_set(name: str, version: str, there: int) -> Object:
    meta = {"name": name, "namespace": "ml", "uid": name, "resourceVersion": "1", "annotations": {}}
    spec = {"template": {"spec": {"containers": containers(version)}}}
    owned = {**meta, "labels": {HASH: name}, "ownerReferences": [{"uid": "uid-web", "controller": True}]}
    return {"metadata": owned, "spec": spec, "status": {"replicas": there, "readyReplicas": there}}


def pod(name: str, of: str, *, going: bool = False) -> Object:
    meta: Object = {"name": name, "uid": name, "labels": {HASH: of}}
    meta["ownerReferences"] = [{"uid": of, "controller": True}]
    if going:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ready = [{"type": "Ready", "status": "False" if going else "True"}]
    return {"metadata": meta, "status": {"phase": "Running", "conditions": ready}}


def server(version: str = "v1", bad: int = 0) -> Api:
    """A Rollout at rest, a revision of v2 from earlier days beside it."""
    api = Api()
    meta = {
        "name": "web",
        "namespace": "ml",
        "uid": "uid-web",
        "resourceVersion": "1",
        "generation": 2,
        "annotations": {},
    }
    status = {"phase": "Healthy", "observedGeneration": "2", "stableRS": "a", "currentPodHash": "a"}
    spec = {"template": {"spec": {"containers": containers(version)}}}
    api.objects = {
        ROLLOUT: {"metadata": meta, "spec": spec, "status": status},
        f"{SETS}/web-a": replica_set("web-a", "v1", 4),
        f"{SETS}/web-b": replica_set("web-b", "v2", bad),
    }
    return api


def site(api: Api) -> Site:
    return Site(cast(Cluster, api), Kubernetes(context="x", namespace="ml"))


def request(where: KubernetesObjects = WHERE.model_copy(update={"container": "model"})) -> Request:  # noqa: B008
    return Request("bad_model", (REF,), (REF,), {}, Target(select="app=web", kubernetes=where))


def injection(api: Api) -> Injection:
    lease = replace(a_lease("mlchaos-a", str(REF), ledger="nowhere"), kind="bad_model")
    return Injection(lease, (REF,), handler("bad_model").undo(site(api), request(), no_step))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once."""
    monkeypatch.setattr(bad_model, "_LOOK_S", 0.0)


def template(api: Api) -> Object:
    return api.objects[ROLLOUT]["spec"]["template"]


@pytest.mark.req("R0-07", "RX-01")
def test_whoever_dies_at_whichever_call_recovery_brings_the_very_template_back() -> None:
    fault, at, ended = handler("bad_model"), 0, False
    while not ended:
        for late in (False, True):
            api = server()
            before, one = copy.deepcopy(template(api)), injection(api)
            api.crash_at, api.late = api.calls + at + 1, late
            try:
                fault.inject(site(api), one, no_step)
                ended = True
            except Crash:
                pass
            api.restart()
            if ended:
                assert template(api)["spec"]["containers"] == containers("v2")
                assert fault.active(site(api), one).present and not fault.active(site(api), one).effective
            fault.recover(site(api), one, no_step)
            assert template(api) == before
            assert api.objects[ROLLOUT]["metadata"]["annotations"] == {}
            assert not fault.active(site(api), one).present
        at += 1
    assert at > 2


def test_what_others_ship_stays_and_what_they_change_beside_it_too() -> None:
    fault, api = handler("bad_model"), server()
    one = injection(api)
    fault.inject(site(api), one, no_step)
    template(api)["spec"]["containers"][1]["image"] = "m:2"
    fault.recover(site(api), one, no_step)
    assert [c["image"] for c in template(api)["spec"]["containers"]] == ["p:1", "m:2"]
    assert template(api)["spec"]["containers"][1]["env"] == containers("v1")[1]["env"]
    api = server()
    one = injection(api)
    fault.inject(site(api), one, no_step)
    template(api)["spec"]["containers"] = containers("v3")
    fault.recover(site(api), one, no_step)
    assert template(api)["spec"]["containers"] == containers("v3")
    assert not fault.active(site(api), one).present


def test_pods_that_outlive_their_template_are_no_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_model, "_GONE_S", 0.0)
    fault, api = handler("bad_model"), server()
    one = injection(api)
    fault.inject(site(api), one, no_step)
    api.objects[f"{PODS}/a"], api.objects[f"{PODS}/b"] = pod("a", "web-a"), pod("b", "web-b")
    assert fault.active(site(api), one).effective
    fault.recover(site(api), one, no_step)
    found = fault.active(site(api), one)
    assert found.present and not found.effective and "1 of 1 pods of v2 ready" in found.lines[0]
    api.objects[f"{PODS}/b"] = pod("b", "web-b", going=True)
    assert fault.active(site(api), one).present, "who is connected to it is still answered"
    del api.objects[f"{PODS}/b"]
    assert not fault.active(site(api), one).present


def test_marks_that_the_controller_spreads_late_are_taken_away_too() -> None:
    """It goes on from what it read: the first look after recovery finds nothing, the second one does."""
    fault, api = handler("bad_model"), server()
    one = injection(api)
    fault.inject(site(api), one, no_step)
    spread = {"mlchaos.dev/lease": "mlchaos-a"}
    looks = iter(range(100))

    def step(done: int, total: int) -> None:
        if next(looks) == 1:
            api.objects[f"{SETS}/web-b"]["metadata"]["annotations"] |= spread

    fault.recover(site(api), one, step)
    assert api.objects[f"{SETS}/web-b"]["metadata"]["annotations"] == {}


def test_a_lease_that_has_lost_its_content_is_mended_from_the_object() -> None:
    fault, api = handler("bad_model"), server()
    one = injection(api)
    fault.inject(site(api), one, no_step)
    fault.recover(site(api), replace(one, undo={}), no_step)
    assert template(api)["spec"]["containers"] == containers("v1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version_variable": ""}, "says neither which variable"),
        ({"version_variable": "TOKEN"}, "does not say its version in TOKEN (valueFrom)"),
        ({"container": "proxy"}, "does not say its version in MODEL_VERSION"),
        ({"container": "none"}, "has no container none"),
        ({"bad_version": "v1"}, "serves v1 already"),
    ],
)
def test_what_cannot_be_shipped_is_refused_beforehand(change: dict[str, str], words: str) -> None:
    where = WHERE.model_copy(update={"container": "model", **change})
    (said,) = handler("bad_model").objections(site(server()), request(where))
    assert words in said.saw


@pytest.mark.parametrize("status", [{"phase": "Degraded"}, {"observedGeneration": "1"}, {"currentPodHash": "b"}])
def test_a_rollout_that_is_not_at_rest_is_left_alone(status: dict[str, str]) -> None:
    api = server()
    api.objects[ROLLOUT]["status"] |= status
    (said,) = handler("bad_model").objections(site(api), request())
    assert "a version is under way, or was taken back" in said.saw
    api.objects.clear()
    with pytest.raises(DriverError, match="is gone"):
        handler("bad_model").undo(site(api), request(), no_step)


def test_a_cluster_that_knows_no_rollouts_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def list_of(path: str, **_: str) -> list[Object]:
        raise NotFound(f"GET {path}: the server could not find the requested resource (404)", 404)

    api = Api()
    monkeypatch.setattr(api, "list", list_of)
    with pytest.raises(DriverUnavailable, match="knows no Rollout; Argo Rollouts is not installed"):
        select(site(api), request().target)


def test_an_abort_is_asked_for_only_where_a_version_is_under_way() -> None:
    api = server()
    status = api.objects[ROLLOUT]["status"]
    assert not rollout_actions.needs("abort_rollout", api.objects[ROLLOUT], {})
    status |= {"currentPodHash": "b", "pauseConditions": [{"reason": "CanaryPauseStep"}]}
    assert rollout_actions.needs("abort_rollout", api.objects[ROLLOUT], {})
    assert rollout_actions.needs("resume_rollout", api.objects[ROLLOUT], {"retry": False})
    status["abort"] = True
    assert not rollout_actions.needs("abort_rollout", api.objects[ROLLOUT], {})
    assert not rollout_actions.needs("resume_rollout", api.objects[ROLLOUT], {"retry": False})
    assert rollout_actions.needs("resume_rollout", api.objects[ROLLOUT], {"retry": True})
