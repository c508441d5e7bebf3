"""Orchestration overhead: all that a run takes beside guards, baseline, fault window and recovery.

    python -m benchmarks.overhead [--n 7] [--warm 6] [--chaos DIR] [--earlier 1000]

The experiment is real but harms nobody: 1 ms on one link for 1 s, after a baseline of 1 s, on a sandbox that is up
already. Phases are told apart from outside, by when the command says on stderr that they begin and end, and what CPU
time the run and its children (probe, watchdog) had used by then. `cold` is a process of its own for each run, in turns
with `chaos run` of one no-op action and one HTTP probe (whole process; it has neither guards nor baseline nor
report). `warm` is the second and later experiments of one process. The last row repeats that in a state
directory that holds many earlier runs of other experiments.
"""

from __future__ import annotations

import json
import statistics
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab import (
    ROOT,
    Lab,
    Mark,
    Peer,
    Watched,
    cost,
    environment,
    experiment,
    heading,
    parser,
    peer_of,
    row,
    spread,
    table,
)

FAULT = {"kind": "network_latency", "latency": "1ms"}
STEPS = (
    ("phase     guards", "start"),
    ("phase     baseline", "guards"),
    ("baseline started", "probe start"),
    ("baseline ended", "baseline"),
    ("inject requested", "steady?"),
    ("observation ended", "window"),
    ("result", "report"),
)
"""A line on stderr, and the name of the part that it ends."""
OVERHEAD = ("start", "steady?", "report", "exit")
WORDS = {
    "start": "command (or last result) → guards",
    "steady?": "baseline ended → inject",
    "report": "observation ended → result shown",
    "exit": "result shown → process gone",
    "probe start": "probe's process and its warm-up of 0.5 s",
}


@dataclass
class Parts:
    """Wall and CPU seconds of each part of one run."""

    wall: dict[str, float]
    cpu: dict[str, float]

    def overhead(self, of: str) -> float:
        """Seconds beside guards, baseline, window and recovery; and without the probe's start and warm-up."""
        values = getattr(self, of)
        return sum(values.get(p, 0.0) for p in OVERHEAD)


def parts(run: Watched, name: str, previous: Mark) -> tuple[Parts, Mark]:
    """Split one experiment of a run; `previous` is where it begins."""
    wall, cpu, last = dict[str, float](), dict[str, float](), previous
    for words, part in STEPS:
        mark = next((m for m in run.marks if m.at >= last.at and m.text.startswith(name) and words in m.text), None)
        if mark is None:
            raise RuntimeError(f"{name}: no line {words!r}:\n" + "\n".join(m.text for m in run.marks[-15:]))
        wall[part], cpu[part], last = mark.at - last.at, mark.cpu_s - last.cpu_s, mark
    return Parts(wall, cpu), last


def cold(lab: Lab) -> tuple[Parts, Watched]:
    """One run in a process of its own."""
    run = Watched(lab.command("run", "noop-0", "-o", "json")).start().wait()
    found, last = parts(run, "noop-0", Mark(run.begun, 0.0, ""))
    found.wall["exit"], found.cpu["exit"] = run.ended - last.at, run.cpu_s - last.cpu_s
    return found, run


def warm(lab: Lab, count: int) -> list[Parts]:
    """Second and later experiments of one process."""
    names = [f"noop-{i}" for i in range(count)]
    run = Watched(lab.command("run", *names, "-o", "json")).start().wait(60.0 * count)
    last, found = Mark(run.begun, 0.0, ""), []
    for name in names:
        one, last = parts(run, name, last)
        found.append(one)
    return found[1:]


def chaos_file(directory: Path, gateway: str) -> Path:
    """One no-op action, one HTTP probe before and after it."""
    noop = {"type": "python", "module": "os", "func": "getpid"}
    http = {"type": "http", "url": f"{gateway}/healthz", "timeout": 1}
    path = directory / "chaos.json"
    path.write_text(
        json.dumps(
            {
                "title": "overhead", "description": "an experiment that does nothing",
                "steady-state-hypothesis": {
                    "title": "answers",
                    "probes": [{"type": "probe", "name": "gateway", "tolerance": 200, "provider": http}],
                },
                "method": [{"type": "action", "name": "noop", "provider": noop}], "rollbacks": [],
            }
        )
    )  # fmt: skip
    return path


