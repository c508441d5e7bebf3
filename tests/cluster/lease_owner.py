"""A run's process, as small as it can be: opens a lease in the cluster's ledger, makes the fault, renews until killed.

`python -m tests.cluster.lease_owner NAMESPACE CONTEXT KIND SELECT LEASE_ID [--hang]`; says `injected` when it has.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import StoreError
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.kube.leases import ClusterLedger

KINDS = {"scale_to_zero": "Deployment"}


def new_lease(driver: KubernetesDriver, kind: str, select: str, lease_id: str, duration_s: float = 300.0) -> Lease:
    """On all that match now."""
    target = Target.model_validate({"select": select, "kubernetes": {"kind": KINDS.get(kind, "Pod")}})
    ids = driver.resolve(target)
    assert ids and isinstance(target.kubernetes, KubernetesObjects)
    with tempfile.TemporaryDirectory() as backup:
        undo = driver.undo(kind, ids, {}, target=target, backup=Path(backup) / "b")
    now = time.time()
    return Lease(
        id=lease_id,
        run_id=f"run-{lease_id}",
        experiment="test",
        environment="test",
        driver="kubernetes",
        kind=kind,
        targets=ids,
        params={},
        undo=undo,
        duration_s=duration_s,
        opened_wall=now,
        deadline_wall=now + duration_s,
        owner=current_owner(),
    )


def main(namespace: str, context: str, kind: str, select: str, lease_id: str, *flags: str) -> None:
    cluster = Cluster(context, os.environ.get("MLCHAOS_TEST_OURS", ""))
    driver = KubernetesDriver.at(cluster, Kubernetes(context=context, namespace=namespace, control_namespace=namespace))
    ledger = ClusterLedger(cluster, namespace, SystemClock())
    lease = ledger.open(new_lease(driver, kind, select, lease_id))
    driver.inject(replace(lease, token=lease.token))
    sys.stdout.write("injected\n")
    sys.stdout.flush()
    while True:
        if "--hang" not in flags:
            try:
                ledger.renew(lease)
            except StoreError as e:
                sys.stdout.write(f"{type(e).__name__}: {e}\n")
                sys.stdout.flush()
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
