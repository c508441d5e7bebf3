"""Nodes: one is drained for maintenance; a whole zone is lost.

Both cordon, so that nothing new comes, and take away what is there: a drain asks the budgets and waits for them, a zone
asks nobody. Taking the fault away uncordons what was not cordoned before. Pods are not moved back: where they are now is
the scheduler's business.
"""

from __future__ import annotations

import json
import math
import socket
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.frozen import UNDO, marked_by, read
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import is_ready, selects
from mlchaos_dagster.drivers.kubernetes.faults import drain
from mlchaos_dagster.drivers.kubernetes.faults.drain import load
from mlchaos_dagster.drivers.kubernetes.faults.marking import put_on, take_off
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverUnavailable, InjectFailed
from mlchaos_dagster.kube.client import NAME, ApiRefused, Forbidden, Permission, Site
from mlchaos_dagster.kube.leases import held
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text
from mlchaos_dagster.kube.refs import PATHS

ZONE = "topology.kubernetes.io/zone"
CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
MOST_S = 120.0
"""A drain that is not through by then (or by half of its lease) has failed: a budget or a finalizer holds it up."""
_LOOK_S = 0.25
"""Between two looks at what is left. Nobody tells when a budget has room again: one has to ask."""
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_BLOCKS = ("NoSchedule", "NoExecute")


class _Nodes:
    """What both have in common."""

    kinds = frozenset({"node"})
    self_limiting = False

    # -- before -----------------------------------------------------------------------------------------------------

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Nodes, and the pods that are on them now."""
        yield from (Permission(verb, "nodes") for verb in ("get", "list", "patch"))
        yield Permission("list", "namespaces")
        yield Permission("list", "pods")
        try:
            going = load(site, [r.name for r in request.refs]).going
        except Forbidden:
            return  # said by the lines above
        for namespace in sorted({text(pod, "metadata", "namespace") for pod in going}):
            yield from self.takes(namespace)

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """Whoever would be hit without having opted in, and what could not be undone."""
        every = {text(n, "metadata", "uid"): n for n in site.cluster.list(PATHS["node"])}
        nodes = [every[r.uid] for r in request.refs if r.uid in every]
        pods = load(site, [r.name for r in request.refs])
        yield from _own(site, pods, [r.name for r in request.refs])
        for node in nodes:
            name = text(node, "metadata", "name")
            if marked_by(node):
                yield Objection(
                    f"node {name} carries the fault of lease {marked_by(node)}", f"mlchaos recover {marked_by(node)}"
                )
            if CONTROL_PLANE in mapping(node, "metadata", "labels") and CONTROL_PLANE not in request.target.select:
                yield Objection(
                    f"node {name} carries the control plane", f"other nodes, or a selector that names {CONTROL_PLANE}"
                )
        hit = {r.uid for r in request.refs}
        if not any(_takes_pods(node) for uid, node in every.items() if uid not in hit):
            yield Objection("no other node is ready and takes pods", "a node that is left for what has to move")
        if pods.foreign:
            spaces = sorted({text(p, "metadata", "namespace") for p in pods.foreign})
            yield Objection(
                f"pods of namespaces that have not opted in are there: {drain.names(pods.foreign)}",
                f"nodes without them, or their consent (mlchaos.dev/allow=true on {', '.join(spaces)})",
            )
        lost = [pod for pod in pods.going if not frozen.controller(pod)]
        if lost:
            yield Objection(f"nothing would make these pods anew: {drain.names(lost)}", "pods of a workload")
        yield from self.more_objections(site, request, nodes, pods, list(every.values()))

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """What is about to go, for the evidence. What undoes it is on the nodes themselves."""
        pods = load(site, [r.name for r in request.refs])
        return {"pods": len(pods.going), "scratch": drain.scratch(pods.going), "staying": pods.staying}

    # -- the fault --------------------------------------------------------------------------------------------------

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Cordon all nodes, then take their pods away until none is left.

        Raises:
            InjectFailed: a node is gone, or pods are left when the time is over.
        """
        end = time.monotonic() + min(MOST_S, injection.lease.duration_s / 2)
        for done, ref in enumerate(injection.refs):
            step(done, len(injection.refs))
            put_on(site, ref, injection.lease, _cordoned)
        most, refused = 0, ""
        while left := load(site, [r.name for r in injection.refs]).going:
            most = max(most, len(left))
            for pod in left:
                step(most - len(left), most)
                if time.monotonic() > end:
                    raise InjectFailed(
                        f"{len(left)} pods are still there: {drain.names(left)}" + (f" ({refused})" if refused else ""),
                        driver=NAME,
                        verb="inject",
                    )
                if not drain.leaving(pod):
                    # One call may be under way when the lease is taken over: that pod goes, and is made anew.
                    held(site, injection.lease)
                    refused = self.take(site, pod, injection.params) or refused
            time.sleep(_LOOK_S)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Uncordon what this lease cordoned."""
        for done, ref in enumerate(injection.refs):
            step(done, len(injection.refs))
            take_off(site, ref, injection.lease, _as_before)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Nodes and pods, as the API server has them now."""
        lines: list[str] = []
        present, cordoned = False, 0
        for ref in injection.refs:
            node = read(site, ref)
            ours = marked_by(node) == injection.lease.id
            closed = bool(part(node, "spec", "unschedulable"))
            present, cordoned = present or ours, cordoned + (ours and closed)
            if node is None:
                lines.append(f"{ref.shown} is gone, and its cordon with it")
            else:
                by = "by this lease" if ours else "not by this lease"
                lines.append(f"{ref.shown}: {f'cordoned, {by}' if closed else 'takes pods'}")
                if not is_ready(node):
                    lines.append(f"{ref.shown} is not ready: its pods may still run, and nobody is told")
        pods = load(site, [ref.name for ref in injection.refs])
        lines.append(f"{len(pods.going)} pods are left of {injection.undo['pods']} that had to go")
        if present and injection.undo["scratch"]:
            lines.append(f"{injection.undo['scratch']} of those had an emptyDir, which is gone with them")
        if present and pods.staying:
            lines.append(pods.staying)
        return Evidence(
            present=present,
            effective=cordoned == len(injection.refs) and not pods.going,
            lines=tuple(lines),
        )

    # -- where they differ ------------------------------------------------------------------------------------------

    @abstractmethod
    def takes(self, namespace: str) -> Iterable[Permission]:
        """What `take` asks of the API server in a namespace."""

    @abstractmethod
    def take(self, site: Site, pod: Object, params: dict[str, Any]) -> str:
        """Tell one pod to go; why it could not be told now, empty when it was."""

    @abstractmethod
    def more_objections(
        self, site: Site, request: Request, nodes: list[Object], pods: drain.Load, every: list[Object]
    ) -> Iterator[Objection]:
        """What speaks against this kind only."""


