"""The sweeper's loop against an API server that goes away: who is spared, who is swept, who leads."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.ports import Driver, Lease
from mlchaos_dagster.errors import DriverUnavailable, MlChaosError, RecoverFailed
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.sweeper import LEVER_GRACE_S, ORPHAN_S, Heart, Journal, Sweeper
from tests.kube.fake_api import Api, Clock
from tests.kube.test_leases import SPACE, a_lease, ledger, left

TTL_S = 15.0


class Backend:
    """A fault that is there until it is recovered; the first `fails` attempts break."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.recovered = fails, list[str]()

    def recover(self, lease: Lease, step: Any = None) -> None:
        if self.fails:
            self.fails -= 1
            raise RecoverFailed("no")
        self.recovered.append(lease.id)

    def active(self, lease: Lease) -> Evidence:
        return Evidence(present=lease.id not in self.recovered, effective=False, lines=("looked",))


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int = 0) -> None:
        self.api, self.clock, self.backend = Api(), Clock(), Backend(fails)
        self.said: list[str] = []
        monkeypatch.setattr(Journal, "write", lambda _, kind, what, **facts: self.said.append(f"{kind}: {what}"))
        self.owner = ledger(self.api, self.clock)
        self.sweeper = self.another(7)

    def another(self, pid: int) -> Sweeper:
        where = ledger(self.api, self.clock, pid)
        heart = Heart(cast(Cluster, self.api), SPACE, f"sweeper-{pid}", self.clock, TTL_S)
        found: Driver = cast(Driver, self.backend)
        return Sweeper(where, heart, lambda *_: found, self.clock, Journal(self.clock), ttl_s=TTL_S)

    def ticks(self, count: int, *, renew: Lease | None = None, sweeper: Sweeper | None = None) -> None:
        which = sweeper or self.sweeper
        for _ in range(count):
            self.clock.sleep(1.0)
            if renew is not None:
                self.owner.renew(renew)
            try:
                which.tick()
            except MlChaosError:
                continue
            for work in list(which._under_way.values()):  # pyright: ignore[reportPrivateUsage]
                work.result(10)


def test_who_renews_is_spared_and_who_is_silent_is_swept_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    lease = world.owner.open(a_lease())
    world.ticks(40, renew=lease)
    assert not world.backend.recovered
    world.ticks(14)
    assert not world.backend.recovered
    world.ticks(3)
    assert world.backend.recovered == [lease.id]
    assert left(world.api, "secrets") == [] and world.owner.leases() == ()


def test_after_an_outage_every_owner_gets_his_whole_time_to_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """In it nobody could renew: silence proves nothing."""
    world = World(monkeypatch)
    lease = world.owner.open(a_lease())
    world.ticks(5, renew=lease)
    world.api.down = True
    world.ticks(60)
    world.api.down = False
    world.ticks(14)
    assert not world.backend.recovered
    world.ticks(3)
    assert world.backend.recovered == [lease.id]


def test_what_could_not_be_taken_away_is_tried_again_and_stays_open_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, fails=40)
    lease = world.owner.open(a_lease())
    world.ticks(int(TTL_S) + 3)
    assert world.owner.is_open(lease.id) and any(x.startswith("unclean") for x in world.said)
    world.ticks(90)
    assert world.backend.recovered == [lease.id] and world.owner.leases() == ()


def test_long_past_its_deadline_also_who_renews_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    lease = world.owner.open(a_lease())  # 30 s, and 60 s of grace
    world.ticks(85, renew=lease)
    assert not world.backend.recovered
    for _ in range(10):
        if not world.backend.recovered:
            world.ticks(1, renew=lease)
    assert world.backend.recovered == [lease.id]


def test_the_lever_leaves_owners_their_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    lease = world.owner.open(a_lease())
    world.ticks(3, renew=lease)
    world.owner.lever.pull("smoke")
    world.ticks(int(LEVER_GRACE_S), renew=lease)
    assert not world.backend.recovered
    world.ticks(2)
    assert world.backend.recovered == [lease.id]


def test_one_leads_and_another_takes_its_place_when_its_heart_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    second = world.another(8)
    world.owner.open(a_lease())
    for _ in range(3):
        world.ticks(1)
        world.ticks(1, sweeper=second)
    assert world.sweeper.heart.leads and not second.heart.leads
    world.ticks(14, sweeper=second)  # from here on the first is gone
    assert not second.heart.leads and not world.backend.recovered
    assert not world.sweeper.heart.leads  # and knows it, should it wake up
    world.ticks(4, sweeper=second)
    assert second.heart.leads
    assert world.backend.recovered == ["mlchaos-a"]  # it had looked on meanwhile, and need not wait again
    second.heart.rest()
    world.ticks(2)
    assert world.sweeper.heart.leads


def test_a_secret_without_a_lease_is_collected_but_not_while_its_lease_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    lease = world.owner.open(a_lease())
    spare = world.api.objects[f"/api/v1/namespaces/{SPACE}/secrets/{lease.id}-0"]
    orphan = {**spare, "metadata": {"name": "x-0", "labels": {**spare["metadata"]["labels"], "mlchaos.dev/lease": "x"}}}
    world.api.create(f"/api/v1/namespaces/{SPACE}/secrets", orphan)
    world.ticks(int(ORPHAN_S) - 60)
    assert len(left(world.api, "secrets")) >= 1 and f"/api/v1/namespaces/{SPACE}/secrets/x-0" in world.api.objects
    world.ticks(200)
    assert f"/api/v1/namespaces/{SPACE}/secrets/x-0" not in world.api.objects


def test_a_driver_that_is_not_there_leaves_the_lease_open(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    lease = world.owner.open(a_lease())

    def none(*_: str) -> Driver:
        raise DriverUnavailable("leases of s3 are not this sweeper's")

    world.sweeper.drivers = none
    world.ticks(30)
    assert world.owner.is_open(lease.id)
