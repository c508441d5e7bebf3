"""`pod_failure`: pods stay where they are, but none of their containers runs until the window ends.

The images of the pod's containers are swapped for a name that no registry can have (upper case). The kubelet ends the
containers because their image changed, then refuses the name without asking anybody: no pull, no image that would have
to be on the node, no process of the app, whatever the app's command and pull policy are. Put back, the app starts at once,
since the kubelet counts restarts per image. (Chaos Mesh's pause image costs a second restart, needs the image on every
node, and runs into the back-off where the app's command is not in it. A stopped process would hang, not fail, and a
liveness probe would end the fault. Deleted pods are replaced within seconds: that is `pod_delete`.)

A container that restarted before within ten minutes is started later, after the kubelet's back-off of 10 s, 20 s, 40 s …
since it ended. What is left of that when the fault is taken away would be our harm, not the platform's: the pod is then
handed to its controller, which brings a new one.

Native sidecars (init containers with `restartPolicy: Always`), such as a mesh's proxy, run on: it is the app that is down.

The kubelet ends containers as it always does: SIGTERM first. One that ignores it serves on for the pod's own grace
period, and so long the fault is not effective; `container_kill` and `pod_delete` are abrupt.

The API server keeps the fault, so it does not end by itself: run, watchdog or sweeper must take it away. The pod's own
annotations tell how.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import is_ready
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, InjectFailed
from mlchaos_dagster.kube.client import NAME, ApiRefused, Permission, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import is_there

_NOWHERE = "mlchaos.invalid/HELD-DOWN"
"""`.invalid` is never resolved (RFC 2606), upper case never parsed: the kubelet says InvalidImageName."""
_BACK_OFF_S, _BACK_OFF_MAX_S, _FORGOTTEN_AFTER_S = 10.0, 300.0, 600.0
"""Of the kubelet: delay of the second start, its limit, and how long a container must run to begin anew."""
_WORTH_WAITING_S = 3.0
"""A replacement takes about as long to become ready."""


class PodFailure:
    """No container of the frozen pods runs until recovery, but for native sidecars."""

    kinds = frozenset({"pod"})
    self_limiting = False

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Read and patch pods; delete, for those that the kubelet would start too late."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            for verb in ("get", "patch", "delete"):
                yield Permission(verb, "pods", namespace)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Pods that would end instead of starting again, and policies that refuse the image (asked by a dry run)."""
        asked: set[tuple[str, str]] = set()
        for ref, pod in frozen.read_all(site, request.refs).items():
            if pod is None:
                continue
            policy = text(pod, "spec", "restartPolicy")
            if policy != "Always":
                yield Objection(f"{ref.shown} has restartPolicy {policy}: it would end", "pod_delete or container_kill")
                continue
            owner = text(frozen.controller(pod), "uid") or ref.uid
            if (ref.namespace, owner) in asked:  # made from one template: what admission says of one holds for all
                continue
            asked.add((ref.namespace, owner))
            try:
                _swap(site, ref, pod, "dry-run", dryRun="All")
            except ApiRefused as e:
                yield Objection(f"{ref.shown} could not be held down: {e}", f"a policy that lets {_NOWHERE} pass")

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Images by container of each pod; the pod's annotation will say the same."""
        pods: dict[str, dict[str, str]] = {}
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            ours = frozen.marked_by(pod)
            if ours:
                raise DriverError(f"{ref.shown} carries the fault of lease {ours}", driver=NAME, verb="undo")
            pods[ref.uid] = _images(pod)
            step(done + 1, len(request.refs))
        return {"images": pods}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """One patch per pod: images and marks together, so that it is never half of it.

        Raises:
            InjectFailed: a pod was taken away before it was hit.
        """
        lease = injection.lease
        for done, ref in enumerate(injection.refs):

            def act(found: Object, ref: Ref = ref) -> None:
                if not is_there(found):
                    raise _missed(ref, "is being deleted, or is over", lease.id)
                if frozen.marked_by(found) != lease.id:
                    _swap(site, ref, found, lease.id)

            if not frozen.change(site, ref, act, lease):
                raise _missed(ref, "is gone", lease.id)
            step(done + 1, len(injection.refs))

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Images and marks as before; a pod that carries nothing of ours is shut to a late inject."""
        lease = injection.lease
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is not None and is_there(found) and not _ours(found, lease.id):
                frozen.shut_out(site, ref)
                found = frozen.read(site, ref)  # what came in just before is seen now
            if found is not None and _ours(found, lease.id):
                known: dict[str, str] = injection.undo.get("images", {}).get(ref.uid, {})
                frozen.change(site, ref, lambda pod, ref=ref, known=known: _restore(site, ref, pod, lease.id, known))
            step(0, 0)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Effective: of every frozen pod that is left no container runs, native sidecars apart, and it is not ready.

        A replacement is nobody's target.
        """
        held: list[bool] = []
        lines: list[str] = []
        down: list[bool] = []
        for ref, found in frozen.read_all(site, injection.refs).items():
            if found is None or not is_there(found):
                going = text(found, "metadata", "deletionTimestamp")
                gone = f"is being deleted since {going}" if going else "has ended" if found else "is gone"
                lines.append(f"{ref.shown} {gone}, and the fault with it; what replaced it is untouched")
                continue
            held.append(_ours(found, injection.lease.id))
            running = _running(found, "containerStatuses")
            down.append(held[-1] and not running and not is_ready(found))
            said = "held down" if held[-1] else "has its own images"
            beside = _running(found, "initContainerStatuses")
            nothing = f"nothing runs but {', '.join(beside)} beside it" if beside else "nothing runs"
            still = nothing if held[-1] else "its kubelet is about to start it"
            runs = f"{', '.join(running)} runs" if running else still
            lines.append(f"{ref.shown} {said}, {runs}, {_ready_word(found)}")
        return Evidence(present=any(held), effective=bool(down) and all(down), lines=tuple(lines))


