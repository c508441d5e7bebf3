"""What a cluster says of a target, from watches: replicas, restarts, OOM kills, workloads, autoscalers, jobs, models.

A value is told at the moment it changes (the watch's event, on our clock) and at every interval while it is known.
It is known while the mirrors that it rests on are live *and* an answer of the API server confirms it: a network that
swallows everything leaves a watch silent, which looks like a cluster where nothing happens. So what was read is held back
until a small request that was sent afterwards came back (half a second); if that fails, it is thrown away. An outage,
a network that is cut and a permission that is withdrawn are thus gaps, never the last value repeated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.domain.record import SignalSample
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.kube.selecting import near
from mlchaos_dagster.probes import kubernetes_rollouts
from mlchaos_dagster.probes.kubernetes_pods import Owner, PodBook, owner_of
from mlchaos_dagster.probes.kubernetes_watch import Api, Changed, Mirror

POD_SIGNALS = ("ready_replicas", "running_replicas", "lost_replicas", "restarts", "oom_kills")
WORKLOAD_SIGNALS = ("desired_replicas",)
AUTOSCALER_SIGNALS = ("hpa_replicas",)
JOB_SIGNALS = ("job_active", "job_succeeded", "job_failed")
MODEL_SIGNALS = ("isvc_ready",)
ROLLOUT_SIGNALS = kubernetes_rollouts.SIGNALS
"""Of a target that is Argo Rollouts."""
SIGNALS = (*POD_SIGNALS, *WORKLOAD_SIGNALS, *AUTOSCALER_SIGNALS, *JOB_SIGNALS, *MODEL_SIGNALS, *ROLLOUT_SIGNALS)
"""Everything that is known here by name."""
_RECOVERY = frozenset({"ready_replicas", "running_replicas", "lost_replicas"})
"""Told whenever pods are looked at: a recovery is split by them (judgement/comeback.py)."""
_PULSE_S = 0.5
"""Between two confirmations; two calls a second, of one object each."""
_RETRY_S = 0.5
_WORKLOADS = ("deployment", "statefulset")


class PulseApi(Api, Protocol):
    """What the signals need of `kube.client.Cluster`."""

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """One object, or a page of a collection."""
        ...

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """All objects."""
        ...


class KubernetesSignals:
    """Gauges of one target in a cluster.

    Args:
        api: The cluster; used by the watches alone, since they hold its connections.
        pulse: The same cluster, through a connection with a short time limit.
        options: Of the environment.
        target: What the experiment hits; None: all pods of the namespace but those of jobs.
        names: Which of `SIGNALS` are wanted; only what they need is watched.
        interval_s: Between two readings of what did not change.
    """

    def __init__(
        self,
        api: PulseApi,
        pulse: PulseApi,
        options: Kubernetes,
        target: Target | None,
        names: Iterable[str],
        interval_s: float,
    ) -> None:
        self.api, self.pulse, self.options, self.interval_s = api, pulse, options, interval_s
        self.target = target
        self.names = frozenset(names) & frozenset(SIGNALS)
        if self.names & set(POD_SIGNALS):
            self.names |= _RECOVERY
        self.namespace = (target.kubernetes.namespace if target is not None else "") or options.namespace
        self.trouble = ""
        """Why nothing is told, in one line; empty while all is well."""
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._zero = 0.0
        self._waiting: list[SignalSample] = []
        self._ready: list[SignalSample] = []
        self._last: dict[str, float] = {}
        self._held = False
        self._book = PodBook()
        self._rollouts = kubernetes_rollouts.RolloutBook()
        self._named: set[Owner] = set()
        self._pods: list[Mirror] = []
        self._groups: list[tuple[Sequence[Mirror], Callable[[], dict[str, float]]]] = []

    # -- SignalSource -----------------------------------------------------------------------------------------------

    def start(self, zero: float) -> None:
        """Begin; times are `time.monotonic()` minus `zero`."""
        self._zero = zero
        if self.names:
            for work in (self._begin, self._confirm):
                threading.Thread(target=work, name=f"signals {work.__name__}", daemon=True).start()

    def drain(self) -> list[SignalSample]:
        """New readings since the last call, as far as they are confirmed."""
        with self._lock:
            taken, self._ready = self._ready, []
        return taken

    def stop(self) -> list[SignalSample]:
        """Stop reading; what is not confirmed by now is lost."""
        self._over.set()
        for mirror in self._mirrors():
            mirror.stop()
        return self.drain()

    # -- watching ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Find out what to watch, as often as it takes, and then read at every interval."""
        selectors: list[str] | None = None
        while selectors is None and not self._over.is_set():
            try:
                selectors = self._selectors()
            except DriverError as e:
                self.trouble = str(e)
                self._over.wait(_RETRY_S)
        with self._lock:
            for labels in selectors or ():
                self._pods.append(self._mirror("pod", self._pods_changed, labels))
            self._add_groups()
        for mirror in self._mirrors():
            mirror.start()
        due = time.monotonic()
        while not self._over.is_set():
            self._read()
            due = max(due + self.interval_s, time.monotonic())
            self._over.wait(due - time.monotonic())

    def _selectors(self) -> list[str]:
        """Of the pods whose number is told."""
        if self.target is None:
            return [""]
        objects = self.target.kubernetes
        if objects.replicas:
            return [objects.replicas]
        if objects.kind == "Pod":
            return [near(self.target.select)]
        if objects.kind in ("Node", "Secret"):
            return [""]
        found = self.api.list(collection(objects.kind.lower(), self.namespace), labels=near(self.target.select))
        self._named = {Owner(objects.kind, one["metadata"]["name"]) for one in found}
        return [written(mapping(one, "spec", "selector")) for one in found]

    def _mirror(self, kind: str, changed: Changed | None = None, labels: str = "", path: str = "") -> Mirror:
        path = path or collection(kind, self.namespace)
        return Mirror(self.api, path, labels=labels, changed=changed or self._changed, lock=self._lock)

    def _add_groups(self) -> None:
        names, add = self.names, self._groups.append
        add((self._pods, self._book.values))
        if names & set(WORKLOAD_SIGNALS):
            workloads = [self._mirror(kind) for kind in _WORKLOADS]
            add((workloads, lambda: self._desired(workloads)))
        if names & set(AUTOSCALER_SIGNALS):
            path = f"/apis/autoscaling/v2/namespaces/{self.namespace}/horizontalpodautoscalers"
            scalers = self._mirror("", path=path)
            add(([scalers], lambda: self._scaled(scalers)))
        if names & set(JOB_SIGNALS):
            jobs = self._mirror("job")
            add(([jobs], lambda: self._jobs(jobs)))
        if names & set(MODEL_SIGNALS):
            path = f"/apis/serving.kserve.io/v1beta1/namespaces/{self.namespace}/inferenceservices"
            models = self._mirror("", path=path)
            add(([models], lambda: self._models(models)))
        if self.target is not None and self.target.kubernetes.kind == "Rollout":
            rollouts = self._mirror("rollout", labels=near(self.target.select))
            if names & set(WORKLOAD_SIGNALS):
                add(([rollouts], lambda: _wanted(rollouts)))
            if names & set(ROLLOUT_SIGNALS):
                sets = self._mirror("", path=f"/apis/apps/v1/namespaces/{self.namespace}/replicasets")
                add(([rollouts, sets], lambda: self._rollouts.values(rollouts.objects(), sets.objects())))

    def _mirrors(self) -> list[Mirror]:
        with self._lock:
            return [mirror for mirrors, _ in self._groups for mirror in mirrors]

    def _pods_changed(self, there: Sequence[Object], gone: Sequence[Object]) -> None:
        every = any(not mirror.labels for mirror in self._pods)
        kept = (pod for pod in there if not every or not _of_job(pod))
        self._book.update(kept, [pod for pod in gone if not every or not _of_job(pod)])
        self._changed(there, gone)

    def _changed(self, there: Sequence[Object], gone: Sequence[Object]) -> None:
        """In a mirror's thread, with the lock: tell what moved, at this very moment."""
        self._read(only_moved=True)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read(self, only_moved: bool = False) -> None:
        with self._lock:
            if self._held or self._over.is_set():
                return
            if self._pods and all(mirror.live for mirror in self._pods):
                self._book.look()
            values: dict[str, float] = {}
            for mirrors, read in self._groups:
                if all(mirror.live for mirror in mirrors):
                    values |= read()
            at = time.monotonic() - self._zero
            for name, value in values.items():
                if name in self.names and not (only_moved and self._last.get(name) == value):
                    self._waiting.append(SignalSample(at, name, value))
                    self._last[name] = value

    def _confirm(self) -> None:
        """Ask for one object, again and again: what was read before the question is confirmed by the answer."""
        while not self._over.is_set():
            asked = time.monotonic() - self._zero
            try:
                self.pulse.get(collection("pod", self.namespace), limit="1")
            except DriverError as e:
                with self._lock:
                    self._held, self.trouble = True, str(e)
                    self._waiting.clear()
            else:
                self._confirmed(asked)
            self._over.wait(_PULSE_S)

    def _confirmed(self, asked: float) -> None:
        with self._lock:
            if not self._held:
                self._ready += [sample for sample in self._waiting if sample.t <= asked]
                self._waiting = [sample for sample in self._waiting if sample.t > asked]
                self.trouble = next((m.trouble for m in self._mirrors() if m.trouble), "")
                return
            self._held = False
        # The watches may hang for as long as their connections try again: what they hold is from before.
        for mirror in self._mirrors():
            mirror.start()

    def _owners(self) -> set[Owner]:
        return self._named | self._book.owners

    def _desired(self, workloads: Sequence[Mirror]) -> dict[str, float]:
        """Replicas that the workloads of these pods are told to have (an autoscaler tells them, too)."""
        owners = self._owners()
        found = [
            float(part(one, "spec", "replicas") or 0)
            for kind, mirror in zip(("Deployment", "StatefulSet"), workloads, strict=True)
            for one in mirror.objects()
            if Owner(kind, one["metadata"]["name"]) in owners
        ]
        return {"desired_replicas": sum(found)} if found else {}

    def _scaled(self, scalers: Mirror) -> dict[str, float]:
        """What the autoscalers of these workloads want."""
        owners = self._owners()
        found = [
            float(part(one, "status", "desiredReplicas") or 0)
            for one in scalers.objects()
            if Owner(text(one, "spec", "scaleTargetRef", "kind"), text(one, "spec", "scaleTargetRef", "name")) in owners
        ]
        return {"hpa_replicas": sum(found)} if found else {}

    def _jobs(self, jobs: Mirror) -> dict[str, float]:
        """Pods of the jobs of these pods; of all jobs of the namespace where these pods have none."""
        names = {owner.name for owner in self._owners() if owner.kind == "Job"}
        found = [one for one in jobs.objects() if not names or one["metadata"]["name"] in names]
        counts = (("job_active", "active"), ("job_succeeded", "succeeded"), ("job_failed", "failed"))
        return (
            {name: float(sum(part(one, "status", key) or 0 for one in found)) for name, key in counts} if found else {}
        )

    def _models(self, models: Mirror) -> dict[str, float]:
        """1 while every InferenceService of these pods (else: of the namespace) is ready with its model loaded."""
        names = self._book.models
        found = [one for one in models.objects() if not names or one["metadata"]["name"] in names]
        return {"isvc_ready": float(all(serves(one) for one in found))} if found else {}


