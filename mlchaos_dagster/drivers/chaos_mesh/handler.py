"""The verbs, the same for every kind: what is made is in specs.py, how it is looked at in the eyes.

Recovery: paused, so that Chaos Mesh recovers and its status can be read; what it does not take away in time is taken
back where it keeps it and mended at the pods by us; our own look proves the pods clean; only then the resource goes, and
what does not go loses its finalizers. What had to be done beyond the usual is said in the evidence of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.chaos_mesh import leavings, life, preflight, states
from mlchaos_dagster.drivers.chaos_mesh.eyes import Eyes
from mlchaos_dagster.drivers.chaos_mesh.resources import is_one_shot, resource, shown
from mlchaos_dagster.drivers.chaos_mesh.specs import Made, held_for
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.engine.ports import Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, RecoverFailed
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object, text

NAME = "chaos_mesh"
Maker = Callable[[Site, Request, dict[str, Any]], Made]
"""(site, request, what the eyes saw before) → kind and spec."""
_REST_S = 1.0
"""What is still there after the finalizers were taken off goes at once."""


class Fault:
    """One neutral kind (or a few) through a resource of Chaos Mesh.

    Args:
        resource_kind: Of Chaos Mesh.
        make: Its spec.
        eyes: How its effect is seen.
        against: Objections that only this kind has.
    """

    kinds = frozenset({"pod"})
    self_limiting = True

    def __init__(
        self,
        resource_kind: str,
        make: Maker,
        eyes: Eyes,
        *,
        self_limiting: bool = True,
        against: Callable[[Site, Request], Iterable[Objection]] = lambda site, request: (),
    ) -> None:
        self.resource_kind, self.make, self.eyes = resource_kind, make, eyes
        self.self_limiting, self.against = self_limiting, against

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Resources of the kind, the pods, what Chaos Mesh keeps at the pods."""
        if preflight.unknown(site, self.resource_kind):
            return  # nobody can grant it: `objections` says what is the matter
        spaces = {ref.namespace for ref in request.refs if ref.namespace}
        yield from preflight.permissions(site, self.resource_kind, spaces, home_of(site, request))
        yield from leavings.permissions(self.resource_kind, spaces)
        yield from self.eyes.permissions(site, request)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """Chaos Mesh itself, the eyes, then the resource as it would be."""
        found = [*self.against(site, request), *self.eyes.objections(site, request)]
        yield from found
        if found:
            return
        try:
            kind, spec = self.make(site, request, self.eyes.before(site, request, no_step))
        except DriverError as e:
            yield Objection(str(e), "targets as the fault needs them")
            return
        made = resource("mlchaos-asked", kind, home_of(site, request), _with_duration(kind, spec, 60.0))
        spaces = sorted({ref.namespace for ref in request.refs if ref.namespace})
        yield from preflight.objections(site, request, made, spaces)

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """What will be created, and what was there before."""
        before = self.eyes.before(site, request, step)
        kind, spec = self.make(site, request, before)
        return {"kind": kind, "spec": spec, "namespace": home_of(site, request), "eyes": before}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Open the eyes, create, wait. Raises InjectFailed: with the words of Chaos Mesh or of its daemon."""
        notes = self.eyes.open(site, injection, step)
        life.begin(site, injection, _resource(site, injection, notes), step)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """As the module says. Raises RecoverFailed: something is still on, or nobody could look."""
        lease, undo = injection.lease, injection.undo
        those = life.mine(site, undo["kind"], undo["namespace"], lease)
        said = [why for one in those if (why := life.pause(site, one))]
        now, failed = life.rested(site, those, 0.0 if said else site.options.chaos_mesh.recover_within, step)
        if failed:
            life.delete(site, now)
            said += failed
            said += leavings.take_back(site, injection, now, step)
        self.eyes.reopen(site, injection, step)
        # Let go and not injected everywhere: its controller may be at it this very moment, and tells afterwards.
        early = not failed and any(not (states.injected(one) or life.is_paused(one)) for one in those)
        seen = self.eyes.look(site, injection, now, last=not failed and not early)
        if seen.present:
            said += self.eyes.mend(site, injection, step)
            seen = self.eyes.look(site, injection, now, last=True)
            if seen.present:
                raise RecoverFailed("; ".join([*said, *seen.lines]), driver=NAME, lease_id=lease.id)
        life.delete(site, now)
        left, done = life.release(site, now, step)
        told = [*said, *done]
        if left:
            # The pods are clean. A controller that comes back looks once, and when its own webhook is not up yet it
            # gives up until somebody touches the resource: so the lease stays open, and whoever recovers does.
            names = ", ".join(map(shown, left))
            why = f"the targets were seen clean, and {names} cannot be deleted yet"
            raise RecoverFailed("; ".join([why, *told]), driver=NAME, lease_id=lease.id)
        if early and (seen := self.eyes.look(site, injection, now, last=True)).present:
            raise RecoverFailed("; ".join([*told, *seen.lines]), driver=NAME, lease_id=lease.id)
        if told:
            _told[lease.id] = told

    def active(self, site: Site, injection: Injection) -> Evidence:
        """The resource, and the pods with our own eyes."""
        undo = injection.undo
        those = life.mine(site, undo["kind"], undo["namespace"], injection.lease)
        seen = self.eyes.look(site, injection, those)
        lines = [*seen.lines, *(_line(one) for one in those), *_told.get(injection.lease.id, ())]
        if not those:
            lines.append(f"no {undo['kind']} of lease {injection.lease.id} is there")
        return Evidence(present=seen.present or bool(those), effective=seen.effective, lines=tuple(lines))


_told: dict[str, list[str]] = {}
"""Lease id → what this process had to do beyond the usual to take it away."""


def home_of(site: Site, request: Request) -> str:
    """The namespace of the resource: the target's."""
    spaces = sorted({ref.namespace for ref in request.refs if ref.namespace})
    return spaces[0] if spaces else request.target.kubernetes.namespace or site.options.namespace


def _resource(site: Site, injection: Injection, notes: dict[str, str]) -> Object:
    undo, lease = injection.undo, injection.lease
    # Chaos Mesh counts from the creation, we from the moment when all targets are injected.
    lasts = lease.duration_s + site.options.chaos_mesh.inject_within
    spec = _with_duration(undo["kind"], undo["spec"], lasts)
    made = resource(lease.id, undo["kind"], undo["namespace"], spec, marks=undo.get("marks", {}))
    made["metadata"]["annotations"].update(notes)
    return made


def _with_duration(kind: str, spec: Object, seconds: float) -> Object:
    return spec if is_one_shot(kind, spec) else held_for(spec, seconds)


def _line(found: Object) -> str:
    if life.inert(found):
        return f"{shown(found)} waits for its controller to let it go, and can inject nothing any more"
    at = states.injected_at(found)
    count = len(states.records(found))
    said = f"injected in {count} targets at {at}" if at else "has injected nothing"
    going = ", is being deleted" if text(found, "metadata", "deletionTimestamp") else ""
    return f"{shown(found)} stands, {said}{going}"
