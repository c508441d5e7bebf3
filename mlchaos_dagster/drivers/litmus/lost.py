"""A ChaosEngine of ours whose lease is lost, ended from what it says itself: for `mlchaos clean`.

Nobody knows any more which pods were frozen, so nothing is proven at them. What is known afterwards: nothing of the engine
is left that could go on, and what ran had its grace to undo itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.litmus import recovery
from mlchaos_dagster.drivers.litmus.eyes import Sight
from mlchaos_dagster.drivers.litmus.tracks import Place, Tracks
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import items, text

PLURAL = "chaosengines"


class _Blind:
    """Eyes that have nothing to look at."""

    def permissions(self, request: Request) -> Iterable[Permission]:
        return ()

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        return ()

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        return {}

    def open(self, site: Site, injection: Injection, step: Step) -> None:
        return

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        return Sight(effective=False)

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        return

    def close(self, site: Site, injection: Injection, step: Step) -> None:
        return


def take_away(site: Site, path: str, lease: Lease, step: Step) -> str:
    """Stop, end, remove: the engine at `path`, its Jobs, pods, NetworkPolicies and results. What was done.

    Raises:
        RecoverFailed: something of it does not go.
        DriverUnavailable: the cluster did not answer.
    """
    engine = site.cluster.get(path)
    namespace, name = path.split("/namespaces/")[1].split("/")[0], path.rpartition("/")[2]
    pods = items(engine, "spec", "selectors", "pods") + items(engine, "spec", "selectors", "workloads")
    target = text(engine, "spec", "appinfo", "appns") or next((text(p, "namespace") for p in pods), "") or namespace
    place = Place(namespace, name, target, lease.id)
    recovery.take_away(site, Injection(lease, (), {}), place, _Blind(), step)
    return "stopped and removed with all it ran; its targets were not looked at, since its lease is lost"
