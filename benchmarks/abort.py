"""Time to abort, from outside: breach, stop request or signal → fault gone → process gone.

    python -m benchmarks.abort [--n 10] [--harness DIR --chaos DIR] [--peer-n 5] [--hold 10] [--out FILE]

Every trial is a real `mlchaos run` on a real sandbox. Nothing is taken from the run's own report but the instant of its
decision: when the fault took effect and when it was gone is read from the platform's truth log, that the link works
again from bare sockets that knock every 20 ms, that the service broke from predictions asked every 20 ms.

Breaches are real: the gateway's breaker, retries and fallback are off, so a delayed feature store, or replicas that are
all held down, are errors for its callers; the experiment aborts at error_rate above 5 % for 200 ms. Stop and signals
come 1 to 2 s into a window of 30 s, at a random phase. The peer does the same with its own target, in turns with us.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.lab import (
    ROOT,
    Lab,
    Watched,
    environment,
    experiment,
    heading,
    parser,
    peer_of,
    predict,
    row,
    spread,
    table,
    tails,
)
from benchmarks.observer import answer_time

WINDOW_S = 30
LINK = "gateway->feature-store"
DELAY = {"kind": "network_latency", "latency": "600ms"}
LIMIT = {"abort": [{"sli": "error_rate", "above": "5%", "for": "200ms"}]}
LAX = {"steady_state": [{"sli": "availability", "at_least": "1%"}]}
"""A busy machine and no fallback: what is stopped by hand need not hold anything."""
TRIES = 5
KNOCK_S = 0.02

EXPERIMENTS = [
    experiment("hold-link", "feature-store", DELAY, f"{WINDOW_S}s", **LAX),
    experiment("breach-link", "feature-store", DELAY, f"{WINDOW_S}s", **LIMIT),
    experiment(
        "breach-replicas", "prediction-service", {"kind": "pod_failure"}, f"{WINDOW_S}s",
        **LIMIT,
    ) | {"blast_radius": {"fraction": "100%"}},
]  # fmt: skip
FRAGILE = {"sandbox": {"mechanisms": {"breaker": False, "retries": False, "fallback": False}}}
TRIGGERS = {
    "breach: feature store delayed 600 ms": "breach-link",
    "breach: all replicas held down": "breach-replicas",
    "mlchaos stop": "hold-link",
    "SIGTERM": "hold-link",
    "SIGINT": "hold-link",
    "SIGKILL": "hold-link",
}


@dataclass
class Trial:
    """Seconds on the machine's monotonic clock; None: not seen."""

    trigger: str
    effective: float | None = None
    """Truth log: the fault works."""
    first_bad: float | None = None
    """The first prediction that failed, when its answer was there."""
    decided: float | None = None
    """The run's own instant of decision."""
    pulled: float | None = None
    """Our stop or signal."""
    gone: float | None = None
    """Truth log: the fault is removed."""
    answers: float | None = None
    """The link's first quick answer after it was slow, complete."""
    told: float | None = None
    """`mlchaos stop` has said that all is clean."""
    ended: float | None = None
    """The run's process is gone."""
    left: int = 0
    """Faults in the truth log, or links that do not work, at the end."""

    def since(self, begin: str, end: str) -> float | None:
        """Seconds from one instant to another."""
        a, b = getattr(self, begin), getattr(self, end)
        return None if a is None or b is None else b - a


