"""Whether an environment's cluster can be used: what is missing, and the command that mends it. Reads only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from importlib import import_module

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.drivers.cluster import points as points_of
from mlchaos_dagster.drivers.cluster import preflight
from mlchaos_dagster.drivers.cluster.points import Point, on_cluster
from mlchaos_dagster.drivers.kubernetes import leftovers
from mlchaos_dagster.drivers.kubernetes.faults import PLACES, handler
from mlchaos_dagster.drivers.kubernetes.leftovers import Leftover
from mlchaos_dagster.errors import ConfigError, DriverError
from mlchaos_dagster.kube import leases, reach
from mlchaos_dagster.kube.address import connect
from mlchaos_dagster.kube.client import Forbidden, Site
from mlchaos_dagster.kube.labels import OPT_IN
from mlchaos_dagster.kube.objects import text
from mlchaos_dagster.kube.selecting import select

OLDEST = (1, 28)
"""Of the API versions that are used; ephemeral containers and policy/v1 are older."""
BACKENDS = ("litmus", "chaos_mesh")
"""Other tools whose drivers are ours."""
SWEEPER = "mlchaos-sweeper"
LEVER = "mlchaos-lever"
_MOST_TOLD = 5
_HEART_S = 6.0
"""Two of the sweeper's beats and a little more."""


def reached(environment: Environment) -> Iterator[Point | Site]:
    """Whether the cluster answers; then, last, the connection."""
    options = environment.kubernetes
    assert options is not None
    try:
        cluster = connect(options)
        version = cluster.version()
    except ConfigError as e:
        yield Point("kubeconfig", "missing", str(e), "kubectl config get-contexts; set kubernetes.context")
        return
    except DriverError as e:
        yield Point("cluster", "missing", str(e), f"kubectl --context {options.context} version")
        return
    shown = ".".join(map(str, version))
    if version < OLDEST:
        yield Point("cluster", "missing", f"Kubernetes {shown}", f"Kubernetes {OLDEST[0]}.{OLDEST[1]} or later")
    else:
        yield Point(
            "cluster", "ok", f"Kubernetes {shown} at {cluster.server}, context {options.context or 'of this pod'}"
        )
    yield Site(cluster, options)


def points(environment: Environment) -> Iterator[Point]:
    """Everything that a run on this cluster needs, in the order in which it would fail."""
    site = None
    for found in reached(environment):
        if isinstance(found, Point):
            yield found
        else:
            site = found
    if site is None:
        return
    for look in (_namespaces, _targets, _permissions, _sweeper, _lever, _left_behind):
        try:
            yield from look(site, environment)
        except DriverError as e:
            yield Point(look.__name__.strip("_").replace("_", " "), "missing", str(e), "docs/rbac.md")
    for backend in BACKENDS:
        if backend in environment.backends:
            yield from backend_points(site, environment, backend)


def backend_points(site: Site, environment: Environment, backend: str) -> Iterator[Point]:
    """What one other tool needs: installed, alive, its rights and ours. Also where the environment does not name it yet."""
    module = import_module(f"mlchaos_dagster.drivers.{backend}.checkup")
    yield from module.points(site, environment)


def _namespaces(site: Site, environment: Environment) -> Iterator[Point]:
    spaces = {t.kubernetes.namespace or site.options.namespace for t in on_cluster(environment).values()}
    for name in sorted(spaces):
        found = site.cluster.get(f"/api/v1/namespaces/{name}")
        if found is None:
            yield Point(f"namespace {name}", "missing", "there is none", f"kubectl create namespace {name}")
        elif text(found, "metadata", "labels", OPT_IN) != "true":
            yield Point(
                f"namespace {name}", "missing", "has not opted in", f"kubectl label namespace {name} {OPT_IN}=true"
            )
        else:
            yield Point(f"namespace {name}", "ok", "opted in to faults")


def _targets(site: Site, environment: Environment) -> Iterator[Point]:
    for name, target in sorted(on_cluster(environment).items()):
        found = select(site, target)
        if found:
            shown = ", ".join(ref.name for ref in found[:3]) + (", …" if len(found) > 3 else "")
            yield Point(f"target {name}", "ok", f"{target.select} matches {len(found)}: {shown}")
        else:
            kind = target.kubernetes.kind.lower()
            where = target.kubernetes.namespace or site.options.namespace
            labels = target.select.partition("->")[0]
            at = "" if kind == "node" else f" in {where}"
            # A cluster of one zone is a sound one: only what wants another is refused.
            yield Point(
                f"target {name}",
                "optional" if kind == "node" else "missing",
                f"{target.select} matches no {kind}{at}" + ("; experiments on it are refused" if not at else ""),
                f"kubectl get {kind} -l '{labels}'" + (f" -n {where}" if at else ""),
            )


