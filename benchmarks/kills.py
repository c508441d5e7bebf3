"""The kill matrix: SIGKILL any of our processes at a random moment of a real run; what is left behind?

    python -m benchmarks.kills [--trials 100] [--lanes 2] [--seed 1]

Each trial runs the real command line on a real sandbox, kills its victim, and lets an observer that
shares no code with us wait until nothing of the fault is left. Victims: the run itself, its watchdog,
both at once, the platform's supervisor; and the run is frozen (SIGSTOP) past its lease.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from benchmarks.observer import Observer, alive
from mlchaos_dagster.catalog import SHIPPED

VICTIMS = ("run", "watchdog", "run and watchdog", "supervisor", "run frozen")
FAULTS = {
    "serving-pod-failure": "pod_failure",
    "feature-store-delay": "network_latency",
    "feature-store-partition": "network_partition",
    "serving-pod-delete": "pod_delete",
    "serving-container-kill": "container_kill",
    "serving-memory-stress": "memory_stress",
    "serving-cpu-stress": "cpu_stress",
    "model-file-corruption": "model_corruption",
    "model-artifact-corruption": "model_corruption",
    "bad-model-promotion": "bad_model",
    "chaotic-model-version": "model_chaos",
    "feature-drift": "feature_drift",
    "feature-nulls": "feature_nulls",
    "feature-stale": "feature_stale",
    "training-pod-delete": "pod_delete",
    "training-data-corruption": "s3_object_corruption",
    "object-store-unavailable": "s3_unavailable",
    "object-store-slow": "s3_slow",
    "object-store-throttled": "s3_throttled",
    "tracking-database-corruption": "database_corruption",
    "tracking-database-unavailable": "database_unavailable",
    "queue-overflow": "queue_overflow",
    "edge-certificate-rotation": "certificate_rotation",
    "edge-credential-rotation": "credential_rotation",
    "compromised-replica-isolation": "network_isolation",
}
"""Experiment → its fault kind: every kind has at least one."""
WITHOUT_DEADLINE = {
    "s3_object_corruption",
    "model_corruption",
    "bad_model",
    "feature_drift",
    "feature_nulls",
    "feature_stale",
    "database_corruption",
}
"""Faults on content: nothing ends them but the run, its watchdog or a sweep. With both dead, `mlchaos recover` is the proof."""
WINDOW_S = 4.0
CLEAN_WITHIN_S = 90.0
"""Only a bound: how long it took is what is told."""


@dataclass
class Trial:
    """One kill."""

    victim: str
    experiment: str
    moment: str
    """`window` or `anywhere`."""
    fault_was_on: bool
    clean_s: float | None
    """Kill → clean as seen from outside; None: not clean in time."""
    left: list[str]
    open_leases: int
    """After one `mlchaos recover`."""
    exit_code: int | None


def fast_library(directory: Path) -> Path:
    """A library with one environment, `fast`: the sandbox with short phases."""
    environment = yaml.safe_load((SHIPPED / "environments" / "sandbox.yaml").read_text())
    environment |= {"name": "fast", "duration_scale": 0.001, "duration_min": f"{WINDOW_S:g}s"}
    environment["sampling"] |= {"baseline": "2s", "min_samples": 40, "recovery_timeout": "10s"}
    environment["safety"] = {"lease_ttl": "3s", "deadline_grace": "2s", "confirm_within": "3s"}
    environment["error_budget"]["objective"] = "50%"  # a hundred trials would spend any real budget
    (directory / "environments").mkdir(parents=True, exist_ok=True)
    (directory / "environments" / "fast.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))
    return directory


def command(home: Path, library: Path, *arguments: str) -> list[str]:
    """The real command line."""
    return [
        sys.executable, "-m", "mlchaos_dagster.cli.main", "--home", str(home), "--library", str(library),
        "--environment", "fast", *arguments,
    ]  # fmt: skip


def watchdogs(home: Path) -> list[int]:
    """Pids of watchdog processes of this home, by their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mlchaos_dagster.watcher" in words and str(home).encode() in words:
            found.append(int(entry.parent.name))
    return found


