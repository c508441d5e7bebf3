"""Time to abort on a cluster: the decision → the fault proven gone, per native fault.

    KUBECONFIG=… python -m benchmarks.cluster_aborts [--n 20] [--kinds KIND…] [--out FILE]

Every trial is the engine with everything real behind it, on the platform of `make cluster`: guards, leases in both ledgers,
fault, a word to stop two seconds after it was made, recovery, proof. Afterwards everything that carries a label or mark of
ours is looked for, by a list that knows no ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from mlchaos_dagster import settings, wiring
from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import RunRecord
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.drivers.kubernetes import leftovers
from mlchaos_dagster.engine.run import run_experiment
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.kube.objects import items, mapping, part, text
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.settings import Home, Settings

FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pod_delete": ("prediction-service", {"interval": "5s"}),
    "pod_failure": ("prediction-service", {}),
    "container_kill": ("prediction-service", {}),
    "scale_to_zero": ("prediction-workload", {}),
    "network_latency": ("feature-store", {"latency": "200ms"}),
    "network_loss": ("feature-store", {"fraction": "20%"}),
    "network_partition": ("feature-store", {}),
    "network_isolation": ("prediction-service", {}),
    "dns_failure": ("orchestrator", {}),
    "cpu_stress": ("prediction-service", {"cores": 1, "load": "50%"}),
    "memory_stress": ("prediction-service", {"size": "20Mi"}),
    "model_corruption": ("model-file", {}),
}
"""Kind → target in the environment `cluster`, parameters."""
WEARING = frozenset({"inference", "gateway", "feature-store"})
"""`app` of the pods that these targets are."""


def experiment(kind: str) -> Experiment:
    target, parameters = FAULTS[kind]
    return Experiment.model_validate(
        {
            "schema": "mlchaos/v1",
            "name": f"abort-{kind.replace('_', '-')}",
            "title": "Stopped as soon as it is on",
            "hypothesis": "It is gone within seconds.",
            "area": "bench",
            "owner": "ml-platform@example.com",
            "target": target,
            "fault": {"kind": kind, **parameters},
            "blast_radius": {"count": 1},
            "duration": "60s",
            "steady_state": [{"sli": "availability", "at_least": "1%"}],
        }
    )


def surroundings(home: Path, kubeconfig: str, **kubernetes: Any) -> tuple[Settings, Environment]:
    found = settings.load()
    found = Settings(Home(home), "cluster", found.library, False, "bench", kubeconfig or found.kubeconfig)
    environment = Catalog(found.library).environment("cluster")
    cluster = environment.kubernetes
    assert cluster is not None
    changes: dict[str, Any] = {
        "duration_scale": 1.0,
        "kubernetes": cluster.model_copy(update=kubernetes),
        "sampling": environment.sampling.model_copy(
            update={"baseline": 3.0, "min_samples": 20, "recovery_timeout": 20.0}
        ),
        "error_budget": None,
        "limits": environment.limits.model_copy(update={"abort": (), "health_at_least": 0.5}),
    }
    return found, environment.model_copy(update=changes)


def trial(found: Settings, environment: Environment, kind: str) -> RunRecord:
    word = Word()
    run_id = f"bench-{uuid.uuid4().hex[:12]}"
    run = wiring.build_run(experiment(kind), environment, found, run_id=run_id, stops=[word], progress=word.told)
    return run_experiment(run)


class Word:
    """A stop source: somebody says stop two seconds after the fault was made."""

    def __init__(self) -> None:
        self.at = float("inf")

    def told(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "moment" and data["name"] == "injected":
            self.at = time.monotonic() + 2.0

    def requested(self) -> tuple[str, str] | None:
        return ("stop", "the bench says so") if time.monotonic() >= self.at else None


WORN_OUT = 2
"""A container that was restarted so often waits longer and longer for its next start: the bench takes a fresh pod."""


def settle(cluster: Cluster, namespace: str, timeout_s: float = 180.0) -> None:
    """Wait until every Deployment has all its replicas and every budget lets a pod go. Raises TimeoutError."""
    base = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    budgets = f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets"
    end, replaced = time.monotonic() + timeout_s, False
    while True:
        short = [
            text(d, "metadata", "name")
            for d in cluster.list(base)
            if part(d, "status", "readyReplicas") != part(d, "spec", "replicas")
            or part(d, "status", "unavailableReplicas")
        ]
        short += [
            text(b, "metadata", "name") for b in cluster.list(budgets) if not part(b, "status", "disruptionsAllowed")
        ]
        if not short and replaced:
            return
        if not replaced:
            replaced = True
            for pod in cluster.list(collection("pod", namespace)):
                counts = [int(part(c, "restartCount") or 0) for c in items(pod, "status", "containerStatuses")]
                if max(counts, default=0) >= WORN_OUT and mapping(pod, "metadata", "labels").get("app") in WEARING:
                    cluster.delete(collection("pod", namespace) + "/" + text(pod, "metadata", "name"))
        if time.monotonic() > end:
            raise TimeoutError(f"not ready: {', '.join(short)}")
        time.sleep(0.5)


def seconds(record: RunRecord) -> dict[str, float | None]:
    at = {m.name: m.t for m in reversed(record.moments)}
    injected = at.get("injected", 0.0) - at["inject_requested"] if "inject_requested" in at else None
    return {"inject_s": injected, "abort_s": record.abort.seconds if record.abort else None}


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, round(q * (len(values) - 1)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", default=list(FAULTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mlchaos-aborts-") as scratch:
        found, environment = surroundings(Path(scratch), "")
        assert environment.kubernetes is not None
        cluster = Cluster(environment.kubernetes.context, found.kubeconfig)
        for kind in options.kinds:
            aborts: list[float] = []
            injects: list[float] = []
            wrong: list[str] = []
            while len(aborts) < options.n and len(wrong) < options.n:
                settle(cluster, environment.kubernetes.namespace)
                record = trial(found, environment, kind)
                took = seconds(record)
                mine = record.fault.lease_id if record.fault else "none"
                # A helper answers 15 s longer; what others do in this cluster is theirs.
                left = [o.shown for o in leftovers.find(cluster) if o.lease == mine and o.how != "helper"]
                proven = record.clean is not None and record.clean.proven
                if took["abort_s"] is None or not proven or left:
                    refused = [f"{g.name}: {g.saw}" for g in record.guards if not g.passed]
                    wrong.append("; ".join(refused or left or [str(record.abort or record.error or "no abort")]))
                    print(f"{kind}: {wrong[-1]}", file=sys.stderr, flush=True)
                    continue
                aborts.append(took["abort_s"])
                injects.append(took["inject_s"] or 0.0)
            row = {"n": len(aborts), "wrong": wrong}
            if aborts:
                row |= {"p50": statistics.median(aborts), "p95": quantile(aborts, 0.95), "max": max(aborts)}
                row |= {"inject_p50": statistics.median(injects), "inject_p95": quantile(injects, 0.95)}
            kinds[kind] = row
            shown = "  ".join(f"{k} {v:.2f} s" for k, v in row.items() if isinstance(v, float))
            print(f"{kind:<20}n {row['n']:<4}{shown}  wrong {len(wrong)}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(kinds, indent=1))


if __name__ == "__main__":
    main()
