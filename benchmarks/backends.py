"""The same experiments through every backend of a cluster, side by side: outcome, effect, time to abort.

    KUBECONFIG=… python -m benchmarks.backends [--backends kubernetes chaos_mesh litmus] [--litmus DIR] [--out FILE]

One service in a namespace of its own, three experiments, one environment in which every backend serves them all; what differs
between two columns is `mlchaos run … --backend NAME` and nothing else. Each experiment runs once over its window, and once more
until it is stopped (`mlchaos stop`) a second after its fault was seen. Litmus's operator is the one that `MLCHAOS_LITMUS` names, or the
stand-in of the tests (`tests/cluster/litmus_place.py`), on the CRDs and ChaosExperiments of `--litmus` (a folder with `crds` and `faults`);
Chaos Mesh is the real one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlchaos_dagster.kube.client import Cluster
from tests.cluster import litmus_place
from tests.cluster.conftest import HELPER_IMAGE, eventually, kubectl, objects
from tests.cluster.surroundings import EXPERIMENT, CommandLine, environment
from tests.cluster.test_sweeper import grant, heart, install

WINDOW = "15s"
"""Of the run that is judged."""
STOP_AFTER_S = 1.0
"""From the first sight of the fault to the word to stop it."""
KINDS = ["pod_delete", "network_partition", "cpu_stress"]
SERVER = """
import http.server, os, signal, sys, urllib.request
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
address = os.environ.get("BEHIND_SERVICE_HOST") if os.environ.get("ASKS") else None
behind = address and f"http://{address}/"
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        code, body = 200, b"ok"
        if self.path == "/work":
            sum(i * i for i in range(5_000))
            try:
                behind and urllib.request.urlopen(behind, timeout=1.0).read()
            except OSError:
                code, body = 503, b"nobody behind"
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8080), Answer).serve_forever()
"""
"""Every request computes a little and asks the service behind: so each of the faults is felt by who asks."""


def experiments() -> list[dict[str, Any]]:
    """One of three pods is hit; what is promised is kept by the other two or not, which is the backends' to agree on."""
    common = {**EXPERIMENT, "duration": "60s", "blast_radius": {"count": 1}, "recovery": {"within": "30s"}}
    kept = [{"sli": "availability", "at_least": "60%"}]
    return [
        {
            **common,
            "name": "pod-gone",
            "title": "One pod is deleted",
            "fault": {"kind": "pod_delete"},
            "steady_state": kept,
        },
        {
            **common,
            "name": "cut-off",
            "title": "One pod no longer reaches the service behind",
            "target": "behind",
            "fault": {"kind": "network_partition"},
            "steady_state": [{"sli": "availability", "at_least": "90%"}],
        },
        {
            **common,
            "name": "busy",
            "title": "One pod's processor is taken",
            "fault": {"kind": "cpu_stress", "cores": 1, "load": "100%"},
            "steady_state": kept,
        },
    ]


def deployment(name: str, replicas: int, env: dict[str, str]) -> list[dict[str, Any]]:
    """A Deployment and its Service."""
    container = {
        "name": "web",
        "image": HELPER_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", SERVER],
        "env": [{"name": k, "value": v} for k, v in env.items()],
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1, "timeoutSeconds": 3},
        "resources": {
            "requests": {"cpu": "20m", "memory": "48Mi"},
            "limits": {"cpu": "300m", "memory": "192Mi"},
        },
    }
    labels = {"app": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 2}}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": pod}
    port = {"type": "NodePort", "selector": labels, "ports": [{"port": 80, "targetPort": 8080}]}
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": port},
    ]


@contextlib.contextmanager
def place() -> Iterator[str]:
    """A namespace that opted in, with the service and a sweeper in it."""
    name = f"mlchaos-bench-{uuid.uuid4().hex[:6]}"
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, "mlchaos.dev/allow=true", "mlchaos.dev/test=true")
        things = [*reversed(deployment("behind", 1, {})), *deployment("web", 3, {"ASKS": "behind"})]
        kubectl("apply", "-n", name, "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": things}))
        ready(name)
        install(name)
        kubectl("rollout", "status", "-n", name, "deployment/mlchaos-sweeper", "--timeout=120s", timeout=130)
        eventually(lambda: heart(name), 60)
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false", check=False)
        for kind in ("clusterrole", "clusterrolebinding"):
            ours = [x["metadata"]["name"] for x in objects(kind, "", "app.kubernetes.io/managed-by=mlchaos")]
            if mine := [n for n in ours if n.endswith(name)]:
                kubectl("delete", kind, *mine, "--ignore-not-found", check=False)


def ready(namespace: str) -> None:
    """All of the service is there again."""
    for name in ("web", "behind"):
        kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=120s", timeout=130)


def written(
    namespace: str, context: str, kubeconfig: str, backends: list[str], changes: dict[str, Any]
) -> dict[str, Any]:
    """The environment: every backend serves every kind."""
    found = environment(namespace, context, kubeconfig, probe={"url": f"{{service:{namespace}/web:80}}/work"})
    found["backends"], found["prefer"] = {b: KINDS for b in backends}, backends[0]
    found["targets"]["behind"] = {"select": "app=web->app=behind"}
    found["probe"] |= {"rate": 10}
    found["sampling"] |= {"baseline": "8s", "min_samples": 50}
    found["slis"]["error_rate"] = {"measure": "error_rate"}
    found["kubernetes"] |= changes
    return found


