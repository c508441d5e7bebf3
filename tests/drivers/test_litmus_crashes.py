"""Whoever dies at whichever call, and whoever comes in between: a recovery leaves nothing of a ChaosEngine, or says so.

The cluster is a dictionary; Litmus in it does at once what its operator and an experiment would do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.litmus import handler, lost, recovery
from mlchaos_dagster.drivers.litmus.engine import collection
from mlchaos_dagster.drivers.litmus.handler import LitmusFault
from mlchaos_dagster.drivers.litmus.tracks import Tracks
from mlchaos_dagster.engine.ports import Lease, no_step
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import DriverError, InjectFailed, LeaseRefused, RecoverFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.leases import KEPT, NOWHERE
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api, Clock, Crash

LEASE_ID = "mlchaos-web-0123456789"
PODS, JOBS = "/api/v1/namespaces/ml/pods", "/apis/batch/v1/namespaces/ml/jobs"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies"
ENGINES, RESULTS = collection("ml", "chaosengines"), collection("ml", "chaosresults")
MOST_CALLS = 80


class World(Api):
    """A namespace with one pod, and Litmus."""

    def __init__(self, *, operator: bool = True, keeps_policy: bool = False) -> None:
        super().__init__()
        self.operator, self.keeps_policy = operator, keeps_policy
        self.make(PODS, "web-a", labels={"app": "web"})
        self.fired = 0

    def make(self, path: str, name: str, **meta: Any) -> dict[str, Any]:
        new = {"metadata": {"name": name, "namespace": "ml", "uid": f"uid-{name}", "resourceVersion": "0", **meta}}
        self.objects[f"{path}/{name}"] = new
        return new

    def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        made = super().create(path, body)
        if path == ENGINES:
            self.works(f"{path}/{body['metadata']['name']}")
        return made

    def patch(self, path: str, body: Mapping[str, Any], *, how: str = "merge", **query: str) -> dict[str, Any]:
        found = super().patch(path, body, how=how, **query)
        if path.startswith(ENGINES):
            self.works(path)
        return found

    def delete(self, path: str, *, uid: str = "", resource_version: str = "", **given: Any) -> bool:
        found = self.objects.get(path)
        if found is not None and found["metadata"].get("finalizers"):
            self._call(lambda: found["metadata"].setdefault("deletionTimestamp", "now"))
            if path.startswith(ENGINES):
                self.works(path)
            return True
        done = super().delete(path, uid=uid, resource_version=resource_version, **given)
        if done and path.startswith(PODS) and not self.keeps_policy and "chaosUID" in found["metadata"]["labels"]:  # type: ignore[index]
            self.ends()
        return done

    def ends(self) -> None:
        """An experiment that is told to end undoes its fault."""
        for path in [p for p in self.objects if p.startswith(POLICIES)]:
            del self.objects[path]

    def works(self, path: str) -> None:
        """The operator, and what it starts."""
        engine = self.objects.get(path)
        if engine is None:
            return
        if not engine["metadata"].get("finalizers") and engine["metadata"].get("deletionTimestamp"):
            del self.objects[path]
            return
        if not self.operator and "status" in engine:
            return
        meta, uid = engine["metadata"], engine["metadata"]["uid"]
        labels = {**meta["labels"], "chaosUID": uid}
        if meta.get("deletionTimestamp") or (engine["spec"]["engineState"] == "stop" and "status" in engine):
            for where in [
                p for p, o in self.objects.items() if (o["metadata"].get("labels") or {}).get("chaosUID") == uid
            ]:
                if where.startswith((PODS, JOBS)):
                    del self.objects[where]
            if not self.keeps_policy:
                self.ends()
            for result in [o for p, o in self.objects.items() if p.startswith(RESULTS)]:
                result["metadata"]["labels"] = {"chaosUID": uid}
            meta.pop("finalizers", None)
            engine["status"] = {"engineStatus": "stopped"}
            if meta.get("deletionTimestamp"):
                del self.objects[path]
        elif engine["spec"]["engineState"] == "active" and "status" not in engine:
            self.fired += 1
            meta["finalizers"] = ["chaosengine.litmuschaos.io/finalizer"]
            engine["status"] = {"engineStatus": "initialized"}
            name = meta["name"]
            self.make(PODS, f"{name}-runner", labels=labels)
            self.make(JOBS, "pod-network-partition-x", labels=labels)
            self.make(PODS, "pod-network-partition-x-y", labels=labels)
            result = self.make(RESULTS, f"{name}-pod-network-partition", labels=labels)
            result |= {
                "spec": {"engine": name},
                "status": {"experimentStatus": {"phase": "Running", "verdict": "Awaited"}},
            }
            self.make(POLICIES, "np-x", labels={"chaosUID": uid})

    def ours(self) -> list[str]:
        """Whatever is left, marks on the pod included."""
        left = [p for p in self.objects if not p.endswith("/web-a")]
        pod = self.objects[f"{PODS}/web-a"]["metadata"]
        return left + [k for k in (*(pod.get("labels") or {}), *(pod.get("annotations") or {})) if "mlchaos" in k]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes when somebody sleeps."""
    clock = Clock()
    for module in (recovery, handler):
        monkeypatch.setattr(module, "time", clock)


