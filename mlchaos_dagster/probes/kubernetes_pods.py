"""What a set of pods says: how many run, are ready, were restarted, were killed for memory.

Fed with pods as the API shows them, in any order and any number of times; keeps what must not be counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlchaos_dagster.kube.objects import Object, items, mapping, part, text
from mlchaos_dagster.kube.rollouts import HASH as ROLLOUT_HASH

_OVER = ("Succeeded", "Failed")
SERVED_BY = "serving.kserve.io/inferenceservice"
"""Label on the pods of an InferenceService: its name."""


@dataclass(frozen=True)
class Owner:
    """The workload that a pod belongs to."""

    kind: str
    """`Deployment`, `StatefulSet`, `Rollout`, `Job`, or what else the controller is."""
    name: str


def is_going(pod: Object) -> bool:
    """On its way out: no longer in any Service, whatever its containers do."""
    return bool(text(pod, "metadata", "deletionTimestamp"))


def is_ready(pod: Object) -> bool:
    """Whether Services send to it. A pod that is being deleted, or is over, is not ready."""
    if is_going(pod) or text(pod, "status", "phase") in _OVER:
        return False
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in items(pod, "status", "conditions"))


def is_running(pod: Object) -> bool:
    """Whether all of its containers have started and none has ended; it may be far from ready."""
    if is_going(pod) or text(pod, "status", "phase") != "Running":
        return False
    states = [mapping(c, "state") for c in items(pod, "status", "containerStatuses")]
    return len(states) == len(items(pod, "spec", "containers")) and all("running" in state for state in states)


def owner_of(pod: Object) -> Owner | None:
    """The workload that would replace it; None for a bare pod."""
    for reference in items(pod, "metadata", "ownerReferences"):
        if not reference.get("controller"):
            continue
        kind, name = str(reference.get("kind")), str(reference.get("name"))
        for label, workload in (("pod-template-hash", "Deployment"), (ROLLOUT_HASH, "Rollout")):
            made_of = text(pod, "metadata", "labels", label)
            if kind == "ReplicaSet" and made_of and name.endswith(f"-{made_of}"):
                return Owner(workload, name.removesuffix(f"-{made_of}"))
        return Owner(kind, name)
    return None


class PodBook:
    """The pods of a target, and what happened to them since the first look."""

    def __init__(self) -> None:
        self._pods: dict[str, tuple[bool, bool]] = {}
        """Uid → ready, running. Kept, not counted anew at each reading: there may be a thousand."""
        self._looked = False
        self._known: set[str] = set()
        """Uids of all pods ever seen."""
        self._lost: set[str] = set()
        """Uids of pods that were deleted, or ended."""
        self._lost_before: set[str] = set()
        """The same, of those that were on their way at the first look."""
        self._new = 0
        """Pods that came after the first look."""
        self._restarts: dict[tuple[str, str], int] = {}
        """(pod uid, container) → its highest restart count."""
        self._restarted = 0
        """How much they rose, of all containers together, since the first look."""
        self._killed: set[str] = set()
        """Ids of containers that ended for memory."""
        self._killed_before: set[str] = set()
        """The same, of those that had ended at the first look."""
        self.owners: set[Owner] = set()
        """All workloads that ever had one of these pods."""
        self.models: set[str] = set()
        """Names of the InferenceServices that ever had one."""

    def update(self, there: Iterable[Object], gone: Iterable[Object]) -> None:
        """Pods that are new or changed, and those that are no more."""
        for pod in there:
            self._see(pod)
        for pod in gone:
            self._see(pod)
            uid = text(pod, "metadata", "uid")
            self._pods.pop(uid, None)
            self._lost.add(uid)

    def look(self) -> None:
        """The first look is over: what comes from here on is new."""
        self._looked = True

    def _see(self, pod: Object) -> None:
        uid = text(pod, "metadata", "uid")
        if uid not in self._known:
            self._known.add(uid)
            self._new += self._looked
        self._pods[uid] = (is_ready(pod), is_running(pod))
        if is_going(pod) or text(pod, "status", "phase") in _OVER:
            (self._lost if self._looked else self._lost_before).add(uid)
        if (owner := owner_of(pod)) is not None:
            self.owners.add(owner)
        if model := text(pod, "metadata", "labels", SERVED_BY):
            self.models.add(model)
        for container, status in _statuses(pod):
            count = int(status.get("restartCount") or 0)
            before = self._restarts.get((uid, container), 0 if self._looked else count)
            self._restarts[uid, container] = max(before, count)
            self._restarted += max(before, count) - before
            for state in (mapping(status, "state"), mapping(status, "lastState")):
                if part(state, "terminated", "reason") == "OOMKilled":
                    killed = text(state, "terminated", "containerID") or f"{uid}/{container}/{count}"
                    (self._killed if self._looked else self._killed_before).add(killed)

    def values(self) -> dict[str, float]:
        """The gauges now.

        `ready_replicas` and `running_replicas` count pods, `lost_replicas` those that went since the first look; `restarts` counts, since the first look, containers that were
        started again and pods that were started in the place of others; `oom_kills` containers that ended for memory.
        """
        lost = len(self._lost - self._lost_before)
        return {
            "ready_replicas": float(sum(ready for ready, _ in self._pods.values())),
            "running_replicas": float(sum(running for _, running in self._pods.values())),
            "lost_replicas": float(lost),
            "restarts": float(self._restarted + min(self._new, lost)),
            "oom_kills": float(len(self._killed - self._killed_before)),
        }


def _statuses(pod: Object) -> Iterator[tuple[str, Object]]:
    for group in ("initContainerStatuses", "containerStatuses"):
        for status in items(pod, "status", group):
            yield str(status.get("name")), status