def _wanted(rollouts: Mirror) -> dict[str, float]:
    found = rollouts.objects()
    return {"desired_replicas": kubernetes_rollouts.wanted(found)} if found else {}


def serves(isvc: Object) -> bool:
    """Whether an InferenceService is ready. `Ready` alone has been seen on one whose model crashed at every start."""
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in items(isvc, "status", "conditions"))
    seen, meant = part(isvc, "status", "observedGeneration"), part(isvc, "metadata", "generation")
    known = seen is None or meant is None or seen >= meant
    state = text(isvc, "status", "modelStatus", "states", "activeModelState")
    return ready and known and state in ("", "Loaded")


def written(selector: Object) -> str:
    """A workload's `spec.selector` as the API wants it in a query."""
    said = [f"{key}={value}" for key, value in mapping(selector, "matchLabels").items()]
    for one in items(selector, "matchExpressions"):
        key, operator, values = one["key"], one["operator"], ",".join(one.get("values") or ())
        said.append(
            {
                "In": f"{key} in ({values})",
                "NotIn": f"{key} notin ({values})",
                "Exists": key,
                "DoesNotExist": f"!{key}",
            }[operator]
        )
    return ",".join(said)


def _of_job(pod: Object) -> bool:
    owner = owner_of(pod)
    return owner is not None and owner.kind == "Job"
