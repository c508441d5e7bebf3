"""What is missing before Litmus could make a fault here, and the command or rule that brings it. Read-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.environment import Litmus
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Request
from mlchaos_dagster.drivers.kubernetes.faults import drain
from mlchaos_dagster.drivers.litmus import engine, faults
from mlchaos_dagster.drivers.litmus.selection import kinds, select
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import ApiRefused, Cluster, Conflict, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text, words

CRDS = ("chaosengines", "chaosexperiments", "chaosresults")
CHART = "litmus-core --repo https://litmuschaos.github.io/litmus-helm/ --version 3.28.1"
INSTALL = f"helm upgrade --install litmus {CHART} -n chaos --create-namespace -f manifests/litmus/values.yaml"
CRDS_INSTALL = f"helm show crds {CHART} | kubectl apply --server-side -f -"
_OTHERS = "https://raw.githubusercontent.com/litmuschaos/chaos-charts/3.28.0/faults/kubernetes/{name}/fault.yaml"
WITHOUT_HELPER = frozenset({"pod-delete", faults.PARTITION})
"""Experiments that need no privileged pod beside their target."""
_LEVEL = "pod-security.kubernetes.io/enforce"
_OPERATOR = "chaos-operator"
_SAMPLE = "mlchaos-dry-run"


def permissions(site: Site, request: Request) -> Iterator[Permission]:
    """Everything of Litmus's objects that preflight, inject, active and recover ask for."""
    options = site.options.litmus
    target = request.refs[0].namespace
    where = engine.namespace_of(options, target)
    for verb in ("get", "create", "patch", "delete"):
        yield Permission(verb, "chaosengines", where, engine.GROUP)
    for verb in ("list", "delete"):
        yield Permission(verb, "chaosresults", where, engine.GROUP)
        yield Permission(verb, "jobs", where, "batch")
        yield Permission(verb, "pods", where)
    yield Permission("get", "chaosexperiments", where, engine.GROUP)
    yield Permission("get", "serviceaccounts", where)
    yield Permission("list", "events", where)
    yield Permission("list", "deployments", options.operator_namespace, "apps")
    yield Permission("create", "subjectaccessreviews", "", "authorization.k8s.io")
    experiment = faults.experiment_of(request.kind, request.params)
    if experiment == faults.PARTITION:
        yield Permission("patch", "pods", target)
        for verb in ("list", "delete"):
            yield Permission(verb, "networkpolicies", target, "networking.k8s.io")
    if experiment == faults.PARTITION or faults.repeats(request.kind, request.params):
        yield Permission("get", "replicasets", target, "apps")
    if request.kind in ("network_latency", "network_loss", "network_partition"):
        yield Permission("list", "services", target)
    if experiment == faults.DRAIN:
        for verb in ("get", "patch"):
            yield Permission(verb, "nodes")
        yield Permission("list", "pods")
        yield Permission("list", "namespaces")


def objections(site: Site, request: Request) -> Iterator[Objection]:
    """From what is installed to what this very ChaosEngine would meet; later ones only where the earlier are met."""
    if missing := _missing_kinds(site):
        yield Objection(
            f"Litmus is not installed: the cluster has no {', '.join(missing)} of {engine.GROUP}", CRDS_INSTALL
        )
        return
    options = site.options.litmus
    where = engine.namespace_of(options, request.refs[0].namespace)
    if not where:
        yield Objection("no namespace for the ChaosEngine: its targets are nodes", "kubernetes.litmus.namespace")
        return
    lacking = [*_operator(site, where), *_parts(site, request, where)]
    yield from lacking
    unfit = [*_unfit(site, request)]
    yield from unfit
    if not lacking and not unfit:
        yield from _refused(site, request, where)


def _missing_kinds(site: Site) -> list[str]:
    found = items(site.cluster.get(f"/apis/{engine.GROUP}/v1alpha1"), "resources")
    there = {text(r, "name") for r in found}
    return [kind for kind in CRDS if kind not in there]


# -- the operator -------------------------------------------------------------------------------------------------------


def operators(site: Site) -> list[Object]:
    """Deployments that run the chaos operator, by its image or its labels."""
    where = site.options.litmus.operator_namespace
    inside = f"/namespaces/{where}" if where else ""
    return [d for d in site.cluster.list(f"/apis/apps/v1{inside}/deployments") if _is_operator(d)]


def _is_operator(deployment: Object) -> bool:
    template = mapping(deployment, "spec", "template")
    images = [text(c, "image") for c in items(template, "spec", "containers")]
    named = text(template, "metadata", "labels", "name") == _OPERATOR
    return named or any(image.rpartition("/")[2].partition(":")[0] == _OPERATOR for image in images)


