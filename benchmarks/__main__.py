"""All benchmarks in order, as one Markdown document on stdout.

    python -m benchmarks [--quick] [--harness DIR] [--chaos DIR] [--only NAME,NAME]

About half an hour; `--quick` takes every figure once or twice and is for trying the benchmarks themselves. The teeth
and kill matrices have commands of their own (`python -m benchmarks.teeth`, `python -m benchmarks.kills`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.lab import ROOT, heading, machine, row, table

QUICK = {
    "abort": ["--n", "1", "--peer-n", "1"],
    "overhead": ["--n", "2", "--warm", "2", "--earlier", "100"],
    "cli_start": ["--n", "2"],
    "recovery": ["--n", "1"],
    "memory": ["--n", "1"],
    "scale": [],
    "probe": ["--seconds", "1", "--repeats", "1"],
    "chaos_model": ["--calls", "8000", "--rounds", "3"],
}
"""In this order."""
TAKES_PEER = ("abort", "overhead", "cli_start", "recovery", "memory")


def scale() -> int:
    """`benchmarks.scale` prints JSON lines; here they are a table."""
    heading("Scale: definitions in memory")
    done = subprocess.run([sys.executable, "-m", "benchmarks.scale"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        table(" | ".join(lines[0]).replace("_", " "))
        for line in lines:
            row(*line.values())
    return done.returncode


def main() -> int:
    """Run them; exit 1 when one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--harness", type=Path)
    parser.add_argument("--chaos", type=Path)
    parser.add_argument("--only", default=",".join(QUICK))
    args = parser.parse_args()
    print(f"# Benchmarks\n\n{machine()}", flush=True)
    failed = []
    for name in args.only.split(","):
        if name == "scale":
            code = scale()
        else:
            options = QUICK[name] if args.quick else []
            if name in TAKES_PEER:
                options = [*options, *(["--harness", str(args.harness)] if args.harness else [])]
                options = [*options, *(["--chaos", str(args.chaos)] if args.chaos else [])]
            if name == "probe":
                heading("Open-loop probe")
            code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=ROOT).returncode
        if code:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
