"""The requirement rows on a cluster, each as it is and with the mechanism it validates taken away.

    KUBECONFIG=… python -m benchmarks.cluster_rows [--only ROW…] [--out FILE]

On the platform of `make cluster`, R0-07 on manifests/rollouts as docs/rollouts.md sets it up; a mechanism is taken away by an overlay and
brought back by the manifests themselves.
With its mechanism an experiment is HELD; without it, it deviates (or is refused, where that is the mechanism's point).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Place(NamedTuple):
    """Where the experiments of a row run."""

    manifests: str
    namespace: str
    environment: str


PLATFORM = Place("manifests/platform", "mlplatform", "cluster")
ELSEWHERE = {"R0-07": Place("manifests/rollouts", "mlrollouts", "rollouts")}
"""Of rows that are not the platform's."""
CELLS: list[tuple[str, str, str]] = [
    ("R1-01", "serving-pod-failure", ""),
    ("R1-01", "serving-pod-failure", "teeth/one-replica"),
    ("R1-01", "serving-half-killed", ""),
    ("R1-02", "tracking-database-latency", ""),
    ("R1-03", "workflow-tracking-partition", ""),
    ("R1-03", "workflow-tracking-partition", "pipeline/teeth/no-breaker"),
    ("R1-04", "serving-cpu-stress", ""),
    ("R1-04", "serving-cpu-stress", "teeth/no-hpa"),
    ("R1-05", "serving-memory-stress", ""),
    ("R1-05", "serving-memory-stress", "teeth/no-limit"),
    ("R0-02", "training-pod-delete", ""),
    ("R0-04", "inference-latency", ""),
    ("R2-03", "feature-store-delay", ""),
    ("R0-07", "canary-bad-model", ""),
    ("R0-07", "canary-bad-model", "teeth/no-analysis"),
]
"""Row, experiment, overlay without the mechanism (empty: the platform as it is)."""
ENDS = {"teeth/no-limit": ("REFUSED",)}
"""What must come of it where that is not DEVIATED (or ABORTED, by a limit that the missing mechanism should have kept)."""


def kubectl(*arguments: str) -> str:
    return subprocess.run(["kubectl", *arguments], text=True, capture_output=True, check=True, cwd=ROOT).stdout


def settle(place: Place) -> None:
    """Everything is rolled out, and no autoscaler is still taking away what it added: that would hit a target by chance."""
    if place is not PLATFORM:
        kubectl(
            "wait",
            "-n",
            place.namespace,
            "rollout",
            "--all",
            "--for=jsonpath={.status.phase}=Healthy",
            "--timeout=240s",
        )
        return
    kubectl("rollout", "status", "-n", place.namespace, "deployment", "--timeout=240s")
    end = time.monotonic() + 180
    while time.monotonic() < end:
        scalers = json.loads(kubectl("get", "hpa", "-n", place.namespace, "-o", "json"))["items"]
        if all(s["status"].get("currentReplicas") == s["spec"]["minReplicas"] for s in scalers):
            return
        time.sleep(2)


def run(home: str, experiment: str, environment: str) -> dict[str, Any]:
    words = ["--home", home, "run", experiment, "-e", environment, "--output", "json"]
    command = [sys.executable, "-m", "mlchaos_dagster.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return found[-1] if found else {"outcome": f"exit {done.returncode}", "reasons": [done.stderr.strip()[-300:]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--teeth", action="store_true", help="only the cells without a mechanism")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mlchaos-rows-") as home:
        for row, experiment, overlay in CELLS:
            if options.only and row not in options.only or options.teeth and not overlay:
                continue
            place = ELSEWHERE.get(row, PLATFORM)
            if overlay:
                kubectl("apply", "-k", f"{place.manifests}/{overlay}")
            settle(place)
            try:
                found = run(home, experiment, place.environment)
            finally:
                if overlay:
                    kubectl("apply", "-k", place.manifests)
                    settle(place)
            right = found["outcome"] in (ENDS.get(overlay, ("DEVIATED", "ABORTED")) if overlay else ("HELD",))
            rows.append({"row": row, "experiment": experiment, "overlay": overlay, "right": right, "run": found})
            shown = (overlay or "as it is").rpartition("/")[2]
            said = "; ".join(found.get("reasons") or [])
            print(
                f"{'✔' if right else '✘'} {row:<6}{experiment:<30}{shown:<14}{found['outcome']:<13}{said}", flush=True
            )
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))
    print(f"{sum(not r['right'] for r in rows)} of {len(rows)} cells wrong")


if __name__ == "__main__":
    main()
