"""One lease as one ChaosEngine of one experiment: any neutral fault that Litmus has, and engines that a team brings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter

from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.record import Evidence, Finding
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults import network_links
from mlchaos_dagster.drivers.kubernetes.faults.network_policy import LABEL
from mlchaos_dagster.drivers.litmus import engine, faults, guards, recovery, sights, states, tracks
from mlchaos_dagster.drivers.litmus.eyes import Eyes, Told
from mlchaos_dagster.drivers.litmus.recovery import NAME
from mlchaos_dagster.drivers.litmus.selection import select
from mlchaos_dagster.drivers.litmus.tracks import Place, Tracks
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import ApiRefused, Conflict, NotFound, Permission, Site
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import Ref

JUDGED_S = 90.0
"""How long an experiment may take, after its fault, to say how it went: its own checks and its probes come then."""
_TICK_S = 0.5
_SELECTION = TypeAdapter(faults.Selection)
_SELF_TOLD = faults.KILLS | faults.ON_NODES
"""Experiments whose result names no target before their end: what they did must be seen at the targets."""


class LitmusFault:
    """See the module."""

    self_limiting = False

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kinds = frozenset({"pod", "node"} if kind == faults.BROUGHT else {"pod"})

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Litmus's objects, what its experiments leave, and what our own eyes need."""
        yield from guards.permissions(site, request)
        yield from sights.chosen(self.kind, request.params).permissions(request)

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """What is missing for Litmus, what it would refuse, what we could not see."""
        found = list(guards.objections(site, request))
        yield from found
        if self.kind != faults.BROUGHT:  # of a brought one Litmus's own word does where we cannot see
            yield from sights.chosen(self.kind, request.params).objections(site, request)

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Where the ChaosEngine will be, whom it hits, and how its targets looked before."""
        step(0, 0)
        eyes, told = sights.chosen(self.kind, request.params), False
        if self.kind == faults.BROUGHT and list(eyes.objections(site, request)):
            eyes, told = Told(), True
        owners: dict[str, str] = {}
        if faults.repeats(self.kind, request.params):
            found = frozen.read_all(site, request.refs)
            owners = {ref.uid: text(frozen.controller(pod), "uid") for ref, pod in found.items()}
        target_namespace = request.refs[0].namespace
        return {
            "namespace": engine.namespace_of(site.options.litmus, target_namespace),
            "selection": dataclasses.asdict(select(site, request)),
            "peers": _peers(site, request),
            "told": told,
            "owners": owners,
            "inject_within": site.options.litmus.inject_within,
            "before": eyes.before(site, request, step),
        }

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Make the ChaosEngine, start it, and wait until it has come to every target.

        Raises:
            InjectFailed: it was refused, it failed, or nothing was seen in time; with Litmus's own words.
            LeaseRefused: the lease is not held any more; nothing was started.
        """
        lease, eyes, place = injection.lease, self._eyes(injection), _place(injection)
        selection = _selection(injection)
        plan = faults.plan(lease.kind, lease.params, selection, lease.duration_s, injection.undo["peers"])
        eyes.open(site, injection, step)
        if plan.experiment == faults.PARTITION:
            for ref in injection.refs:
                self._label(site, injection, ref)
        body = engine.body(lease.id, site.options.litmus, place.namespace, plan, selection, lease.params)
        self._start(site, injection, place, body)
        self._wait(site, injection, place, plan, step)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """See `recovery`; then the labels of ours go from the pods."""
        recovery.take_away(site, injection, _place(injection), self._eyes(injection), step)
        if faults.experiment_of(injection.lease.kind, injection.params) == faults.PARTITION:
            for ref in injection.refs:
                _unlabel(site, ref, injection.lease.id)
                step(0, 0)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Present while anything of the engine is there; effective as our own eyes see it."""
        found = tracks.find(site, _place(injection))
        sight = self._eyes(injection).look(site, injection, found)
        state = states.of(found)
        ran = state.phase in ("accepted", "running") or not is_held(injection.lease.kind, injection.params)
        lines = [*sight.lines, *found.said]
        if found.engine is not None:
            lines.append(f"Litmus: {state.said}")
        elif not lines:
            lines.append("neither ChaosEngine nor Job, pod or result of it is there")
        return Evidence(
            present=bool(found.said) or sight.present,
            effective=sight.effective and ran and state.phase != "failed",
            lines=tuple(lines),
        )

    def findings(self, site: Site, injection: Injection, step: Step) -> tuple[Finding, ...]:
        """What its probes and its verdict say, of a brought engine; waits for it, at most `JUDGED_S`."""
        if self.kind != faults.BROUGHT:
            return ()
        place, end = _place(injection), time.monotonic() + JUDGED_S
        while True:
            found = tracks.find(site, place)
            if states.judged(found.results):
                return states.findings(found.results)
            over = states.of(found).phase in ("absent", "aborting", "over", "failed")
            if over or time.monotonic() >= end:
                said = states.of(found).said
                why = f"no verdict: {said}" if over else f"no verdict within {JUDGED_S:g} s: {said}"
                known = [f for f in states.findings(found.results) if f.name != "litmus verdict"]
                return (*known, Finding(name="litmus verdict", passed=None, saw=why))
            step(0, 0)
            time.sleep(_TICK_S)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _eyes(self, injection: Injection) -> Eyes:
        return Told() if injection.undo["told"] else sights.chosen(self.kind, injection.params)

    def _label(self, site: Site, injection: Injection, ref: Ref) -> None:
        lease_id = injection.lease.id

        def act(found: Object) -> None:
            frozen.patch(site, found, ref.path, {"metadata": {"labels": {LABEL: lease_id}}})

        if not frozen.change(site, ref, act, injection.lease):
            raise _failed(injection, f"{ref.shown} is gone")

    def _start(self, site: Site, injection: Injection, place: Place, body: Object) -> None:
        """In two steps: see `engine`. What cannot be started is taken away again."""
        leases.held(site, injection.lease)
        try:
            made = site.cluster.create(engine.collection(place.namespace, "chaosengines"), body)
        except Conflict as e:
            raise _failed(injection, f"ChaosEngine {place.name} is there already: the lease was recovered") from e
        except ApiRefused as e:
            raise _failed(injection, f"the ChaosEngine was refused: {e}") from e
        path = f"{engine.collection(place.namespace, 'chaosengines')}/{place.name}"
        meta = {"uid": text(made, "metadata", "uid"), "resourceVersion": text(made, "metadata", "resourceVersion")}
        try:
            leases.held(site, injection.lease)
            site.cluster.patch(path, {"metadata": meta, "spec": {"engineState": engine.ACTIVE}})
        except (NotFound, Conflict) as e:
            raise _failed(injection, "the ChaosEngine was taken away before it began") from e
        except BaseException:
            site.cluster.delete(path, uid=meta["uid"])
            raise

    def _wait(self, site: Site, injection: Injection, place: Place, plan: faults.Plan, step: Step) -> None:
        start = time.monotonic()
        limit_s = site.options.litmus.inject_within + plan.ramp_s
        while True:
            found = tracks.find(site, place)
            state = states.of(found)
            done, said = self._injected(site, injection, plan, found)
            if done:
                return
            if state.phase not in ("accepted", "running"):
                by = " (by somebody else, or by a probe with stopOnFailure)" if state.phase == "aborting" else ""
                raise _failed(injection, f"Litmus did not make the fault, or not to its end: {state.said}{by}")
            if time.monotonic() - start >= limit_s:
                why = states.stuck(found, tracks.events(site, found.engine) if found.engine else ())
                seen = f"; {said}" if said else ""
                raise _failed(injection, f"no effect within {limit_s:g} s: {why}{seen}")
            step(0, 0)
            time.sleep(_TICK_S)

    def _injected(self, site: Site, injection: Injection, plan: faults.Plan, found: Tracks) -> tuple[bool, str]:
        """Whether the fault is at every target, and what was seen of it: Litmus's word, our own eyes where it says nothing."""
        if plan.experiment == faults.PARTITION:
            return bool(found.policies), ""
        names, touched = {ref.name for ref in injection.refs}, states.touched(found)
        if plan.experiment not in _SELF_TOLD:
            return bool(touched & names) if plan.env.get("SEQUENCE", "") == "serial" else names <= touched, ""
        if not found.results:
            return False, ""
        try:
            sight = self._eyes(injection).look(site, injection, found)
        except DriverUnavailable as e:  # a target may be hard to ask under its fault; there is time
            return False, str(e)
        return sight.effective, "; ".join(sight.lines)


