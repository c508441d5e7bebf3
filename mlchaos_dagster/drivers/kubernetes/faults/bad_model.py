"""`bad_model` on an Argo Rollout: a worse, well-formed model version is shipped as any version is, through its pod template.

One variable of one container gets another value, in one patch with the mark; what the Rollout does about it (canary,
analysis, abort) is its own affair, and what the experiment is about. Recovery puts the value back, so the template is the
one before and its hash is that of the stable ReplicaSet: that alone brings an aborted Rollout from Degraded to Healthy.
Whoever ships something else meanwhile wins: recovery then only takes its marks away.

The bad version is in the service until its pods are gone, whatever the template says. It is gone only then, and a
Rollouts controller that is down is not called clean. The API server keeps the fault, so it does not end by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import is_ready
from mlchaos_dagster.drivers.kubernetes.faults.scale import copies, unmark
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, InjectFailed
from mlchaos_dagster.kube import rollouts
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref, collection
from mlchaos_dagster.kube.selecting import is_there

_MANAGER = "mlchaos"
_GONE_S = 30.0
"""How long `recover` waits for the bad version's pods: their own grace, and a controller's rounds."""
_LOOK_S = 0.25
_CALM = 3
"""So many looks in a row must find nothing."""


class BadModel:
    """Another value of `kubernetes.version_variable`: `kubernetes.bad_version`."""

    kinds = frozenset({"rollout"})
    self_limiting = False

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Read and patch the Rollouts; read their ReplicaSets and pods, and patch those to which annotations spread."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            yield from (Permission(verb, "rollouts", namespace, rollouts.GROUP) for verb in ("get", "patch"))
            yield from (Permission(verb, "replicasets", namespace, "apps") for verb in ("list", "patch"))
            yield Permission("list", "pods", namespace)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """A Rollout that is not at rest, or where the version is not said as the target tells."""
        where = request.target.kubernetes
        if not where.version_variable or not where.bad_version:
            yield Objection(
                "the target says neither which variable names the model version nor which version is bad",
                "targets.….kubernetes: {version_variable: MODEL_VERSION, bad_version: …}",
            )
            return
        for ref in request.refs:
            found = frozen.read(site, ref)
            if found is None:
                yield Objection(f"{ref.shown} is gone", "a Rollout that is there")
            elif lease := frozen.marked_by(found):
                yield Objection(f"{ref.shown} carries the fault of lease {lease}", f"mlchaos recover {lease}")
            elif not rollouts.at_rest(found):
                yield Objection(
                    f"{ref.shown} is {rollouts.shown_phase(found)}: a version is under way, or was taken back",
                    "a Rollout that is Healthy",
                )
            elif said := _unfit(found, where.container, where.version_variable, where.bad_version):
                yield Objection(f"{ref.shown} {said}", "targets.….kubernetes: container, version_variable, bad_version")

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Where the version is said, and what it is now; the Rollout's annotation will say the same."""
        where, found = request.target.kubernetes, dict[str, Any]()
        for done, ref in enumerate(request.refs):
            rollout = frozen.read(site, ref)
            if rollout is None or frozen.marked_by(rollout):
                said = f"carries the fault of lease {frozen.marked_by(rollout)}" if rollout else "is gone"
                raise DriverError(f"{ref.shown} {said}", driver=NAME, verb="undo")
            if said := _unfit(rollout, where.container, where.version_variable, where.bad_version):
                raise DriverError(f"{ref.shown} {said}", driver=NAME, verb="undo")
            container = _container(rollout, where.container)
            found[ref.uid] = {
                "container": text(container, "name"),
                "variable": where.version_variable,
                "before": _value(container, where.version_variable),
                "bad": where.bad_version,
                "stable": text(rollout, "status", "stableRS"),
            }
            step(done + 1, len(request.refs))
        return {"rollouts": found}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """One patch per Rollout, on the template as it was read.

        Raises:
            InjectFailed: it is gone, or serves another version than when it was read.
        """
        lease = injection.lease
        for done, ref in enumerate(injection.refs):
            known: dict[str, str] = injection.undo["rollouts"][ref.uid]

            def act(found: Object, ref: Ref = ref, known: dict[str, str] = known) -> None:
                if frozen.marked_by(found) == lease.id:
                    return
                now = _value(_container(found, known["container"]), known["variable"])
                if not is_there(found) or frozen.marked_by(found) or now != known["before"]:
                    said = f"{ref.shown} is not as it was: {known['variable']} is {now}, it was {known['before']}"
                    raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
                note = json.dumps(known, separators=(",", ":"))
                marks = {LEASE: lease.id, frozen.UNDO: note}
                body = {"metadata": {"annotations": marks}, "spec": _serving(found, known, known["bad"])}
                frozen.patch(site, found, ref.path, body, fieldManager=_MANAGER)

            if not frozen.change(site, ref, act, lease):
                raise InjectFailed(f"{ref.shown} is gone", driver=NAME, verb="inject", lease_id=lease.id)
            step(done + 1, len(injection.refs))

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """The version as before, unless somebody shipped another one meanwhile; marks away, a late inject shut out; then
        wait for the bad version's pods to go. (What still is there then, `active` tells.)
        """
        lease = injection.lease
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is not None and is_there(found) and frozen.marked_by(found) != lease.id:
                frozen.shut_out(site, ref)
                found = frozen.read(site, ref)  # what came in just before is seen now
            if found is not None and frozen.marked_by(found) == lease.id:
                frozen.change(site, ref, lambda now, ref=ref: _restore(site, ref, now, lease.id))
            step(0, 0)
        end, calm = time.monotonic() + _GONE_S, 0
        while calm < _CALM and time.monotonic() < end:
            left = [ref for ref in injection.refs if self._unsettled(site, injection, ref)]
            calm = 0 if left else calm + 1
            step(0, 0)
            time.sleep(_LOOK_S)  # until its own controller is through; a watch would be one more permission

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Effective: pods of the bad version have been ready, as their ReplicaSet or the Rollout's own abort says."""
        present, effective, lines = False, list[bool](), list[str]()
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is None:
                lines.append(f"{ref.shown} is gone, and the fault with it")
                continue
            known: dict[str, str] = _known(injection, ref, found)
            ours = frozen.marked_by(found) == injection.lease.id
            now = _value(_container(found, known.get("container", "")), known.get("variable", ""))
            shipped = ours and _serves(found, known)
            ready, there = self._pods(site, ref, known)
            copied = any(copies(site, ref, injection.lease.id))
            outlives = there > 0 and not _serves(found, known)  # a canary whose template is gone
            present = present or ours or outlives or copied
            effective.append(shipped and ready > 0)
            said = "shipped by us" if shipped else "as before" if now == known.get("before") else "set by others since"
            lines.append(
                f"{ref.shown}: {known.get('variable')} is {now} ({said}), {ready} of {there} pods of {known.get('bad')} ready, "
                f"{rollouts.shown_phase(found)}, stable {text(found, 'status', 'stableRS')} (before: {known.get('stable', '')})"
                + (", marks on its ReplicaSets" if copied and not ours else "")
            )
        return Evidence(present=present, effective=bool(effective) and all(effective), lines=tuple(lines))

    def _unsettled(self, site: Site, injection: Injection, ref: Ref) -> bool:
        """Whether something may still come, or has to go. Marks that the Rollouts controller has spread are taken away.

        It goes on from what it read before: only when it has observed the present spec, it copies our marks no more.
        """
        found = frozen.read(site, ref)
        if found is None:
            return False
        spread = list(copies(site, ref, injection.lease.id))
        for one in spread:
            unmark(site, one)
        known = _known(injection, ref, found)
        if _serves(found, known):
            return bool(spread)  # somebody else ships that very version: it is theirs
        return bool(spread) or not rollouts.is_observed(found) or self._pods(site, ref, known)[1] > 0

    def _pods(self, site: Site, ref: Ref, known: dict[str, str]) -> tuple[int, int]:
        """(ready, all) pods of the bad version. One that is being deleted still answers who is connected: it counts."""
        ready = there = 0
        for one in rollouts.replica_sets(site, ref):
            if not known or not _serves(one, known):
                continue
            made_of = text(one, "metadata", "labels", rollouts.HASH)
            for pod in site.cluster.list(collection("pod", ref.namespace), labels=f"{rollouts.HASH}={made_of}"):
                if frozen.controller(pod).get("uid") != one["metadata"]["uid"]:
                    continue
                ready, there = (
                    ready + is_ready(pod),
                    there + (text(pod, "status", "phase") not in ("Succeeded", "Failed")),
                )
        return ready, there