def _operator(site: Site, where: str) -> Iterator[Objection]:
    found = operators(site)
    if not found:
        there = site.options.litmus.operator_namespace or "any namespace"
        yield Objection(f"the chaos operator runs nowhere: no Deployment of it in {there}", INSTALL)
        return
    up = [d for d in found if int(part(d, "status", "availableReplicas") or 0) > 0]
    if not up:
        namespace, name = text(found[0], "metadata", "namespace"), text(found[0], "metadata", "name")
        yield Objection(
            f"the chaos operator {namespace}/{name} has no replica that is available",
            f"kubectl -n {namespace} scale deployment {name} --replicas=1; kubectl -n {namespace} get pods",
        )
        return
    watched = [_watches(d) for d in up]
    if not any(not spaces or where in spaces for spaces in watched):
        namespace, name = text(up[0], "metadata", "namespace"), text(up[0], "metadata", "name")
        yield Objection(
            f"the chaos operator {namespace}/{name} watches {', '.join(watched[0])}, and the ChaosEngine is in {where}",
            f'kubernetes.litmus.namespace: {watched[0][0]}; or kubectl -n {namespace} set env deployment/{name} WATCH_NAMESPACE=""',
        )


def _watches(deployment: Object) -> tuple[str, ...]:
    """Namespaces that an operator looks at; empty: all."""
    for container in items(deployment, "spec", "template", "spec", "containers"):
        for variable in items(container, "env"):
            if text(variable, "name") == "WATCH_NAMESPACE":
                if text(variable, "valueFrom", "fieldRef", "fieldPath") == "metadata.namespace":
                    return (text(deployment, "metadata", "namespace"),)
                return tuple(filter(None, (v.strip() for v in text(variable, "value").split(","))))
    return ()


# -- experiment and service account -------------------------------------------------------------------------------------


def account_of(options: Litmus, request: Request) -> str:
    """As which service account the experiment runs."""
    brought: dict[str, Any] = request.params.get("engine") or {}
    return str(brought.get("chaosServiceAccount") or options.service_account)


def _parts(site: Site, request: Request, where: str) -> Iterator[Objection]:
    name, account = faults.experiment_of(request.kind, request.params), account_of(site.options.litmus, request)
    experiment = site.cluster.get(f"{engine.collection(where, 'chaosexperiments')}/{name}")
    if experiment is None:
        yield Objection(f"there is no ChaosExperiment {name} in namespace {where}", _brings(where, name))
    if site.cluster.get(f"/api/v1/namespaces/{where}/serviceaccounts/{account}") is None:
        yield Objection(
            f"there is no service account {account} in namespace {where}",
            f"kubectl create serviceaccount {account} -n {where}; {_bound(where, account, where, 'litmus-faults')}; or "
            "kubernetes.litmus.service_account: one that is there",
        )
    elif experiment is not None:
        yield from _rights(site, request, experiment, where, account)
    space = mapping(site.cluster.get(f"/api/v1/namespaces/{where}"), "metadata", "labels")
    if name not in WITHOUT_HELPER and space.get(_LEVEL, "privileged") != "privileged":
        yield Objection(
            f"pod security {space[_LEVEL]} of namespace {where} refuses the privileged helpers of {name}",
            f"kubectl label namespace {where} {_LEVEL}=privileged --overwrite; or kubernetes.litmus.namespace: another",
        )


def _brings(where: str, experiment: str) -> str:
    if experiment in faults.EXPERIMENTS.values():
        return f"kubectl apply -n {where} -k manifests/litmus/faults"
    if experiment.startswith(("pod-", "node-", "container-", "disk-", "kubelet-", "docker-")):
        return f"kubectl apply -n {where} -f {_OTHERS.format(name=experiment)}"
    return f"kubectl apply -n {where} -f fault.yaml, with the fault.yaml of {experiment} from litmuschaos/chaos-charts"


def _rights(site: Site, request: Request, experiment: Object, where: str, account: str) -> Iterator[Objection]:
    """The rules that the experiment says it needs, in its own namespace and in that of the targets."""
    cluster_wide = text(experiment, "spec", "definition", "scope") == "Cluster"
    target, name = request.refs[0].namespace, text(experiment, "metadata", "name")
    lacking: dict[tuple[str, str], list[str]] = {}
    for rule in items(experiment, "spec", "definition", "permissions"):
        for group in words(rule, "apiGroups"):
            if group and site.cluster.get(f"/apis/{group}") is None:
                continue  # what is not installed needs no right
            own = group in ("batch", engine.GROUP)
            spaces = [""] if cluster_wide else sorted({where} if own else {where, target or where})
            for resource in words(rule, "resources"):
                for space in spaces:
                    verbs = words(rule, "verbs")
                    if no := [
                        v for v in verbs if not may(site.cluster, where, account, Permission(v, resource, space, group))
                    ]:
                        role = "litmus-network-partition" if resource == "networkpolicies" else "litmus-faults"
                        lacking.setdefault((space, role), []).append(f"{', '.join(no)} {resource}")
    for (space, role), what in sorted(lacking.items()):
        yield Objection(
            f"service account {where}/{account} may not {'; '.join(what)}{f' in {space}' if space else ''}: {name} needs it",
            _bound(where, account, space, role),
        )


