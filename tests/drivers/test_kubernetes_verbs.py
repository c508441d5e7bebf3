"""The verbs of the Kubernetes driver against an API server that is slow, lies, or serves others meanwhile."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.cluster import beside as module
from mlchaos_dagster.drivers.cluster.beside import beside
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.faults import handler
from mlchaos_dagster.engine.ports import Step, no_step
from mlchaos_dagster.errors import DriverUnavailable, Halted, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api
from tests.kube.test_leases import a_lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.005)


class Loop:
    """The engine's side: counts, and wants out at the `out`-th step."""

    def __init__(self, out: int = 10**9) -> None:
        self.out, self.steps, self.enough = out, 0, threading.Event()
        self.threads: set[int] = set()

    def __call__(self, done: int, total: int) -> None:
        self.steps += 1
        self.threads.add(threading.get_ident())
        if self.steps >= 5:
            self.enough.set()
        if self.steps >= self.out:
            raise Halted("stop")


def test_a_call_that_takes_long_neither_stops_the_measurements_nor_the_renewals() -> None:
    loop = Loop()
    assert beside(lambda _: loop.enough.wait(5.0), loop), "steps go on while one call is under way"
    assert loop.threads == {threading.get_ident()}


def test_who_wants_out_is_let_out_when_nothing_is_being_made_any_more() -> None:
    loop, made = Loop(out=1), list[str]()

    def work(step: Step) -> None:
        loop.enough.wait(5.0)
        made.append("first")
        step(1, 2)
        made.append("second")

    with pytest.raises(Halted):
        beside(work, loop)
    assert made == ["first"]


def test_what_the_work_raises_is_raised_and_a_stop_comes_before_it() -> None:
    def fails(step: Step) -> None:
        raise InjectFailed("no")

    with pytest.raises(InjectFailed):
        beside(fails, Loop())

    late = Loop(out=1)

    def fails_late(step: Step) -> None:
        late.enough.wait(5.0)
        raise InjectFailed("no")

    with pytest.raises(Halted):
        beside(fails_late, late)


def test_work_that_hangs_looks_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STUCK_S", 0.05)
    loop, never = Loop(), threading.Event()
    threading.Timer(0.3, never.set).start()
    beside(lambda _: never.wait(5.0), loop)
    assert 0 < loop.steps < 20


# -- what fired must have been ours ----------------------------------------------------------------------------------

PODS = "/api/v1/namespaces/ml/pods"
REF = Ref("pod", "ml", "a", "uid-a")


def pod(**metadata: Any) -> dict[str, Any]:
    meta = {"name": "a", "namespace": "ml", "uid": "uid-a", "resourceVersion": "1", **metadata}
    return {"metadata": meta, "spec": {"containers": [{"name": "c", "image": "app:1"}]}, "status": {"phase": "Running"}}


def site(*there: dict[str, Any]) -> Site:
    api = Api()
    api.objects = {f"{PODS}/{o['metadata']['name']}": o for o in there}
    return Site(cast(Cluster, api), Kubernetes(context="x", namespace="ml"))


def injection(kind: str, undo: dict[str, Any], ref: Ref = REF) -> Injection:
    lease = replace(a_lease("mlchaos-a", str(ref), ledger="nowhere"), kind=kind)
    return Injection(lease, (ref,), undo)


@pytest.mark.req("RX-04")
@pytest.mark.parametrize("there", [[], [pod(deletionTimestamp="2026-01-01T00:00:00Z")]], ids=["gone", "going"])
def test_a_pod_that_somebody_else_took_away_was_not_hit_by_us(there: list[dict[str, Any]]) -> None:
    failure, delete = handler("pod_failure"), handler("pod_delete")
    with pytest.raises(InjectFailed, match="not hit"):
        failure.inject(site(*there), injection("pod_failure", {"images": {}}), no_step)
    late = replace(injection("pod_delete", {}), lease=replace(injection("pod_delete", {}).lease, id="mlchaos-late"))
    delete.inject(where := site(*there), late, no_step)
    assert not delete.active(where, late).effective
    delete.inject(where := site(pod()), injection("pod_delete", {}), no_step)
    assert delete.active(where, injection("pod_delete", {})).effective


def test_a_pod_that_is_being_deleted_is_not_called_gone() -> None:
    going = site(pod(deletionTimestamp="2026-01-01T00:00:00Z"))
    (line,) = handler("pod_failure").active(going, injection("pod_failure", {})).lines
    assert "being deleted since 2026" in line


