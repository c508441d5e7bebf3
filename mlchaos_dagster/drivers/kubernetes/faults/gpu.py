"""A share of the memory of a node's GPU is held by a Job, one a target, that asks the scheduler for a device there.

The target is a node, or a pod: then it is the pod's node. The Job gets a device of its own unless the device plugin shares
devices (time-slicing, MPS): only then does it press on what the pod uses. It is made suspended and let go after the lease
was looked at: a Job that was taken away meanwhile cannot be let go any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.errors import InjectFailed, RecoverFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import NAME, Conflict, NotFound, Permission, Site
from mlchaos_dagster.kube.labels import LEASE, of_lease
from mlchaos_dagster.kube.lease_objects import object_name
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref, collection

RESOURCE = "nvidia.com/gpu"
_PROGRAM = "mlchaos_dagster.drivers.kubernetes.faults.gpu_job"
_DIRECTORY = "/tmp/mlchaos"
_HELD_S = 90.0
"""Scheduling, a start, filling 100 GiB: seconds each."""
_GONE_S = 15.0
_GRACE_S = 2
_LATE_S = 5
"""How long after the program's own deadline the Job controller ends it."""
_KEEP_FINISHED_S = 60
_MEMORY = "1Gi"
"""Of the host: CUDA's context, and nothing else."""


class GpuMemoryHog:
    """`fraction` of every device that the Job gets."""

    kinds = frozenset({"node", "pod"})
    self_limiting = True

    def __init__(self, resource: str = RESOURCE) -> None:
        self.resource = resource

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Jobs are made, let go and removed in the control namespace, their pods looked at."""
        control = site.options.control_namespace
        yield Permission("get", "nodes")
        for verb in ("create", "patch", "list", "delete"):
            yield Permission(verb, "jobs", control, "batch")
        yield Permission("list", "pods", control)
        for space in sorted({ref.namespace for ref in request.refs if ref.namespace}):
            yield Permission("get", "pods", space)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Nodes without a GPU."""
        for ref in request.refs:
            node = self._node(site, ref)
            offered = text(site.cluster.get(f"/api/v1/nodes/{node}"), "status", "allocatable", self.resource)
            if offered in ("", "0"):
                yield Objection(
                    f"node {node or '(none yet)'}{'' if ref.kind == 'node' else f' of {ref.shown}'} offers no {self.resource}",
                    "a target on a node whose device plugin offers one: kubectl get nodes -o "
                    f"custom-columns=NAME:.metadata.name,GPUS:.status.allocatable.{self.resource.replace('.', chr(92) + '.')}",
                )

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which node each target means."""
        return {"nodes": {str(ref): self._node(site, ref) for ref in request.refs}}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Make the Jobs, look at the lease, let them go, wait until all hold what they are to hold.

        Raises:
            InjectFailed: one could not be scheduled or got no memory. On failure: its Job is there until recover.
        """
        lease = injection.lease
        left_s = min(lease.duration_s, lease.deadline_wall - time.time())
        if left_s <= 0:
            raise _failed(lease, "the lease's deadline has passed")
        jobs: list[Object] = []
        leases.held(site, lease)
        for number, ref in enumerate(injection.refs):
            body = self._job(site, injection, number, injection.undo["nodes"][str(ref)], left_s)
            try:
                jobs.append(site.cluster.create(_jobs(site), body))
            except Conflict as e:
                raise _failed(lease, "a Job of this lease is there already") from e
        leases.held(site, lease)
        for job in jobs:
            # By uid alone: the Job controller writes the status meanwhile, and who takes the lease away removes the Job.
            go = {"metadata": {"uid": text(job, "metadata", "uid")}, "spec": {"suspend": False}}
            try:
                site.cluster.patch(f"{_jobs(site)}/{text(job, 'metadata', 'name')}", go)
            except (NotFound, Conflict) as e:
                raise _failed(lease, "the Job was taken away") from e
        self._wait_held(site, injection, len(jobs), step)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Remove the Jobs, and wait until their pods are gone: with the process goes its memory.

        Raises:
            RecoverFailed: a pod is still there.
        """
        lease = injection.lease
        for job in _of_lease(site, _jobs(site), lease):
            site.cluster.delete(f"{_jobs(site)}/{text(job, 'metadata', 'name')}", uid=text(job, "metadata", "uid"))
        end = time.monotonic() + _GONE_S
        while left := _of_lease(site, _pods(site), lease):
            step(0, len(left))
            if time.monotonic() >= end:
                said = f"still there: pod {text(left[0], 'metadata', 'name')}"
                raise RecoverFailed(said, driver=NAME, verb="recover", lease_id=lease.id)
            time.sleep(0.2)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """The Jobs' pods: ready is who holds everything."""
        lease = injection.lease
        jobs, pods = _of_lease(site, _jobs(site), lease), _of_lease(site, _pods(site), lease)
        lines = [
            f"pod {text(p, 'metadata', 'name')} on {text(p, 'spec', 'nodeName') or 'no node'}: {_said(p)}" for p in pods
        ]
        present = any(not _is_over(job) for job in jobs) or any(
            text(p, "status", "phase") in ("Pending", "Running") for p in pods
        )
        holding = [p for p in pods if _is_ready(p)]
        if not lines:
            lines = [
                f"no Job of lease {lease.id} is left"
                if not jobs
                else f"{len(jobs)} Jobs of lease {lease.id} without a pod"
            ]
        return Evidence(present=present, effective=len(holding) == len(injection.refs), lines=tuple(lines))

    # -- inside ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _node(site: Site, ref: Ref) -> str:
        return ref.name if ref.kind == "node" else text(site.cluster.get(ref.path), "spec", "nodeName")

    def _job(self, site: Site, injection: Injection, number: int, node: str, left_s: float) -> Object:
        lease, labels = injection.lease, of_lease(injection.lease.id, "fault")
        fraction = float(injection.params["fraction"])
        # `tini`: as process 1 the hog would not hear SIGTERM.
        program = ["tini", "--", "python3", "-m", _PROGRAM, _DIRECTORY, lease.id, str(fraction), f"{left_s:.1f}"]
        container = {
            "name": "hog",
            "image": site.options.helper_image,
            "imagePullPolicy": "IfNotPresent",
            "command": program,
            "resources": {"requests": {"cpu": "50m"}, "limits": {self.resource: 1, "memory": _MEMORY, "cpu": "1"}},
            "readinessProbe": {
                "exec": {"command": ["grep", "-q", '"state": "holding"', f"{_DIRECTORY}/{lease.id}.held"]},
                "periodSeconds": 1,
            },
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        here = {"key": "metadata.name", "operator": "In", "values": [node]}
        affinity = {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [here]}]}
            }
        }
        pod = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": _GRACE_S,
            "automountServiceAccountToken": False,
            "affinity": affinity,
            "tolerations": [
                {"operator": "Exists", "effect": "NoSchedule"}
            ],  # nodes with GPUs are kept for who wants them
            "containers": [container],
        }
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"{object_name(lease.id)}-{number}", "labels": labels},
            "spec": {
                "suspend": True,
                "backoffLimit": 0,
                "activeDeadlineSeconds": math.ceil(left_s) + _LATE_S,
                "ttlSecondsAfterFinished": _KEEP_FINISHED_S,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }

    def _wait_held(self, site: Site, injection: Injection, wanted: int, step: Step) -> None:
        end, lease = time.monotonic() + _HELD_S, injection.lease
        while True:
            pods = _of_lease(site, _pods(site), lease)
            if sum(map(_is_ready, pods)) >= wanted:
                return
            for pod in pods:
                if text(pod, "status", "phase") in ("Failed", "Succeeded"):
                    raise _failed(lease, _said(pod))
            if time.monotonic() >= end or any(_cannot_be_placed(pod) for pod in pods):
                raise _failed(lease, "; ".join(map(_said, pods)) or "the Job got no pod")
            step(0, wanted)
            time.sleep(0.25)


