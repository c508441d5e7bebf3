"""Rollback actions on a cluster: what helps a service back on its feet after a fault was taken away.

They are made and undone with the very verbs of a fault, under a lease of their own: whoever dies, the sweeper undoes them.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers.cluster.handler import Handler
from mlchaos_dagster.drivers.cluster.preflight import is_ready
from mlchaos_dagster.drivers.kubernetes import rollout_actions
from mlchaos_dagster.drivers.kubernetes.faults.pod_delete import PodDelete
from mlchaos_dagster.drivers.kubernetes.faults.scale import Scaling, replicas_of
from mlchaos_dagster.drivers.kubernetes.rollout_actions import AbortRollout, ResumeRollout
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.objects import Object, items, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import matching, namespace_of, near


class ScaleUp(Scaling):
    """At least so many replicas; undone, as many as before."""

    def goal(self, before: int, params: dict[str, Any]) -> int:
        """Never fewer than there are."""
        return max(before, int(params["at_least"]))


class RestartUnhealthy(PodDelete):
    """Pods that do not become ready are deleted, with their own grace; their controllers bring others."""


HANDLERS: dict[str, Handler] = {
    "scale_up": ScaleUp(),
    "restart_unhealthy": RestartUnhealthy(),
    "abort_rollout": AbortRollout(),
    "resume_rollout": ResumeRollout(),
}
"""Action → handler. (`params` of a restart: `after_s`, and PodDelete's `signal: term`.)"""


def affected(site: Site, kind: str, target: Target, params: dict[str, Any]) -> list[Ref]:
    """What an action would change now: workloads below the minimum, pods unready for long. Read-only."""
    objects = target.kubernetes.kind.lower()
    found = matching(site, objects, namespace_of(site, target), near(target.select))
    if kind == "scale_up":
        below = [o for o in found if replicas_of(o) < int(params["at_least"])]
        return sorted(Ref.of(objects, o) for o in below)
    if kind in ("abort_rollout", "resume_rollout"):
        return sorted(Ref.of(objects, o) for o in found if rollout_actions.needs(kind, o, params))
    longest = sorted(found, key=_unready_since)
    since = time.time() - float(params["after_s"])
    return [Ref.of(objects, o) for o in longest if not is_ready(o) and _unready_since(o) <= since]


def _unready_since(pod: Object) -> float:
    """Unix time, by the cluster's clocks."""
    changed = [text(c, "lastTransitionTime") for c in items(pod, "status", "conditions") if text(c, "type") == "Ready"]
    stamp = next(filter(None, changed), text(pod, "metadata", "creationTimestamp"))
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