@pytest.mark.req("RX-04")
@pytest.mark.parametrize(("code", "ours"), [(0, True), (137, True), (3, False), (None, False)])
def test_a_container_that_ended_by_itself_was_not_killed_by_us(code: int | None, ours: bool) -> None:
    found = pod()
    over = {"terminated": {"containerID": "c://1", "exitCode": 137}}
    found["status"]["containerStatuses"] = [{"name": "c", "restartCount": 1, "lastState": over}]
    found["spec"]["ephemeralContainers"] = [{"name": "mlchaos-a", "command": ["python3", "9999999999"]}]
    state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
    found["status"]["ephemeralContainerStatuses"] = [{"name": "mlchaos-a", "state": state}]
    undo = {"containers": {"uid-a": {"name": "c", "containerID": "c://1", "restartCount": 0}}}
    assert handler("container_kill").active(site(found), injection("container_kill", undo)).effective == ours


def test_replicas_go_back_to_what_they_were_when_the_fault_was_made() -> None:
    path, ref = "/apis/apps/v1/namespaces/ml/deployments/web", Ref("deployment", "ml", "web", "uid-web")
    api = Api()
    meta = {"name": "web", "namespace": "ml", "uid": "uid-web", "resourceVersion": "1"}
    api.objects[path] = {"metadata": meta, "spec": {"replicas": 5}}  # 3 when the lease was written: an HPA came between
    where, fault = Site(cast(Cluster, api), Kubernetes(context="x", namespace="ml")), handler("scale_to_zero")
    lease = injection("scale_to_zero", {"replicas": {"uid-web": 3}}, ref)
    fault.inject(where, lease, no_step)
    assert api.objects[path]["spec"]["replicas"] == 0
    fault.recover(where, lease, no_step)
    assert api.objects[path]["spec"]["replicas"] == 5


def test_marks_that_a_late_controller_copies_are_taken_off_its_replica_set() -> None:
    """It copies annotations from what it last saw: until it has seen the workload as it is now, nothing is clean."""
    path, ref = "/apis/apps/v1/namespaces/ml/deployments/web", Ref("deployment", "ml", "web", "uid-web")
    meta = {"name": "web", "namespace": "ml", "uid": "uid-web", "resourceVersion": "1", "generation": 3}
    own = {
        "name": "web-1",
        "namespace": "ml",
        "uid": "uid-rs",
        "resourceVersion": "1",
        "ownerReferences": [{"uid": "uid-web"}],
    }
    api = Api()
    api.objects[path] = {"metadata": meta, "spec": {"replicas": 3}, "status": {"observedGeneration": 2}}
    copy = api.objects["/apis/apps/v1/namespaces/ml/replicasets/web-1"] = {"metadata": own}
    where, fault = Site(cast(Cluster, api), Kubernetes(context="x", namespace="ml")), handler("scale_to_zero")
    lease = injection("scale_to_zero", {"replicas": {"uid-web": 3}}, ref)
    fault.inject(where, lease, no_step)
    assert fault.active(where, lease).present

    def late(done: int, total: int) -> None:
        """The controller at work, while recovery waits for it: it writes what it saw, then it sees."""
        status = api.objects[path]["status"]
        if status["observedGeneration"] < 3:
            own["annotations"] = {LEASE: "mlchaos-a"}
            status["observedGeneration"] = 3

    fault.recover(where, lease, late)
    assert LEASE not in (
        api.objects["/apis/apps/v1/namespaces/ml/replicasets/web-1"]["metadata"].get("annotations") or {}
    )
    assert not fault.active(where, lease).present, copy


