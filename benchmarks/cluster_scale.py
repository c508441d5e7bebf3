"""A thousand pods and a hundred leases: what a large cluster costs us, with fake nodes and a real API server.

    KUBECONFIG=… python -m benchmarks.cluster_scale --kwok PATH [--pods 1000] [--leases 100]

The pods are kwok's (sigs.k8s.io/kwok: `go install sigs.k8s.io/kwok/cmd/kwok@v0.6.1`): objects without processes. Everything is
counted as calls to the API server as well as in seconds, since this API server is on the same two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.engine.sweep import RenewalObserver
from mlchaos_dagster.errors import LeaseRefused
from mlchaos_dagster.kube import leases as cluster_leases
from mlchaos_dagster.kube.client import Cluster

NAME = "mlchaos-scale"


def kubectl(*arguments: str, stdin: str = "") -> str:
    return subprocess.run(["kubectl", *arguments], input=stdin, text=True, capture_output=True, check=True).stdout


class Counted(Cluster):
    """The client, counting its calls."""

    calls = 0

    def _call(self, *arguments: Any, **options: Any) -> Any:
        Counted.calls += 1
        return super()._call(*arguments, **options)


def measured(what: str, work: Callable[[], Any], rows: list[dict[str, Any]]) -> Any:
    before, start = Counted.calls, time.monotonic()
    found = work()
    rows.append({"what": what, "seconds": round(time.monotonic() - start, 3), "calls": Counted.calls - before})
    print(f"{what:<58}{rows[-1]['seconds']:>8.2f} s {rows[-1]['calls']:>6} calls", flush=True)
    return found


@contextmanager
def fake_pods(kwok: str, kubeconfig: str, count: int) -> Iterator[None]:
    """A fake node with so many ready pods."""
    with tempfile.TemporaryDirectory() as scratch:
        log = (Path(scratch) / "kwok.log").open("wb")
        selector = "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake"
        process = subprocess.Popen([kwok, f"--kubeconfig={kubeconfig}", selector], stdout=log, stderr=log)
        try:
            kubectl("apply", "-f", "-", stdin=json.dumps(manifests(count)))
            end = time.monotonic() + 600
            while True:
                # Not Ready of the Deployment: a fake node that misses a beat makes its pods unready, and kwok leaves them so.
                found = kubectl("get", "pods", "-n", NAME, "--field-selector=status.phase=Running", "-o", "name")
                ready = len(found.splitlines())
                if ready == count:
                    break
                if time.monotonic() > end:
                    raise SystemExit(f"only {ready} of {count} fake pods are ready; see {log.name}")
                time.sleep(2)
            yield
        finally:
            kubectl("delete", "namespace", NAME, "--wait=false")
            kubectl("delete", "pods", "-n", NAME, "--all", "--force", "--grace-period=0")
            kubectl("delete", "nodes", "-l", "type=kwok", "--ignore-not-found")
            process.terminate()
            process.wait(10)


def manifests(count: int) -> dict[str, Any]:
    taint = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
    labels = {"app": "inference"}
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": f"kwok-{i}",
                "labels": {"type": "kwok"},
                "annotations": {"kwok.x-k8s.io/node": "fake"},
            },
            "spec": {"taints": [taint]},
            "status": {"allocatable": {"cpu": "64", "memory": "256Gi", "pods": "500"}, "capacity": {"cpu": "64", "memory": "256Gi", "pods": "500"}},
        }
        for i in range(count // 400 + 1)
    ]  # fmt: skip
    pod = {
        "nodeSelector": {"type": "kwok"},
        "tolerations": [{"operator": "Exists"}],  # also of a fake node whose heart a busy machine lets miss a beat
        "containers": [{"name": "web", "image": "fake"}],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME, "namespace": NAME},
        "spec": {
            "replicas": count,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    space = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAME, "labels": {"mlchaos.dev/allow": "true"}},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [space, *nodes, deployment]}


def lease(targets: tuple[str, ...], undo: dict[str, Any], kind: str) -> Lease:
    now = time.time()
    return Lease(
        id=f"mlchaos-scale-{uuid.uuid4().hex[:10]}",
        run_id=uuid.uuid4().hex,
        experiment="scale",
        environment="scale",
        driver="kubernetes",
        kind=kind,
        targets=targets,
        params={},
        undo=undo,
        duration_s=600.0,
        opened_wall=now,
        deadline_wall=now + 600.0,
        owner=current_owner(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kwok", required=True)
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument("--pods", type=int, default=1000)
    parser.add_argument("--leases", type=int, default=100)
    options = parser.parse_args()
    context = kubectl("config", "current-context").strip()
    rows: list[dict[str, Any]] = []
    with fake_pods(options.kwok, options.kubeconfig, options.pods):
        cluster = Counted(context, options.kubeconfig, timeout_s=20.0)
        about = Kubernetes(context=context, namespace=NAME, control_namespace=NAME)
        driver = KubernetesDriver.at(cluster, about)
        target = Target(select="app=inference")
        ids = measured(f"resolve {options.pods} pods", lambda: driver.resolve(target), rows)
        assert len(ids) == options.pods
        kind = "network_partition"
        measured("preflight, all of them", lambda: driver.preflight("pod_delete", ids, ids, {"interval_s": None, "signal": "kill"}, target=target), rows)  # fmt: skip
        undo = measured("undo data, all of them (pod_failure)", lambda: driver.undo("pod_failure", ids, {}, target=target, backup=Path("/nonexistent")), rows)  # fmt: skip
        ledger = cluster_leases.ClusterLedger(cluster, NAME, SystemClock())
        big = measured("open one lease on all of them", lambda: ledger.open(lease(ids, undo, "pod_failure")), rows)
        other = lease(ids[:1], undo, "pod_failure")

        def race() -> None:
            try:
                ledger.open(other)
            except LeaseRefused:
                return
            raise SystemExit("a held target was given away")

        measured("a second lease on one of them is refused", race, rows)
        measured("check it", lambda: ledger.check(big), rows)
        measured("close it", lambda: ledger.close(big, ("bench",)), rows)
        share = len(ids) // options.leases
        parts = [ids[i * share : (i + 1) * share] for i in range(options.leases)]
        small = measured(
            f"open {options.leases} leases of {share} pods",
            lambda: [ledger.open(lease(p, {"fault": {}}, kind)) for p in parts],
            rows,
        )
        watching = cluster_leases.ClusterLedger(cluster, NAME, SystemClock())
        observer = RenewalObserver(watching, SystemClock(), 15.0)
        tracemalloc.start()
        measured(f"read {options.leases} leases (sweeper's first look)", watching.leases, rows)
        measured("a look at their renewals", lambda: observer.look(watching.leases()), rows)
        print(f"{'memory of it, peak':<58}{tracemalloc.get_traced_memory()[1] / 2**20:>8.1f} MiB")
        tracemalloc.stop()
        measured(f"renew {options.leases} leases", lambda: [ledger.renew(x) for x in small], rows)
        measured(f"close {options.leases} leases", lambda: [ledger.close(x, ("bench",)) for x in small], rows)
    print(json.dumps({"pods": options.pods, "leases": options.leases, "rows": rows}))


if __name__ == "__main__":
    main()
