"""`pod_delete`: pods vanish, once or again at an interval. Their controller brings others.

Once, it is an act: nothing of it can be left. At an interval, a thread of the run's own process deletes what replaced
the frozen pods, as many each time; it ends with the process, at the lease's deadline, when the lease is taken over, and
when `recover` is called here. A pod that no controller owns would stay away, so it is refused beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen, rounds
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import selects
from mlchaos_dagster.drivers.cluster.rounds import Rounds
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.errors import InjectFailed
from mlchaos_dagster.kube.client import NAME, ApiRefused, Permission, Site
from mlchaos_dagster.kube.objects import Object, mapping, part, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import is_there

_TOO_MANY_REQUESTS = 429
"""What the eviction API answers when a budget says no."""


class PodDelete:
    """Delete or evict the frozen pods, once or at an interval."""

    kinds = frozenset({"pod"})
    self_limiting = True

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Read and delete (or evict) pods; patch, to shut out a deletion that comes too late."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            yield Permission("get", "pods", namespace)
            yield Permission("patch", "pods", namespace)
            if request.params.get("evict"):
                yield Permission("create", "pods/eviction", namespace)
            else:
                yield Permission("delete", "pods", namespace)
            if request.params.get("interval_s"):
                yield Permission("list", "pods", namespace)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Pods that would not come back; budgets that the eviction API would enforce whatever the guards say."""
        pods = list(frozen.read_all(site, request.refs).items())
        for ref, pod in pods:
            owner = text(frozen.controller(pod), "kind")
            if pod is not None and owner in ("", "Node"):
                why = "no controller owns it" if not owner else "it is a static pod of its node"
                yield Objection(f"{ref.shown} would not come back: {why}", "pods of a Deployment, StatefulSet or Job")
        if request.params.get("evict"):
            for budget, allowed, covered in _budgets(site, [p for _, p in pods if p is not None]):
                if covered > allowed:
                    yield Objection(
                        f"PodDisruptionBudget {budget} allows {allowed} evictions now, and {covered} are wanted",
                        "a smaller blast radius, more ready pods, or `evict: false`",
                    )

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Nothing can be undone; kept are the controllers, whose pods an interval hits."""
        owners: dict[str, str] = {}
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            owners[ref.uid] = text(frozen.controller(pod), "uid")
            step(done + 1, len(request.refs))
        return {"owners": owners}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """All frozen pods, one after the other; then the rounds of an interval begin. Raises InjectFailed: a budget's no."""
        lease, began = injection.lease, time.monotonic()
        for done, ref in enumerate(injection.refs):
            if _take(site, lease, ref):
                _hit.setdefault(lease.id, set()).add(ref.uid)
            step(done + 1, len(injection.refs))
        rounds.begin(site, injection, began, "deleted", _round)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """End the rounds, and shut out a deletion of frozen pods that is still under way.

        A process that was stopped between asking for its lease and deleting a *replacement* may still take that one:
        an act of a millisecond, which its controller mends as it did the others.
        """
        lease = injection.lease
        rounds.end(site, lease, step, NAME)
        for ref in injection.refs:
            found = frozen.read(site, ref)
            if found is not None and is_there(found):
                frozen.shut_out(site, ref)
            step(0, 0)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Effective: every frozen pod is gone or going, and by us. Present: rounds of this process go on."""
        here: list[str] = []
        lines: list[str] = []
        for ref, found in frozen.read_all(site, injection.refs).items():
            if found is not None and is_there(found):
                here.append(ref.name)
            elif found is not None:
                lines.append(f"{ref.shown} is being deleted since {text(found, 'metadata', 'deletionTimestamp')}")
            else:
                lines.append(f"{ref.shown} is gone")
        lines += [f"{name} is still there" for name in here]
        missed = [ref for ref in injection.refs if ref.uid not in _hit.get(injection.lease.id, ())]
        lines += [f"{ref.shown} was not deleted by this run" for ref in missed if ref.name not in here]
        fired = not here and not missed
        ours = rounds.of(injection.lease)
        if ours is None:
            return Evidence(present=False, effective=fired, lines=tuple(lines))
        lines.insert(0, ours.said)
        present = ours.is_alive()
        return Evidence(present=present, effective=present and fired and not ours.error, lines=tuple(lines))


_hit: dict[str, set[str]] = {}
"""Uids that this process deleted, by lease: a pod that an autoscaler or a rollout took away did not fall to our fault."""


def _round(ours: Rounds, refs: list[Ref]) -> list[Ref]:
    """One pod after the other, until the rounds are over."""
    return [ref for ref in refs if not ours.over and _take(ours.site, ours.injection.lease, ref)]


def _take(site: Site, lease: Lease, ref: Ref) -> bool:
    """Delete or evict one pod, if it is there. Raises InjectFailed: a budget says no; it is named."""
    grace_s = 0 if lease.params.get("signal", "kill") == "kill" else None
    evict = bool(lease.params.get("evict"))
    taken = False

    def act(found: Object) -> None:
        nonlocal taken
        if not is_there(found):
            return
        version = text(found, "metadata", "resourceVersion")
        if evict:
            taken = site.cluster.evict(ref.namespace, ref.name, uid=ref.uid, resource_version=version, grace_s=grace_s)
        else:
            taken = site.cluster.delete(ref.path, uid=ref.uid, resource_version=version, grace_s=grace_s)

    try:
        frozen.change(site, ref, act, lease)
    except ApiRefused as e:
        if e.code != _TOO_MANY_REQUESTS:
            raise
        found = frozen.read(site, ref)
        names = [name for name, _, _ in _budgets(site, [found])] if found is not None else []
        if not names:  # the API server is busy; no budget said no
            raise
        raise InjectFailed(
            f"PodDisruptionBudget {', '.join(names)} does not let {ref.shown} be evicted now",
            driver=NAME,
            verb="inject",
            lease_id=lease.id,
        ) from e
    return taken


def _budgets(site: Site, pods: list[Object]) -> Iterator[tuple[str, int, int]]:
    """Each budget that covers some of the pods: namespace/name, disruptions allowed now, pods covered."""
    for namespace in sorted({text(p, "metadata", "namespace") for p in pods}):
        mine = [p for p in pods if text(p, "metadata", "namespace") == namespace]
        for budget in site.cluster.list(f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets"):
            covered = sum(selects(mapping(budget, "spec", "selector"), mapping(p, "metadata", "labels")) for p in mine)
            if covered:
                allowed = int(part(budget, "status", "disruptionsAllowed") or 0)
                yield f"{namespace}/{text(budget, 'metadata', 'name')}", allowed, covered