class Knocking:
    """Bare sockets to the link and predictions to the gateway, every 20 ms, beside a trial."""

    def __init__(self, lab: Lab, link: bool) -> None:
        self.link_port, self.gateway = lab.observer.state()["link_ports"][LINK] if link else None, lab.gateway
        self.links: list[tuple[float, float, bool]] = []
        self.predictions: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(40)
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Knocking:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self._pool.shutdown(wait=True)

    def _loop(self) -> None:
        while not self._over.wait(KNOCK_S):
            self._pool.submit(self._ask)
            if self.link_port is not None:
                self._pool.submit(self._knock)

    def _ask(self) -> None:
        status = predict(self.gateway)
        self.predictions.append((time.monotonic(), status))

    def _knock(self) -> None:
        begun = time.monotonic()
        ok = answer_time(self.link_port) is not None  # type: ignore[arg-type]
        self.links.append((begun, time.monotonic(), ok))

    def first_bad(self, after: float) -> float | None:
        """When the first failed prediction was answered."""
        return min((at for at, status in self.predictions if status != 200 and at >= after), default=None)

    def answers_again(self, after: float) -> float | None:
        """When the link had answered quickly for the first time after a moment at which it was slow."""
        return min((done for begun, done, ok in self.links if ok and done > after), default=None)


class Refused(Exception):
    """The run injected nothing, because the machine was too busy for its steady state."""


def patiently(lab: Lab, trigger: str) -> Trial:
    """One trial; again when the run was refused."""
    for _ in range(TRIES):
        try:
            return trial(lab, trigger)
        except Refused as e:
            said = str(e)
    raise RuntimeError(said)


def trial(lab: Lab, trigger: str) -> Trial:
    """One run that is stopped this way. Raises Refused."""
    name, found = TRIGGERS[trigger], Trial(trigger)
    lab.settle()
    seen = len(lab.observer.truth())
    with Knocking(lab, link=name.endswith("link")) as knocking:
        run = Watched(lab.command("run", name, "-o", "json"), tree=False).start()
        begin = _until(lambda: _event(lab, seen, "fault_effective") or (0.0 if run.over else None), 60)
        if not begin:
            run.process.kill()
            run.wait()
            raise Refused(f"{trigger}: no fault:\n" + "\n".join(m.text for m in run.marks[-10:]))
        found.effective = begin
        if not trigger.startswith("breach"):
            time.sleep(random.uniform(1, 2))
            found.pulled = time.monotonic()
            if trigger == "mlchaos stop":
                subprocess.run(lab.command("stop", name), capture_output=True, timeout=60, cwd=ROOT)
                found.told = time.monotonic()
            else:
                os.kill(run.process.pid, getattr(signal, trigger))
        found.gone = _until(lambda: _event(lab, seen, "fault_removed", "fault_expired"), WINDOW_S + 20)
        time.sleep(0.4)  # sockets that knocked on the slow link are still waiting
        run.wait(60)
    found.ended = run.ended
    found.first_bad = knocking.first_bad(begin)
    if run.results and run.results[0].get("abort"):
        record = json.loads(Path(run.results[0]["record_path"]).read_text())["record"]
        found.decided = record["zero_mono"] + record["abort"]["breach_at"]
    found.answers = knocking.answers_again(found.pulled or found.decided or begin)
    if found.gone is None or lab.observer.live_faults() or (name.endswith("link") and lab.observer.bad_links()):
        found.left = 1
        subprocess.run(lab.command("recover"), capture_output=True, timeout=60, cwd=ROOT)
    return found


def _event(lab: Lab, skip: int, *names: str) -> float | None:
    """The last truth line of that kind among the new ones: with several targets, all of them."""
    events = [e for e in lab.observer.truth()[skip:] if e["what"] in names]
    if names[0] != "fault_effective" and lab.observer.live_faults():
        return None
    return max((e["mono"] for e in events), default=None)


def _until(look: Callable[[], float | None], within_s: float) -> float | None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        time.sleep(0.01)
    return None


# ---- the peer


METHODS = {"hold": "one background hold", "steps": "1 s steps"}
PEER_TRIGGERS = "probe,SIGTERM,SIGINT,SIGKILL"
CASES = 2 * 4 * 2
"""Methods, triggers and rollback strategies of one round of the peer."""