def case(world: World) -> tuple[Site, Injection]:
    options = Kubernetes.model_validate(
        {"namespace": "ml", "context": "x", "litmus": {"inject_within": "1s", "recover_within": "300ms"}}
    )
    ref = Ref("pod", "ml", "web-a", "uid-web-a")
    selection = {"namespace": "ml", "pods": ["web-a"], "nodes": [], "workloads": [], "kind": "deployment"}
    undo = {"namespace": "ml", "selection": selection, "peers": {}, "told": True, "inject_within": 3.0, "before": {}}
    lease = Lease(
        id=LEASE_ID,
        run_id="r",
        experiment="web",
        environment="e",
        driver="litmus",
        kind="network_isolation",
        targets=(str(ref),),
        params={},
        undo={KEPT: NOWHERE},
        duration_s=30.0,
        opened_wall=time.time(),
        deadline_wall=time.time() + 30,
        owner=current_owner(),
        token=1,
    )
    return Site(cast(Cluster, world), options), Injection(lease, (ref,), undo)


FAULT = LitmusFault("network_isolation")


def recovered(world: World) -> None:
    site, injection = case(world)
    FAULT.recover(site, injection, no_step)
    assert world.ours() == []
    assert not FAULT.active(site, injection).present


def test_from_end_to_end() -> None:
    world = World()
    site, injection = case(world)
    FAULT.inject(site, injection, no_step)
    assert world.fired == 1 and FAULT.active(site, injection).present
    recovered(world)
    recovered(world)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("operator", [True, False], ids=["up", "down"])
def test_a_death_at_every_call_of_the_injection(late: bool, operator: bool) -> None:
    for k in range(1, MOST_CALLS):
        world = World()
        world.crash_at, world.late = k, late
        site, injection = case(world)
        try:
            FAULT.inject(site, injection, no_step)
        except Crash:
            world.restart()
            world.operator = operator
            recovered(world)
            continue
        assert k > 8
        return
    raise AssertionError("the injection has no end")


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("operator", [True, False], ids=["up", "down"])
def test_a_death_and_an_outage_at_every_call_of_the_recovery(late: bool, operator: bool) -> None:
    for k in range(1, MOST_CALLS):
        world = World(keeps_policy=bool(k % 2))
        site, injection = case(world)
        FAULT.inject(site, injection, no_step)
        world.operator, world.late = operator, late
        setattr(world, "fail_at" if late else "crash_at", world.calls + k)
        try:
            FAULT.recover(site, injection, no_step)
        except (Crash, DriverError):
            world.restart()
            recovered(world)
            continue
        assert k > 8
        return
    raise AssertionError("the recovery has no end")


