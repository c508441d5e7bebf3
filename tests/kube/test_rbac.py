"""The roles that are shipped allow what the code asks for, and nothing else; and `docs/rbac.md` says of each rule why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import yaml

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.cluster import preflight
from mlchaos_dagster.drivers.cluster.handler import Handler, Request
from mlchaos_dagster.drivers.cluster.points import SAMPLE
from mlchaos_dagster.drivers.every import of_cluster
from mlchaos_dagster.drivers.kubernetes import actions
from mlchaos_dagster.drivers.kubernetes.faults import PLACES, handler
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Cluster, Permission, Site
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api

ROOT = Path(__file__).parents[2]
RBAC = ROOT / "manifests" / "rbac"
CONTROL, SPACE = "mlchaos-system", "shop"
Rules = set[tuple[str, str]]
"""(`resource` or `resource.group`, verb)."""
WATCHED = "pods deployments.apps statefulsets.apps jobs.batch horizontalpodautoscalers.autoscaling"
MIRRORS = f"{WATCHED} inferenceservices.serving.kserve.io"

RUNNER: dict[str, dict[str, str]] = {
    "cluster": {
        "nodes": "list",  # probes/kubernetes_service.py: through which node a NodePort answers
        "chaosengines.litmuschaos.io chaosschedules.litmuschaos.io *.chaos-mesh.org": "list",  # drivers/cluster/rivals.py
    },
    "target": {
        MIRRORS: "list watch",  # probes/kubernetes.py
        "deployments.apps statefulsets.apps": "get",  # probes/kubernetes_health.py
        "services": "get",  # probes/kubernetes_service.py
        "pods replicasets.apps": "get",  # kube/kin.py
        "rollouts.argoproj.io replicasets.apps": "list watch",  # probes/kubernetes.py, kubernetes_rollouts.py
        "networkpolicies.networking.k8s.io": "get list create delete",  # faults/network_policy.py
    },
    "control": {"pods": "get"},  # faults/nodes.py: on which node this run itself is
}
"""What is asked for besides faults and ledger, which say it themselves."""

SWEEPER: dict[str, dict[str, str]] = {
    "cluster": {
        "namespaces": "get",  # kube/client.py, identity and _gone_around
        "nodes": "get patch",  # faults/network_agent.py, _answers; faults/nodes.py, recover
        "namespaces pods": "list",  # faults/drain.py: nodes read back
    },
    "target": {
        "pods": "get list watch patch delete",  # agents.py waits with a watch; pod_failure may delete
        "pods/ephemeralcontainers": "patch",  # faults/network_agent.py, _clean_after; faults/model_file.py, _helper
        "pods/exec": "get create",
        "secrets": "get patch",  # faults/rotation.py, recover
        "deployments.apps statefulsets.apps": "get patch",  # faults/scale.py, recover
        "replicasets.apps": "list patch",
        "rollouts.argoproj.io": "get patch",  # faults/bad_model.py, recover
        "networkpolicies.networking.k8s.io": "get delete",  # faults/network_policy.py, remove and standing
        "events": "create",  # sweeper.py, Events
    },
    "control": {
        "leases.coordination.k8s.io": "get list create update patch delete",  # create, update: its heart
        "secrets": "get list delete",
        "configmaps/mlchaos-lever": "get",
        "jobs.batch": "list delete",  # faults/gpu.py, recover
        "pods": "list",
    },
}
"""What recovery, proof and the heart ask for: `recover` and `active` of each handler, and sweeper.py."""


BACKENDS = ("litmus", "chaos_mesh")
"""Whose rights are folders of their own: who does not use them grants nothing."""

FURTHER: dict[str, dict[str, dict[str, str]]] = {
    "litmus": {},
    "chaos_mesh": {
        "target": {
            "iochaos.chaos-mesh.org httpchaos.chaos-mesh.org timechaos.chaos-mesh.org": "get list create update patch delete",
            "podiochaos.chaos-mesh.org podhttpchaos.chaos-mesh.org": "get patch",
        }
    },
}
"""Of the runner: what teams bring along, which is asked for by that kind only."""


def manifests(backend: str = "") -> Iterator[Path]:
    """Files with roles and bindings of a backend; empty: what everybody needs."""
    for path in sorted((RBAC / backend).rglob("*.yaml")):
        if path.name != "kustomization.yaml" and (backend or not {*BACKENDS} & set(path.relative_to(RBAC).parts)):
            yield path


def roles() -> dict[str, Rules]:
    """What each role allows; a resource that is bound to a name is `resource/name`."""
    found: dict[str, Rules] = {}
    for path in (*manifests(), *(p for backend in BACKENDS for p in manifests(backend))):
        for role in yaml.safe_load_all(path.read_text()):
            if role["kind"] in ("Role", "ClusterRole"):
                found[role["metadata"]["name"]] = set(_rules(role["rules"]))
    return found


def _rules(written: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for rule in written:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for name in rule.get("resourceNames", [""]):
                    shown = resource + (f"/{name}" if name else "") + (f".{group}" if group else "")
                    yield from ((shown, verb) for verb in rule["verbs"])


def bound(account: str, backend: str = "") -> dict[str, Rules]:
    """What an account may, by place: of the cluster, in a target's namespace, in the control namespace, in a tool's own."""
    there, found = roles(), {"cluster": Rules(), "target": Rules(), "control": Rules()}
    for path in manifests(backend):
        for binding in yaml.safe_load_all(path.read_text()):
            if binding["kind"] in ("RoleBinding", "ClusterRoleBinding"):
                if account in [s["name"] for s in binding["subjects"]]:
                    role = binding["roleRef"]
                    place = "control" if role["kind"] == "Role" else "target"
                    place = "cluster" if binding["kind"] == "ClusterRoleBinding" else place
                    found[place] |= there[role["name"]]
    return found


def spread(written: dict[str, str]) -> Rules:
    return {(r, v) for resources, verbs in written.items() for r in resources.split() for v in verbs.split()}


def asked_by_a_run(network: Literal["agent", "policy"] = "agent") -> Iterator[Permission]:
    """By every fault and action, with every parameter that changes what is asked, and by the ledger."""
    site = Site(cast(Cluster, Api()), Kubernetes(context="c", namespace=SPACE, network=network))
    chosen: list[tuple[str, Handler]] = [(kind, handler(kind)) for kind in PLACES] + list(actions.HANDLERS.items())
    for kind, one in chosen:
        for what in sorted(one.kinds):
            ref = Ref(what, "" if what == "node" else SPACE, "x", "u")
            for params in ({"interval_s": 1.0}, {"evict": True}, {}):
                target = Target(select="app=x->app=y", kubernetes=KubernetesObjects())
                request = Request(kind, (ref,), (ref,), dict(params), target)
                yield from preflight.permissions(request, iter(one.permissions(site, request)))
    yield from leases.permissions(CONTROL)


def needed_by_a_run() -> dict[str, Rules]:
    found = {place: spread(written) for place, written in RUNNER.items()}
    places = {"": "cluster", SPACE: "target", CONTROL: "control"}
    for p in (*asked_by_a_run("agent"), *asked_by_a_run("policy")):
        found[places[p.namespace]].add((p.resource + (f".{p.group}" if p.group else ""), p.verb))
    return found


@pytest.mark.parametrize("place", ["cluster", "target", "control"])
def test_the_run_may_do_what_its_code_asks_for_and_nothing_else(place: str) -> None:
    may, needs = bound("mlchaos-runner")[place], needed_by_a_run()[place]
    assert sorted(needs - may) == [], "missing"
    assert sorted(may - needs) == [], "not needed"


@pytest.mark.parametrize("place", ["cluster", "target", "control"])
def test_the_sweeper_may_do_what_recovery_asks_for_and_nothing_else(place: str) -> None:
    may, needs = bound("mlchaos-sweeper")[place], spread(SWEEPER[place])
    assert sorted(needs - may) == [], "missing"
    assert sorted(may - needs) == [], "not needed"


def asked_through(backend: str) -> Iterator[Permission]:
    """By every neutral fault of another tool's driver; what teams bring along asks for its own kind."""
    site = Site(cast(Cluster, Api()), Kubernetes(context="c", namespace=SPACE))
    driver = of_cluster(backend, site.cluster, site.options)
    for kind in sorted(driver.faults - {"litmus_engine", "chaos_mesh_resource"}):
        one = driver.handler(kind)
        for what in sorted(one.kinds):
            ref = Ref(what, "" if what == "node" else SPACE, "x", "u")
            target = Target(select="app=x->app=y", kubernetes=KubernetesObjects())
            for params in (SAMPLE | {"interval_s": 1.0}, SAMPLE):
                request = Request(kind, (ref,), (ref,), dict(params), target)
                yield from preflight.permissions(request, iter(one.permissions(site, request)))


