"""The roles that are shipped allow what the code asks for, and the sweeper's nothing that only makes faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes import preflight
from mlchaos_dagster.drivers.kubernetes.faults import PLACES, handler
from mlchaos_dagster.drivers.kubernetes.handler import Request
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Cluster, Permission, Site
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api

RBAC = Path(__file__).parents[2] / "manifests" / "rbac"


def rules(*names: str) -> set[tuple[str, str, str]]:
    """(group, resource, verb) that these roles allow."""
    found: set[tuple[str, str, str]] = set()
    for path in RBAC.glob("*.yaml"):
        for role in yaml.safe_load_all(path.read_text()):
            if role["kind"] in ("Role", "ClusterRole") and role["metadata"]["name"] in names:
                for rule in role["rules"]:
                    found |= {(g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    assert found, names
    return found


def missing(needed: set[Permission], allowed: set[tuple[str, str, str]]) -> list[str]:
    return sorted(f"{p.verb} {p.group}/{p.resource}" for p in needed if (p.group, p.resource, p.verb) not in allowed)


@pytest.mark.parametrize("kind", sorted(PLACES))
@pytest.mark.parametrize("network", ["agent", "policy"])
def test_the_runner_may_do_what_every_handler_asks_for(kind: str, network: Any) -> None:
    options = Kubernetes(context="c", namespace="shop", network=network)
    site = Site(cast(Cluster, Api()), options)
    chosen = handler(kind)
    for what in sorted(chosen.kinds):
        ref = Ref(what, "" if what == "node" else "shop", "x", "u")
        for params in ({"interval_s": 1.0}, {"evict": True}, {}):
            target = Target(select="app=x->app=y", kubernetes=KubernetesObjects())
            request = Request(kind, (ref,), (ref,), dict(params), target)
            needed = preflight.permissions(request, iter(chosen.permissions(site, request)))
            inside = {p for p in needed if p.namespace == options.control_namespace}
            assert missing(inside, rules("mlchaos-ledger", "mlchaos-helpers")) == []
            assert missing(needed - inside, rules("mlchaos-faults", "mlchaos-cluster", "mlchaos-nodes")) == []


def test_both_may_keep_the_ledger_and_no_more_of_the_control_namespace() -> None:
    needed = set(leases.permissions("mlchaos-system"))
    assert missing(needed, rules("mlchaos-ledger")) == []
    assert rules("mlchaos-ledger") == {(p.group, p.resource, p.verb) for p in needed}


def test_the_sweeper_makes_no_fault() -> None:
    """What is only needed to make one: eviction, new policies and jobs; nothing of nodes but what uncordons them."""
    sweeper, runner = rules("mlchaos-recovery"), rules("mlchaos-faults")
    assert sweeper - runner == {("", "events", "create")}
    makes = {(g, r, v) for g, r, v in runner if v == "create" and r != "pods/exec"}
    assert makes and not makes & sweeper
