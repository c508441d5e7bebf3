"""The kill matrix on a cluster: kill what a run stands on at a random moment of its window; what is left behind?

    KUBECONFIG=… python -m benchmarks.cluster_kills [--rounds 2] [--victims V…] [--faults F…] [--out FILE]

Each trial is the real command line on a small Deployment in a namespace of its own, with a sweeper of its own. The observer
shares no code with us: objects as `kubectl get` shows them; processes, netfilter rules and the model's file of the pods as the
machine under them shows them (without access to it, objects only). Node victims need `MLCHAOS_CLUSTER` with a command `node`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kills import watchdogs
from tests.cluster import machines
from tests.cluster.conftest import SERVER, TARGET_IMAGE, eventually, kubectl, objects, pods, ready
from tests.cluster.surroundings import CommandLine, environment
from tests.cluster.test_sweeper import heart, install

ON_THE_MACHINE = ("run", "watchdog", "run and watchdog", "sweeper")
ON_A_NODE = ("kubelet", "node")
VICTIMS = (*ON_THE_MACHINE, *ON_A_NODE)
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pod_failure": ("web", {}),
    "network_latency": ("web", {"latency": "100ms"}),
    "network_partition": ("web", {}),
    "cpu_stress": ("web", {"cores": 1, "load": "50%"}),
    "memory_stress": ("web", {"size": "20Mi"}),
    "container_kill": ("web", {}),
    "scale_to_zero": ("workload", {}),
    "model_corruption": ("model", {}),
    "node_drain": ("node", {}),
}
"""Kind → target, parameters."""
MODEL = "/scratch/model.bin"
REPLICAS = 2
WINDOW_S = 20.0
TTL_S = 6.0
CLEAN_WITHIN_S = 120.0
ALONE = ("run", "run and watchdog")
"""With these the run is over; else it goes on or aborts, and is clean when it has ended."""


@dataclass
class Trial:
    """One kill."""

    victim: str
    fault: str
    on: list[str]
    """What the observer saw of the fault before the kill."""
    clean_s: float | None
    """Kill → no part of the fault is seen any more; None: not in time."""
    bare_s: float | None = None
    """Kill → no helper of it runs any more, either: agents answer for a while after their fault is over."""
    left: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    """What was seen last."""
    exit_code: int | None = None
    said: str = ""
    skipped: str = ""


# -- the observer ------------------------------------------------------------------------------------------------------


def processes(uid: str) -> list[int]:
    """Pids of a pod's processes on this machine (nodes of the tests run on it), by their cgroup."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            said = entry.read_text()
            if uid in said or uid.replace("-", "_") in said:
                found.append(int(entry.parent.name))
    return found


def in_the_pod(pod: dict[str, Any]) -> Iterator[str]:
    """What of ours is in a pod: processes, netfilter rules, a changed file."""
    name, rules = pod["metadata"]["name"], False
    for pid in processes(pod["metadata"]["uid"]):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "mlchaos" in words:
                yield f"{name}: process {words[:90]}"
            if not rules:
                rules = True
                said = subprocess.run(
                    ["nsenter", f"--net=/proc/{pid}/ns/net", "iptables-save"],
                    capture_output=True, text=True, check=False, timeout=20,
                ).stdout  # fmt: skip
                if lines := [x for x in said.splitlines() if "mlchaos" in x.lower() or "NFQUEUE" in x]:
                    yield f"{name}: netfilter {lines[0][:60]}"
            model = Path(f"/proc/{pid}/root{MODEL}")
            if b"http.server" in Path(f"/proc/{pid}/cmdline").read_bytes() and (
                not model.exists() or hashlib.sha256(model.read_bytes()).hexdigest() != MODEL_SHA
            ):
                yield f"{name}: {MODEL} is changed"


