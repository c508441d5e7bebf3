"""What of ours is found in a cluster where other tools made faults for us, and in which order it is taken away."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.kubernetes import leftovers
from mlchaos_dagster.drivers.kubernetes.cleaning import Cleaner
from mlchaos_dagster.drivers.litmus import lost
from mlchaos_dagster.errors import RecoverFailed
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.labels import MANAGED_BY, OURS
from tests.kube.fake_api import Clock

LEASE = "mlchaos-web-down-1a2b"
OURS_LABELS = {MANAGED_BY: OURS, "mlchaos.dev/lease": LEASE}
ENGINES, POLICIES = "/apis/litmuschaos.io/v1alpha1/chaosengines", "/apis/networking.k8s.io/v1/networkpolicies"


def thing(name: str, labels: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop", "uid": f"u-{name}", "labels": labels, **more}}


class Found:
    """A cluster as lists."""

    def __init__(self) -> None:
        cut = thing("cut", {"chaosUID": "x"}) | {"spec": {"podSelector": {"matchLabels": {leftovers.FAULT: LEASE}}}}
        theirs = thing("theirs", {"chaosUID": "y"}) | {"spec": {"podSelector": {"matchLabels": {"app": "web"}}}}
        going = {"deletionTimestamp": "2026-11-22T00:00:00Z"}
        self.places: dict[str, Any] = {
            "/apis": {"groups": [{"preferredVersion": {"groupVersion": "litmuschaos.io/v1alpha1"}}]},
            "/api/v1": self._kinds("pods", "Pod"),
            "/apis/litmuschaos.io/v1alpha1": self._kinds("chaosengines", "ChaosEngine"),
            "/api/v1/namespaces": [{"metadata": {"name": "shop"}}],
            "/api/v1/namespaces/shop/pods": [thing("web-1", {leftovers.FAULT: LEASE})],
            "/api/v1/pods": [thing("helper", OURS_LABELS), thing("gone", OURS_LABELS, **going)],
            ENGINES: [thing("ours", OURS_LABELS, **going), thing("foreign", {})],
            POLICIES: [cut, theirs],
        }

    @staticmethod
    def _kinds(name: str, kind: str) -> dict[str, Any]:
        return {"resources": [{"name": name, "kind": kind, "verbs": ["list", "delete"]}]}

    def get(self, path: str) -> Any:
        return self.places.get(path)

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[Any]:
        found = self.places.get(path, [])
        key = labels.partition("=")[0]
        return [o for o in found if not key or path.endswith("namespaces") or key in o["metadata"]["labels"]]


def test_what_makes_a_fault_comes_first_and_nothing_of_others() -> None:
    found = list(leftovers.find(cast(Cluster, Found())))
    assert [(o.how, o.kind, o.name) for o in found] == [
        ("object", "chaosengine", "ours"),  # its deletion hangs: that is a fault, too
        ("mark", "pod", "web-1"),
        ("object", "networkpolicy", "cut"),
        ("object", "pod", "helper"),
    ]
    assert {o.lease for o in found} == {LEASE}


@pytest.mark.parametrize("goes", [True, False])
def test_an_engine_whose_lease_is_lost_is_ended_through_its_tool(monkeypatch: pytest.MonkeyPatch, goes: bool) -> None:
    asked: list[str] = []

    def take_away(site: Site, path: str, lease: Any, step: Any) -> str:
        asked.append(path)
        if not goes:
            raise RecoverFailed("a helper pod does not end")
        return "stopped and removed"

    monkeypatch.setattr(lost, "take_away", take_away)
    site = Site(cast(Cluster, Found()), Kubernetes(context="c", namespace="shop"))
    cleaner = Cleaner(site, Clock(), cast(Any, None))
    engine = next(leftovers.find(site.cluster))
    (row,) = cleaner._one(engine)
    assert asked == ["/apis/litmuschaos.io/v1alpha1/namespaces/shop/chaosengines/ours"]
    assert (row.action, row.why) == (
        ("mended", "stopped and removed") if goes else ("failed", "a helper pod does not end")
    )


@pytest.mark.parametrize("extra", ["", "-2", "-c1", "-e0", "-q3", "-d2"])
def test_helpers_of_a_live_lease_are_its_own(extra: str) -> None:
    """Killers, agents, cleaners, eyes and readers of queues: none is a leftover while its run lives."""
    name = f"mlchaos-1a2b{extra}"
    found = leftovers.Leftover("helper", "pod", "shop", "web-1", "/x", "u", name)
    assert leftovers.is_of(found, [LEASE]) and not leftovers.is_of(found, ["mlchaos-web-down-1a2c"])
