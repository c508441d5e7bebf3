"""The ledger of a cluster against an API server that fails, dies and lets others go first, at every single call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.engine.sweep import RenewalObserver
from mlchaos_dagster.errors import LeaseRefused, StoreError
from mlchaos_dagster.kube import leases as module
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.leases import KEPT, NOWHERE, ClusterLedger, held
from tests.kube.fake_api import Api, Clock, Crash

SPACE = "control"
POD = "pod/shop/web-1@uid-web-1"
PODS = "/api/v1/namespaces/shop/pods"
SETS = "/apis/apps/v1/namespaces/shop/replicasets"
REGISTER = f"/api/v1/namespaces/{SPACE}/configmaps/mlchaos-ledger"


def owner(pid: int = 1) -> Owner:
    return Owner(pid=pid, started=float(pid), boot_id="b", host=f"machine-{pid}")


def a_lease(lease_id: str = "mlchaos-a", *targets: str, pid: int = 1, **undo: Any) -> Lease:
    return Lease(
        id=lease_id,
        run_id=f"run-of-{lease_id}",
        experiment="exp",
        environment="cluster",
        driver="kubernetes",
        kind="pod_failure",
        targets=targets or (POD,),
        params={"x": 1},
        undo={"fault": {}, **undo},
        duration_s=10.0,
        opened_wall=1.0,
        deadline_wall=31.0,
        owner=owner(pid),
    )


def ledger(api: Api, clock: Clock | None = None, pid: int = 1) -> ClusterLedger:
    return ClusterLedger(cast(Cluster, api), SPACE, clock or Clock(), owner(pid))


def left(api: Api, kind: str) -> list[str]:
    return [path for path in api.objects if f"/{kind}/" in path]


def calls_of(work: Callable[[Api], Any]) -> int:
    api = Api()
    work(api)
    return api.calls


def pod(name: str, controller: str = "rs-1", node: str = "node-1") -> dict[str, Any]:
    owners = [{"kind": "ReplicaSet", "name": controller, "uid": f"uid-{controller}"}]
    return {"metadata": {"name": name, "uid": f"uid-{name}", "ownerReferences": owners}, "spec": {"nodeName": node}}


def workload(api: Api) -> None:
    """A Deployment with two pods on two nodes."""
    for name, node in (("web-1", "node-1"), ("web-2", "node-2")):
        api.objects[f"{PODS}/{name}"] = pod(name, node=node)
    owners = [{"kind": "Deployment", "name": "web", "uid": "uid-web"}]
    api.objects[f"{SETS}/rs-1"] = {"metadata": {"name": "rs-1", "uid": "uid-rs-1", "ownerReferences": owners}}


# -- open, renew, close ---------------------------------------------------------------------------------------------


def test_what_was_opened_is_read_back_whole_and_leaves_nothing_when_closed() -> None:
    api = Api()
    mine = ledger(api)
    lease = mine.open(a_lease(secret="x" * 10))
    other = ledger(api, pid=2)
    assert other.leases() == (lease,)
    mine.renew(lease)
    mine.check(lease)
    assert ledger(api, pid=3).beat(lease.id) == 2  # opened, renewed
    mine.close(lease, ("clean",))
    assert left(api, "leases") == left(api, "secrets") == []
    with pytest.raises(LeaseRefused):
        mine.renew(lease)


def test_content_of_many_megabytes_is_cut_into_secrets_that_the_api_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlchaos_dagster.kube.lease_objects.CHUNK_BYTES", 64)
    api = Api()
    lease = ledger(api).open(a_lease(big=[f"{i:x}" for i in range(500)]))
    assert len(left(api, "secrets")) > 5
    assert ledger(api, pid=2).leases() == (lease,)


def test_stop_and_take_over_are_seen_at_the_next_renewal() -> None:
    api = Api()
    mine, other = ledger(api), ledger(api, pid=2)
    lease = mine.open(a_lease())
    other.request_stop(lease.id, "enough")
    mine.renew(lease)  # the object was changed since: renewed all the same
    assert mine.stop_requested(lease.run_id) == "enough"
    taken = other.fence(lease.id, "sweeper")
    assert taken.token > lease.token and taken.targets == lease.targets and taken.owner == lease.owner
    for verb in (mine.renew, mine.check, lambda x: mine.close(x, ())):
        with pytest.raises(LeaseRefused):
            verb(lease)
    other.close(taken, ())
    assert left(api, "leases") == []


# -- races and crashes ----------------------------------------------------------------------------------------------


@pytest.mark.req("R0-10")
def test_of_two_that_want_one_target_exactly_one_wins_wherever_they_meet() -> None:
    total = calls_of(lambda api: ledger(api).open(a_lease()))
    for used in (False, True):
        for at in range(1, total + 1):
            api = Api()
            if used:  # with a register, and without one
                first = ledger(api, pid=9)
                first.close(first.open(a_lease("mlchaos-z", "pod/shop/other@o")), ())
            won: list[str] = []

            def attempt(lease_id: str, pid: int, api: Api = api, won: list[str] = won) -> None:
                try:
                    ledger(api, pid=pid).open(a_lease(lease_id, pid=pid))
                    won.append(lease_id)
                except LeaseRefused:
                    pass

            api.before[api.calls + at] = lambda go=attempt: go("mlchaos-b", 2)
            attempt("mlchaos-a", 1)
            assert len(won) == 1, (used, at, won)
            assert [p.rpartition("/")[2] for p in left(api, "leases")] == won


@pytest.mark.req("R0-10")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_wherever_open_breaks_off_the_target_is_free_or_held_by_what_a_sweeper_clears(crash: bool, late: bool) -> None:
    for at in range(1, calls_of(lambda api: ledger(api).open(a_lease())) + 1):
        api = Api()
        api.late = late
        setattr(api, "crash_at" if crash else "fail_at", at)
        with pytest.raises((Crash, StoreError)):
            ledger(api).open(a_lease())
        api.restart()
        _swept_and_free(api)


@pytest.mark.req("R0-10")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("verb", ["renew", "fence", "close"])
def test_wherever_another_verb_breaks_off_a_sweeper_clears_it(verb: str, crash: bool, late: bool) -> None:
    def work(api: Api, lease: Lease, mine: ClusterLedger) -> None:
        if verb == "fence":
            ledger(api, pid=2).fence(lease.id, "sweeper")
        else:
            getattr(mine, verb)(*((lease, ()) if verb == "close" else (lease,)))

    at = 0
    while True:
        at += 1
        api = Api()
        mine = ledger(api)
        lease = mine.open(a_lease())
        api.late = late
        setattr(api, "crash_at" if crash else "fail_at", api.calls + at)
        before = api.calls
        try:
            work(api, lease, mine)
            done = api.calls - before < at
        except (Crash, StoreError):
            done = False
        api.restart()
        if verb == "close" and not crash and f"/{SPACE}/leases/{lease.id}" in "".join(left(api, "leases")):
            mine.close(lease, ())  # the owner tries again
        _swept_and_free(api)
        if done:
            break
    assert at > 1


def _swept_and_free(api: Api) -> None:
    sweeper = ledger(api, pid=3)
    assert not sweeper.unreadable()
    for lease in sweeper.leases():
        sweeper.close(sweeper.fence(lease.id, "sweeper"), ())
    for path, uid in sweeper.orphans().items():
        api.delete(path, uid=uid)
    assert left(api, "leases") == left(api, "secrets") == []
    ledger(api, pid=4).open(a_lease("mlchaos-next", pid=4))


def test_a_lost_answer_to_closing_is_no_error_the_second_time() -> None:
    api = Api()
    mine = ledger(api)
    lease = mine.open(a_lease())
    api.late, api.fail_at = True, api.calls + 2
    with pytest.raises(StoreError):
        mine.close(lease, ())
    mine.close(lease, ())
    assert left(api, "leases") == left(api, "secrets") == []


def test_a_register_that_somebody_deleted_lets_nobody_onto_a_held_target() -> None:
    api = Api()
    ledger(api).open(a_lease())
    del api.objects[REGISTER]
    with pytest.raises(LeaseRefused, match="held by run run-of-mlchaos-a"):
        ledger(api, pid=2).open(a_lease("mlchaos-b", pid=2))


# -- what keeps a lease out -----------------------------------------------------------------------------------------


def test_a_workload_and_its_pods_exclude_each_other_and_its_pods_do_not() -> None:
    for first, second, refused in (
        (POD, "deployment/shop/web@uid-web", True),
        ("deployment/shop/web@uid-web", POD, True),
        (POD, "node//node-1@uid-node-1", True),
        ("node//node-1@uid-node-1", POD, True),
        (POD, "node//node-2@uid-node-2", False),
        (POD, "pod/shop/web-2@uid-web-2", False),
    ):
        api = Api()
        workload(api)
        ledger(api).open(a_lease("mlchaos-a", first))
        if not refused:
            ledger(api, pid=2).open(a_lease("mlchaos-b", second, pid=2))
            continue
        with pytest.raises(LeaseRefused, match="held by run"):
            ledger(api, pid=2).open(a_lease("mlchaos-b", second, pid=2))
        assert [p.rpartition("/")[2] for p in left(api, "leases")] == ["mlchaos-a"]


def test_the_lever_keeps_out_also_who_looked_before_it_was_pulled() -> None:
    for at in range(1, calls_of(lambda api: ledger(api).open(a_lease())) + 1):
        api = Api()
        seen: list[tuple[Lease, ...]] = []

        def pull(api: Api = api, seen: list[tuple[Lease, ...]] = seen) -> None:
            ledger(api, pid=2).lever.pull("fire")
            seen.append(ledger(api, pid=2).leases())

        api.before[at] = pull
        try:
            ledger(api).open(a_lease())
            assert seen[0], f"opened at call {at}, unseen by who pulled the lever"
        except LeaseRefused as e:
            assert "fire" in str(e)
            assert left(api, "leases") == []


@pytest.mark.parametrize("how", ["gone", "changed", "of another"])
def test_content_that_is_gone_or_changed_keeps_everybody_out_and_is_still_named(how: str) -> None:
    api = Api()
    mine = ledger(api)
    mine.open(a_lease())
    mine.open(a_lease("mlchaos-b", "pod/shop/b@b"))
    path = f"/api/v1/namespaces/{SPACE}/secrets/mlchaos-a-0"
    if how == "gone":
        del api.objects[path]
    else:
        other = api.objects[path.replace("-a-", "-b-")]["data"]["lease"] if how == "of another" else "QUJD"
        api.objects[path]["data"]["lease"] = other
    other_side = ledger(api, pid=2)
    assert other_side.unreadable() == (f"{SPACE}/mlchaos-a",)
    assert [x.id for x in other_side.leases()] == ["mlchaos-b"]
    with pytest.raises(LeaseRefused, match="cannot be read"):
        other_side.open(a_lease("mlchaos-c", "pod/shop/c@c", pid=2))
    stub = other_side.stub(f"{SPACE}/mlchaos-a")
    assert stub is not None and (stub.id, stub.environment, stub.driver) == ("mlchaos-a", "cluster", "kubernetes")
    assert other_side.fence(stub.id, "sweeper").targets == ()


# -- before every mutation ------------------------------------------------------------------------------------------


def test_held_refuses_what_the_cluster_does_not_know_and_who_was_taken_over() -> None:
    api = Api()
    site = Site(cast(Cluster, api), Kubernetes(context="c", namespace="shop", control_namespace=SPACE))
    lease = a_lease()
    with pytest.raises(LeaseRefused):
        held(site, lease)
    held(site, replace(lease, undo={KEPT: NOWHERE}))
    opened = ledger(api).open(lease)
    held(site, replace(opened, token=77))  # the token is that of the files
    ledger(api, pid=2).fence(lease.id, "sweeper")
    with pytest.raises(LeaseRefused, match="taken over by sweeper"):
        held(site, opened)


# -- two sweepers ---------------------------------------------------------------------------------------------------


def test_who_takes_over_gives_every_other_sweeper_a_whole_time_to_live_to_wait() -> None:
    api, clock = Api(), Clock()
    ledger(api, clock).open(a_lease())
    first, second = ledger(api, clock, 2), ledger(api, clock, 3)
    observers = [RenewalObserver(x, clock, 15.0, max_gap_s=5.0) for x in (first, second)]

    def look() -> list[bool]:
        clock.sleep(1.0)
        for observer, where in zip(observers, (first, second), strict=True):
            observer.look(where.leases())
        return [o.silent(x) for o, w in zip(observers, (first, second), strict=True) for x in w.leases()]

    for _ in range(15):
        assert not any(look())
    assert all(look())
    first.fence("mlchaos-a", "first")
    assert [any(look()) for _ in range(14)] == [False] * 14


def test_a_sweeper_waits_while_another_recovers_and_goes_on_when_that_one_is_gone() -> None:
    api, clock = Api(), Clock()
    ledger(api, clock).open(a_lease())
    first, second = ledger(api, clock, 2), ledger(api, clock, 3)
    taken = first.fence("mlchaos-a", "first")
    with second.recovering("mlchaos-a", 15.0) as free:
        assert free and 3 * module._KEEP_S < clock.t - 100.0 < 15.0  # pyright: ignore[reportPrivateUsage]
    clock.t, patient = 100.0, Clock.sleep

    def beating(self: Clock, seconds: float) -> None:
        first.renew(taken)
        patient(self, seconds)

    clock.sleep = beating.__get__(clock)  # type: ignore[method-assign]
    with second.recovering("mlchaos-a", 15.0) as free:
        assert not free


@pytest.mark.parametrize("interval_s", [None, 5.0])
def test_who_hits_new_pods_at_an_interval_holds_their_controller(interval_s: float | None) -> None:
    api = Api()
    owner_of = [{"kind": "ReplicaSet", "name": "web", "uid": "uid-rs", "controller": True}]
    for name in ("web-1", "web-2"):
        meta = {"name": name, "uid": f"uid-{name}", "resourceVersion": "1", "ownerReferences": owner_of}
        api.objects[f"{PODS}/{name}"] = {"metadata": meta, "spec": {}}
    rounds = a_lease("mlchaos-rounds", fault={"owners": {"uid-web-1": "uid-rs"}})
    rounds.params["interval_s"] = interval_s
    ledger(api).open(rounds)
    other = a_lease("mlchaos-other", "pod/shop/web-2@uid-web-2", pid=2)
    if interval_s is None:
        ledger(api, pid=2).open(other)
        return
    with pytest.raises(LeaseRefused, match="part of is held by run run-of-mlchaos-rounds"):
        ledger(api, pid=2).open(other)