def test_a_pod_that_was_deleted_by_force_is_not_known_to_be_gone_while_its_node_is_cut_off() -> None:
    away = {"metadata": {"name": "n1"}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}
    where, lost = (
        site(),
        injection("network_partition", {"mode": "agent", "far": "", "pods": {str(REF): {"node": "n1"}}}),
    )
    lost = replace(lost, lease=replace(lost.lease, deadline_wall=time.time() + 30))
    cast(Api, where.cluster).objects["/api/v1/nodes/n1"] = away
    fault = handler("network_partition")
    with pytest.raises(DriverUnavailable, match="n1 does not answer"):
        fault.active(where, lost)
    with pytest.raises(RecoverFailed, match="n1 does not answer"):
        fault.recover(where, lost, no_step)
    over = replace(lost, lease=replace(lost.lease, deadline_wall=time.time() - 61))
    assert not fault.active(where, over).present, "the agent's own deadline is over"
    away["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
    assert not fault.active(where, lost).present, "the node is back, and its kubelet ends what is gone"


# -- an agent that is being started ----------------------------------------------------------------------------------


def starting(state: str = "waiting") -> tuple[Site, Api, Injection, dict[str, Any]]:
    found = pod(annotations={LEASE: "mlchaos-a"}, resourceVersion="before")
    found["spec"]["ephemeralContainers"] = [{"name": "mlchaos-a"}]
    found["status"]["ephemeralContainerStatuses"] = [{"name": "mlchaos-a", "state": {state: {}}}]
    where = site(found)
    return where, cast(Api, where.cluster), injection("network_partition", {"mode": "agent", "far": ""}), found


@pytest.mark.req("R1-03")
def test_an_agent_that_was_withdrawn_before_it_ran_is_never_told_to_begin() -> None:
    where, _, given, found = starting()
    fault = handler("network_partition")
    assert fault.active(where, given).present
    fault.recover(where, given, no_step)  # nothing is executed in the pod: this API server has no exec
    fault.recover(where, given, no_step)
    evidence = fault.active(where, given)
    assert not evidence.present and "withdrawn before it ran" in evidence.lines[0]
    found["status"]["ephemeralContainerStatuses"][0]["state"] = {"running": {}}  # and then it starts
    with pytest.raises(InjectFailed, match="recovered meanwhile"):
        agents.arm(where, REF, given.lease, threading.Event())


@pytest.mark.req("R1-03")
@pytest.mark.parametrize("first", ["recover", "arm"])
def test_of_arming_and_withdrawing_at_the_same_moment_one_wins(first: str) -> None:
    """Each time the other one writes between reading and writing; the node's word is late, and still says `waiting`."""
    where, api, given, found = starting()
    told: list[bool] = []

    def withdraw() -> None:
        told.append(agents.withdraw(where, REF, given.lease))

    def arm() -> None:
        try:
            agents.arm(where, REF, given.lease, threading.Event())
            told.append(True)
        except InjectFailed:
            told.append(False)

    sooner, later = (withdraw, arm) if first == "recover" else (arm, withdraw)
    api.before[2] = sooner  # between the read and the write of the other one
    later()
    assert told == [True, False]
    assert (agents.ARMED in found["metadata"]["annotations"]) == (first == "arm")
    if first == "arm":
        with pytest.raises(RecoverFailed, match="does not say what became"):
            handler("network_partition").recover(where, given, no_step)
        assert handler("network_partition").active(where, given).present


def test_who_was_told_to_stop_starts_and_arms_nothing_more() -> None:
    where, api, given, found = starting()
    halted = threading.Event()
    halted.set()
    before = found["metadata"]["resourceVersion"]
    with pytest.raises(InjectFailed, match="somebody said stop"):
        agents.arm(where, REF, given.lease, halted)
    with pytest.raises(InjectFailed, match="somebody said stop"):
        agents.add(where, REF, {"name": "mlchaos-b"}, given.lease, halted)
    assert found["metadata"]["resourceVersion"] == before


@pytest.mark.parametrize("kind", ["pod_failure", "pod_delete"])
def test_a_hundred_pods_are_looked_at_in_a_few_calls(kind: str) -> None:
    owner = {"kind": "ReplicaSet", "name": "web", "uid": "uid-rs", "controller": True}
    found = [pod(name=f"p{i}", uid=f"uid-{i}", ownerReferences=[owner]) for i in range(100)]
    for one in found:
        one["spec"]["restartPolicy"] = "Always"
    where, refs = site(*found), tuple(Ref.of("pod", o) for o in found)
    api, fault = cast(Any, where.cluster), handler(kind)
    api.patch = lambda path, body, **query: api._call(lambda: {})  # admission has nothing against it
    request = Request(kind, refs, refs, {}, Target(select="app=x", kubernetes=KubernetesObjects()))
    assert list(fault.objections(where, request)) == []
    undo = fault.undo(where, request, no_step)
    assert len(next(iter(undo.values()))) == 100
    lease = injection(kind, undo)
    seen = fault.active(where, replace(lease, refs=(*refs, REF)))
    assert len(seen.lines) >= 101 and "gone" in " ".join(seen.lines)
    assert api.calls <= 6


def test_a_loop_that_is_held_up_holds_up_what_is_being_made() -> None:
    held_up, made = threading.Event(), list[int]()

    def step(done: int, total: int) -> None:
        if done:
            assert not held_up.wait(0.2)

    def work(told: Step) -> None:
        for i in (1, 2):
            made.append(i)
            told(i, 2)
            assert len(made) == i

    began = time.monotonic()
    beside(work, step)
    assert made == [1, 2] and time.monotonic() - began >= 0.4