def judged(line: CommandLine, name: str, backend: str) -> dict[str, Any]:
    """One run over its window."""
    code, out, err = line("run", name, "--backend", backend, "--duration", WINDOW, "--output", "json", timeout=300)
    found = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
    return found[-1] if found else {"outcome": f"exit {code}", "reasons": [err.strip()[-300:]]}


def stopped(line: CommandLine, name: str, backend: str) -> dict[str, Any]:
    """One run that is stopped once its fault is seen; the run's own account, and how long the word took as a command."""
    words = line.words("run", name, "--backend", backend, "--output", "json")
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout and run.stderr
    out: list[str] = []
    reader = threading.Thread(target=lambda: out.extend(run.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    took, told = None, list[str]()
    for said in run.stderr:  # plain lines of progress
        told.append(said)
        if took is None and " s confirmed" in said:
            time.sleep(STOP_AFTER_S)  # the fault is to be on for a while, which is what is measured
            began = time.monotonic()
            line("stop", name, timeout=120)
            took = time.monotonic() - began
    run.wait(300)
    reader.join(10)
    found = [json.loads(x) for x in out if x.startswith("{")]
    last = found[-1] if found else {"outcome": f"exit {run.returncode}", "reasons": ["".join(told)[-300:]]}
    return {**last, "stop_s": took}


def effect(run: dict[str, Any], sli: str, unit: str) -> str:
    """`−33.2 pp [−36.0, −30.1]`."""
    of = run.get("slis", {}).get(sli) or {}
    factor = {"pp": 100.0, "ms": 1000.0}[unit]
    if of.get("effect") is None:
        return "–"
    ends = [of["ci_low"], of["ci_high"]]
    interval = "" if None in ends else " [{:+.1f}, {:+.1f}]".format(*(e * factor for e in ends))
    return f"{of['effect'] * factor:+.1f} {unit}{interval}".replace("-", "−")


def table(rows: list[dict[str, Any]]) -> str:
    """Experiment × backend."""
    head = (
        "experiment",
        "backend",
        "outcome",
        "availability",
        "p95",
        "injected → seen",
        "stop → clean",
        "`mlchaos stop`",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        run, stop = row["run"], row["stop"]
        abort = (stop.get("abort") or {}).get("seconds")
        clean = all((r.get("clean") or {}).get("proven") for r in (run, stop))
        cells = (
            row["experiment"],
            row["backend"],
            run["outcome"] + ("" if clean else " NOT CLEAN"),
            effect(run, "availability", "pp"),
            effect(run, "latency_p95", "ms"),
            "–" if row["seen_s"] is None else f"{row['seen_s']:.1f} s",
            f"{stop['outcome']}, no time" if abort is None else f"{abort:.2f} s",
            "–" if stop.get("stop_s") is None else f"{stop['stop_s']:.1f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def left_behind(namespace: str, backends: list[str]) -> list[str]:
    """Objects of any lease that are still there, as kubectl sees them."""
    kinds = ["leases", "networkpolicies", "jobs", "secrets"]
    kinds += ["podchaos", "networkchaos", "stresschaos"] if "chaos_mesh" in backends else []
    kinds += ["chaosengines", "chaosresults"] if "litmus" in backends else []
    return kubectl("get", ",".join(kinds), "-n", namespace, "-l", "mlchaos.dev/lease", "-o", "name").split()


def seen_s(run: dict[str, Any]) -> float | None:
    """From the word to inject to the first sight of the effect, from the record."""
    path = run.get("record_path")
    if not path or not Path(path).is_file():
        return None
    moments = {m["name"]: m["t"] for m in reversed(json.loads(Path(path).read_text())["record"]["moments"])}
    return moments["confirmed"] - moments["inject_requested"] if "confirmed" in moments else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["kubernetes", "chaos_mesh", "litmus"])
    parser.add_argument("--only", nargs="*", default=[], help="names of experiments")
    parser.add_argument("--litmus", type=Path, default=litmus_place.DATA, help="folder with crds and faults")
    parser.add_argument("--out", type=Path, help="every run as JSON")
    options = parser.parse_args()
    context = kubectl("config", "current-context").strip()
    kubeconfig = os.environ["KUBECONFIG"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mlchaos-backends-") as root, contextlib.ExitStack() as stack:
        namespace = stack.enter_context(place())
        changes: dict[str, Any] = {}
        for tool in {"litmus", "chaos_mesh"} & set(options.backends):
            grant(namespace, tool)
        if "litmus" in options.backends:
            litmus_place.install_crds(options.litmus)
            stack.enter_context(litmus_place.installed(namespace, Cluster(context, kubeconfig), options.litmus))
            changes["litmus"] = litmus_place.options(namespace)
        spec = written(namespace, context, kubeconfig, options.backends, changes)
        line = CommandLine(Path(root), spec, *experiments())
        for name in [e["name"] for e in experiments() if not options.only or e["name"] in options.only]:
            for backend in options.backends:
                ready(namespace)
                run = judged(line, name, backend)
                seen = seen_s(run)
                ready(namespace)
                stop = stopped(line, name, backend)
                rows.append({"experiment": name, "backend": backend, "seen_s": seen, "run": run, "stop": stop})
                print(
                    f"{name} {backend}: {run['outcome']}: {'; '.join(run.get('reasons') or [])}",
                    file=sys.stderr,
                    flush=True,
                )
                if options.out:
                    options.out.write_text(json.dumps(rows, indent=1))
        left = left_behind(namespace, options.backends)
    print(table(rows))
    print(f"\nleft behind: {', '.join(left) or 'nothing'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
