"""Guards that hold for every fault kind on a cluster; all read-only. What only one kind knows is in its handler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlchaos_dagster.drivers.cluster import rivals
from mlchaos_dagster.drivers.cluster.handler import Handler, Request
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.kube import leases, reach
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.labels import LEASE, OPT_IN
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text, words
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.kube.selecting import permission_to

_NEVER = frozenset({"kube-system", "kube-public", "kube-node-lease"})
_TAKES_PODS = frozenset({"pod_delete", "pod_failure"})
"""Kinds after which a pod is gone for its PodDisruptionBudget. (`zone_failure`: a zone asks no budget.)"""
_PRESSURES = ("MemoryPressure", "DiskPressure", "PIDPressure")

BASE = (
    Permission("get", "namespaces"),
    Permission("list", "poddisruptionbudgets", "{namespace}", "policy"),
    Permission("list", "pods", "{namespace}"),
    Permission("get", "nodes"),
)
"""What these guards themselves need; `{namespace}`: of each target."""


def objections(site: Site, request: Request, handler: Handler, backend: str = "kubernetes") -> Iterator[Objection]:
    """Everything that speaks against `backend` making this fault now."""
    closed = list(_opted_in(site, request)) + list(_kind_fits(request, handler))
    yield from closed
    missing = list(_permitted(site, request, handler))
    yield from missing
    if closed or missing:  # what follows would only repeat it, or could not be read
        return
    yield from _within_reach(site, request, backend)
    pods = _pods(site, request)
    yield from _untouched(request, pods)
    yield from _ready(site, request, pods)
    yield from _budgets(site, request, pods)
    yield from _nodes_well(site, request, pods)
    yield from rivals.objections(site, request)
    yield from handler.objections(site, request)


def again(site: Site, request: Request) -> Iterator[Objection]:
    """What may have changed since: a baseline lies between the guards and the fault."""
    closed = list(_opted_in(site, request))
    yield from closed
    if not closed:
        pods = _pods(site, request)
        yield from _untouched(request, pods)
        yield from _ready(site, request, pods)
        yield from _budgets(site, request, pods)


def permissions(request: Request, handler_permissions: Iterator[Permission]) -> set[Permission]:
    """Everything that a run with this fault asks of the API server before and during the fault."""
    spaces = sorted({ref.namespace for ref in request.refs if ref.namespace})
    own = {Permission(p.verb, p.resource, n if p.namespace else "", p.group) for p in BASE for n in spaces or [""]}
    own = {p for p in own if spaces or p.resource in ("namespaces", "nodes")}
    selected = {permission_to("list", ref.kind, ref.namespace) for ref in request.refs}
    return own | selected | set(handler_permissions)


def _opted_in(site: Site, request: Request) -> Iterator[Objection]:
    yield from opted_in(site, {ref.namespace for ref in request.refs if ref.namespace})


def opted_in(site: Site, spaces: Iterable[str]) -> Iterator[Objection]:
    """Namespaces that did not let faults in."""
    for name in sorted(set(spaces)):
        if name in _NEVER:
            yield Objection(f"namespace {name} carries the cluster itself", "a target in another namespace")
        elif text(site.cluster.get(f"/api/v1/namespaces/{name}"), "metadata", "labels", OPT_IN) != "true":
            yield Objection(
                f"namespace {name} has not opted in to faults", f"kubectl label namespace {name} {OPT_IN}=true"
            )


def _kind_fits(request: Request, handler: Handler) -> Iterator[Objection]:
    wrong = sorted({ref.kind for ref in request.refs} - handler.kinds)
    if wrong:
        yield Objection(
            f"{request.kind} is not for a {wrong[0]}",
            f"a target of kind {', '.join(sorted(handler.kinds))} (targets.….kubernetes.kind)",
        )


def _permitted(site: Site, request: Request, handler: Handler) -> Iterator[Objection]:
    needed = permissions(request, iter(handler.permissions(site, request)))
    needed |= set(leases.permissions(site.options.control_namespace))
    for _, said, rule in refused(site, needed):
        yield Objection(f"no permission to {said}", rule)


def refused(site: Site, needed: Iterable[Permission]) -> Iterator[tuple[str, str, str]]:
    """(namespace, what is not allowed, the RBAC rule to add), one for each resource."""
    missing: dict[tuple[str, str, str], list[Permission]] = {}
    for p in sorted(needed):
        if not site.cluster.allowed(p):
            missing.setdefault((p.namespace, p.group, p.resource), []).append(p)
    for those in missing.values():
        verbs = [p.verb for p in those]
        where = f" in {those[0].namespace}" if those[0].namespace else ""
        yield those[0].namespace, f"{', '.join(verbs)} {those[0].resource}{where}", those[0].rule_of(*verbs)


def _within_reach(site: Site, request: Request, backend: str) -> Iterator[Objection]:
    """The last ring must hold there, too: for what another tool makes it needs that tool's rights."""
    spaces = {ref.namespace for ref in request.refs if ref.namespace}
    for name in sorted(reach.beyond(site.cluster, site.options.control_namespace, spaces, backend)):
        yield Objection(
            f"the sweeper has no rights in namespace {name}: it could not take the fault away",
            brings_rights(site, backend, name),
        )


