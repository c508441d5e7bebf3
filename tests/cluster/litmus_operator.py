"""A stand-in for Litmus's operator, runner and experiments, on the real API server with Litmus's real CRDs.

It does to the objects what chaos-operator (`controllers/chaosengine_controller.go`), chaos-runner and litmus-go do, in their
order: the finalizer and `initialized` first, a runner pod, a Job with the engine's labels, a ChaosResult, the fault, its
undoing on the experiment pod's termination, `completed` or `stopped`. Pods and faults are real, only who makes them is not.
The operator works on one engine at a time, as the real one; experiments live on when the operator is down.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Cluster, Conflict, NotFound

GROUP = "/apis/litmuschaos.io/v1alpha1"
FINALIZER = "chaosengine.litmuschaos.io/finalizer"
IMAGE = "local/base:1"
UID = "chaosUID"
TINY = {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"cpu": "100m", "memory": "64Mi"}}


@dataclass
class Script:
    """How this Litmus behaves."""

    deaf: bool = False
    """The operator does nothing: it is down."""
    stuck: bool = False
    """The operator gets no further than `initialized`."""
    slow_s: float = 0.0
    """Before the experiment begins."""
    error: tuple[str, str] | None = None
    """(errorCode, reason): the experiment fails before its fault, and its engine completes."""
    skipped: bool = False
    """The runner skips the experiment."""
    keeps: bool = False
    """An experiment that is terminated does not undo its fault."""
    probes: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name → (verdict, description); where there are none, those of the engine pass."""


class Litmus:
    """Operator and experiments of one namespace. `start`, and `stop` at the end."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace, self.script = cluster, namespace, Script()
        self.seen: list[str] = []
        """What happened, in order, for tests that ask."""
        self._over = threading.Event()
        self._experiments: dict[str, Experiment] = {}
        self._thread = threading.Thread(target=self._run, name="litmus-operator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)

    # -- operator ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over.wait(0.2):
            if self.script.deaf:
                continue
            try:
                for engine in self.cluster.list(f"{GROUP}/namespaces/{self.namespace}/chaosengines"):
                    self._reconcile(engine)
            except (DriverError, KeyError) as e:  # it tries again, as a controller does
                self.seen.append(f"error: {e}")

    def path(self, name: str) -> str:
        return f"{GROUP}/namespaces/{self.namespace}/chaosengines/{name}"

    def _reconcile(self, engine: dict[str, Any]) -> None:
        name, spec = engine["metadata"]["name"], engine["spec"]
        status = (engine.get("status") or {}).get("engineStatus", "")
        state = spec.get("engineState", "active")
        if engine["metadata"].get("deletionTimestamp"):
            if engine["metadata"].get("finalizers"):
                self._remove(engine)
            return
        if state == "active" and status == "":
            engine["status"] = {**(engine.get("status") or {}), "engineStatus": "initialized"}
            if not engine["metadata"].get("finalizers"):
                engine["metadata"]["finalizers"] = [FINALIZER]
            self.cluster.replace(self.path(name), engine)
            self.event(engine, "ChaosEngineInitialized", f"Identifying app under test & launching {name}-runner")
            status = "initialized"
        if state == "active" and status == "initialized":
            self._go_on(engine)
        elif state == "stop" and status == "completed":
            runner = f"/api/v1/namespaces/{self.namespace}/pods/{name}-runner"
            if spec.get("jobCleanUpPolicy") == "delete" and self.cluster.get(runner):
                self.cluster.delete(runner)
        elif state == "stop" and status == "initialized":
            self._remove(engine)

    def _go_on(self, engine: dict[str, Any]) -> None:
        if self.script.stuck:
            return
        uid, name = engine["metadata"]["uid"], engine["spec"]["experiments"][0]["name"]
        if uid not in self._experiments:
            if self.cluster.get(f"{GROUP}/namespaces/{self.namespace}/chaosexperiments/{name}") is None:
                said = "(chaos start) Unable to get chaos resources"
                self.event(engine, "ChaosResourcesOperationFailed", said, "Warning")
                return
            self._experiments[uid] = Experiment(self, engine)
            self._experiments[uid].start()
        elif self._experiments[uid].completed:
            now = self.cluster.get(self.path(engine["metadata"]["name"]))
            if now and now["spec"].get("engineState") == "active":
                now["status"]["engineStatus"], now["spec"]["engineState"] = "completed", "stop"
                self.cluster.replace(self.path(now["metadata"]["name"]), now)
                self.event(now, "ChaosEngineCompleted", "ChaosEngine completed")

    def _remove(self, engine: dict[str, Any]) -> None:
        """Abort, or deletion: Jobs and pods by their label, wait, the result's targets, the finalizer, `stopped`."""
        uid, name = engine["metadata"]["uid"], engine["metadata"]["name"]
        grace = int(engine["spec"].get("terminationGracePeriodSeconds") or 0)
        pods = f"/api/v1/namespaces/{self.namespace}/pods"
        jobs = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        for where in (jobs, pods):
            for one in self.cluster.list(where, labels=f"{UID}={uid}"):
                if not one["metadata"].get("deletionTimestamp"):
                    self.cluster.delete(f"{where}/{one['metadata']['name']}", grace_s=grace or None)
        end = time.monotonic() + 180
        while self.cluster.list(pods, labels=f"{UID}={uid}") and time.monotonic() < end:
            if self._over.wait(1.0) or self.script.deaf:
                return
        for result in self.cluster.list(f"{GROUP}/namespaces/{self.namespace}/chaosresults", labels=f"{UID}={uid}"):
            _into_history(self.cluster, result)
        now = self.cluster.get(self.path(name))
        if now is None or now["metadata"]["uid"] != uid:
            return
        status = now.get("status") or {}
        for entry in status.get("experiments") or []:
            if entry["status"] in ("Running", "Waiting for Job Creation"):
                entry |= {"status": "Forcefully Aborted", "verdict": "Stopped"}
        body = {
            "metadata": {"uid": uid, "finalizers": None},
            "status": {"engineStatus": "stopped", "experiments": status.get("experiments") or []},
        }
        try:
            self.cluster.patch(self.path(name), body)
        except (NotFound, Conflict):
            return
        self.seen.append(f"stopped {name}")

    def event(self, engine: dict[str, Any], reason: str, message: str, kind: str = "Normal") -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        meta = engine["metadata"]
        body = {
            "metadata": {"name": f"{meta['name']}.{secrets.token_hex(6)}", "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": "litmuschaos.io/v1alpha1",
                "kind": "ChaosEngine",
                "name": meta["name"],
                "namespace": self.namespace,
                "uid": meta["uid"],
            },
            "reason": reason,
            "message": message,
            "type": kind,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "litmus-stand-in"},
        }
        self.cluster.create(f"/api/v1/namespaces/{self.namespace}/events", body)


