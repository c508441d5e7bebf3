"""Whether Chaos Mesh can make our faults: CRDs, controller, daemons, webhook, namespace filter, our rights. Reads only.

The webhook is asked with creations that are only asked for (`dryRun`): one that it must refuse, which tells whether it is
there at all, and the fault's own kind, which tells whether its certificate holds and what we may. The names of what is
missing and the commands are those of `manifests/chaos_mesh`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import partial

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.drivers.chaos_mesh.preflight import CONTROLLER, CRDS, DAEMON, FILTER, install, told
from mlchaos_dagster.drivers.chaos_mesh.resources import API, GROUP, collection, resource
from mlchaos_dagster.drivers.cluster import preflight
from mlchaos_dagster.drivers.cluster.points import (
    Point,
    deployment,
    guarded,
    images,
    needed,
    on_cluster,
    served,
    spaces,
    variable,
    version,
)
from mlchaos_dagster.kube import reach
from mlchaos_dagster.kube.client import ApiRefused, Forbidden, Site
from mlchaos_dagster.kube.objects import Object, items, text
from mlchaos_dagster.kube.selecting import select

PLURALS = ("podchaos", "networkchaos", "stresschaos", "dnschaos", "podnetworkchaos")
"""Of neutral faults, and what Chaos Mesh itself needs for them."""
OLDEST = (2, 6)
BROUGHT = "chaos_mesh_resource"
"""Asks for the rights of its own kind, which only the resource tells."""
_WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/chaos-mesh-validation"
_SOON = timedelta(days=30)


def points(site: Site, environment: Environment) -> Iterator[Point]:
    """Everything that Chaos Mesh needs here, in the order in which it would fail."""
    there = served(site.cluster.get(API))
    absent = [f"{plural}.{GROUP}" for plural in PLURALS if plural not in there]
    if absent:
        yield Point("chaos_mesh: CRDs", "missing", f"the cluster has no {', '.join(absent)}", CRDS)
    else:
        yield Point("chaos_mesh: CRDs", "ok", f"{len(there)} kinds of {GROUP}")
    system = site.options.chaos_mesh.system_namespace
    yield from guarded("chaos_mesh: controller", partial(_controller, site, environment, system), install(system))
    yield from guarded("chaos_mesh: daemon", partial(_daemons, site, environment, system), install(system))
    if "podchaos" in there:
        for space in spaces(site, environment):
            what = f"chaos_mesh: webhook in {space}"
            yield from guarded(what, partial(_webhook, site, space, system), install(system))
        yield from _certificate(site, system)
    yield from guarded("chaos_mesh: our rights", partial(_ours, site, environment), "docs/rbac.md")


def _controller(site: Site, environment: Environment, system: str) -> Iterator[Point]:
    what = "chaos_mesh: controller"
    found = site.cluster.list(f"/apis/apps/v1/namespaces/{system}/deployments", labels=CONTROLLER)
    if not found:
        elsewhere = _elsewhere(site)
        if elsewhere:
            help = f"kubernetes: {{chaos_mesh: {{system_namespace: {elsewhere}}}}} in the environment"
            yield Point(what, "missing", f"it is in namespace {elsewhere}, not in {system}", help)
        else:
            yield Point(what, "missing", f"no Deployment of it in namespace {system}", install(system))
        return
    one = found[0]
    yield deployment(what, one, "no fault is made, ended or taken back")
    yield version("chaos_mesh: version", images(one)[0], OLDEST, install(system))
    yield from _filter(site, environment, one)


def _elsewhere(site: Site) -> str:
    """Where the controller runs, if somebody who may look sees it."""
    try:
        found = site.cluster.list("/apis/apps/v1/deployments", labels=CONTROLLER)
    except Forbidden:
        return ""
    return text(found[0], "metadata", "namespace") if found else ""


def _filter(site: Site, environment: Environment, controller: Object) -> Iterator[Point]:
    """`enableFilterNamespace`: what the chart's own default leaves open."""
    what = "chaos_mesh: filter"
    if variable(controller, "ENABLE_FILTER_NAMESPACE") != "true":
        saw = "off: whoever may create its resources can hit any namespace"
        yield Point(what, "optional", saw, install(text(controller, "metadata", "namespace")))
        return
    shut = [s for s in spaces(site, environment) if not _lets_in(site, s)]
    for space in shut:
        open_it = f"kubectl annotate namespace {space} {FILTER}=enabled --overwrite"
        yield Point(what, "missing", f"on, and namespace {space} does not let it in", open_it)
    if not shut:
        yield Point(what, "ok", f"on; {', '.join(spaces(site, environment))} let it in")


def _lets_in(site: Site, space: str) -> bool:
    found = site.cluster.get(f"/api/v1/namespaces/{space}")
    return text(found, "metadata", "annotations", FILTER) == "enabled"