@pytest.mark.req("R0-01")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_through_another_tool_may_what_its_driver_asks_for_and_nothing_else(backend: str) -> None:
    more, base = bound("mlchaos-runner", backend), bound("mlchaos-runner")
    places = {"": "cluster", SPACE: "target"}
    needs = {"cluster": Rules(), "target": Rules(), "control": Rules()}
    for p in asked_through(backend):
        shown = p.resource + (f".{p.group}" if p.group else "")
        needs[places.get(p.namespace, "control")].add((shown, p.verb))
    for place, asked in needs.items():
        asked |= spread(FURTHER[backend].get(place, {}))
        assert sorted(asked - more[place] - base[place]) == [], f"missing ({place})"
        assert sorted(more[place] - asked) == [], f"not needed ({place})"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sweeper_takes_such_a_fault_away_and_makes_none(backend: str) -> None:
    """What a recovery changes is what the run may change there, but for making it. (Chaos Mesh: docs/rbac.md.)"""
    run, sweeper = bound("mlchaos-runner", backend), bound("mlchaos-sweeper", backend)
    changes = {(r, v) for r, v in run["target"] if v in ("patch", "delete")}
    assert changes <= sweeper["target"] | bound("mlchaos-sweeper")["target"]
    assert sweeper["target"] <= run["target"] | bound("mlchaos-runner")["target"]
    makes = {r for r, v in sweeper["target"] if v == "create"}
    assert makes == ({r for r, v in run["target"] if v == "create"} if backend == "chaos_mesh" else set())


def test_the_sweeper_makes_no_fault() -> None:
    """Nothing that is only needed to make one: eviction, new policies and Jobs; Events are its own."""
    sweeper, runner = bound("mlchaos-sweeper"), bound("mlchaos-runner")
    assert sweeper["target"] - runner["target"] == {("events", "create")}
    makes = {(r, v) for r, v in runner["target"] | runner["control"] if v == "create" and r != "pods/exec"}
    made = {(r, v) for r, v in sweeper["target"] | sweeper["control"]}
    assert makes & made == {("leases.coordination.k8s.io", "create")}  # its heart


def test_every_rule_has_its_sentence() -> None:
    """`docs/rbac.md`: under a heading for each role, `| resources | verbs | why | without it |`; and no other rules."""
    told: dict[str, Rules] = {}
    for section in re.split(r"^### ", (ROOT / "docs/rbac.md").read_text(), flags=re.M)[1:]:
        name = section.split("`")[1]
        rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \| ([^|]{20,}) \| ([^|]{10,}) \|$", section, re.M)
        words = [(re.findall(r"`([^`]+)`", row[0]), re.findall(r"\w+", row[1])) for row in rows]
        told[name] = {(r, v) for resources, verbs in words for r in resources for v in verbs}
    assert told == roles()
