"""`mlchaos clean` never takes the memory of a fault away before the fault: whose lease is whose, and what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.kubernetes import cleaning
from mlchaos_dagster.drivers.kubernetes.cleaning import Cleaner
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import RecoverFailed
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.leases import ClusterLedger
from tests.kube.fake_api import Api, Clock
from tests.kube.test_leases import SPACE, a_lease, ledger, left, owner


class Discovered(Api):
    """With the two collections that hold leases, listed over all namespaces, too."""

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        kinds = {
            "/apis": {"groups": [{"preferredVersion": {"groupVersion": "coordination.k8s.io/v1"}}]},
            "/api/v1": {"resources": [{"name": "secrets", "kind": "Secret", "verbs": ["list", "delete"]}]},
            "/apis/coordination.k8s.io/v1": {
                "resources": [{"name": "leases", "kind": "Lease", "verbs": ["list", "delete"]}]
            },
        }
        return kinds.get(path) or super().get(path, **query)

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        base, _, plural = path.rpartition("/")
        spaces = {p.split("/namespaces/")[1].split("/")[0] for p in self.objects if "/namespaces/" in p}
        if "/namespaces/" in path or path == "/api/v1/namespaces":
            return super().list(path, labels=labels, fields=fields)
        return [
            o
            for s in sorted(spaces)
            for o in super(Discovered, self).list(f"{base}/namespaces/{s}/{plural}", labels=labels)
        ]


def cleaner(api: Api, tmp_path: Path, clock: Clock) -> Cleaner:
    site = Site(cast(Cluster, api), Kubernetes(context="x", namespace="shop", control_namespace=SPACE))
    return Cleaner(site, clock, IncidentLog(tmp_path / "incidents", clock), force="by somebody")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "sweep", lambda *a, **k: _sweep(*a, **(k | {"proof_s": 0.0})))


_sweep = cleaning.sweep


def test_a_fault_that_could_not_be_taken_away_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api, clock = Discovered(), Clock()
    ledger(api, clock).open(a_lease())

    def fails(self: KubernetesDriver, lease: Lease, step: object = None) -> None:
        raise RecoverFailed("node n1 does not answer")

    monkeypatch.setattr(KubernetesDriver, "recover", fails)
    rows = list(cleaner(api, tmp_path, clock).rows())
    assert [(r.action, "n1" in r.why) for r in rows] == [("failed", True)]
    assert left(api, "leases"), "who proves it gone later needs the lease"
    assert left(api, "secrets"), "and what is in it"


@pytest.mark.parametrize(("asked", "theirs"), [("ml", False), ("shop", True)])
def test_what_runs_in_a_namespace_that_was_not_asked_for_is_left_alone_even_by_force(
    asked: str, theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, clock = Discovered(), Clock()
    ledger(api, clock).open(a_lease("mlchaos-a", "pod/shop/web-1@u1"))
    hit: list[str] = []
    monkeypatch.setattr(KubernetesDriver, "recover", lambda self, lease, step=None: hit.append(lease.id))
    one = cleaner(api, tmp_path, clock)
    one.namespaces = frozenset({asked})
    assert (bool(list(one.rows())), bool(hit)) == (theirs, theirs)
    assert bool(left(api, "leases")) or theirs, "and keeps its lease"


def test_leases_of_another_control_namespace_are_left_to_their_own_sweeper(tmp_path: Path) -> None:
    api, clock = Discovered(), Clock()
    ClusterLedger(cast(Cluster, api), "elsewhere", clock, owner()).open(a_lease())
    before = left(api, "leases") + left(api, "secrets")
    rows = list(cleaner(api, tmp_path, clock).rows())
    assert {r.action for r in rows} == {"left"}
    assert "elsewhere" in rows[0].why
    assert left(api, "leases") + left(api, "secrets") == before
