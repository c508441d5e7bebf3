"""The ledger on a real API server: races, take-overs, what was tampered with, the lever."""

from __future__ import annotations

import os
import threading
import time
import uuid
from dataclasses import replace

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease, Owner, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import InjectFailed, LeaseRefused, StoreError
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.leases import ClusterLedger, held
from tests.cluster.conftest import deploy, kubectl, objects, pods
from tests.cluster.lease_owner import new_lease


def ledger(context: str, kubeconfig: str, namespace: str, name: str = "") -> ClusterLedger:
    """With a connection of its own, as another process would have."""
    holder = Owner(1, 1.0, "b", name) if name else None
    return ClusterLedger(Cluster(context, kubeconfig), namespace, SystemClock(), holder)


def a_lease(*targets: str, **undo: object) -> Lease:
    return Lease(
        id=f"mlchaos-test-{uuid.uuid4().hex[:10]}",
        run_id=uuid.uuid4().hex,
        experiment="test",
        environment="test",
        driver="kubernetes",
        kind="pod_failure",
        targets=targets or ("pod/nowhere/web@00000000-0000",),
        params={},
        undo={"fault": {}, **undo},
        duration_s=10.0,
        opened_wall=0.0,
        deadline_wall=30.0,
        owner=current_owner(),
    )


@pytest.mark.req("R0-10")
def test_of_two_runs_that_race_for_a_target_exactly_one_wins(context: str, kubeconfig: str, namespace: str) -> None:
    both = [ledger(context, kubeconfig, namespace, f"racer-{i}") for i in range(2)]
    for attempt in range(20):
        gate, won, said = threading.Barrier(2), list[tuple[ClusterLedger, Lease]](), list[str]()

        def race(
            mine: ClusterLedger,
            gate: threading.Barrier = gate,
            won: list[tuple[ClusterLedger, Lease]] = won,
            said: list[str] = said,
        ) -> None:
            lease = a_lease()
            gate.wait()
            try:
                won.append((mine, mine.open(lease)))
            except StoreError as e:
                said.append(f"{type(e).__name__}: {e}")

        threads = [threading.Thread(target=race, args=(x,)) for x in both]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(won) == 1 and said[0].startswith("LeaseRefused") and "held by run" in said[0], (attempt, won, said)
        assert len(objects("leases", namespace)) == len(objects("secrets", namespace)) == 1
        won[0][0].close(won[0][1], ())
    assert objects("leases", namespace) == objects("secrets", namespace) == []


def test_a_lease_of_megabytes_comes_back_whole(context: str, kubeconfig: str, namespace: str) -> None:
    big = [os.urandom(80).hex() for _ in range(10_000)]
    mine = ledger(context, kubeconfig, namespace)
    lease = mine.open(a_lease(big=big))
    assert len(objects("secrets", namespace)) > 1
    assert ledger(context, kubeconfig, namespace).leases() == (lease,)
    mine.close(lease, ())
    assert objects("secrets", namespace) == []


def test_a_secret_that_was_exchanged_keeps_every_run_out(context: str, kubeconfig: str, namespace: str) -> None:
    mine = ledger(context, kubeconfig, namespace)
    lease = mine.open(a_lease())
    (secret,) = objects("secrets", namespace)
    name = secret["metadata"]["name"]
    # The API server itself refuses to change it; it can only be exchanged.
    changed = kubectl("patch", "secret", name, "-n", namespace, "-p", '{"data":{"lease":"QUJD"}}', check=False)
    assert "patched" not in changed
    kubectl("delete", "secret", name, "-n", namespace)
    kubectl("create", "secret", "generic", name, "-n", namespace, "--from-literal=lease=other")
    kubectl("label", "secret", name, "-n", namespace, *(f"{k}={v}" for k, v in secret["metadata"]["labels"].items()))
    other = ledger(context, kubeconfig, namespace)
    assert other.unreadable() == (f"{namespace}/{lease.id}",)
    with pytest.raises(LeaseRefused, match="cannot be read"):
        other.open(a_lease("pod/nowhere/other@11111111-1111"))
    assert len(objects("leases", namespace)) == 1


@pytest.mark.req("R0-10")
def test_who_was_taken_over_injects_nothing_more(
    context: str, kubeconfig: str, namespace: str, driver: KubernetesDriver, site: Site
) -> None:
    select = deploy(namespace, replicas=1)
    mine = ledger(context, kubeconfig, namespace)
    lease = mine.open(new_lease(driver, "pod_failure", select, "mlchaos-test-late"))
    held(site, lease)
    taken = ledger(context, kubeconfig, namespace, "sweeper").fence(lease.id, "another")
    assert taken == replace(lease, token=lease.token + 1)
    with pytest.raises((LeaseRefused, InjectFailed), match="taken over by another"):
        driver.inject(lease)
    with pytest.raises(LeaseRefused):
        mine.renew(lease)
    assert [p["metadata"].get("annotations", {}).get("mlchaos.dev/lease") for p in pods(namespace, select)] == [None]


@pytest.mark.req("R0-10")
def test_a_deployment_and_its_pods_are_not_hit_at_once(
    context: str, kubeconfig: str, namespace: str, driver: KubernetesDriver, options: Kubernetes
) -> None:
    select = deploy(namespace, replicas=2)
    mine = ledger(context, kubeconfig, namespace)
    (deployment,) = objects("deployment", namespace)
    whole = f"deployment/{namespace}/web@{deployment['metadata']['uid']}"
    pod = new_lease(driver, "pod_failure", select, "mlchaos-test-pods")
    first = mine.open(replace(pod, targets=pod.targets[:1]))
    with pytest.raises(LeaseRefused, match="a part of deployment"):
        mine.open(a_lease(whole))
    second = mine.open(replace(pod, id="mlchaos-test-pods-2", targets=pod.targets[1:]))
    mine.close(first, ())
    mine.close(second, ())
    mine.open(a_lease(whole))
    with pytest.raises(LeaseRefused, match="part of is held"):
        mine.open(replace(pod, id="mlchaos-test-pods-3"))


def test_the_lever_keeps_out_and_a_stop_request_comes_with_the_next_renewal(
    context: str, kubeconfig: str, namespace: str
) -> None:
    mine, other = ledger(context, kubeconfig, namespace), ledger(context, kubeconfig, namespace, "operator")
    lease = mine.open(a_lease())
    other.request_stop(lease.id, "by hand")
    mine.renew(lease)
    assert mine.stop_requested(lease.run_id) == "by hand"
    other.lever.pull("smoke in the room", "me")
    with pytest.raises(LeaseRefused, match="smoke in the room"):
        mine.open(a_lease("pod/nowhere/other@11111111-1111"))
    assert other.lever.release() and not other.lever.release()
    mine.open(a_lease("pod/nowhere/other@11111111-1111"))


def test_what_the_ledger_costs_in_calls_and_seconds(context: str, kubeconfig: str, namespace: str) -> None:
    """A thousand targets are one lease: as fast as one."""
    mine = ledger(context, kubeconfig, namespace)
    start = time.monotonic()
    lease = mine.open(a_lease(*(f"deployment/nowhere/x@{uuid.uuid4()}" for _ in range(1000))))
    opened = time.monotonic() - start
    mine.close(lease, ())
    assert opened < 3.0
