"""Litmus's real objects in the real API server; its operator and experiments as `litmus_place.py` says."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, Litmus
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.litmus.driver import LitmusDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverUnavailable, InjectFailed
from mlchaos_dagster.kube.client import Cluster
from tests.cluster import litmus_operator, litmus_place
from tests.cluster.conftest import Faulting, deploy, eventually, kubectl, objects, pods, ready
from tests.cluster.litmus_operator import Script
from tests.cluster.litmus_place import DATA, Real

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout (../shared/data/litmus)"),
    pytest.mark.timeout(180),
]
LEFT = "chaosengines,chaosresults,jobs,networkpolicies"


@pytest.fixture(scope="session")
def crds(admin_kubeconfig: str) -> None:
    litmus_place.install_crds()


@pytest.fixture
def litmus(crds: None, namespace: str, admin_kubeconfig: str, context: str) -> Iterator[litmus_operator.Litmus | Real]:
    """Litmus in the test's namespace."""
    with litmus_place.installed(namespace, Cluster(context, admin_kubeconfig)) as found:
        yield found


@pytest.fixture
def options(options: Kubernetes, namespace: str) -> Kubernetes:
    return options.model_copy(update={"litmus": Litmus.model_validate(litmus_place.options(namespace))})


@pytest.fixture
def driver(cluster: Cluster, options: Kubernetes) -> LitmusDriver:
    return LitmusDriver.at(cluster, options)


class Leasing(Faulting):
    """Leases of this backend."""

    def lease(self, *arguments: Any, **given: Any) -> Lease:
        return dataclasses.replace(super().lease(*arguments, **given), driver="litmus")


@pytest.fixture
def faulting(driver: LitmusDriver, tmp_path: Path) -> Leasing:
    return Leasing(driver, tmp_path)  # type: ignore[arg-type]


def nothing_left(namespace: str) -> bool:
    """Of Litmus's doing, as kubectl sees it."""
    uids = [p for p in objects("pods", namespace) if "chaosUID" in p["metadata"].get("labels", {})]
    return not objects(LEFT, namespace) and not uids


def effective(driver: LitmusDriver, lease: Lease) -> Evidence:
    """The evidence, once the effect was seen; a target under its fault may be hard to ask, as the engine knows, too."""
    found: list[Evidence] = []

    def look() -> bool:
        try:
            found[:] = [driver.active(lease)]
        except DriverUnavailable as e:
            found[:] = [Evidence(present=True, effective=False, lines=(str(e),))]
        return found[0].effective

    try:
        eventually(look, 25, every=0.5)
    except AssertionError as e:
        raise AssertionError(found[0].lines) from e
    return found[0]


def names(namespace: str, selector: str) -> set[str]:
    return {p["metadata"]["name"] for p in pods(namespace, selector)}


@pytest.mark.req("R1-01", "R1-04")
def test_pod_delete_takes_the_frozen_pods_and_leaves_nothing(
    litmus: litmus_operator.Litmus, namespace: str, driver: LitmusDriver, faulting: Leasing
) -> None:
    select = deploy(namespace, replicas=3)
    before = names(namespace, select)
    lease = faulting.lease("pod_delete", select, count=1, duration_s=30, signal="kill")
    victim = lease.targets[0].split("/")[2].partition("@")[0]
    driver.inject(lease)
    evidence = driver.active(lease)
    assert evidence.present and evidence.effective, evidence.lines
    assert victim not in names(namespace, select) and len(before & names(namespace, select)) == 2
    engine = objects("chaosengines", namespace)[0]
    assert engine["spec"]["terminationGracePeriodSeconds"] == 30
    assert engine["metadata"]["finalizers"] == [litmus_operator.FINALIZER]
    started = time.monotonic()
    driver.recover(lease)
    took = time.monotonic() - started
    assert not driver.active(lease).present
    assert nothing_left(namespace) and took < 15, took
    assert len(before & names(namespace, select)) == 2  # no second round
    eventually(lambda: all(map(ready, pods(namespace, select))) and len(pods(namespace, select)) == 3)


@pytest.mark.req("R1-02", "R1-05", "R1-06")
@pytest.mark.parametrize(
    "kind,params,count",
    [
        ("container_kill", {}, 1),
        ("network_isolation", {}, 1),
        ("cpu_stress", {"cores": 1.0, "load": 1.0}, 1),
        ("memory_stress", {"bytes": 48 << 20}, 1),
    ],
)
def test_neutral_faults_are_seen_and_gone(
    litmus: litmus_operator.Litmus,
    namespace: str,
    driver: LitmusDriver,
    faulting: Leasing,
    kind: str,
    params: dict[str, Any],
    count: int,
) -> None:
    select = deploy(namespace, replicas=2)
    lease = faulting.lease(kind, select, count=count, duration_s=60, **params)
    driver.inject(lease)
    assert effective(driver, lease).present
    started = time.monotonic()
    driver.recover(lease)
    took = time.monotonic() - started
    evidence = driver.active(lease)
    assert not evidence.present and took < 20, (took, evidence.lines)
    if kind != "container_kill":
        assert not evidence.effective, evidence.lines
    assert nothing_left(namespace)
    labels = [p["metadata"]["labels"] for p in pods(namespace, select)]
    assert not any(key.startswith("mlchaos.dev") for found in labels for key in found)


