"""What speaks against a fault of Chaos Mesh: it is not installed, does not run, or would refuse. Read-only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mlchaos_dagster.drivers.chaos_mesh.resources import API, GROUP, WITHOUT_PODS, collection
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Request
from mlchaos_dagster.drivers.cluster.preflight import is_ready
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube.client import ApiRefused, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref

CHART = "chaos-mesh --repo https://charts.chaos-mesh.org --version 2.8.1"
CRDS = f"helm show crds {CHART} | kubectl apply --server-side -f -"
CONTROLLER = "app.kubernetes.io/component=controller-manager,app.kubernetes.io/name=chaos-mesh"
DAEMON = "app.kubernetes.io/component=chaos-daemon,app.kubernetes.io/name=chaos-mesh"
FILTER = "chaos-mesh.org/inject"
_FILTERING = "ENABLE_FILTER_NAMESPACE"
_BY_DAEMON = {"PodChaos": ("container-kill",)}
"""Of these kinds only these actions are made by the daemon on the pod's node; of all others all are."""


def install(system: str) -> str:
    """The command that installs it, or mends an installation."""
    return (
        f"helm upgrade --install chaos-mesh {CHART} -n {system} --create-namespace -f manifests/chaos_mesh/values.yaml"
    )


def kinds(site: Site) -> set[str]:
    """Kinds of Chaos Mesh that this cluster knows."""
    return {text(r, "kind") for r in items(site.cluster.get(API), "resources")}


def unknown(site: Site, kind: str) -> bool:
    """Whether Chaos Mesh is there and has no such kind."""
    known = kinds(site)
    return bool(known) and kind not in known


def permissions(site: Site, kind: str, spaces: Iterable[str], home: str) -> Iterator[Permission]:
    """Of whoever makes a resource of a kind in `home` that hits pods in `spaces`."""
    plural = kind.lower()
    for verb in ("get", "list", "create", "patch", "delete"):
        yield Permission(verb, plural, home, GROUP)
    # Its webhook asks for these in every namespace that is selected: up to 2.8 for `create` whatever is done, later for
    # `update` where a resource is changed. Our pause and its end are changes.
    for space in sorted(set(spaces)):
        yield Permission("create", plural, space, GROUP)
        yield Permission("update", plural, space, GROUP)
    yield Permission("list", "events", home)
    yield Permission("list", "pods", site.options.chaos_mesh.system_namespace)


def objections(site: Site, request: Request, made: Object, spaces: Sequence[str]) -> Iterator[Objection]:
    """In the order in which a person would mend it; what cannot be asked any more is left out."""
    kind = text(made, "kind")
    known = kinds(site)
    system = site.options.chaos_mesh.system_namespace
    if kind not in known:
        needs = CRDS if known else install(system)
        yield Objection(f"the cluster knows no {kind} of {GROUP}" if known else "Chaos Mesh is not installed", needs)
        return
    managers = site.cluster.list(f"/api/v1/namespaces/{system}/pods", labels=CONTROLLER)
    if not any(is_ready(p) for p in managers):
        yield Objection(
            f"the controller of Chaos Mesh does not run in namespace {system}",
            f"kubectl -n {system} rollout status deployment/chaos-controller-manager; or where it runs: "
            "kubernetes.chaos_mesh.system_namespace",
        )
        return
    yield from _daemons(site, request.refs, made, system)
    yield from _filtered(site, managers, spaces)
    yield from _refused(site, made)


def _daemons(site: Site, refs: Sequence[Ref], made: Object, system: str) -> Iterator[Objection]:
    kind = text(made, "kind")
    if kind in WITHOUT_PODS or text(made, "spec", "action") not in _BY_DAEMON.get(
        kind, (text(made, "spec", "action"),)
    ):
        return
    there = site.cluster.list(f"/api/v1/namespaces/{system}/pods", labels=DAEMON)
    served = {text(p, "spec", "nodeName") for p in there if is_ready(p)}
    pods = frozen.read_all(site, [ref for ref in refs if ref.kind == "pod"])
    wanted = {text(p, "spec", "nodeName") for p in pods.values() if p is not None}
    for node in sorted(wanted - served):
        yield Objection(
            f"no daemon of Chaos Mesh runs on node {node}, where a target is",
            f"kubectl -n {system} get pods -l app.kubernetes.io/component=chaos-daemon -o wide",
        )


def _filtered(site: Site, managers: Sequence[Object], spaces: Sequence[str]) -> Iterator[Objection]:
    """`enableFilterNamespace`: then only namespaces with an annotation are ever selected, the others silently not."""
    settings = [e for p in managers for c in items(p, "spec", "containers") for e in items(c, "env")]
    if not any(text(e, "name") == _FILTERING and text(e, "value") == "true" for e in settings):
        return
    for space in sorted(set(spaces)):
        found = site.cluster.get(f"/api/v1/namespaces/{space}")
        if mapping(found, "metadata", "annotations").get(FILTER) != "enabled":
            yield Objection(
                f"Chaos Mesh selects nothing in namespace {space} (enableFilterNamespace)",
                f"kubectl annotate namespace {space} {FILTER}=enabled",
            )


def _refused(site: Site, made: Object) -> Iterator[Objection]:
    """What schema and webhooks say to this very resource, with the path of the field."""
    place = collection(text(made, "kind"), text(made, "metadata", "namespace"))
    try:
        site.cluster.create(place, made, dryRun="All")
    except ApiRefused as e:
        yield Objection(f"Chaos Mesh would not take the {text(made, 'kind')}: {told(e)}", _remedy(e))
    except DriverUnavailable:
        site.cluster.version()  # is it the API server itself?
        yield Objection(
            f"the webhooks of Chaos Mesh do not answer within {site.cluster.timeout_s:g} s",
            f"a controller that has time: kubectl -n {site.options.chaos_mesh.system_namespace} logs "
            "deployment/chaos-controller-manager",
        )


def told(error: ApiRefused) -> str:
    """What a webhook or the schema said, without the address of the call."""
    said = str(error)
    return said.partition(": ")[2].rsplit(" (", 1)[0] if said.startswith("POST ") else said


def _remedy(error: ApiRefused) -> str:
    if "calling webhook" in str(error) or "call webhook" in str(error):
        return "webhooks of Chaos Mesh that answer: see its controller's log"
    if "is forbidden on" in str(error):
        return "the right to create this kind in every namespace it hits: kubectl apply -k manifests/rbac"
    return "a spec that it accepts"


def marks(resource: Mapping[str, object]) -> Object:
    """Labels and annotations that a team gave its resource."""
    return {key: value for key, value in resource.items() if key in ("labels", "annotations")}