def _bound(where: str, account: str, space: str, role: str) -> str:
    """The command that gives an account what experiments need in a namespace; empty: in the cluster."""
    how = f"rolebinding {role} -n {space}" if space else f"clusterrolebinding {role}"
    bind = f"kubectl create {how} --clusterrole={role} --serviceaccount={where}:{account}"
    return f"kubectl apply -f manifests/litmus/roles.yaml; {bind}"


def may(cluster: Cluster, space: str, account: str, permission: Permission) -> bool:
    """Whether a ServiceAccount may do that."""
    resource, _, subresource = permission.resource.partition("/")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{space}:{account}",
            "groups": ["system:serviceaccounts", f"system:serviceaccounts:{space}", "system:authenticated"],
            "resourceAttributes": {
                "verb": permission.verb,
                "group": permission.group,
                "resource": resource,
                "subresource": subresource,
                "namespace": permission.namespace,
            },
        },
    }
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(part(cluster.create(path, review), "status", "allowed"))


# -- what Litmus cannot do, or would do to others ------------------------------------------------------------------------


def _unfit(site: Site, request: Request) -> Iterator[Objection]:
    kind, params, refs = request.kind, request.params, request.refs
    experiment = faults.experiment_of(kind, params)
    on_nodes = experiment in faults.ON_NODES
    if on_nodes != (refs[0].kind == "node"):
        yield Objection(
            f"{experiment} hits {'nodes' if on_nodes else 'pods'}, and the target is a {refs[0].kind}", "another target"
        )
        return
    if experiment == "pod-autoscaler":
        yield Objection(
            "pod-autoscaler scales whole workloads: no pod of it could be frozen", "scale_to_zero, or another"
        )
    if len({ref.namespace for ref in refs}) > 1:
        yield Objection("the targets are in several namespaces", "targets in one; Litmus takes no more")
    if on_nodes:
        yield from _nodes(site, request, experiment)
    if params.get("evict"):
        yield Objection("Litmus deletes pods without asking budgets", "`evict: false`; or the backend kubernetes")
    if experiment == faults.PARTITION:
        owners = kinds(site, refs)
        if len(owners) != 1 or owners[0] not in engine.KINDS:
            shown = ", ".join(owner or "nothing" for owner in owners)
            yield Objection(
                f"pod-network-partition wants pods of one {', '.join(engine.KINDS)}; these are of {shown}", "other pods"
            )
        if request.target.kubernetes.ports:
            yield Objection("pod-network-partition cuts all ports", "no kubernetes.ports; or the backend kubernetes")
    if kind == "pod_delete" and params.get("interval_s") and not select(site, request).comes_back:
        yield Objection(
            "pod-delete at an interval cannot be kept to the frozen pods: from its second round on Litmus would take others",
            "all pods of the workload (fraction: 1), a StatefulSet, no interval; or the backend kubernetes",
        )


def _nodes(site: Site, request: Request, experiment: str) -> Iterator[Objection]:
    if experiment not in faults.MANY_NODES and len(request.refs) > 1:
        yield Objection(f"{experiment} takes one node, and {len(request.refs)} are meant", "max_targets: 1")
    if experiment == faults.DRAIN:
        for ref in request.refs:
            if text(frozen.read(site, ref), "spec", "unschedulable") == "True":
                yield Objection(
                    f"{ref.shown} is cordoned already, and Litmus would uncordon it", f"kubectl uncordon {ref.name}"
                )
        if foreign := drain.load(site, [ref.name for ref in request.refs]).foreign:
            yield Objection(
                f"Litmus drains every namespace, and these have not opted in to faults: {drain.names(foreign)}",
                "the backend kubernetes, which leaves them alone",
            )


def _refused(site: Site, request: Request, where: str) -> Iterator[Objection]:
    """What the API server and its webhooks say to this very ChaosEngine, asked without making it."""
    try:
        selection = select(site, request)
        plan = faults.plan(request.kind, request.params, selection, 60.0)
    except (DriverError, ValueError, KeyError, TypeError) as e:
        yield Objection(f"the ChaosEngine cannot be built: {e}", "an engine as `mlchaos import` writes it")
        return
    body = engine.body(_SAMPLE, site.options.litmus, where, plan, selection, request.params)
    try:
        site.cluster.create(engine.collection(where, "chaosengines"), body, dryRun="All")
    except Conflict:
        pass
    except ApiRefused as e:
        yield Objection(f"the ChaosEngine would be refused: {e}", "a ChaosEngine that the cluster takes")