def _running(pod: Object, which: str) -> list[str]:
    return [text(s, "name") for s in items(pod, "status", which) if "running" in _state(s)]


def _missed(ref: Ref, why: str, lease_id: str) -> InjectFailed:
    return InjectFailed(f"{ref.shown} {why}: it was not hit", driver=NAME, verb="inject", lease_id=lease_id)


def _ready_word(pod: Object) -> str:
    return "ready" if is_ready(pod) else "not ready"


def _images(pod: Object | None) -> dict[str, str]:
    return {text(c, "name"): text(c, "image") for c in items(pod, "spec", "containers")}


def _image_of(lease_id: str) -> str:
    return f"{_NOWHERE}:{lease_id}"


def _ours(pod: Object, lease_id: str) -> bool:
    return frozen.marked_by(pod) == lease_id or _image_of(lease_id) in _images(pod).values()


def _state(status: Object) -> Object:
    return mapping(status, "state")


def _swap(site: Site, ref: Ref, pod: Object, lease_id: str, **query: str) -> None:
    images = _images(pod)
    note = json.dumps({"images": images}, separators=(",", ":"))
    body = {
        "metadata": {"annotations": {LEASE: lease_id, frozen.UNDO: note}},
        "spec": {"containers": [{"name": name, "image": _image_of(lease_id)} for name in images]},
    }
    frozen.patch(site, pod, ref.path, body, how="strategic", **query)


def _restore(site: Site, ref: Ref, pod: Object, lease_id: str, known: dict[str, str]) -> None:
    """Images that are ours go back; one that somebody set meanwhile stays."""
    if _waits_s(pod) > _WORTH_WAITING_S and frozen.controller(pod):
        version = text(pod, "metadata", "resourceVersion")
        site.cluster.delete(ref.path, uid=ref.uid, resource_version=version, grace_s=0)
        return
    before = known or json.loads(text(pod, "metadata", "annotations", frozen.UNDO) or "{}").get("images", {})
    ours = [name for name, image in _images(pod).items() if image == _image_of(lease_id)]
    body: dict[str, Any] = {"metadata": {"annotations": dict.fromkeys(frozen.MARKS)}}
    if ours:
        body["spec"] = {"containers": [{"name": name, "image": before[name]} for name in ours]}
    frozen.patch(site, pod, ref.path, body, how="strategic")


def _waits_s(pod: Object) -> float:
    """For how long the kubelet would still put off the start of a container that gets its image back; at most."""
    return max((_wait_s(status) for status in items(pod, "status", "containerStatuses")), default=0.0)


def _wait_s(status: Object) -> float:
    last = mapping(status, "lastState", "terminated") or mapping(_state(status), "terminated")
    restarts = int(status.get("restartCount") or 0)
    began, ended = _seconds(text(last, "startedAt")), _seconds(text(last, "finishedAt"))
    if "running" in _state(status) or not restarts or not ended or ended - began > _FORGOTTEN_AFTER_S:
        return 0.0
    return ended + min(_BACK_OFF_MAX_S, _BACK_OFF_S * 2.0 ** (restarts - 1)) - time.time()


def _seconds(timestamp: str) -> float:
    """Unix time of an API timestamp; 0 where there is none."""
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp() if timestamp else 0.0