@pytest.mark.req("R1-03")
def test_a_partition_cuts_one_link_and_no_other(
    litmus: litmus_operator.Litmus, namespace: str, driver: LitmusDriver, faulting: Leasing
) -> None:
    near, far = deploy(namespace, "near", replicas=1), deploy(namespace, "far", replicas=1)
    lease = faulting.lease("network_partition", f"{near}->{far}", duration_s=60)
    driver.inject(lease)
    effective(driver, lease)
    policy = objects("networkpolicies", namespace)[0]["spec"]
    there = pods(namespace, far)[0]["status"]["podIP"]
    assert f"{there}/32" in policy["egress"][0]["to"][0]["ipBlock"]["except"]
    driver.recover(lease)
    assert not driver.active(lease).present and nothing_left(namespace)


def test_what_litmus_cannot_make_fails_in_its_own_words(
    litmus: litmus_operator.Litmus, namespace: str, driver: LitmusDriver, faulting: Leasing
) -> None:
    """No netem in this kernel: the experiment says so, and its engine completes."""
    near, far = deploy(namespace, "near", replicas=1), deploy(namespace, "far", replicas=1)
    lease = faulting.lease("network_latency", f"{near}->{far}", duration_s=30, latency_s=0.2, jitter_s=0.0)
    with pytest.raises(InjectFailed, match="HELPER_ERROR.*Specified qdisc kind is unknown"):
        driver.inject(lease)
    driver.recover(lease)
    assert not driver.active(lease).present and nothing_left(namespace)


@pytest.mark.parametrize(
    "script,said",
    [
        (Script(stuck=True), "no effect within 4 s: engineStatus is initialized"),
        (Script(deaf=True), "the chaos operator has not seen the ChaosEngine"),
        (Script(skipped=True), "experiment pod-delete: Skipped"),
        (Script(error=("TARGET_SELECTION_ERROR", "no pods found")), "TARGET_SELECTION_ERROR: no pods found"),
        (Script(slow_s=30), "no effect within 4 s"),
    ],
    ids=["stuck", "down", "skipped", "error", "slow"],
)
def test_an_engine_that_does_not_come_to_its_fault(
    litmus: litmus_operator.Litmus,
    namespace: str,
    cluster: Cluster,
    options: Kubernetes,
    tmp_path: Path,
    script: Script,
    said: str,
) -> None:
    brief = options.model_copy(update={"litmus": options.litmus.model_copy(update={"inject_within": 4.0})})
    if script.error or script.skipped:
        brief = options
    driver = LitmusDriver.at(cluster, brief)
    select = deploy(namespace, replicas=2)
    before = names(namespace, select)
    lease = Leasing(driver, tmp_path).lease("pod_delete", select, count=1, duration_s=20)  # type: ignore[arg-type]
    litmus.script = script
    with pytest.raises(InjectFailed, match=said):
        driver.inject(lease)
    driver.recover(lease)
    assert not driver.active(lease).present and nothing_left(namespace)
    assert names(namespace, select) == before


def test_the_event_of_a_missing_experiment_is_told(
    litmus: litmus_operator.Litmus, namespace: str, cluster: Cluster, options: Kubernetes, tmp_path: Path
) -> None:
    brief = options.model_copy(update={"litmus": options.litmus.model_copy(update={"inject_within": 4.0})})
    driver = LitmusDriver.at(cluster, brief)
    lease = Leasing(driver, tmp_path).lease("pod_delete", deploy(namespace), count=1)  # type: ignore[arg-type]
    kubectl("delete", "chaosexperiment", "pod-delete", "-n", namespace)
    with pytest.raises(
        InjectFailed, match="ChaosResourcesOperationFailed: .chaos start. Unable to get chaos resources"
    ):
        driver.inject(lease)
    driver.recover(lease)
    assert nothing_left(namespace)


@pytest.mark.req("R2-03")
def test_an_operator_that_is_down_does_not_keep_a_fault_alive(
    litmus: litmus_operator.Litmus, namespace: str, driver: LitmusDriver, faulting: Leasing
) -> None:
    """Its finalizer would hold the engine for ever: the experiment is ended first, the finalizer goes last."""
    select = deploy(namespace, replicas=2)
    lease = faulting.lease("network_isolation", select, count=1, duration_s=120)
    driver.inject(lease)
    litmus.script = Script(deaf=True)
    started = time.monotonic()
    driver.recover(lease)
    took = time.monotonic() - started
    assert not driver.active(lease).present and nothing_left(namespace) and took < 25, took
    assert not [line for line in litmus.seen if line.startswith("stopped")]


def test_a_policy_that_a_killed_experiment_left_is_removed(
    litmus: litmus_operator.Litmus, namespace: str, driver: LitmusDriver, faulting: Leasing
) -> None:
    lease = faulting.lease("network_isolation", deploy(namespace), count=1, duration_s=120)
    driver.inject(lease)
    litmus.script = Script(keeps=True)
    assert objects("networkpolicies", namespace)
    driver.recover(lease)
    assert not driver.active(lease).present and nothing_left(namespace)
