"""`container_kill`: the main process of one container dies by SIGKILL; its kubelet starts the container again.

Nobody inside a container can kill its first process, and from outside only the node's runtime can, which would take a
privileged pod on the node. In between: an ephemeral container that shares the target's process namespace and holds the
one capability CAP_SYS_PTRACE (`agent/kill.py` says how). It works whether the app is process 1 or behind `tini`, needs
nothing in the target's image, and is refused beforehand where pod security does not let it in (asked by a dry run).

An ephemeral container cannot be taken out of a pod again: ended and empty, it stays listed until the pod goes. It kills
that very start of the container which was frozen, and nothing after its own deadline.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import NAME, ApiRefused, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import is_there

_STARTS_WITHIN_S = 12.0
"""The kubelet starts the container in one or two seconds. One that it starts later than this kills nothing, so that an
abort is over within the engine's `recover_timeout`. The clocks of machine and node must agree better than that."""


class ContainerKill:
    """SIGKILL to the main process of the target's container in each frozen pod, once."""

    kinds = frozenset({"pod"})
    self_limiting = True

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Read pods, add an ephemeral container; patch, to shut out one that comes too late."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            yield Permission("get", "pods", namespace)
            yield Permission("patch", "pods", namespace)
            yield Permission("patch", "pods/ephemeralcontainers", namespace)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Pods without that container, or that do not let the helper in."""
        for ref in request.refs:
            pod = frozen.read(site, ref)
            if pod is None:
                continue
            status = _status(pod, request.target.kubernetes.container)
            if "running" not in mapping(status, "state"):
                name = request.target.kubernetes.container or "(the first)"
                yield Objection(f"container {name} of {ref.shown} does not run", "a container that runs")
                continue
            try:
                _add(site, ref, pod, "mlchaos-dry-run", status, dryRun="All")
            except ApiRefused as e:
                yield Objection(
                    f"{ref.shown} does not let a helper container in: {e}",
                    "a namespace whose pod security allows CAP_SYS_PTRACE; or pod_delete",
                )

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Nothing can be undone; kept is which start of which container is meant."""
        pods: dict[str, dict[str, Any]] = {}
        for done, ref in enumerate(request.refs):
            status = _status(frozen.read(site, ref), request.target.kubernetes.container)
            if "running" not in mapping(status, "state"):
                raise DriverError(f"the container of {ref.shown} does not run", driver=NAME, verb="undo")
            pods[ref.uid] = {k: status.get(k) for k in ("name", "containerID", "restartCount")}
            step(done + 1, len(request.refs))
        return {"containers": pods}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """A helper beside each container; it kills and is gone. `active` tells what it did."""
        lease = injection.lease
        for done, ref in enumerate(injection.refs):
            meant: dict[str, Any] = injection.undo["containers"][ref.uid]

            def act(found: Object, ref: Ref = ref, meant: dict[str, Any] = meant) -> None:
                there = {text(c, "name") for c in items(found, "spec", "ephemeralContainers")}
                if is_there(found) and lease.id not in there:
                    _add(site, ref, found, lease.id, meant)

            frozen.change(site, ref, act, lease)
            step(done + 1, len(injection.refs))

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """The kubelet recovers. A helper that is not there yet is shut out; one that is there dies of its deadline."""
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is not None and is_there(found) and not _helper(found, injection.lease.id, "spec"):
                frozen.shut_out(site, ref)
            step(0, 0)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Effective: that start of the container ended. Present: a helper that may still kill."""
        present, killed, lines = False, [False] * len(injection.refs), list[str]()
        for index, ref in enumerate(injection.refs):
            meant: dict[str, Any] = injection.undo["containers"][ref.uid]
            found = frozen.read(site, ref)
            if found is None:
                lines.append(f"{ref.shown} is gone; what replaced it is untouched")
                continue
            status = _status(found, str(meant["name"]))
            killed[index], said = _ended(status, meant)
            waits, helper_said = _helper_state(found, injection.lease.id)
            if killed[index] and not _fired(found, injection.lease.id):
                killed[index], said = False, f"{said}, but not by our helper"
                waits = False  # that start of the container is over: it has nothing left to kill
            present = present or (waits and not killed[index])
            lines.append(f"container {meant['name']} of {ref.shown} {said}{helper_said}")
        return Evidence(present=present, effective=all(killed), lines=tuple(lines))


def _status(pod: Object | None, name: str) -> Object:
    """Status of a container; of the first in the spec where no name is given."""
    first = next(iter(items(pod, "spec", "containers")), Object())
    wanted = name or text(first, "name")
    return next((s for s in items(pod, "status", "containerStatuses") if text(s, "name") == wanted), Object())


def _add(site: Site, ref: Ref, pod: Object, name: str, meant: Object, **query: str) -> None:
    container_id = text(meant, "containerID").rpartition("/")[2]
    source = (files("mlchaos_dagster.agent") / "kill.py").read_text(encoding="utf-8")
    helper = {
        "name": name,
        "image": site.options.helper_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-I", "-S", "-B", "-c", source, container_id, f"{time.time() + _STARTS_WITHIN_S:.0f}"],
        "targetContainerName": text(meant, "name"),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "runAsUser": 0,
            "runAsNonRoot": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE", "KILL"]},
        },
    }
    body = {"spec": {"ephemeralContainers": [helper]}}
    frozen.patch(site, pod, f"{ref.path}/ephemeralcontainers", body, how="strategic", **query)


def _helper(pod: Object, name: str, where: str) -> Object:
    place = ("spec", "ephemeralContainers") if where == "spec" else ("status", "ephemeralContainerStatuses")
    return next((c for c in items(pod, *place) if text(c, "name") == name), Object())


def _helper_state(pod: Object, name: str) -> tuple[bool, str]:
    """Whether the helper may still kill, and what it says for itself."""
    spec = _helper(pod, name, "spec")
    if not spec:
        return False, ""
    state = mapping(_helper(pod, name, "status"), "state")
    ended = mapping(state, "terminated")
    if ended:
        message = text(ended, "message").strip()
        return False, f" (helper: {message})" if message else ""
    waits = time.time() <= float(spec["command"][-1])
    if "running" in state:
        return waits, " (helper runs)"
    reason = text(state, "waiting", "message") or text(state, "waiting", "reason")
    return waits, f" (helper not started{': ' + reason if reason else ''})"


def _fired(pod: Object, name: str) -> bool:
    """Whether the helper says that it killed: it leaves with 0, or dies with the process namespace that it ended (137).

    A container may end by itself, or by its liveness probe, in the same second.
    """
    ended = mapping(_helper(pod, name, "status"), "state", "terminated")
    return bool(ended) and int(ended.get("exitCode") or 0) in (0, 137)


def _ended(status: Object, meant: dict[str, Any]) -> tuple[bool, str]:
    """Whether that start of the container is over, and how it ended."""
    for state in ("state", "lastState"):
        over = mapping(status, state, "terminated")
        if over and text(over, "containerID") == meant["containerID"]:
            times = int(status.get("restartCount") or 0) - int(meant["restartCount"] or 0)
            return True, f"ended with exit code {text(over, 'exitCode')}, {times} restarts since"
    if status and text(status, "containerID") not in ("", meant["containerID"]):
        return True, f"was started again, {text(status, 'restartCount')} restarts (before: {meant['restartCount']})"
    return False, "runs on" if "running" in mapping(status, "state") else "is not to be seen"