class NodeDrain(_Nodes):
    """Through the eviction API, which respects PodDisruptionBudgets; tried again until they allow it."""

    def takes(self, namespace: str) -> Iterable[Permission]:
        """Evictions, and a look at the budgets."""
        yield Permission("create", "pods/eviction", namespace)
        yield Permission("list", "poddisruptionbudgets", namespace, "policy")

    def take(self, site: Site, pod: Object, params: dict[str, Any]) -> str:
        """Evict it. A budget's no (429) is an answer, not an error."""
        grace = params.get("grace_s")
        try:
            site.cluster.evict(
                text(pod, "metadata", "namespace"),
                text(pod, "metadata", "name"),
                uid=text(pod, "metadata", "uid"),
                grace_s=None if grace is None else math.ceil(grace),
            )
        except ApiRefused as e:
            if e.code == 429:
                return str(e)
            raise
        return ""

    def more_objections(
        self, site: Site, request: Request, nodes: list[Object], pods: drain.Load, every: list[Object]
    ) -> Iterator[Objection]:
        """A budget that allows nothing now would hold the drain up to its end."""
        for namespace in sorted({text(p, "metadata", "namespace") for p in pods.going}):
            ours = [p for p in pods.going if text(p, "metadata", "namespace") == namespace]
            for budget in site.cluster.list(f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets"):
                covers = [
                    p for p in ours if selects(mapping(budget, "spec", "selector"), mapping(p, "metadata", "labels"))
                ]
                if covers and not part(budget, "status", "disruptionsAllowed"):
                    yield Objection(
                        f"PodDisruptionBudget {namespace}/{text(budget, 'metadata', 'name')} allows no eviction now "
                        f"({drain.names(covers)})",
                        "more ready pods than it asks for",
                    )


class ZoneFailure(_Nodes):
    """All nodes of a zone at once, their pods without grace and without asking any budget."""

    def takes(self, namespace: str) -> Iterable[Permission]:
        """Deletions."""
        yield Permission("delete", "pods", namespace)

    def take(self, site: Site, pod: Object, params: dict[str, Any]) -> str:
        """Delete it, as if its machine were gone."""
        path = f"/api/v1/namespaces/{text(pod, 'metadata', 'namespace')}/pods/{text(pod, 'metadata', 'name')}"
        site.cluster.delete(path, uid=text(pod, "metadata", "uid"), grace_s=0)
        return ""

    def more_objections(
        self, site: Site, request: Request, nodes: list[Object], pods: drain.Load, every: list[Object]
    ) -> Iterator[Objection]:
        """It is one zone, and all of it."""
        zones = sorted({text(node, "metadata", "labels", ZONE) for node in nodes})
        if zones == [""] or len(zones) != 1:
            said = ", ".join(zone or "(none)" for zone in zones)
            yield Objection(f"the nodes are in the zones {said}", f"nodes of one zone, such as {ZONE}=NAME")
            return
        whole = [n for n in every if text(n, "metadata", "labels", ZONE) == zones[0]]
        if len(whole) > len(request.refs):
            yield Objection(
                f"{len(request.refs)} of the {len(whole)} nodes of zone {zones[0]} would be hit",
                "all of them (blast_radius: {fraction: 100%}), for a zone fails as a whole; or node_drain",
            )


def _cordoned(node: Object) -> Object:
    """The patch; what was before is written down only once, so that a second inject does not take ours for theirs."""
    known = text(node, "metadata", "annotations", UNDO)
    before = known or json.dumps({"unschedulable": bool(part(node, "spec", "unschedulable"))})
    return {"metadata": {"annotations": {UNDO: before}}, "spec": {"unschedulable": True}}


def _as_before(node: Object) -> Object:
    known = text(node, "metadata", "annotations", UNDO)
    patch: Object = {"metadata": {"annotations": {UNDO: None}}}
    if known and not json.loads(known)["unschedulable"]:
        patch["spec"] = {"unschedulable": None}
    return patch


def _takes_pods(node: Object) -> bool:
    tainted = any(text(t, "effect") in _BLOCKS for t in items(node, "spec", "taints"))
    return is_ready(node) and not part(node, "spec", "unschedulable") and not tainted


def _own(site: Site, pods: drain.Load, nodes: list[str]) -> Iterator[Objection]:
    """Who takes the fault away is not taken away by it."""
    every = [*pods.going, *pods.foreign, *pods.tolerant]
    sweepers = [pod for pod in every if drain.is_sweeper(site, pod)]
    if sweepers and site.options.spare_sweeper_node:
        yield Objection(
            f"the sweeper runs there: {drain.names(sweepers)}",
            "other nodes (the sweeper can be moved), or kubernetes.spare_sweeper_node: false",
        )
    if not _OWN_NAMESPACE.is_file():
        return  # this process is in no pod
    try:
        namespace = _OWN_NAMESPACE.read_text().strip()
    except OSError as e:
        raise DriverUnavailable(f"it cannot be read which pod this is: {e.strerror}", driver=NAME) from e
    pod = site.cluster.get(f"/api/v1/namespaces/{namespace}/pods/{socket.gethostname()}")
    if pod is None and not site.options.context:
        yield Objection("it is not known on which node this run's own pod is", "a pod whose host name is its own name")
    elif text(pod, "spec", "nodeName") in nodes:
        yield Objection(f"this run's own pod is on node {text(pod, 'spec', 'nodeName')}", "other nodes")