def brings_rights(site: Site, backend: str, namespace: str) -> str:
    """The commands that give run and sweeper their rights in a namespace; empty: those of the whole cluster.

    The roles for other tools are not installed with us, and a binding alone to one that is not there gives nothing.
    """
    rights = "manifests/rbac" if backend == "kubernetes" else f"manifests/rbac/{backend}"
    roles, shipped = f"kubectl apply -k {rights}", "chaos-testing"
    system = site.options.chaos_mesh.system_namespace
    if backend == "chaos_mesh" and system != shipped:
        roles = f"kubectl kustomize {rights} | sed s/{shipped}/{system}/ | kubectl apply -f -"
    if not namespace:
        return roles
    bind = f"kubectl apply -n {namespace} -k {rights}/namespace"
    return bind if backend == "kubernetes" else f"{roles}; {bind}"


def _pods(site: Site, request: Request) -> dict[str, Object]:
    """Existing target pods by uid, as they are now."""
    found: dict[str, Object] = {}
    for namespace in sorted({r.namespace for r in request.refs if r.kind == "pod"}):
        for pod in site.cluster.list(collection("pod", namespace)):
            found[text(pod, "metadata", "uid")] = pod
    return found


def _untouched(request: Request, pods: dict[str, Object]) -> Iterator[Objection]:
    """No fault of ours is on a target already; the ledger says so too, this is the object's own word."""
    for ref in request.refs:
        lease = text(pods.get(ref.uid), "metadata", "annotations", LEASE)
        if lease:
            yield Objection(f"{ref.shown} carries the fault of lease {lease}", f"mlchaos recover {lease}")


def _ready(site: Site, request: Request, pods: dict[str, Object]) -> Iterator[Objection]:
    """What is hit works now, and enough of what works is left alone."""
    if not pods:
        return
    down = [ref.shown for ref in request.refs if ref.kind == "pod" and not is_ready(pods.get(ref.uid))]
    if down:
        yield Objection(f"not ready before the fault: {', '.join(down)}", "targets that are well")
    hit = {ref.uid for ref in request.refs}
    left = [ref for ref in request.existing if ref.uid not in hit]
    ready = sum(is_ready(pods.get(ref.uid)) for ref in left)
    if left and ready < site.options.min_ready:
        yield Objection(
            f"{ready} of the {len(left)} pods that stay untouched are ready",
            f"at least {site.options.min_ready} (kubernetes.min_ready)",
        )


def _budgets(site: Site, request: Request, pods: dict[str, Object]) -> Iterator[Objection]:
    if request.kind not in _TAKES_PODS or site.options.ignore_budgets:
        return
    for namespace in sorted({ref.namespace for ref in request.refs if ref.kind == "pod"}):
        hit = [pods[r.uid] for r in request.refs if r.namespace == namespace and r.uid in pods]
        for budget in site.cluster.list(f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets"):
            covered = sum(selects(mapping(budget, "spec", "selector"), mapping(p, "metadata", "labels")) for p in hit)
            allowed = int(part(budget, "status", "disruptionsAllowed") or 0)
            if covered > allowed:
                yield Objection(
                    f"PodDisruptionBudget {namespace}/{text(budget, 'metadata', 'name')} allows {allowed} pods to be down, "
                    f"and {covered} would be",
                    "a smaller blast radius, more ready pods, or kubernetes.ignore_budgets: true",
                )


def _nodes_well(site: Site, request: Request, pods: dict[str, Object]) -> Iterator[Objection]:
    names = {text(pods.get(ref.uid), "spec", "nodeName") for ref in request.refs if ref.kind == "pod"}
    names |= {ref.name for ref in request.refs if ref.kind == "node"}
    for name in sorted(filter(None, names)):
        node = site.cluster.get(f"/api/v1/nodes/{name}")
        for condition in items(node, "status", "conditions"):
            kind, status = text(condition, "type"), text(condition, "status")
            if (kind == "Ready" and status != "True") or (kind in _PRESSURES and status == "True"):
                yield Objection(f"node {name}: {kind} is {status}", "a node that is well under the targets")


def is_ready(pod: Object | None) -> bool:
    """Whether a pod is Ready now; a missing one is not."""
    return any(text(c, "type") == "Ready" and text(c, "status") == "True" for c in items(pod, "status", "conditions"))


def selects(selector: Object, labels: Object) -> bool:
    """Whether a label selector of an object (`matchLabels`, `matchExpressions`) selects these labels; empty: all."""
    if any(labels.get(k) != v for k, v in mapping(selector, "matchLabels").items()):
        return False
    for rule in items(selector, "matchExpressions"):
        key, operator, values = text(rule, "key"), text(rule, "operator"), words(rule, "values")
        there = key in labels
        fits = {
            "In": there and labels.get(key) in values,
            "NotIn": not there or labels.get(key) not in values,
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not fits.get(operator, False):
            return False
    return True