def _permissions(site: Site, environment: Environment) -> Iterator[Point]:
    """For the ledger, and for every fault that is served here, on every target that it fits."""
    needed = set(leases.permissions(site.options.control_namespace))
    kinds = set(environment.backends.get("kubernetes", ())) & PLACES.keys()
    needed |= points_of.needed(site, environment, kinds, handler)
    missing = list(preflight.refused(site, needed))
    for namespace, said, rule in missing:
        whole = f"kubectl apply -n {namespace} -k manifests/rbac/namespace"
        if namespace in ("", site.options.control_namespace):
            whole = "kubectl apply -k manifests/rbac"
        help = f"{whole}; or for another account than mlchaos-runner (docs/rbac.md) add {rule}"
        yield Point("permission", "missing", f"may not {said}", help)
    if not missing:
        yield Point("permissions", "ok", f"all {len(needed)} that the faults served here need")


def _sweeper(site: Site, environment: Environment) -> Iterator[Point]:
    help = "kubectl apply -k manifests/kubernetes"
    path = f"/apis/coordination.k8s.io/v1/namespaces/{site.options.control_namespace}/leases/{SWEEPER}"
    before = site.cluster.get(path)
    if before is None:
        help += " (into mlchaos-system; where it is elsewhere, set kubernetes.control_namespace)"
        yield Point("sweeper", "missing", f"none in namespace {site.options.control_namespace}", help)
        return
    end = time.monotonic() + _HEART_S
    while time.monotonic() < end:
        if text(site.cluster.get(path), "metadata", "resourceVersion") != text(before, "metadata", "resourceVersion"):
            pod = text(before, "spec", "holderIdentity").partition("/")[0]
            yield Point("sweeper", "ok", f"its heart beats ({pod})")
            yield from _reach(site, environment)
            return
        time.sleep(0.5)
    logs = f"kubectl logs -n {site.options.control_namespace} deployment/{SWEEPER}"
    yield Point("sweeper", "missing", f"no heartbeat within {_HEART_S:g} s", logs)


def _reach(site: Site, environment: Environment) -> Iterator[Point]:
    spaces = {t.kubernetes.namespace or site.options.namespace for t in on_cluster(environment).values()}
    for name in sorted(reach.beyond(site.cluster, site.options.control_namespace, spaces)):
        if site.cluster.get(f"/api/v1/namespaces/{name}") is not None:
            bind = f"kubectl apply -n {name} -k manifests/rbac/namespace"
            yield Point("sweeper", "missing", f"it has no rights in namespace {name}, or that has not opted in", bind)


def _lever(site: Site, environment: Environment) -> Iterator[Point]:
    found = site.cluster.get(f"/api/v1/namespaces/{site.options.control_namespace}/configmaps/{LEVER}")
    if found is not None:
        reason = text(found, "data", "reason") or "no reason given"
        release = f"mlchaos stop --release -e {environment.name}"
        yield Point("lever", "missing", f"pulled ({reason}): no run may start", release)


def _left_behind(site: Site, environment: Environment) -> Iterator[Point]:
    try:
        found = list(leftovers.find(site.cluster))
    except Forbidden as e:
        help = f"mlchaos clean -e {environment.name} --dry-run, as who may look into every namespace"
        yield Point("left behind", "optional", f"only who may look everywhere can tell: {e}", help)
        return
    known, lost = _lost(found)
    if lost:  # a run may have begun or ended while all that was read
        again = _lost(list(leftovers.find(site.cluster)))
        known, lost = known | again[0], [left for left in again[1] if left in lost]
    if known:
        saw = f"{len(known)}, of runs that live or that the sweeper is about to clean up after"
        yield Point("open leases", "ok", saw)
    for left in lost[:_MOST_TOLD]:
        yield Point("left behind", "missing", left.shown, f"mlchaos clean -e {environment.name} --dry-run")
    if len(lost) > _MOST_TOLD:
        help = f"mlchaos clean -e {environment.name} --dry-run"
        yield Point("left behind", "missing", f"and {len(lost) - _MOST_TOLD} more", help)
    if not lost:
        yield Point("left behind", "ok", "nothing of any experiment")


def _lost(found: Iterable[Leftover]) -> tuple[set[str], list[Leftover]]:
    """(ids of open leases, what belongs to none of them); what belongs to the installation is neither."""
    ours = [left for left in found if left.lease]
    known = {left.lease for left in ours if left.is_lease}
    return known, [left for left in ours if not leftovers.is_of(left, known)]
