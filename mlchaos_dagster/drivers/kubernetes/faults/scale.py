"""`scale_to_zero`: a workload has no replicas until the window ends, then as many as before.

Replicas and marks are one patch, so that it is never half of it (the scale subresource would need a second one for the
marks). Whoever scales the workload meanwhile wins: recovery then only takes its marks away. A HorizontalPodAutoscaler
does not fight: with no replicas it is disabled by its own rule, and goes on when they are back. What does fight are
owners (an InferenceService, a Rollout) and operators that keep `spec.replicas`: they are refused beforehand.

The API server keeps the fault, so it does not end by itself. The Deployment controller copies annotations to
ReplicaSets, from where `kubectl rollout undo` would bring them back: they are taken away there, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import NAME, Conflict, NotFound, Permission, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import is_there

_PEOPLE = ("kubectl", "helm", "terraform", "pulumi", "k9s", "lens", "openapi-generator", "python", "mozilla", "mlchaos")
"""Beginnings of field managers that write once, when somebody says so, and do not come back by themselves."""
_AUTOSCALER = "kube-controller-manager"
_MANAGER = "mlchaos"
_SETTLES_S = 5.0
"""For its controller to see a change; it takes a moment, and a second on a busy machine."""
_POLL_S = 0.05


class Scaling:
    """Other replicas of the frozen workloads until recovery; subclasses say how many."""

    kinds = frozenset({"deployment", "statefulset"})
    self_limiting = False

    def goal(self, before: int, params: dict[str, Any]) -> int:
        """Replicas that a workload is to have instead of `before`."""
        raise NotImplementedError

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Read and patch the workloads; read and patch the ReplicaSets to which annotations spread."""
        for kind, namespace in sorted({(ref.kind, ref.namespace) for ref in request.refs}):
            for verb in ("get", "patch"):
                yield Permission(verb, f"{kind}s", namespace, "apps")
            if kind == "deployment":
                for verb in ("list", "patch"):
                    yield Permission(verb, "replicasets", namespace, "apps")

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Workloads that have no replicas, are marked, or whose replicas somebody else keeps."""
        for ref in request.refs:
            found = frozen.read(site, ref)
            if found is None:
                continue
            lease = frozen.marked_by(found)
            if lease:
                yield Objection(f"{ref.shown} carries the fault of lease {lease}", f"mlchaos recover {lease}")
            elif self.goal(1, request.params) == 0 == replicas_of(found):
                yield Objection(f"{ref.shown} has no replicas", "a workload that has some")
            for who in _keepers(found):
                yield Objection(f"{who} keeps the replicas of {ref.shown} and would fight the fault", f"{who} paused")

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Replicas as they are; the workload's annotation will say the same."""
        replicas: dict[str, int] = {}
        for done, ref in enumerate(request.refs):
            found = frozen.read(site, ref)
            if found is None or frozen.marked_by(found):
                said = f"carries the fault of lease {frozen.marked_by(found)}" if found else "is gone"
                raise DriverError(f"{ref.shown} {said}", driver=NAME, verb="undo")
            replicas[ref.uid] = replicas_of(found)
            step(done + 1, len(request.refs))
        return {"replicas": replicas}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """One patch per workload."""
        lease = injection.lease
        for done, ref in enumerate(injection.refs):

            def act(found: Object, ref: Ref = ref) -> None:
                before = replicas_of(found)
                goal = self.goal(before, injection.params)
                if not is_there(found) or frozen.marked_by(found) == lease.id or goal == before:
                    return
                note = json.dumps({"replicas": before}, separators=(",", ":"))
                body = {"metadata": {"annotations": {LEASE: lease.id, frozen.UNDO: note}}, "spec": {"replicas": goal}}
                frozen.patch(site, found, ref.path, body, fieldManager=_MANAGER)

            frozen.change(site, ref, act, lease)
            step(done + 1, len(injection.refs))

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Replicas as before, unless somebody set others meanwhile; marks away, a late inject shut out."""
        lease = injection.lease
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is not None and is_there(found) and frozen.marked_by(found) != lease.id:
                frozen.shut_out(site, ref)
                found = frozen.read(site, ref)  # what came in just before is seen now
            if found is not None and frozen.marked_by(found) == lease.id:
                frozen.change(site, ref, lambda now, ref=ref: self._restore(site, ref, now, injection))
            _settled(site, ref, step)
            for copy in copies(site, ref, lease.id):
                unmark(site, copy)
            step(0, 0)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Effective: as many as meant are wanted and exist, as the controller itself says of this very state."""
        present, effective, lines = False, list[bool](), list[str]()
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is None:
                lines.append(f"{ref.shown} is gone, and the fault with it")
                continue
            ours = frozen.marked_by(found) == injection.lease.id
            wanted, there = replicas_of(found), int(part(found, "status", "replicas") or 0)
            seen = _is_seen(found)
            before = injection.undo["replicas"].get(ref.uid)
            goal = self.goal(0 if before is None else before, injection.params)
            effective.append(ours and wanted == there == goal and seen)
            changed = (
                "" if wanted in (goal, before) else f" (before the fault: {before}; somebody set others meanwhile)"
            )
            copied = any(copies(site, ref, injection.lease.id))
            present = present or ours or copied or not seen
            marked = "marked" if ours else "marks on its ReplicaSets" if copied else "not marked"
            marked += "" if seen else ", its controller has not seen that yet"
            lines.append(f"{ref.shown} wants {wanted} replicas and has {there}{changed}, {marked}")
        return Evidence(present=present, effective=bool(effective) and all(effective), lines=tuple(lines))

    def _restore(self, site: Site, ref: Ref, found: Object, injection: Injection) -> None:
        if frozen.marked_by(found) != injection.lease.id:
            return
        noted = json.loads(text(found, "metadata", "annotations", frozen.UNDO) or "{}").get("replicas")
        # What was noted in the very patch that made the fault; an autoscaler may have been at work since `undo`.
        known: dict[str, int] = injection.undo.get("replicas", {})
        before: int = known.get(ref.uid, 1) if noted is None else int(noted)
        body: dict[str, Any] = {"metadata": {"annotations": dict.fromkeys(frozen.MARKS)}}
        if replicas_of(found) == self.goal(before, injection.params):
            body["spec"] = {"replicas": before}
        frozen.patch(site, found, ref.path, body, fieldManager=_MANAGER)


