"""How long the command line takes to start: help, list, check of one file and of 1,000.

    python -m benchmarks.cli_start [--n 15] [--files 1000] [--chaos DIR]

Whole processes, start to exit, in turns; wall and CPU time and peak memory by the kernel's account (wait4).
`python -c pass` is the floor. Chaos Toolkit validates one file a process; so that its 1,000 files are not 1,000
starts of Python, its functions are also called in one process (`load_experiment`, `ensure_experiment_is_valid`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.lab import ROOT, Cost, cost, heading, parser, peer_of, row, spread, table
from mlchaos_dagster.catalog import SHIPPED

IN_ONE_PROCESS = """
import sys, pathlib, logging
logging.disable(logging.CRITICAL)
from chaoslib.loader import load_experiment
from chaoslib.experiment import ensure_experiment_is_valid
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.yaml")):
    ensure_experiment_is_valid(load_experiment(str(path)))
"""


def files(directory: Path, count: int) -> Path:
    """Experiments under new names, copies of the shipped ones in turn."""
    directory.mkdir(parents=True)
    shipped = [yaml.safe_load(p.read_text()) for p in sorted((SHIPPED / "experiments").rglob("*.yaml"))]
    for i in range(count):
        value = shipped[i % len(shipped)] | {"name": f"experiment-{i:04}"}
        (directory / f"{value['name']}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    return directory


def chaos_files(directory: Path, count: int) -> Path:
    """As many of Chaos Toolkit's experiments: an HTTP probe, three actions."""
    directory.mkdir(parents=True)
    http = {"type": "http", "url": "http://127.0.0.1:9/", "timeout": 1}
    action = {"type": "action", "provider": {"type": "python", "module": "os", "func": "getpid"}}
    for i in range(count):
        value = {
            "title": f"experiment {i}", "description": "a file to check",
            "steady-state-hypothesis": {
                "title": "answers", "probes": [{"type": "probe", "name": "gate", "tolerance": 200, "provider": http}]
            },
            "method": [action | {"name": f"action {k}"} for k in range(3)], "rollbacks": [],
        }  # fmt: skip
        (directory / f"{i:04}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    (directory / "one.json").write_text(json.dumps(value))
    return directory


def main() -> int:
    """Measure in turns."""
    options = parser(__doc__, 15)
    options.add_argument("--files", type=int, default=1000)
    args = options.parse_args()
    peer = peer_of(args)
    heading("Start of the command line")
    folder = Path(tempfile.mkdtemp(prefix="mlchaos-bench-"))
    try:
        many = files(folder / "many", args.files)
        theirs = chaos_files(folder / "theirs", args.files)
        ours = [sys.executable, "-m", "mlchaos_dagster.cli.main", "--home", str(folder / "home")]
        one = str(SHIPPED / "experiments" / "serving" / "serving-pod-failure.yaml")
        quick = {
            "`python -c pass`": [sys.executable, "-c", "pass"],
            "`mlchaos --help`": [*ours, "--help"],
            "`mlchaos list`": [*ours, "list"],
            "`mlchaos check FILE`": [*ours, "check", one],
            "`mlchaos status`": [*ours, "status"],
        }
        slow = {f"`mlchaos check` of {args.files:,} files": [*ours, "check", str(many)]}
        if not peer.missing(harness=False):
            chaos = [str(peer.chaos), "--no-version-check", "--log-file", os.devnull]
            quick |= {
                "`chaos --help`": [str(peer.chaos), "--help"],
                "`chaos validate FILE`": [*chaos, "validate", str(theirs / "one.json")],
            }
            slow[f"chaoslib: load and validate {args.files:,} YAML files in one process"] = [
                peer.python, "-c", IN_ONE_PROCESS, str(theirs),
            ]  # fmt: skip
        found: dict[str, list[Cost]] = {}
        for name, command in quick.items():
            cost(command, cwd=ROOT)  # file caches
            found[name] = []
        for _ in range(args.n):
            for name, command in quick.items():
                found[name].append(cost(command, cwd=ROOT))
        for _ in range(max(3, args.n // 5)):
            for name, command in slow.items():
                found.setdefault(name, []).append(cost(command, cwd=ROOT))
        table("command | n | wall, s: median [min to max] | CPU, s | peak RSS, MiB")
        for name, costs in found.items():
            row(
                name, len(costs), spread((c.wall_s for c in costs), 3), spread((c.cpu_s for c in costs), 3),
                spread((c.rss_mib for c in costs), 0).split(" ")[0],
            )  # fmt: skip
        if peer.missing(harness=False):
            print(f"\n{peer.missing(harness=False)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