def chaos_command(peer: Peer, path: Path) -> list[str]:
    """`chaos run` of a file, without its look for a new version."""
    journal = str(path.with_name("journal.json"))
    return [
        str(peer.chaos), "--no-version-check", "--log-file", "/dev/null", "run", "--journal-path", journal, str(path),
    ]  # fmt: skip


def earlier_runs(lab: Lab, count: int) -> None:
    """Records of other experiments in this state directory."""
    records = lab.home / "records"
    source = next(p for p in records.glob("*.json"))
    value = json.loads(source.read_text())
    old, value["record"]["experiment"]["name"] = value["record"]["run_id"], "another"
    text = json.dumps(value)
    for _ in range(count):
        run_id = str(uuid.uuid4())
        (records / f"{run_id}.json").write_text(text.replace(old, run_id))


def show(title: str, runs: list[Parts]) -> None:
    """Rows of one way to run."""
    row(f"**{title}**", len(runs), spread(p.overhead("wall") for p in runs), spread(p.overhead("cpu") for p in runs))
    for part in (*OVERHEAD, "probe start"):
        if part in runs[0].wall:
            said = WORDS[part] + (" (part of the baseline, not counted above)" if part == "probe start" else "")
            row(f"– {said}", "", spread(p.wall[part] for p in runs), spread(p.cpu[part] for p in runs))


def main() -> int:
    """Measure cold in turns with the peer, then warm."""
    options = parser(__doc__, 7)
    options.add_argument("--warm", type=int, default=6, help="experiments in one process")
    options.add_argument("--earlier", type=int, default=1000, help="earlier runs in the last row")
    args = options.parse_args()
    peer = peer_of(args)
    heading("Orchestration overhead per experiment")
    noops = [experiment(f"noop-{i}", "feature-store", FAULT, "1s") for i in range(args.warm)]
    with Lab([environment("bench")], noops) as lab:
        cold(lab)  # fills file caches and makes Dagster's storage
        path, colds, runs, theirs = chaos_file(lab.home, lab.gateway), [], [], []
        for _ in range(args.n):
            found, run = cold(lab)
            colds.append(found)
            runs.append(run)
            if not peer.missing(harness=False):
                theirs.append(cost(chaos_command(peer, path), cwd=lab.home))
        warms = warm(lab, args.warm)
        earlier_runs(lab, args.earlier)
        crowded = warm(lab, min(4, args.warm))
    table("what | n | wall, s: median [min to max] | CPU, s")
    show("cold: a process of its own", colds)
    show("warm: second and later of one process", warms)
    show(f"warm, with {args.earlier:,} earlier runs in the state directory", crowded)
    row(
        "whole `mlchaos run`, phases and all",
        len(runs),
        spread(r.ended - r.begun for r in runs),
        spread(r.cpu_s for r in runs),
    )
    if theirs:
        row(
            "whole `chaos run`, one no-op",
            len(theirs),
            spread(c.wall_s for c in theirs),
            spread(c.cpu_s for c in theirs),
        )
        ours = statistics.median(p.overhead("cpu") for p in colds)
        ratio = ours / statistics.median(c.cpu_s for c in theirs)
        print(f"\nOverhead cold, CPU, against the whole of `chaos run`: {ratio:.1f} times.")
    else:
        print(f"\n{peer.missing(harness=False)}")
    print("\nA process that only imports what a run needs:\n")
    table("import | n | wall, s | CPU, s")
    for code in ("pass", "import dagster", "import mlchaos_dagster.orchestration.launch"):
        costs = [cost([sys.executable, "-c", code], cwd=ROOT) for _ in range(args.n)]
        row(f"`{code}`", len(costs), spread(c.wall_s for c in costs), spread(c.cpu_s for c in costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
