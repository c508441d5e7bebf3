"""What Argo Rollouts tell while a version is under way: whether the stable one serves everything, and whether it does again.

Fed with the Rollouts and ReplicaSets as the API shows them, any number of times. Which version was the stable one, and
that there was another since, is known from the first look on: a Rollout whose stable version is a new one is not safe,
however healthy it says it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlchaos_dagster.kube import rollouts
from mlchaos_dagster.kube.objects import Object, part, text

SIGNALS = (
    "rollout_healthy",
    "rollout_aborted",
    "canary_ready",
    "canary_weight",
    "stable_available",
    "traffic_safe",
    "rolled_back",
)


class RolloutBook:
    """The Rollouts of a target since the first look. Not thread-safe."""

    def __init__(self) -> None:
        self._stable: dict[str, str] = {}
        """Uid → template hash of the version that was stable at the first look."""
        self._shipped: set[str] = set()
        """Uids of those of which another version was under way since."""

    def values(self, found: Sequence[Object], replica_sets: Sequence[Object]) -> dict[str, float]:
        """Signals as they are now, of all Rollouts together: counts are added up, states are those of the worst.

        States are left out while the status is of an older spec (`rolled_back` is then 0), all while there is no Rollout.
        """
        if not found:
            return {}
        ready = available = 0
        weight, healthy, aborted, safe, back = 0.0, True, False, True, True
        for one in found:
            uid, stable = text(one, "metadata", "uid"), text(one, "status", "stableRS")
            there = rollouts.of_rollout(replica_sets, uid)
            known = self._stable.setdefault(uid, stable) if stable else ""
            current = text(one, "status", "currentPodHash")
            if known and rollouts.is_observed(one) and current != known:
                self._shipped.add(uid)
            ready += rollouts.count(there, "readyReplicas", but=known) if known else 0
            available += rollouts.count(there, "availableReplicas", only=known) if known else 0
            weight = max(weight, self._weight(one, there, known))
            here = rollouts.traffic_safe(one, there, known)
            # By the Rollout itself: a template that somebody puts back (as our recovery does) is no rollback of its own.
            by_itself = rollouts.is_aborted(one) and uid in self._shipped
            healthy = healthy and text(one, "status", "phase") == "Healthy"
            aborted = aborted or rollouts.is_aborted(one)
            safe, back = safe and here, back and here and by_itself
        values: dict[str, float] = {
            "canary_ready": float(ready),
            "canary_weight": weight,
            "stable_available": float(available),
        }
        observed = all(map(rollouts.is_observed, found))
        values["rolled_back"] = float(back and observed)  # not known to be is not
        if observed:
            values["rollout_healthy"], values["rollout_aborted"] = float(healthy), float(aborted)
            values["traffic_safe"] = float(safe)
        return values

    @staticmethod
    def _weight(one: Object, replica_sets: Sequence[Object], known: str) -> float:
        """Share of the requests that another version gets than the one that was stable at the first look."""
        promoted = bool(known) and text(one, "status", "stableRS") != known
        share = rollouts.canary_weight(one, replica_sets)
        return 1.0 - share if promoted else share


def wanted(found: Sequence[Object]) -> float:
    """Replicas that the Rollouts are told to have; the API's default is 1."""
    counts = (part(one, "spec", "replicas") for one in found)
    return float(sum(1 if count is None else int(count) for count in counts))
