"""What `mlchaos doctor` calls left behind: neither the installation nor what an open lease keeps."""

from __future__ import annotations

from typing import cast

import pytest

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.kubernetes import checkup, leftovers
from mlchaos_dagster.drivers.kubernetes.leftovers import Leftover
from mlchaos_dagster.kube.client import Cluster, Forbidden, Site
from tests.kube.fake_api import Api

SITE = Site(cast(Cluster, Api()), Kubernetes(context="c", namespace="shop"))
OPEN = "mlchaos-web-down-1a2b"
LEASE = Leftover("object", "lease", "mlchaos-system", OPEN, "/l", "u1", OPEN, "lease")
KEPT = [
    LEASE,
    Leftover("object", "clusterrole", "", "mlchaos-faults", "/r", "u2", ""),
    Leftover("mark", "pod", "shop", "web-1", "/p", "u3", OPEN),
    Leftover("helper", "pod", "shop", "web-1", "/p", "u3", "mlchaos-1a2b", "mlchaos-1a2b"),
    Leftover("helper", "pod", "shop", "web-1", "/p", "u3", "mlchaos-1a2b-c1", "mlchaos-1a2b-c1"),
]
LOST = [Leftover("mark", "pod", "shop", f"web-{i}", "/p", f"u{i}", "mlchaos-gone-3c4d") for i in range(10, 18)]


def told(monkeypatch: pytest.MonkeyPatch, *looks: list[Leftover]) -> list[checkup.Point]:
    answers = iter(looks)
    monkeypatch.setattr(leftovers, "find", lambda _: next(answers))
    return list(checkup._left_behind(SITE, Catalog().environment("cluster")))


def test_the_installation_and_what_an_open_lease_keeps_are_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    points = told(monkeypatch, KEPT)
    assert [(p.what, p.state) for p in points] == [("open leases", "ok"), ("left behind", "ok")]


def test_what_belongs_to_no_lease_is_told_a_few_lines_long(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [p for p in told(monkeypatch, KEPT + LOST, KEPT + LOST) if p.state == "missing"]
    assert len(points) == 6
    assert (points[0].saw, points[-1].saw) == (LOST[0].shown, "and 3 more")


def test_a_run_that_ends_meanwhile_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    points = told(monkeypatch, KEPT[1:4], [])  # the marks were read before its end, the leases after it
    assert [(p.what, p.state) for p in points] == [("left behind", "ok")]


def test_who_may_not_look_everywhere_is_not_told_that_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Cluster) -> list[Leftover]:
        raise Forbidden("not allowed: secrets", 403)

    monkeypatch.setattr(leftovers, "find", refuse)
    (point,) = checkup._left_behind(SITE, Catalog().environment("cluster"))
    assert point.state == "optional" and "not allowed: secrets" in point.saw