def _place(injection: Injection) -> Place:
    undo, lease = injection.undo, injection.lease
    policies = faults.experiment_of(lease.kind, lease.params) == faults.PARTITION
    where = str(undo["selection"]["namespace"]) if policies else ""
    return Place(str(undo["namespace"]), engine.name_of(lease.id), where, lease.id)


def _selection(injection: Injection) -> faults.Selection:
    return _SELECTION.validate_python(injection.undo["selection"])


def _peers(site: Site, request: Request) -> dict[str, Any]:
    if request.kind not in ("network_latency", "network_loss", "network_partition"):
        return {}
    try:
        return network_links.other_end(site, request.target)
    except DriverError as e:
        raise DriverError(str(e), driver=NAME, verb="undo") from e


def _unlabel(site: Site, ref: Ref, lease_id: str) -> None:
    """Off, or shut out where it may still be on its way."""
    labelled = False

    def act(found: Object) -> None:
        nonlocal labelled
        labelled = text(found, "metadata", "labels", LABEL) == lease_id
        if labelled:
            frozen.patch(site, found, ref.path, {"metadata": {"labels": {LABEL: None}}})

    if frozen.change(site, ref, act) and not labelled:
        frozen.shut_out(site, ref)


def _failed(injection: Injection, said: str) -> InjectFailed:
    return InjectFailed(said, driver=NAME, verb="inject", lease_id=injection.lease.id)