def _serves(found: Object, known: dict[str, str]) -> bool:
    """Whether a template, of a Rollout or a ReplicaSet, is of the bad version."""
    return bool(known) and _value(_container(found, known["container"]), known["variable"]) == known["bad"]


def _container(found: Object, name: str) -> Object:
    """Of a Rollout's or ReplicaSet's template; of that name, or the first; empty when there is none."""
    there = items(found, "spec", "template", "spec", "containers")
    return next((c for c in there if not name or text(c, "name") == name), Object())


def _value(container: Object, variable: str) -> str:
    return next((text(e, "value") for e in items(container, "env") if text(e, "name") == variable), "")


def _unfit(found: Object, name: str, variable: str, bad: str) -> str:
    """Why the version cannot be changed there; empty: it can."""
    container = _container(found, name)
    if not mapping(found, "spec", "template"):
        return "has no template of its own (workloadRef)"
    if not container:
        return f"has no container {name}"
    entry = next((e for e in items(container, "env") if text(e, "name") == variable), None)
    if entry is None or "value" not in entry:
        return f"does not say its version in {variable}" + (" (valueFrom)" if entry else "")
    return f"serves {bad} already" if entry["value"] == bad else ""


def _serving(found: Object, known: dict[str, str], version: str) -> Object:
    """The `spec` of a merge patch: all containers as they were read, with one value changed. The resource version of the
    patch keeps everybody else's changes from being overwritten.
    """
    name, variable = known["container"], known["variable"]
    containers = [
        {**c, "env": [{**e, "value": version} if text(e, "name") == variable else e for e in items(c, "env")]}
        if text(c, "name") == name
        else c
        for c in items(found, "spec", "template", "spec", "containers")
    ]
    return {"template": {"spec": {"containers": containers}}}


def _restore(site: Site, ref: Ref, found: Object, lease_id: str) -> None:
    if frozen.marked_by(found) != lease_id:
        return
    known = _noted(found)
    body: dict[str, Any] = {"metadata": {"annotations": dict.fromkeys(frozen.MARKS)}}
    if known and _value(_container(found, known["container"]), known["variable"]) == known["bad"]:
        body["spec"] = _serving(found, known, known["before"])
    frozen.patch(site, found, ref.path, body, fieldManager=_MANAGER)


def _noted(found: Object | None) -> dict[str, str]:
    """What the Rollout itself says of what it was; empty where it says nothing that can be read."""
    try:
        noted = json.loads(text(found, "metadata", "annotations", frozen.UNDO) or "{}")
        return {key: str(noted[key]) for key in ("container", "variable", "before", "bad")}
    except (ValueError, KeyError, TypeError):
        return {}


def _known(injection: Injection, ref: Ref, found: Object | None) -> dict[str, str]:
    """From the lease; from the object where the lease has lost its content."""
    return injection.undo.get("rollouts", {}).get(ref.uid) or _noted(found)
