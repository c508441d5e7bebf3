"""Peak memory of a run, process by process; and of loading a library of 1,000 files into Dagster.

    python -m benchmarks.memory [--n 3] [--files 1000] [--chaos DIR]

The processes of a run are the command, its probe and its watchdog (the sandbox is up already and is not counted); each
is read every 50 ms. RSS counts pages that processes share in each of them; PSS shares them out, so its sum is the
memory the run really takes. Linux. The peer is one whole `chaos run`, by the kernel's account.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import psutil

from benchmarks.cli_start import files
from benchmarks.lab import ROOT, Lab, Watched, cost, environment, every, experiment, heading, parser, peer_of, row
from benchmarks.overhead import FAULT, chaos_command, chaos_file

ROLES = {"mlchaos_dagster.watcher": "watchdog", "_loadgen": "probe", "mlchaos_dagster.cli.main": "mlchaos run"}
LOAD = (
    "from mlchaos_dagster.orchestration.definitions import load\n"
    "repository = load().get_repository_def()\n"
    "repository.load_all_definitions()\n"
)


class Peaks:
    """Largest memory seen, by role and of all together."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.rss, self.pss = dict[str, float](), dict[str, float]()

    def look(self) -> None:
        """Read every process of the run once."""
        rss, pss = dict[str, float](), dict[str, float]()
        try:
            processes = [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                words = " ".join(process.cmdline())
                role = next((r for word, r in ROLES.items() if word in words), "other")
                info = process.memory_full_info()
            except psutil.Error:
                continue
            rss[role] = rss.get(role, 0.0) + info.rss / 2**20
            pss[role] = pss.get(role, 0.0) + getattr(info, "pss", info.uss) / 2**20
        for values, peaks in ((rss, self.rss), (pss, self.pss)):
            values["all together"] = sum(values.values())
            for role, mib in values.items():
                peaks[role] = max(peaks.get(role, 0.0), mib)


def main() -> int:
    """Measure runs, then the load of many definitions."""
    options = parser(__doc__, 3)
    options.add_argument("--files", type=int, default=1000)
    args = options.parse_args()
    peer = peer_of(args)
    heading("Peak memory")
    print("| what | n | peak RSS, MiB: median | peak PSS, MiB |\n|---|---|---|---|")
    with Lab([environment("bench")], [experiment("noop-0", "feature-store", FAULT, "4s")]) as lab:
        seen = []
        for _ in range(args.n):
            run = Watched(lab.command("run", "noop-0", "-o", "json"), tree=False).start()
            peaks = Peaks(run.process.pid)
            with every(0.05, peaks.look):
                run.wait()
            if run.at("observation ended") is None:
                raise RuntimeError("the run had no window:\n" + "\n".join(m.text for m in run.marks[-10:]))
            seen.append(peaks)
        for role in sorted({r for p in seen for r in p.rss}, key=lambda r: -seen[0].rss.get(r, 0.0)):
            values = [[getattr(p, of).get(role, 0.0) for p in seen] for of in ("rss", "pss")]
            row(f"a run: {role}", len(seen), *(f"{statistics.median(v):.0f}" for v in values))
        if not peer.missing(harness=False):
            theirs = [cost(chaos_command(peer, chaos_file(lab.home, lab.gateway)), cwd=lab.home) for _ in range(args.n)]
            row("`chaos run`, one no-op", len(theirs), f"{statistics.median(c.rss_mib for c in theirs):.0f}", "")
    folder = Path(tempfile.mkdtemp(prefix="mlchaos-bench-"))
    try:
        files(folder / "library" / "experiments", args.files)
        surroundings = os.environ | {"MLCHAOS_LIBRARY": str(folder / "library"), "MLCHAOS_HOME": str(folder / "home")}
        loads = [cost([sys.executable, "-c", LOAD], cwd=ROOT, env=surroundings) for _ in range(args.n)]
        idle = [cost([sys.executable, "-c", LOAD], cwd=ROOT) for _ in range(args.n)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\nAll definitions from YAML files, as a code server loads them (whole process)\n")
    print("| library | n | wall, s | CPU, s | peak RSS, MiB |\n|---|---|---|---|---|")
    for words, costs in (("the shipped one", idle), (f"{args.files:,} files more", loads)):
        row(words, len(costs), *(f"{statistics.median(getattr(c, of) for c in costs):.{d}f}" for of, d in COLUMNS))
    if peer.missing(harness=False):
        print(f"\n{peer.missing(harness=False)}")
    return 0


COLUMNS = (("wall_s", 2), ("cpu_s", 2), ("rss_mib", 0))

if __name__ == "__main__":
    sys.exit(main())
