"""A ChaosEngine of ours whose lease is lost, ended from what it says itself: for `mlchaos clean`.

Nobody knows any more which pods were frozen, so nothing is proven at them. What is known afterwards: nothing of the engine
is left that could go on, and what ran had its grace to undo itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.litmus import recovery, states
from mlchaos_dagster.drivers.litmus.eyes import Sight
from mlchaos_dagster.drivers.litmus.tracks import Place, Tracks
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.errors import RecoverFailed
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import items, text
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.kube.selecting import has_ended

PLURAL = "chaosengines"


class _Blind:
    """Eyes that have nothing to look at but Litmus's word."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

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
        """A pod that Litmus still calls injected, and that was there then. Raises RecoverFailed."""
        since = min((text(r, "metadata", "creationTimestamp") for r in tracks.results), default="")
        for name in sorted(states.still_injected(tracks)):
            pod = site.cluster.get(f"{collection('pod', self.namespace)}/{name}")
            if pod is not None and not has_ended(pod) and text(pod, "metadata", "creationTimestamp") <= since:
                raise RecoverFailed(
                    f"{self.namespace}/{name}: injected by Litmus's own word, what made it was ended without reverting it; it "
                    f"goes with the pod: kubectl delete pod {name} -n {self.namespace}",
                    driver=recovery.NAME,
                    verb="recover",
                )

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
    recovery.take_away(site, Injection(lease, (), {}), place, _Blind(target), step)
    return "stopped and removed with all it ran; its targets were not looked at, since its lease is lost"
