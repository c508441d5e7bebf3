"""Whether Litmus can make our faults: CRDs, operator, experiments, its account and the account's rights, ours. Reads only.

The names of what is missing and the commands are those of `manifests/litmus`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from mlchaos_dagster.domain.environment import Environment
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
from mlchaos_dagster.drivers.litmus.engine import GROUP, collection, namespace_of
from mlchaos_dagster.drivers.litmus.faults import EXPERIMENTS
from mlchaos_dagster.drivers.litmus.guards import CRDS, CRDS_INSTALL, INSTALL, WITHOUT_HELPER, may, operators
from mlchaos_dagster.kube import reach
from mlchaos_dagster.kube.client import Cluster, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, part, text, words

OLDEST = (3, 0)
"""Durations of probes are text since then, as we write them."""
PLURAL_OF_EXPERIMENTS = "chaosexperiments"


def points(site: Site, environment: Environment) -> Iterator[Point]:
    """Everything that Litmus needs here, in the order in which it would fail."""
    kinds = sorted(set(environment.backends.get("litmus", tuple(EXPERIMENTS))) & EXPERIMENTS.keys())
    experiments = sorted({EXPERIMENTS[kind] for kind in kinds})
    group = site.cluster.get(f"/apis/{GROUP}/v1alpha1")
    absent = [f"{plural}.{GROUP}" for plural in CRDS if plural not in served(group)]
    if absent:
        yield Point("litmus: CRDs", "missing", f"the cluster has no {', '.join(absent)}", CRDS_INSTALL)
    else:
        yield Point("litmus: CRDs", "ok", f"{', '.join(CRDS)} of {GROUP}")
    yield from guarded("litmus: operator", partial(_operator, site, environment), INSTALL)
    for space in _engine_spaces(site, environment):
        if PLURAL_OF_EXPERIMENTS not in served(group):
            break
        look = partial(_experiments, site, space, experiments)
        yield from guarded(f"litmus: experiments in {space}", look, "docs/litmus.md")
        yield from guarded(f"litmus: account in {space}", partial(_account, site, environment, space), "docs/litmus.md")
        yield from guarded(f"litmus: helpers in {space}", partial(_helpers, site, space, experiments), "docs/litmus.md")
    yield from guarded("litmus: our rights", partial(_ours, site, environment, kinds), "docs/rbac.md")


def _engine_spaces(site: Site, environment: Environment) -> list[str]:
    """Where our engines would be."""
    return sorted({namespace_of(site.options.litmus, space) for space in spaces(site, environment)})


def _operator(site: Site, environment: Environment) -> Iterator[Point]:
    where, found = site.options.litmus.operator_namespace, operators(site)
    if not found:
        yield Point("litmus: operator", "missing", f"no Deployment of it in {where or 'any namespace'}", INSTALL)
        return
    one = max(found, key=lambda d: int(part(d, "status", "availableReplicas") or 0))
    yield deployment("litmus: operator", one, "no engine is started, stopped or cleaned up after")
    watched = variable(one, "WATCH_NAMESPACE")
    missed = [s for s in _engine_spaces(site, environment) if watched and s not in watched.split(",")]
    if missed:
        help = f"{INSTALL}; or kubernetes.litmus.namespace: {watched} in the environment"
        yield Point("litmus: operator", "missing", f"it watches {watched}, and not {', '.join(missed)}", help)
    yield version("litmus: version", images(one)[0], OLDEST, INSTALL)


def _experiments(site: Site, space: str, wanted: list[str]) -> Iterator[Point]:
    what, help = f"litmus: experiments in {space}", f"kubectl apply -n {space} -k manifests/litmus/faults"
    there = {text(e, "metadata", "name"): e for e in site.cluster.list(collection(space, PLURAL_OF_EXPERIMENTS))}
    absent = [name for name in wanted if name not in there]
    if absent:
        yield Point(what, "missing", f"no ChaosExperiment {', '.join(absent)}", help)
    have = [name for name in wanted if name in there]
    without = [name for name in have if not text(there[name], "spec", "definition", "image")]
    if without:
        yield Point(what, "missing", f"ChaosExperiment {', '.join(without)} names no image", help)
    floating = [n for n in have if text(there[n], "spec", "definition", "image").endswith(":latest")]
    if floating:
        saw = (
            f"{', '.join(floating)}: image {text(there[floating[0]], 'spec', 'definition', 'image')} changes by itself"
        )
        yield Point(what, "optional", saw, help)
    if not absent and not without:
        yield Point(what, "ok", ", ".join(wanted))


def _account(site: Site, environment: Environment, space: str) -> Iterator[Point]:
    name, what = site.options.litmus.service_account, f"litmus: account in {space}"
    if site.cluster.get(f"/api/v1/namespaces/{space}/serviceaccounts/{name}") is None:
        make = f"kubectl create serviceaccount {name} -n {space}"
        yield Point(what, "missing", f"no ServiceAccount {name}", f"{make}; {bind(site, space, space)}")
        return
    wanted = set(EXPERIMENTS[k] for k in environment.backends.get("litmus", tuple(EXPERIMENTS)) if k in EXPERIMENTS)
    there = [e for e in site.cluster.list(collection(space, PLURAL_OF_EXPERIMENTS)) if _name(e) in wanted]
    asked = 0
    for target in sorted(
        {space, *(s for s in spaces(site, environment) if namespace_of(site.options.litmus, s) == space)}
    ):
        permissions = {p for e in there for p in demanded(site.cluster, e, target)}
        asked += len(permissions)
        lacking = sorted(p for p in permissions if not may(site.cluster, space, name, p))
        roles: dict[str, list[str]] = {}
        for group, resource in sorted({(p.group, p.resource) for p in lacking}):
            verbs = [p.verb for p in lacking if (p.group, p.resource) == (group, resource)]
            role = "litmus-network-partition" if resource == "networkpolicies" else "litmus-faults"
            roles.setdefault(role, []).append(f"{', '.join(verbs)} {resource}{'.' * bool(group)}{group}")
        for role, rights in roles.items():
            more = f"; and {len(rights) - 3} more" if len(rights) > 3 else ""
            saw = f"{name} may not {'; '.join(rights[:3])}{more} in {target}"
            help = f"kubectl apply -f manifests/litmus/roles.yaml; {bind(site, target, space, role)}"
            yield Point(what, "missing", saw, help)
        if lacking:
            return
    yield Point(what, "ok", f"{name}, with all {asked} rights that the experiments ask for")


def bind(site: Site, target: str, space: str, role: str = "litmus-faults") -> str:
    """The command that gives the engines' account its rights in a namespace."""
    account = site.options.litmus.service_account
    return f"kubectl create rolebinding {role} -n {target} --clusterrole={role} --serviceaccount={space}:{account}"