def _jobs(site: Site) -> str:
    return collection("job", site.options.control_namespace)


def _pods(site: Site) -> str:
    return collection("pod", site.options.control_namespace)


def _of_lease(site: Site, path: str, lease: Lease) -> list[Object]:
    return site.cluster.list(path, labels=f"{LEASE}={lease.id}")


def _condition(found: Object, kind: str) -> Object:
    return next((c for c in items(found, "status", "conditions") if c.get("type") == kind), Object())


def _is_ready(pod: Object) -> bool:
    return _condition(pod, "Ready").get("status") == "True" and not text(pod, "metadata", "deletionTimestamp")


def _is_over(job: Object) -> bool:
    return any(_condition(job, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def _cannot_be_placed(pod: Object) -> bool:
    return text(_condition(pod, "PodScheduled"), "reason") == "Unschedulable"


def _said(pod: Object) -> str:
    """What a pod's own status says of it."""
    if _cannot_be_placed(pod):
        return f"cannot be scheduled: {text(_condition(pod, 'PodScheduled'), 'message')}"
    status = next(iter(items(pod, "status", "containerStatuses")), Object())
    ended, waits = mapping(status, "state", "terminated"), mapping(status, "state", "waiting")
    if ended:
        return text(ended, "message").strip() or f"ended: {text(ended, 'reason')}, exit code {text(ended, 'exitCode')}"
    if waits:
        return f"waits: {text(waits, 'reason')} {text(waits, 'message')}".strip()
    return (
        "holds its share of the device" if _is_ready(pod) else f"{text(pod, 'status', 'phase')}, does not hold it all"
    )


def _failed(lease: Lease, said: str) -> InjectFailed:
    return InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