def trial(home: Path, library: Path, victim: str, experiment: str, moment: str, rng: random.Random) -> Trial:
    """Start a run, kill the victim, wait until the observer sees nothing wrong."""
    observer = Observer(home / "sandbox" / "fast")
    subprocess.run(command(home, library, "sandbox", "up"), check=True, capture_output=True)
    log = (home / "run.log").open("ab")
    run = subprocess.Popen(command(home, library, "run", experiment), stdout=log, stderr=log, start_new_session=True)
    # Looking through a whole store takes longer than the window; what the truth log tells of needs no such look.
    seen = observer.fault_seen if FAULTS[experiment] in WITHOUT_DEADLINE else observer.live_faults
    try:
        if moment == "window":
            while run.poll() is None and not seen():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, WINDOW_S * 0.8))
        else:
            time.sleep(rng.uniform(0, 12))
        on = bool(seen())
        killed_at = time.monotonic()
        if "watchdog" in victim:
            for pid in watchdogs(home):
                os.kill(pid, signal.SIGKILL)
        if victim == "supervisor" and observer.state().get("pid") and alive(observer.state()["pid"]):
            os.kill(observer.state()["pid"], signal.SIGKILL)
        if victim.startswith("run") and run.poll() is None:
            run.send_signal(signal.SIGSTOP if "frozen" in victim else signal.SIGKILL)
        both = victim == "run and watchdog" and FAULTS[experiment] in WITHOUT_DEADLINE
        if both:
            run.wait(CLEAN_WITHIN_S)
            subprocess.run(command(home, library, "recover"), capture_output=True, timeout=60)
        left, clean_s, last_wrong = observer.wrong(), None, killed_at
        while time.monotonic() < killed_at + CLEAN_WITHIN_S:
            left = observer.wrong()
            now = time.monotonic()
            if left:
                last_wrong = now
            # A run that goes on may still inject: only when it has ended is the last wrong moment known.
            elif victim in ("run", "run and watchdog", "run frozen") or run.poll() is not None:
                clean_s = last_wrong - killed_at
                break
            time.sleep(0.02)
        if victim == "run frozen":
            # Woken up late, it must inject nothing more.
            if run.poll() is None:
                run.send_signal(signal.SIGCONT)
                time.sleep(0.5)
                left = observer.wrong() if clean_s is not None and on else left
        try:
            code = run.wait(CLEAN_WITHIN_S)
        except subprocess.TimeoutExpired:
            code = None
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGCONT)
            run.kill()
            run.wait()
        log.close()
    subprocess.run(command(home, library, "recover"), capture_output=True, timeout=60)
    status = subprocess.run(command(home, library, "status", "-o", "json"), capture_output=True, timeout=60)
    leases = len(json.loads(status.stdout)["open_leases"]) if status.stdout.startswith(b"{") else -1
    return Trial(victim, experiment, moment, on, clean_s, left or observer.wrong(), leases, code)


def lane(number: int, jobs: list[tuple[str, str, str]], seed: int, out: Path | None) -> list[Trial]:
    """Some trials one after the other, on a home and a sandbox of their own."""
    home = Path(tempfile.mkdtemp(prefix="mlchaos-kills-"))
    library = fast_library(home / "library")
    rng = random.Random(seed * 1000 + number)
    results = []
    try:
        for victim, experiment, moment in jobs:
            result = trial(home, library, victim, experiment, moment, rng)
            results.append(result)
            if out:
                with out.open("a") as f:
                    f.write(json.dumps(asdict(result)) + "\n")
    finally:
        subprocess.run(command(home, library, "sandbox", "down"), capture_output=True)
        shutil.rmtree(home, ignore_errors=True)
    return results


def jobs_for(trials: int, seed: int, experiments: list[str] | None = None) -> list[tuple[str, str, str]]:
    """Every victim equally often, faults and moments mixed by the seed; three of four inside the window."""
    rng = random.Random(seed)
    return [
        (
            VICTIMS[k % len(VICTIMS)],
            rng.choice(experiments or sorted(FAULTS)),
            "anywhere" if rng.random() < 0.25 else "window",
        )
        for k in range(trials)
    ]


def table(results: list[Trial]) -> str:
    """The matrix as Markdown."""
    lines = [
        "| victim | kills | fault was on | left behind | open leases after `recover` | clean, s: p50 | p95 | max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for victim in (*VICTIMS, "all"):
        rows = [r for r in results if victim in (r.victim, "all")]
        times = sorted(r.clean_s for r in rows if r.clean_s is not None and r.fault_was_on)
        if not rows:
            continue
        cells = ["–"] * 3
        if times:
            p95 = times[min(len(times) - 1, int(0.95 * len(times)))]
            cells = [f"{statistics.median(times):.2f}", f"{p95:.2f}", f"{times[-1]:.2f}"]
        left = sum(bool(r.left) or r.clean_s is None for r in rows)
        lines.append(
            f"| {victim} | {len(rows)} | {sum(r.fault_was_on for r in rows)} | {left} "
            f"| {sum(r.open_leases for r in rows)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the matrix; exit 1 when anything was left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--lanes", type=int, default=2, help="trials at once, each on its own sandbox")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--experiments", nargs="+", choices=sorted(FAULTS), help="only these")
    parser.add_argument("--out", type=Path, help="every trial as a JSON line")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    jobs = jobs_for(args.trials, args.seed, args.experiments)
    with concurrent.futures.ThreadPoolExecutor(args.lanes) as pool:
        parts = pool.map(lambda n: lane(n, jobs[n :: args.lanes], args.seed, args.out), range(args.lanes))
        results = [r for part in parts for r in part]
    print(table(results))
    bad = [r for r in results if r.left or r.clean_s is None or r.open_leases]
    for r in bad:
        print(json.dumps(asdict(r)), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