def demanded(cluster: Cluster, experiment: Object, namespace: str) -> Iterator[Permission]:
    """What a ChaosExperiment says that its account must be allowed, as far as the cluster has such objects."""
    for rule in items(experiment, "spec", "definition", "permissions"):
        for group in words(rule, "apiGroups"):
            resources = _resources(cluster, group)
            for resource in words(rule, "resources"):
                if resource in resources:
                    yield from (Permission(verb, resource, namespace, group) for verb in words(rule, "verbs"))


@cache
def _resources(cluster: Cluster, group: str) -> frozenset[str]:
    """Plurals of an API group, subresources too; empty where the cluster does not have it."""
    if not group:
        return frozenset(text(r, "name") for r in items(cluster.get("/api/v1"), "resources"))
    found = cluster.get(f"/apis/{group}")
    version = text(found, "preferredVersion", "groupVersion")
    there = items(cluster.get(f"/apis/{version}"), "resources") if version else []
    return frozenset(text(r, "name") for r in there)


def _helpers(site: Site, space: str, experiments: list[str]) -> Iterator[Point]:
    """Pod security that would refuse the helper pods, which are privileged and see the node's processes."""
    level = text(
        site.cluster.get(f"/api/v1/namespaces/{space}"), "metadata", "labels", "pod-security.kubernetes.io/enforce"
    )
    hindered = sorted(set(experiments) - WITHOUT_HELPER)
    if hindered and level not in ("", "privileged"):
        saw = f"pod security {level} refuses the privileged helpers of {', '.join(hindered)}"
        help = f"kubectl label namespace {space} pod-security.kubernetes.io/enforce=privileged --overwrite; or kubernetes.litmus.namespace"
        yield Point(f"litmus: helpers in {space}", "missing", saw, help)


def _ours(site: Site, environment: Environment, kinds: list[str]) -> Iterator[Point]:
    from mlchaos_dagster.drivers.litmus.driver import LitmusDriver

    asked = needed(site, environment, kinds, LitmusDriver.at(site.cluster, site.options).handler)
    for space in sorted(
        reach.beyond(site.cluster, site.options.control_namespace, spaces(site, environment), "litmus")
    ):
        saw = f"the sweeper could not take such a fault away in namespace {space}"
        yield Point("litmus: sweeper", "missing", saw, preflight.brings_rights(site, "litmus", space))
    missing = list(preflight.refused(site, asked))
    for namespace, said, rule in missing:
        whole = preflight.brings_rights(site, "litmus", namespace)
        yield Point(
            "litmus: our rights",
            "missing",
            f"may not {said}",
            f"{whole}; or for another account than mlchaos-runner add {rule}",
        )
    if not missing and on_cluster(environment):
        yield Point("litmus: our rights", "ok", f"all {len(asked)} that {len(kinds)} faults through Litmus need")


def _name(found: Object) -> str:
    return text(found, "metadata", "name")
