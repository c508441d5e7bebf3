"""`mlchaos clean` against planted leftovers: said in a dry run, removed with proof, and nothing else is touched (R0-10)."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import LeaseRefused
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.leases import KEPT, ClusterLedger
from tests.cluster.conftest import Faulting, deploy, eventually, kubectl, objects, pods, ready
from tests.cluster.surroundings import CommandLine, environment

GONE = replace(current_owner(), pid=1, host="another-machine")
"""An owner of another host that never renews."""


@pytest.fixture
def ledger(site: Site) -> ClusterLedger:
    return ClusterLedger(site.cluster, site.options.control_namespace, SystemClock(), GONE)


@pytest.fixture
def line(tmp_path: Path, namespace: str, context: str, admin_kubeconfig: str) -> CommandLine:
    """As who installed it: `clean` looks for what is ours in every kind of object."""
    written = environment(namespace, context, admin_kubeconfig)
    written["kubernetes"]["sweeper_ttl"] = "2s"
    return CommandLine(tmp_path, written)


def opened(ledger: ClusterLedger, lease: Lease) -> Lease:
    undo = {k: v for k, v in lease.undo.items() if k != KEPT}
    return ledger.open(replace(lease, owner=GONE, undo=undo))


@pytest.mark.req("R0-10")
def test_what_was_left_is_told_removed_and_proven(
    line: CommandLine, namespace: str, ledger: ClusterLedger, faulting: Faulting, driver: KubernetesDriver
) -> None:
    deploy(namespace, replicas=2)
    deploy(namespace, name="lost", replicas=1)
    left = opened(ledger, faulting.lease("pod_failure", "app=web", count=1))
    driver.inject(left)
    lost = opened(ledger, faulting.lease("pod_failure", "app=lost"))
    driver.inject(lost)
    kubectl("delete", "lease", lost.id, "-n", namespace)
    kubectl("delete", "secret", "-n", namespace, "-l", f"mlchaos.dev/lease={lost.id}")
    labels = "app.kubernetes.io/managed-by=mlchaos,mlchaos.dev/lease=mlchaos-old"
    kubectl("create", "configmap", "old", "-n", namespace)
    kubectl("label", "configmap", "old", "-n", namespace, *labels.split(","))
    kubectl("create", "configmap", "theirs", "-n", namespace)

    code, out, _ = line("clean", "--dry-run", "--namespace", namespace, "--output", "json")
    told = json.loads(out)
    assert (code, told["clean"]) == (0, False)
    said = " ".join(r["what"] for r in told["rows"])
    for what in (left.id, "pod " + namespace + "/lost-", f"configmap {namespace}/old"):
        assert what in said
    assert {r["action"] for r in told["rows"]} == {"would mend", "would remove"}
    assert objects("leases", namespace), "a dry run changes nothing"

    code, out, err = line("clean", "--namespace", namespace, timeout=180)
    assert code == 0, out + err
    eventually(lambda: all(map(ready, pods(namespace, "app in (web,lost)"))), within=60)
    assert objects("leases", namespace, f"mlchaos.dev/lease={left.id}") == []
    assert {c["metadata"]["name"] for c in objects("configmaps", namespace)} >= {"theirs"}
    assert "old" not in {c["metadata"]["name"] for c in objects("configmaps", namespace)}
    for pod in objects("pods", namespace):
        assert "mlchaos.dev/lease" not in pod["metadata"].get("annotations", {})

    code, out, _ = line("clean", "--namespace", namespace)
    assert (code, out.strip().splitlines()[-1]) == (
        0,
        f"nothing to clean: nothing of any experiment is in namespace {namespace}",
    )


@pytest.mark.req("R0-10")
def test_what_a_live_run_holds_is_left_alone(
    line: CommandLine, namespace: str, ledger: ClusterLedger, faulting: Faulting, driver: KubernetesDriver
) -> None:
    deploy(namespace, replicas=2)
    lease = opened(ledger, faulting.lease("pod_failure", "app=web", count=1))
    driver.inject(lease)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.3):
            with contextlib.suppress(LeaseRefused):  # taken over at last
                ledger.renew(lease)

    owner = threading.Thread(target=live)
    owner.start()
    try:
        code, out, err = line("clean", "--namespace", namespace)
        assert code == 70, out + err
        assert f"lease {lease.id}" in out and "its run is alive" in out
        assert driver.active(lease).present
        code, out, err = line("clean", "--force", "--namespace", namespace)
        assert code == 0, out + err
        assert not driver.active(lease).present
    finally:
        over.set()
        owner.join()
        driver.recover(lease)