def test_a_recovery_before_every_call_of_the_injection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever injects sleeps at that call for longer than somebody else's recovery: he starts nothing, and leaves nothing."""
    closed: list[bool] = []

    def held(site: Site, lease: Lease) -> None:
        if closed:
            raise LeaseRefused("closed")

    monkeypatch.setattr(leases, "held", held)
    for k in range(1, MOST_CALLS):
        world = World()
        site, injection = case(world)
        fired: list[int] = []

        def other(world: World = world, fired: list[int] = fired) -> None:
            fired.append(world.fired)
            recovered(world)
            closed.append(True)

        closed.clear()
        world.before[k] = other
        with contextlib.suppress(InjectFailed, LeaseRefused):
            FAULT.inject(site, injection, no_step)
        if not fired:
            return
        assert world.fired == fired[0], f"started after the recovery before call {k}"
        assert world.ours() == [], f"left by who was recovered before call {k}"
    raise AssertionError("the injection has no end")


def test_a_fault_that_does_not_go_keeps_the_engine() -> None:
    """The finalizer is dropped only after the proof."""
    world = World(operator=True)
    site, injection = case(world)
    FAULT.inject(site, injection, no_step)
    world.operator = False
    stays = world.objects[f"{PODS}/pod-network-partition-x-y"]
    stays["metadata"]["finalizers"] = ["example.com/hold"]
    with pytest.raises(RecoverFailed, match="does not end: pod-network-partition-x-y"):
        FAULT.recover(site, injection, no_step)
    engine = world.objects[f"{ENGINES}/{LEASE_ID}"]
    assert engine["metadata"]["finalizers"]
    del stays["metadata"]["finalizers"], world.objects[f"{PODS}/pod-network-partition-x-y"]
    recovered(world)


def test_a_target_that_litmus_calls_injected_is_not_clean() -> None:
    """Of an experiment that nobody but Litmus can see: its helper died, and its last word is all there is."""
    world = World()
    site, injection = case(world)
    FAULT.inject(site, injection, no_step)
    result = next(o for p, o in world.objects.items() if p.startswith(RESULTS))
    result["metadata"]["annotations"] = {"pod/web-a": "injected"}
    for _ in range(2):
        with pytest.raises(RecoverFailed, match="ml/web-a.*injected"):
            FAULT.recover(site, injection, no_step)
        assert FAULT.active(site, injection).present
    del world.objects[f"{PODS}/web-a"]  # and what was in it with it
    FAULT.recover(site, injection, no_step)
    assert not FAULT.active(site, injection).present and not world.objects


def test_a_lost_engine_whose_result_says_injected_is_not_called_mended() -> None:
    world = World()
    site, injection = case(world)
    FAULT.inject(site, injection, no_step)
    result = next(o for p, o in world.objects.items() if p.startswith(RESULTS))
    result["metadata"]["annotations"] = {"pod/web-a": "injected", "pod/web-z": "injected"}
    path = f"{ENGINES}/{LEASE_ID}"
    with pytest.raises(RecoverFailed, match="ml/web-a: injected"):
        lost.take_away(site, path, injection.lease, no_step)
    assert path in world.objects, "found again by the next"
    del world.objects[f"{PODS}/web-a"]
    assert "removed" in lost.take_away(site, path, injection.lease, no_step)
    assert not world.objects


def test_what_a_killed_helper_left_is_ended_at_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the real one: the pod of a helper that was killed does not end while its stressor lives in the target."""
    clock, ended = Clock(), list[float]()

    class Eyes:
        def end(self, *_: Any) -> None:
            ended.append(clock.monotonic())
            raise DriverError("one of two could not be asked", driver="litmus", verb="recover")

    def find(*_: Any) -> Tracks:
        helper = {"metadata": {"name": "helper", "namespace": "ml", "deletionTimestamp": "now"}}
        return Tracks(pods=[] if ended else [helper])

    monkeypatch.setattr(recovery, "time", clock)
    monkeypatch.setattr(recovery.tracks, "find", find)
    monkeypatch.setattr(recovery, "_removed", lambda *_: None)
    eyes = cast("Any", type("Whole", (Eyes,), {"clean": lambda *_: None, "close": lambda *_: None})())
    site = Site(cast("Cluster", World()), Kubernetes(context="c", namespace="ml"))
    began = clock.monotonic()
    recovery.take_away(site, cast("Injection", None), recovery.Place("ml", "e", "", LEASE_ID), eyes, no_step)
    assert len(ended) == 1 and ended[0] - began < 10