def wrong(namespace: str, node: str) -> list[str]:
    """Everything of a fault that is to be seen."""
    kinds = "pods,deployments,leases,secrets,jobs,networkpolicies,configmaps"
    found: list[str] = []
    for one in json.loads(kubectl("get", kinds, "-n", namespace, "-o", "json"))["items"]:
        meta, kind = one["metadata"], one["kind"]
        if lease := meta.get("annotations", {}).get("mlchaos.dev/lease") or meta.get("labels", {}).get(
            "mlchaos.dev/lease"
        ):
            found.append(f"{kind} {meta['name']}: lease {lease}")
        if kind == "Deployment" and meta["name"] == "web" and one["spec"]["replicas"] != REPLICAS:
            found.append(f"{kind} web: {one['spec']['replicas']} replicas")
        if kind == "Pod":
            for helper in one.get("status", {}).get("ephemeralContainerStatuses", []):
                if "running" in helper.get("state", {}) and not meta.get("deletionTimestamp"):
                    found.append(f"{kind} {meta['name']}: container {helper['name']} runs")
            if meta.get("labels", {}).get("app") == "web":
                found += in_the_pod(one)
    if node:
        one = machines.found(node)
        if one["spec"].get("unschedulable") or "mlchaos.dev/lease" in str(one["metadata"]):
            found.append(f"Node {node}: cordoned")
    return found


def idle(seen: list[str]) -> bool:
    """Whether there are but helpers without a fault."""
    return all(" runs" in x or ("process " in x and "agent.network" in x) for x in seen)


def shows_effect(seen: list[str], fault: str) -> bool:
    """A lease, and more than its own objects: helpers look at a pod before there is a fault in it, too."""
    effect = [x for x in seen if not x.startswith(("Lease", "Secret", "ConfigMap"))]
    if fault == "container_kill":  # over as soon as it is made
        return bool(seen)
    if fault == "model_corruption":
        effect = [x for x in effect if x.endswith("is changed")]
    return bool(effect) and any(x.startswith("Lease") for x in seen)


# -- the surroundings --------------------------------------------------------------------------------------------------

_PREPARE = f"import random\nopen({MODEL!r}, 'wb').write(random.Random(1).randbytes(100_000))\n"
MODEL_SHA = hashlib.sha256(random.Random(1).randbytes(100_000)).hexdigest()


def deploy(namespace: str, node: str, *, only: bool) -> None:
    """The target, with a file, on a node."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    prefer = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term}]}
    require = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1, "failureThreshold": 2, "timeoutSeconds": 3}
    container = {
        "name": "web", "image": TARGET_IMAGE, "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", _PREPARE + SERVER], "readinessProbe": probe,
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"cpu": "200m", "memory": "128Mi"}},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }  # fmt: skip
    pod = {
        "containers": [container], "volumes": [{"name": "scratch", "emptyDir": {}}], "terminationGracePeriodSeconds": 2,
        "tolerations": machines.TOLERATES, "affinity": {"nodeAffinity": require if only else prefer},
    }  # fmt: skip
    labels = {"app": "web"}
    spec = {
        "replicas": REPLICAS,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    port = {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]}
    listed = [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": port},
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": listed})
    kubectl("apply", "-n", namespace, "-f", "-", stdin=text)


class Place:
    """A namespace with a sweeper and the target; one lane of trials."""

    def __init__(self, root: Path, node: str, *, added: bool) -> None:
        self.root, self.node, self.added = root, node, added
        self.namespace = f"mlchaos-kills-{uuid.uuid4().hex[:8]}"
        self.context = kubectl("config", "current-context").strip()
        kubectl("create", "namespace", self.namespace)
        kubectl("label", "namespace", self.namespace, "mlchaos.dev/allow=true")
        install(self.namespace)
        if added:
            machines.added(node, "local-c" if node == "node-3" else "local-b")
        # A node that is drained must be left by its pods; one that dies must have them again.
        deploy(self.namespace, node, only=added)
        kubectl("rollout", "status", "-n", self.namespace, "deployment", "--timeout=90s", timeout=100)
        eventually(lambda: heart(self.namespace), 60)
        address = objects("services", self.namespace)[0]["spec"]["clusterIP"]
        self.written = environment(
            self.namespace,
            self.context,
            os.environ["KUBECONFIG"],
            backends={"kubernetes": list(FAULTS)},
            kubernetes={"sweeper_ttl": f"{TTL_S:g}s"},
            targets={
                "web": {"select": "app=web"},
                "workload": {"select": "app=web", "kubernetes": {"kind": "Deployment"}},
                "model": {"select": "app=web", "kubernetes": {"path": MODEL}},
                "node": {
                    "select": f"kubernetes.io/hostname={node}",
                    "kubernetes": {"kind": "Node", "replicas": "app=web"},
                },
            },
            probe={"url": f"http://{address}/", "rate": 10, "timeout": "1s"},
            sampling={"baseline": "2s", "min_samples": 10, "recovery_timeout": "20s"},
            limits={"health_at_least": "10%"},
        )
        kubectl("label", "deployment", "web", "app=web", "-n", self.namespace)
        self.line = CommandLine(root, self.written, *map(self.experiment, FAULTS))

    def experiment(self, kind: str) -> dict[str, Any]:
        target, parameters = FAULTS[kind]
        return {
            "schema": "mlchaos/v1",
            "name": f"kill-{kind.replace('_', '-')}",
            "title": "Killed in its window",
            "hypothesis": "Nothing is left.",
            "area": "bench",
            "owner": "ml-platform@example.com",
            "target": target,
            "fault": {"kind": kind, **parameters},
            "blast_radius": {"count": 1},
            "duration": f"{WINDOW_S:g}s",
            "steady_state": [{"sli": "availability", "at_least": "1%"}],
            "recovery": {"within": "20s"},
        }

    def well(self) -> bool:
        """As a trial must find it."""
        found = pods(self.namespace, "app=web")
        placed = all(p["spec"].get("nodeName") == self.node for p in found)
        return len(found) == REPLICAS and all(map(ready, found)) and placed and bool(heart(self.namespace))

    def watched(self) -> list[str]:
        """What is wrong now."""
        return wrong(self.namespace, self.node if self.added else "")

    def close(self) -> None:
        kubectl("delete", "namespace", self.namespace, "--wait=false", check=False)
        for kind in ("clusterrole", "clusterrolebinding"):
            names = [x["metadata"]["name"] for x in objects(kind, "", "app.kubernetes.io/managed-by=mlchaos")]
            mine = [n for n in names if n.endswith(self.namespace)]
            kubectl("delete", kind, *mine, "--ignore-not-found", check=False)
        if self.added:
            machines.node("remove", self.node)


# -- the kills ---------------------------------------------------------------------------------------------------------


def kubelet_of(node: str) -> int:
    """Pid of a further node's kubelet, by its command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"kubelet" in words[1:2] and f"--hostname-override\0{node}".encode() in entry.read_bytes():
                return int(entry.parent.name)
    raise RuntimeError(f"no kubelet of {node} runs on this machine")