def peer_round(peer, hold: int, jobs: int) -> list[dict]:  # noqa: ANN001
    """Every case of the harness once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "trials.jsonl")
        peer.script(
            "abort.py", "--n", "1", "--hold", str(hold), "--jobs", str(jobs), "--triggers", PEER_TRIGGERS,
            "--out", str(out),
        )  # fmt: skip
        return [json.loads(line) for line in out.read_text().splitlines()]


def show(trials: list[Trial], peer_trials: list[dict], hold: int) -> None:
    """Both tables."""
    print("mlchaos (window of 30 s, sandbox; seconds)\n")
    table(
        "trigger | from | n | fault gone: p50 | p95 | max | link answers again: p50 | p95 | max "
        "| process gone: p50 | left behind"
    )
    for trigger in TRIGGERS:
        rows = [t for t in trials if t.trigger == trigger]
        if not rows:
            continue
        breach = trigger.startswith("breach")
        starts = {"decided": "decision (limit crossed for 0.2 s)", "first_bad": "first failed prediction"}
        for start, words in starts.items() if breach else (("pulled", "its start" if "stop" in trigger else "signal"),):
            row(
                trigger, words, len(rows), tails(t.since(start, "gone") for t in rows),
                tails(t.since(start, "answers") for t in rows) if TRIGGERS[trigger].endswith("link") else "– | – | –",
                spread(t.since(start, "ended") for t in rows).split(" ")[0], sum(t.left for t in rows),
            )  # fmt: skip
    stops = [t for t in trials if t.told is not None]
    if stops:
        print(
            f"\n`mlchaos stop` itself returned, all proven clean, after {spread(t.since('pulled', 'told') for t in stops)} s."
        )
    if not peer_trials:
        return
    print(f"\nChaos Toolkit (fault of {hold} s, its harness; seconds, median [min to max])\n")
    table("method | trigger | rollbacks | n | fault gone | process gone | rollback ran | left behind | status")
    for key in sorted({(t["method"], t["trigger"], t["strategy"]) for t in peer_trials}):
        rows = [t for t in peer_trials if (t["method"], t["trigger"], t["strategy"]) == key]
        row(
            METHODS[key[0]], key[1], key[2], len(rows), spread(t["clean"] for t in rows).replace("–", "never"),
            spread(t["gone"] for t in rows), sum(t["rollback"] is not None for t in rows),
            sum(t["clean"] is None for t in rows), ", ".join(sorted({t["status"] for t in rows})),
        )  # fmt: skip


def _keep(out: Path | None, rows: list[dict]) -> None:
    if out:
        with out.open("a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> int:
    """Run the trials in turns; exit 1 when one of ours left something behind."""
    options = parser(__doc__, 10)
    options.add_argument("--peer-n", type=int, default=5)
    options.add_argument("--hold", type=int, default=10, help="seconds of the peer's fault")
    options.add_argument("--jobs", type=int, default=8, help="trials of the peer at once; they mostly sleep")
    options.add_argument("--triggers", default=",".join(TRIGGERS))
    options.add_argument("--out", type=Path, help="every trial as a JSON line; those it already has count")
    args = options.parse_args()
    peer, trials, peer_trials = peer_of(args), list[Trial](), list[dict]()
    if args.out and args.out.exists():
        for value in map(json.loads, args.out.read_text().splitlines()):
            peer_trials.append(value) if "method" in value else trials.append(Trial(**value))
    heading("Abort")
    bench = environment("bench", **FRAGILE)
    with Lab([bench], EXPERIMENTS) as lab:
        for turn in range(args.n):
            for trigger in args.triggers.split(","):
                if sum(t.trigger == trigger for t in trials) <= turn:
                    trials.append(patiently(lab, trigger))
                    _keep(args.out, [asdict(trials[-1])])
            if turn < args.peer_n and not peer.missing() and len(peer_trials) <= turn * CASES:
                peer_trials += (found := peer_round(peer, args.hold, args.jobs))
                _keep(args.out, found)
    show(trials, peer_trials, args.hold)
    if peer.missing():
        print(f"\n{peer.missing()}")
    return 1 if any(t.left for t in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
