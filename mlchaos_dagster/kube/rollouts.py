"""Argo Rollouts as they tell of themselves. What may be believed when, at the source (controller v1.9):

- `status.phase` is of the generation in `status.observedGeneration` (a text); of another it is history.
- An aborted Rollout stays `Degraded` while the stable version serves everything; it is `Healthy` again only when its
  template is the stable one's. `abort` is taken back by the controller whenever the template changes.
- Weights are in `status.canary.weights` only where a traffic router splits requests; without one a version's share of
  the requests is its share of the ready pods.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text
from mlchaos_dagster.kube.refs import Ref

GROUP = "argoproj.io"
HASH = "rollouts-pod-template-hash"
"""Label on ReplicaSets and pods: of which template they are."""
_TAKEN_BACK = ("RolloutAborted",)


def is_observed(rollout: Object) -> bool:
    """Whether the status is of the spec as it is now."""
    return text(rollout, "status", "observedGeneration") == text(rollout, "metadata", "generation")


def at_rest(rollout: Object) -> bool:
    """Healthy, with one version only, and the controller knows it."""
    known = text(rollout, "status", "stableRS")
    return (
        is_observed(rollout)
        and text(rollout, "status", "phase") == "Healthy"
        and bool(known)
        and known == text(rollout, "status", "currentPodHash")
        and not part(rollout, "spec", "paused")
    )


def is_aborted(rollout: Object) -> bool:
    """Taken back: by the analysis, a person, or a deadline with `progressDeadlineAbort`."""
    reasons = {text(c, "reason") for c in items(rollout, "status", "conditions") if text(c, "type") == "Progressing"}
    return bool(part(rollout, "status", "abort")) or bool(reasons & set(_TAKEN_BACK))


def is_under_way(rollout: Object) -> bool:
    """A version other than the stable one is on its way and was not taken back."""
    current, stable = text(rollout, "status", "currentPodHash"), text(rollout, "status", "stableRS")
    return is_observed(rollout) and bool(stable) and current != stable and not is_aborted(rollout)


def is_paused(rollout: Object) -> bool:
    """Waits for somebody: `spec.paused`, or a pause of its steps. (An analysis without a result is for people to judge.)"""
    reasons = {text(c, "reason") for c in items(rollout, "status", "pauseConditions")}
    return bool(part(rollout, "spec", "paused")) or bool(reasons - {"InconclusiveAnalysisRun"})


def shown_phase(rollout: Object) -> str:
    """`Degraded (RolloutAborted: …)`, for people."""
    phase, said = text(rollout, "status", "phase") or "of unknown phase", text(rollout, "status", "message")
    fresh = "" if is_observed(rollout) else ", which is not of its present spec"
    return f"{phase} ({said}){fresh}" if said else f"{phase}{fresh}"


def of_rollout(replica_sets: Iterable[Object], uid: str) -> list[Object]:
    """Those that the Rollout of this uid controls."""
    return [
        one for one in replica_sets if any(text(o, "uid") == uid for o in items(one, "metadata", "ownerReferences"))
    ]


def replica_sets(site: Site, ref: Ref) -> list[Object]:
    """All of a Rollout's. Raises DriverError."""
    return of_rollout(site.cluster.list(f"/apis/apps/v1/namespaces/{ref.namespace}/replicasets"), ref.uid)


def count(replica_sets: Iterable[Object], what: str, *, only: str = "", but: str = "") -> int:
    """Sum of `status.<what>` over the templates `only`, or all `but` one."""
    total = 0
    for one in replica_sets:
        made_of = text(one, "metadata", "labels", HASH)
        if (not only or made_of == only) and (not but or made_of != but):
            total += int(part(one, "status", what) or 0)
    return total


def canary_weight(rollout: Object, replica_sets: Iterable[Object]) -> float:
    """Share of the requests that another version than the stable one gets, 0 to 1."""
    stable, there = text(rollout, "status", "stableRS"), list(replica_sets)
    weights = mapping(rollout, "status", "canary", "weights", "canary")
    if mapping(rollout, "spec", "strategy", "canary", "trafficRouting") and weights:
        return float(part(weights, "weight") or 0) / 100
    every = count(there, "readyReplicas")
    return count(there, "readyReplicas", but=stable) / every if every else 0.0


def traffic_safe(rollout: Object, replica_sets: Iterable[Object], stable: str) -> bool:
    """The stable version is the one it was, with all its replicas, and gets every request."""
    there = list(replica_sets)
    wanted = part(rollout, "spec", "replicas")
    return (
        bool(stable)
        and text(rollout, "status", "stableRS") == stable
        and count(there, "availableReplicas", only=stable) >= (1 if wanted is None else int(wanted))
        and canary_weight(rollout, there) == 0
    )