class Aborted(Exception):
    """The experiment pod was told to end."""


class Experiment(threading.Thread):
    """Runner and experiment of one engine."""

    def __init__(self, litmus: Litmus, engine: dict[str, Any]) -> None:
        super().__init__(name=f"litmus-{engine['metadata']['name']}", daemon=True)
        self.litmus, self.cluster, self.engine = litmus, litmus.cluster, engine
        self.ns, self.completed = litmus.namespace, False
        self.uid, self.name_ = engine["metadata"]["uid"], engine["metadata"]["name"]
        self.entry = engine["spec"]["experiments"][0]
        self.kind = self.entry["name"]
        self.job = f"{self.kind}-{secrets.token_hex(3)}"
        self.pod = ""
        self.result = f"{self.name_}-{self.kind}"
        self.undo: list[Any] = []

    def run(self) -> None:
        try:
            self._runner()
        except Aborted:
            pass
        except DriverError as e:
            self.litmus.seen.append(f"experiment error: {e}")

    # -- runner -----------------------------------------------------------------------------------------------------

    def _runner(self) -> None:
        script = self.litmus.script
        meta, spec = self.engine["metadata"], self.engine["spec"]
        labels = {"app": meta["name"], UID: self.uid, "app.kubernetes.io/component": "chaos-runner"}
        labels |= ((spec.get("components") or {}).get("runner") or {}).get("runnerLabels") or {}
        owner = {"apiVersion": self.engine["apiVersion"], "kind": "ChaosEngine", "name": meta["name"], "uid": self.uid}
        own = {**owner, "controller": True, "blockOwnerDeletion": True}
        self._pod_up(f"{meta['name']}-runner", {"labels": labels, "ownerReferences": [own]})
        if script.skipped:
            self._status("Skipped", "Fail")
            return self._complete()
        self._status("Waiting for Job Creation", "N/A")
        if self.litmus._over.wait(script.slow_s):
            return None
        experiment = self.cluster.get(f"{GROUP}/namespaces/{self.ns}/chaosexperiments/{self.kind}") or {}
        defined = experiment["spec"]["definition"]
        self.labels = {**defined.get("labels", {}), UID: self.uid, **(meta.get("labels") or {})}
        self.env = {e["name"]: str(e.get("value", "")) for e in defined.get("env") or []}
        components = (self.entry.get("spec") or {}).get("components") or {}
        self.env |= {e["name"]: str(e.get("value", "")) for e in components.get("env") or []}
        template = {"metadata": {"labels": self.labels}, "spec": _pod_spec(spec.get("terminationGracePeriodSeconds"))}
        body = {
            "metadata": {"name": self.job, "labels": self.labels},
            "spec": {"template": template},
        }
        self.cluster.create(f"/apis/batch/v1/namespaces/{self.ns}/jobs", body)
        self.pod = self._job_pod()
        self._status("Running", "Awaited")
        try:
            self._experiment()
        except Aborted:
            self._aborted()
            raise
        self._status("Completed", self._verdict())
        if spec.get("jobCleanUpPolicy") == "delete":
            self.cluster.delete(f"/apis/batch/v1/namespaces/{self.ns}/jobs/{self.job}")
        return self._complete()

    def _complete(self) -> None:
        self.completed = True

    def _pod_up(self, name: str, metadata: dict[str, Any]) -> None:
        pods = f"/api/v1/namespaces/{self.ns}/pods"
        self.cluster.create(pods, {"metadata": {"name": name, **metadata}, "spec": _pod_spec(None)})
        while True:
            found = self.cluster.get(f"{pods}/{name}")
            if found is None or found["metadata"].get("deletionTimestamp"):
                raise Aborted
            if found["status"].get("phase") == "Running":
                return
            time.sleep(0.1)

    def _job_pod(self) -> str:
        while True:
            if self.cluster.get(f"/apis/batch/v1/namespaces/{self.ns}/jobs/{self.job}") is None:
                raise Aborted
            pods = self.cluster.list(f"/api/v1/namespaces/{self.ns}/pods", labels=f"job-name={self.job}")
            for pod in pods:
                if pod["metadata"].get("deletionTimestamp"):
                    raise Aborted
                if pod["status"].get("phase") == "Running":
                    return pod["metadata"]["name"]
            time.sleep(0.1)

    def _status(self, status: str, verdict: str) -> None:
        entry = {
            "name": self.kind,
            "runner": f"{self.name_}-runner",
            "experimentPod": self.pod or "Yet to be launched",
            "status": status,
            "verdict": verdict,
            "lastUpdateTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            self.cluster.patch(self.litmus.path(self.name_), {"status": {"experiments": [entry]}})
        except NotFound as e:
            raise Aborted from e

    # -- experiment -------------------------------------------------------------------------------------------------

    def _experiment(self) -> None:
        script, status = self.litmus.script, self._fresh()
        body = {
            "apiVersion": "litmuschaos.io/v1alpha1",
            "kind": "ChaosResult",
            "metadata": {"name": self.result, "labels": {**self.labels, "job-name": self.job}},
            "spec": {"engine": self.name_, "experiment": self.kind},
            "status": status,
        }
        self.cluster.create(f"{GROUP}/namespaces/{self.ns}/chaosresults", body)
        self._sleep(0.3)
        if script.error:
            code, reason = script.error
            return self._end("Error", "Error", {"errorCode": code, "reason": reason})
        try:
            targets = self._inject()
            self._sleep(float(self.env["TOTAL_CHAOS_DURATION"]) if self.kind != "pod-delete" else 0.0)
            self._revert()
        except Failed as e:
            return self._end("Error", "Error", {"errorCode": e.code, "reason": e.reason})
        if self.kind in ("pod-delete", "container-kill"):
            for target in targets:
                self._annotate(target, "targeted")
        failed = any(verdict == "Failed" for verdict, _ in script.probes.values())
        return self._end("Completed_With_Probe_Failure" if failed else "Completed", "Fail" if failed else "Pass", None)

    def _inject(self) -> list[str]:
        made = {
            "pod-delete": self._pod_delete,
            "container-kill": self._container_kill,
            "pod-network-partition": self._partition,
            "pod-cpu-hog": self._stress,
            "pod-memory-hog": self._stress,
        }.get(self.kind)
        if made is None:
            raise Failed(
                "HELPER_ERROR", "failed to create priority-based queue: Error: Specified qdisc kind is unknown."
            )
        return made()

    def _targets(self) -> tuple[str, list[str]]:
        """As GetTargetPods: TARGET_PODS if set, else what the engine selects."""
        spec = self.engine["spec"]
        chosen = (spec.get("selectors") or {}).get("pods") or []
        workloads = (spec.get("selectors") or {}).get("workloads") or []
        space = (chosen or workloads or [{}])[0].get("namespace") or (spec.get("appinfo") or {}).get("appns") or self.ns
        if names := self.env.get("TARGET_PODS"):
            return space, names.split(",")
        if chosen:
            return space, chosen[0]["names"].split(",")
        if workloads:
            pods = self.cluster.list(f"/api/v1/namespaces/{space}/pods")
            start = tuple(f"{w['names']}-" for w in workloads)
            return space, [p["metadata"]["name"] for p in pods if p["metadata"]["name"].startswith(start) and _alive(p)]
        label = spec["appinfo"]["applabel"]
        return space, [
            p["metadata"]["name"] for p in self.cluster.list(f"/api/v1/namespaces/{space}/pods", labels=label)
        ]

    def _pod_delete(self) -> list[str]:
        start, seconds = time.monotonic(), float(self.env["TOTAL_CHAOS_DURATION"])
        hit: list[str] = []
        while time.monotonic() - start < seconds:
            space, names = self._targets()
            for name in names:
                if self.cluster.get(f"/api/v1/namespaces/{space}/pods/{name}") is None:
                    target = f"{{podName: {name}, namespace: {space}}}"
                    raise Failed("TARGET_SELECTION_ERROR", f"{target}: pod doesn't exist set by TARGET_PODS ENV")
            self.litmus.event(self.engine, "ChaosInject", "Injecting pod-delete chaos on application pod")
            for name in names:
                grace = 0 if self.env.get("FORCE") == "true" else None
                self.cluster.delete(f"/api/v1/namespaces/{space}/pods/{name}", grace_s=grace)
                self.litmus.seen.append(f"deleted {name}")
            hit = names
            self._sleep(float(self.env["CHAOS_INTERVAL"]))
        return hit

    def _container_kill(self) -> list[str]:
        space, names = self._targets()
        self.litmus.event(self.engine, "ChaosInject", "Injecting container-kill chaos on application pod")
        for name in names:
            _exec(space, name, "import os; os.kill(1, 15)")
        return names

    def _partition(self) -> list[str]:
        spec = self.engine["spec"]["appinfo"]
        key, value = spec["applabel"].split("=")
        space, names = self._targets()
        blocks = [
            ip if "/" in ip else f"{ip}/32" for ip in filter(None, self.env.get("DESTINATION_IPS", "").split(","))
        ]
        peers = [{"ipBlock": {"cidr": "0.0.0.0/0", "except": blocks}}] if blocks else []
        name = f"pod-network-partition-np-{secrets.token_hex(3)}"
        policy = {
            "metadata": {"name": name, "labels": {"name": name, UID: self.uid, "app.kubernetes.io/part-of": "litmus"}},
            "spec": {
                "podSelector": {"matchLabels": {key: value}},
                "policyTypes": ["Egress", "Ingress"],
                "egress": [{"to": peers}] if peers else [],
                "ingress": [{"from": peers}] if peers else [],
            },
        }
        where = f"/apis/networking.k8s.io/v1/namespaces/{space}/networkpolicies"
        self.cluster.create(where, policy)
        self.undo.append(lambda: self.cluster.delete(f"{where}/{name}"))
        return names

    def _stress(self) -> list[str]:
        space, names = self._targets()
        seconds = self.env["TOTAL_CHAOS_DURATION"]
        if self.kind == "pod-cpu-hog":
            words = f"--cpu {self.env['CPU_CORES']} --cpu-load {self.env['CPU_LOAD']}"
        else:
            words = f"--vm {self.env['NUMBER_OF_WORKERS']} --vm-bytes {self.env['MEMORY_CONSUMPTION']}M --vm-keep"
        for name in names:
            command = [
                "kubectl",
                "exec",
                "-n",
                space,
                name,
                "--",
                "stress-ng",
                "--timeout",
                f"{seconds}s",
                *words.split(),
            ]
            stressor = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

            def end(name: str = name, stressor: Any = stressor) -> None:
                _exec(space, name, _END_STRESS)
                stressor.wait(10)
                self._annotate(name, "reverted")

            self.undo.append(end)
            self._annotate(name, "injected")
        return names

    def _revert(self) -> None:
        while self.undo:
            self.undo.pop()()

    def _aborted(self) -> None:
        """What the termination signal of the experiment pod (or of its helper) makes it do, within its grace."""
        if self.litmus.script.keeps:
            return
        self._revert()
        self._end("Stopped", "Stopped", None)

    def _sleep(self, seconds: float) -> None:
        """Wait; the pod's termination ends it."""
        end = time.monotonic() + seconds
        while True:
            pod = self.cluster.get(f"/api/v1/namespaces/{self.ns}/pods/{self.pod}")
            if pod is None or pod["metadata"].get("deletionTimestamp"):
                raise Aborted
            if time.monotonic() >= end:
                return
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))

    # -- result -----------------------------------------------------------------------------------------------------

    def _fresh(self) -> dict[str, Any]:
        given = self.entry.get("spec", {}).get("probe") or []
        probes = [
            {"name": p["name"], "type": p["type"], "mode": p["mode"], "status": {"verdict": "Awaited"}} for p in given
        ]
        return {
            "experimentStatus": {"phase": "Running", "verdict": "Awaited", "probeSuccessPercentage": "Awaited"},
            "probeStatuses": probes,
            "history": {"passedRuns": 0, "failedRuns": 0, "stoppedRuns": 0, "targets": []},
        }

    def _path(self) -> str:
        return f"{GROUP}/namespaces/{self.ns}/chaosresults/{self.result}"

    def _annotate(self, target: str, status: str) -> None:
        try:
            self.cluster.patch(self._path(), {"metadata": {"annotations": {f"pod/{target}": status}}})
        except NotFound:
            pass

    def _end(self, phase: str, verdict: str, error: dict[str, str] | None) -> None:
        now = self.cluster.get(self._path())
        if now is None:
            return
        _into_history(self.cluster, now)
        probes = now["status"].get("probeStatuses") or []
        for probe in probes:
            word, why = self.litmus.script.probes.get(probe["name"], ("Passed", "Actual value: OK"))
            probe["status"] = {"verdict": word, "description": why}
        passed = sum(p["status"]["verdict"] == "Passed" for p in probes)
        share = str(100 * passed // len(probes)) if probes else "100" if verdict == "Pass" else "0"
        status: dict[str, Any] = {"phase": phase, "verdict": verdict, "probeSuccessPercentage": share}
        if error:
            status["errorOutput"] = error
        body: dict[str, Any] = {"status": {"experimentStatus": status, "probeStatuses": probes}}
        if phase == "Stopped":  # its labels are not derived from the pod any more: only this one stays
            body["metadata"] = {"labels": {**dict.fromkeys(now["metadata"]["labels"]), UID: self.uid}}
        try:
            self.cluster.patch(self._path(), body)
        except NotFound:
            pass

    def _verdict(self) -> str:
        now = self.cluster.get(self._path()) or {}
        return str(now.get("status", {}).get("experimentStatus", {}).get("verdict", ""))


class Failed(Exception):
    """The experiment cannot make its fault."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


_END_STRESS = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    try: name = open(f"/proc/{pid}/comm").read()
    except OSError: continue
    if name.startswith("stress-ng"):
        try: os.kill(int(pid), signal.SIGKILL)
        except OSError: pass
"""


def _exec(namespace: str, pod: str, program: str) -> None:
    command = ["kubectl", "exec", "-n", namespace, pod, "--", "python3", "-c", program]
    subprocess.run(command, capture_output=True, timeout=20, check=False)


def _alive(pod: dict[str, Any]) -> bool:
    return not pod["metadata"].get("deletionTimestamp")


def _pod_spec(grace: Any) -> dict[str, Any]:
    container = {"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "resources": TINY}
    command = ["tini", "--", "sleep", "1000"]  # a first process that hears its termination from the beginning
    spec: dict[str, Any] = {"restartPolicy": "Never", "containers": [{**container, "command": command}]}
    return spec | ({"terminationGracePeriodSeconds": int(grace)} if grace else {})


def _into_history(cluster: Cluster, result: dict[str, Any]) -> None:
    """Annotations of targets become its history."""
    notes = result["metadata"].get("annotations") or {}
    words = {k: v for k, v in notes.items() if "/" in k and v in ("injected", "reverted", "targeted")}
    if not words:
        return
    kept = {t["name"]: t for t in (result["status"].get("history") or {}).get("targets") or []}
    for key, status in words.items():
        kind, _, name = key.partition("/")
        kept[name] = {"name": name, "kind": kind, "chaosStatus": status}
    path = f"{GROUP}/namespaces/{result['metadata']['namespace']}/chaosresults/{result['metadata']['name']}"
    body = {
        "metadata": {"annotations": dict.fromkeys(words)},
        "status": {"history": {"targets": list(kept.values())}},
    }
    try:
        cluster.patch(path, body)
    except NotFound:
        pass


def rules(experiments: list[dict[str, Any]]) -> str:
    """A Role with all that these ChaosExperiments say they need."""
    found = [rule for e in experiments for rule in e["spec"]["definition"]["permissions"]]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "litmus-admin"}}
    return json.dumps({**role, "rules": found})
