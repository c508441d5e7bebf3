"""`pod_delete` through PodChaos pod-kill: once, or again at an interval.

At an interval, a thread of the run's own process makes one resource a round, for what replaced the frozen pods, as many
each time. (A Schedule of Chaos Mesh knows minutes at best through cron, would select anew by labels, and go on when all
of us are dead.) The thread ends with the process, at the lease's deadline, when the lease is taken over, on `recover`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.chaos_mesh import life, preflight, specs, states
from mlchaos_dagster.drivers.chaos_mesh.handler import home_of
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import GoneEyes
from mlchaos_dagster.drivers.chaos_mesh.resources import name_of, resource
from mlchaos_dagster.drivers.cluster import frozen, rounds
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.rounds import Rounds
from mlchaos_dagster.engine.ports import Lease, Objection, Step, no_step
from mlchaos_dagster.errors import RecoverFailed
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object, part, text
from mlchaos_dagster.kube.refs import Ref

NAME = "chaos_mesh"
_KIND = "PodChaos"


class PodKill:
    """Kill the frozen pods, once or at an interval."""

    kinds = frozenset({"pod"})
    self_limiting = True

    def __init__(self) -> None:
        self.eyes = GoneEyes()

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Resources, and pods."""
        spaces = {ref.namespace for ref in request.refs}
        yield from preflight.permissions(site, _KIND, spaces, home_of(site, request))
        yield from self.eyes.permissions(site, request)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Pods that would not come back; evictions, which Chaos Mesh does not know."""
        if request.params.get("evict"):
            yield Objection(
                "Chaos Mesh deletes pods and knows no eviction", "`evict: false`; or the backend kubernetes"
            )
        for ref, pod in frozen.read_all(site, request.refs).items():
            owner = text(frozen.controller(pod), "kind")
            if pod is not None and owner in ("", "Node"):
                why = "no controller owns it" if not owner else "it is a static pod of its node"
                yield Objection(f"{ref.shown} would not come back: {why}", "pods of a Deployment, StatefulSet or Job")
        kind, spec = specs.pod_kill(request.refs, 0)
        made = resource("mlchaos-asked", kind, home_of(site, request), spec)
        yield from preflight.objections(site, request, made, sorted({ref.namespace for ref in request.refs}))

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Nothing can be undone; kept are the controllers, whose pods an interval hits, and how long a pod may take to end."""
        owners: dict[str, str] = {}
        grace_s = 0
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            owners[ref.uid] = text(frozen.controller(pod), "uid")
            if request.params.get("signal") == "term":
                grace_s = max(grace_s, int(part(pod, "spec", "terminationGracePeriodSeconds") or 0))
            step(done + 1, len(request.refs))
        return {"kind": _KIND, "namespace": home_of(site, request), "owners": owners, "grace_s": grace_s}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """The frozen pods; then the rounds of an interval begin. Raises InjectFailed: in Chaos Mesh's words."""
        lease, began = injection.lease, time.monotonic()
        life.begin(site, injection, _made(injection, injection.refs, ""), step)
        _hit.add(lease.id)
        rounds.begin(site, injection, began, "killed", _round)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """End the rounds, delete the resources. A deleted one kills nothing more. Raises RecoverFailed: it stays."""
        lease = injection.lease
        rounds.end(site, lease, step, NAME)
        those = life.mine(site, _KIND, injection.undo["namespace"], lease)
        life.delete(site, those)
        left, said = life.release(site, those, step)
        if left:
            names = ", ".join(text(one, "metadata", "name") for one in left)
            raise RecoverFailed(
                "; ".join([f"PodChaos {names} cannot be deleted", *said]), driver=NAME, lease_id=lease.id
            )

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Effective: every frozen pod is gone or going, and Chaos Mesh says that it did it. Present: rounds or resources."""
        lease = injection.lease
        those = life.mine(site, _KIND, injection.undo["namespace"], lease)
        seen = self.eyes.look(site, injection, those)
        done = lease.id in _hit or any(states.injected(one) for one in those)
        ours = rounds.of(lease)
        lines = [*([ours.said] if ours else ()), *seen.lines]
        lines += [
            f"PodChaos {text(one, 'metadata', 'name')} stands, done at {states.injected_at(one)}" for one in those
        ]
        alive = ours is not None and ours.is_alive()
        effective = seen.effective and done and (ours is None or (alive and not ours.error))
        return Evidence(present=alive or bool(those), effective=effective, lines=tuple(lines))


_hit: set[str] = set()
"""Leases whose pods Chaos Mesh killed at this process's word."""


def _round(ours: Rounds, refs: list[Ref]) -> list[Ref]:
    """One resource for all of them."""
    injection = Injection(ours.injection.lease, tuple(refs), ours.injection.undo)
    made = _made(injection, refs, f"-r{ours.done}")
    life.delete(ours.site, [life.begin(ours.site, injection, made, no_step)])
    return refs


def _made(injection: Injection, refs: tuple[Ref, ...] | list[Ref], extra: str) -> Object:
    lease: Lease = injection.lease
    kind, spec = specs.pod_kill(refs, int(injection.undo["grace_s"]))
    name = name_of(lease.id, extra)
    return resource(lease.id, kind, injection.undo["namespace"], spec, name=name)