class ScaleToZero(Scaling):
    """No replicas of the frozen workloads until recovery."""

    def goal(self, before: int, params: dict[str, Any]) -> int:
        """None."""
        return 0


def replicas_of(found: Object) -> int:
    """Replicas that a workload wants; the API's default is 1."""
    wanted = part(found, "spec", "replicas")
    return 1 if wanted is None else int(wanted)


def _keepers(found: Object) -> Iterator[str]:
    """Who would set the replicas again: a controlling owner, a field manager that is no person's tool."""
    owner = frozen.controller(found)
    if owner:
        yield f"{text(owner, 'kind')} {text(owner, 'name')}"
    for entry in items(found, "metadata", "managedFields"):
        who = text(entry, "manager")
        if "f:replicas" not in mapping(entry, "fieldsV1", "f:spec") or who == _AUTOSCALER:
            continue
        if not who.lower().startswith(_PEOPLE):
            yield f"field manager {who}"


def _settled(site: Site, ref: Ref, step: Step) -> None:
    """Until the controller has seen the workload as it is now: from what it saw before it copies marks, also late."""
    end = time.monotonic() + _SETTLES_S
    while (found := frozen.read(site, ref)) is not None and not _is_seen(found) and time.monotonic() < end:
        step(0, 0)
        time.sleep(_POLL_S)


def _is_seen(found: Object) -> bool:
    return int(part(found, "status", "observedGeneration") or 0) >= int(part(found, "metadata", "generation") or 0)


def copies(site: Site, ref: Ref, lease_id: str) -> Iterator[Object]:
    """ReplicaSets of a Deployment or Rollout that carry a mark of ours."""
    if ref.kind not in ("deployment", "rollout"):
        return
    for found in site.cluster.list(f"/apis/apps/v1/namespaces/{ref.namespace}/replicasets"):
        notes = mapping(found, "metadata", "annotations")
        mine = any(text(o, "uid") == ref.uid for o in items(found, "metadata", "ownerReferences"))
        if mine and notes.get(LEASE) == lease_id:
            yield found


def unmark(site: Site, replica_set: Object) -> None:
    """Take our marks off. Of that uid, whatever its version: its controller changes it all the time, and nobody else writes our marks."""
    meta = replica_set["metadata"]
    body = {"metadata": {"uid": meta["uid"], "annotations": dict.fromkeys(frozen.MARKS)}}
    try:
        site.cluster.patch(f"/apis/apps/v1/namespaces/{meta['namespace']}/replicasets/{meta['name']}", body)
    except (NotFound, Conflict):
        return  # gone, or another one of its name