def _daemons(site: Site, environment: Environment, system: str) -> Iterator[Point]:
    """On every node that carries a target now."""
    what = "chaos_mesh: daemon"
    pods = site.cluster.list(f"/api/v1/namespaces/{system}/pods", labels=DAEMON)
    on = {text(p, "spec", "nodeName"): p for p in pods if not text(p, "metadata", "deletionTimestamp")}
    nodes = _nodes(site, environment)
    wrong = False
    for node in sorted(nodes):
        if node not in on:
            saw = f"none on node {node}, which carries targets"
            taints = f"kubectl get node {node} -o jsonpath='{{.spec.taints}}'"
            wrong = True
            yield Point(what, "missing", saw, f"{install(system)}; {taints}")
        elif not preflight.is_ready(on[node]):
            name = text(on[node], "metadata", "name")
            wrong = True
            yield Point(what, "missing", f"{name} on node {node} is not ready", f"kubectl logs {name} -n {system}")
    if not nodes:
        yield Point(what, "ok" if on else "missing", f"on {len(on)} nodes; no target is there now", install(system))
    elif not wrong:
        yield Point(what, "ok", f"ready on all {len(nodes)} nodes that carry targets")


def _nodes(site: Site, environment: Environment) -> set[str]:
    """Which carry target pods now."""
    found: set[str] = set()
    for target in on_cluster(environment).values():
        if target.kubernetes.kind == "Pod":
            space = target.kubernetes.namespace or site.options.namespace
            uids = {ref.uid for ref in select(site, target)}
            pods = site.cluster.list(f"/api/v1/namespaces/{space}/pods")
            found |= {text(p, "spec", "nodeName") for p in pods if text(p, "metadata", "uid") in uids}
    return found - {""}


def _webhook(site: Site, space: str, system: str) -> Iterator[Point]:
    what = f"chaos_mesh: webhook in {space}"
    try:
        # A kill of a container that is not named: no schema forbids it, the webhook does.
        site.cluster.create(collection("PodChaos", space), _asked(space, "container-kill"), dryRun="All")
    except ApiRefused as e:
        if "denied the request" not in str(e) or "container" not in str(e).lower():
            yield _refused(what, e, space, system)
            return
    else:
        yield Point(what, "missing", "none: it takes what it should refuse, and asks nobody's rights", install(system))
        return
    try:
        site.cluster.create(collection("PodChaos", space), _asked(space, "pod-failure"), dryRun="All")
    except ApiRefused as e:
        yield _refused(what, e, space, system)
        return
    yield Point(what, "ok", "answers, its certificate is taken, and it lets us in")


def _asked(space: str, action: str) -> Object:
    spec = {"action": action, "mode": "all", "duration": "1s", "selector": {"pods": {space: ["mlchaos-doctor"]}}}
    return resource("mlchaos-doctor", "PodChaos", space, spec)


def _refused(what: str, error: ApiRefused, space: str, system: str) -> Point:
    said = told(error)
    if "x509" in said or "certificate" in said:
        return Point(what, "missing", f"its certificate is not taken: {said}", install(system))
    if "calling webhook" in said:
        look = f"kubectl get pods,endpoints -n {system}; kubectl logs deployment/chaos-controller-manager -n {system}"
        return Point(what, "missing", f"it does not answer: {said}", look)
    if isinstance(error, Forbidden) or "forbidden" in said:
        return Point(what, "missing", said, f"kubectl apply -n {space} -k manifests/rbac/chaos_mesh/namespace")
    return Point(what, "missing", said, f"kubectl logs deployment/chaos-controller-manager -n {system}")


def _certificate(site: Site, system: str) -> Iterator[Point]:
    """How long the webhook's CA holds, where it may be seen; helm makes one for five years."""
    from cryptography import x509

    try:
        found = site.cluster.get(_WEBHOOKS)
        pem = base64.b64decode(text((items(found, "webhooks") or [{}])[0], "clientConfig", "caBundle"))
        certificate = x509.load_pem_x509_certificate(pem)
    except (ApiRefused, ValueError, binascii.Error):  # not ours to see, or cert-manager's, which renews it
        return
    ends = certificate.not_valid_after_utc
    if ends < datetime.now(timezone.utc) + _SOON:
        yield Point("chaos_mesh: certificate", "missing", f"the webhook's CA ends {ends:%Y-%m-%d}", install(system))
    else:
        yield Point("chaos_mesh: certificate", "ok", f"the webhook's CA holds until {ends:%Y-%m-%d}")


def _ours(site: Site, environment: Environment) -> Iterator[Point]:
    from mlchaos_dagster.drivers.chaos_mesh.faults import HANDLERS

    kinds = (set(environment.backends.get("chaos_mesh", tuple(HANDLERS))) & HANDLERS.keys()) - {BROUGHT}
    asked = needed(site, environment, kinds, HANDLERS.__getitem__)
    for space in sorted(
        reach.beyond(site.cluster, site.options.control_namespace, spaces(site, environment), "chaos_mesh")
    ):
        saw = f"the sweeper could not take such a fault away in namespace {space}"
        yield Point("chaos_mesh: sweeper", "missing", saw, preflight.brings_rights(site, "chaos_mesh", space))
    missing = list(preflight.refused(site, asked))
    for namespace, said, rule in missing:
        system = namespace in ("", site.options.chaos_mesh.system_namespace)
        whole = preflight.brings_rights(site, "chaos_mesh", "" if system else namespace)
        help = f"{whole}; or for another account than mlchaos-runner add {rule}"
        yield Point("chaos_mesh: our rights", "missing", f"may not {said}", help)
    if not missing and on_cluster(environment):
        yield Point("chaos_mesh: our rights", "ok", f"all {len(asked)} that {len(kinds)} faults through it need")