def kill(place: Place, victim: str, run: subprocess.Popen[bytes], rng: random.Random) -> None:
    """SIGKILL, or the plug; what does not come back by itself is brought back."""
    if "watchdog" in victim:
        for pid in watchdogs(place.line.home):
            os.kill(pid, signal.SIGKILL)
    if victim.startswith("run"):
        run.kill()
    if victim == "sweeper":
        selector = "app.kubernetes.io/name=mlchaos-sweeper"
        kubectl("delete", "pod", "-n", place.namespace, "-l", selector, "--grace-period=0", "--force")
    if victim == "kubelet":
        pid = kubelet_of(place.node)
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        os.kill(pid, signal.SIGKILL)
        time.sleep(rng.uniform(0.5, 12))
        subprocess.Popen(
            [machines.command(), "exec", place.node, "setsid", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    if victim == "node":
        machines.node("kill", place.node)
        time.sleep(rng.uniform(0, 25))
        machines.switched_on(place.node)


def trial(place: Place, victim: str, fault: str, rng: random.Random) -> Trial:
    """Start a run, wait until its fault is seen, kill, wait until nothing is wrong and the run is over."""
    eventually(place.well, 180, 1.0)
    assert not (before := place.watched()), before
    log = place.line.home / "run.log"
    start = log.stat().st_size if log.exists() else 0
    run = place.line.start("run", f"kill-{fault.replace('_', '-')}")
    said = ""
    try:
        on: list[str] = []
        while run.poll() is None and not shows_effect(on := place.watched(), fault):
            time.sleep(0.5)
        if run.poll() is not None:
            said = words(log, start)
            return Trial(victim, fault, [], None, skipped=f"exit {run.returncode}: {said}", said=said)
        time.sleep(rng.uniform(0, 6))
        killed = time.monotonic()
        kill(place, victim, run, rng)
        clean_s, bare_s, left, lasting = None, None, ["not looked"], list[str]()
        last = last_fault = killed
        while time.monotonic() < killed + CLEAN_WITHIN_S:
            left, now = place.watched(), time.monotonic()
            if left:
                last, lasting = now, left
            if not idle(left):
                last_fault = now
            elif not left and (victim in ALONE or run.poll() is not None):
                clean_s, bare_s = last_fault - killed, last - killed
                break
            time.sleep(0.7)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(60)
        if run.poll() is None:
            left = [*left, "the run hangs"]
        said = words(log, start)
    finally:
        if run.poll() is None:
            run.kill()
        run.wait()
    # What the state directory of a killed run still owes is closed by hand, as a person would.
    place.line("recover")
    return Trial(victim, fault, on, clean_s, bare_s, left, lasting, run.returncode, said)


def words(log: Path, start: int) -> str:
    """The end of what a run said."""
    return " ".join(log.read_bytes()[start:].decode(errors="replace").split())[-400:]


def table(results: list[Trial]) -> str:
    """Fault × victim: trials, left behind, seconds until clean (median, longest)."""
    lines = ["| fault | " + " | ".join(VICTIMS) + " |", "|---|" + "---|" * len(VICTIMS)]
    for fault in FAULTS:
        cells: list[str] = []
        for victim in VICTIMS:
            rows = [r for r in results if (r.fault, r.victim) == (fault, victim) and not r.skipped]
            times = sorted(r.clean_s for r in rows if r.clean_s is not None)
            left = sum(bool(r.left) for r in rows)
            took = f"{statistics.median(times):.1f} s (max {times[-1]:.1f})" if times else "never"
            cells.append(f"{left}/{len(rows)} left, {took}" if rows else "–")
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(f"trials {sum(not r.skipped for r in results)}, left behind {sum(bool(r.left) for r in results)}")
    lines += [f"LEFT {r.victim} × {r.fault}: {r.left} (run: {r.exit_code}, {r.said[-160:]})" for r in results if r.left]
    lines += [f"no trial {r.victim} × {r.fault}: {r.skipped}" for r in results if r.skipped]
    return "\n".join(lines)


class Lane:
    """Trials one after the other in one place, until the end."""

    def __init__(self, node: str, added: bool, jobs: list[tuple[str, str]], seed: int, until: float) -> None:
        self.node, self.added, self.jobs, self.until = node, added, jobs, until
        self.rng, self.results = random.Random(seed), list[Trial]()

    def run(self, out: Path | None) -> None:
        root = Path(tempfile.mkdtemp(prefix="mlchaos-kills-"))
        place = Place(root, self.node, added=self.added)
        try:
            for victim, fault in self.jobs:
                if time.monotonic() > self.until:
                    break
                try:
                    done = trial(place, victim, fault, self.rng)
                except (AssertionError, subprocess.SubprocessError) as e:
                    done = Trial(victim, fault, [], None, skipped=f"{type(e).__name__}: {e}"[:300])
                    with contextlib.suppress(AssertionError):  # an outage must not use up the other trials
                        eventually(lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok", 180, 2.0)
                self.results.append(done)
                line = json.dumps(asdict(done))
                print(line, flush=True)
                if out:
                    with out.open("a") as f:
                        f.write(line + "\n")
        finally:
            place.close()
            shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    """Run the matrix; exit 1 when anything was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="trials of each cell")
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins later")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--node", default="node-2", help="name of the further node")
    parser.add_argument("--out", type=Path, help="every trial as a JSON line")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    rng, until = random.Random(args.seed), time.monotonic() + args.minutes * 60
    cells = [(v, f) for v in args.victims for f in args.faults]
    here: list[tuple[str, str]] = []
    there: list[tuple[str, str]] = []
    for _ in range(args.rounds):
        for victim, fault in rng.sample(cells, len(cells)):
            (there if victim in ON_A_NODE or fault == "node_drain" else here).append((victim, fault))
    lanes = [Lane("node-1", False, here, args.seed, until), Lane(args.node, True, there, args.seed + 1, until)]
    threads = [threading.Thread(target=lane.run, args=(args.out,)) for lane in lanes if lane.jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [r for lane in lanes for r in lane.results]
    print(table(results))
    return 1 if any(r.left for r in results) or not results else 0


if __name__ == "__main__":
    sys.exit(main())
