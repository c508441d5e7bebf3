"""Recovery times of the record held against the truth.

    python -m benchmarks.recovery [--n 8] [--harness DIR --chaos DIR] [--out FILE]

Two experiments in turns. `kill-once`: one of three replicas gets SIGKILL and is started again by its platform. `hold-all`:
all replicas are held down for 3 s (retries, breaker and fallback off), so the service itself breaks and comes back.
The truth of detect, reschedule and ready is the platform's truth log; that of steady is what predictions asked every
20 ms, on sockets of their own, saw: the first good answer after which none was bad for the dwell time of 0.5 s (of
`hold-all` only).
Error: told by the record − truth, in milliseconds, origin included.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.abort import FRAGILE, TRIES, Knocking, Refused
from benchmarks.lab import Lab, Watched, environment, experiment, heading, parser, peer_of, quantile, row, spread, table

DWELL_S = 0.5
EXPERIMENTS = [
    experiment("kill-once", "prediction-service", {"kind": "pod_delete", "signal": "kill"}, "3s"),
    experiment("hold-all", "prediction-service", {"kind": "pod_failure"}, "3s")
    | {"blast_radius": {"fraction": "100%"}},
]
PARTS = ("detect", "reschedule", "ready", "steady")


@dataclass
class Told:
    """One part of one recovery."""

    experiment: str
    part: str
    told_s: float | None
    truth_s: float | None
    censored: bool = False

    @property
    def error_ms(self) -> float | None:
        """Told − truth."""
        return None if self.told_s is None or self.truth_s is None else 1e3 * (self.told_s - self.truth_s)


def patiently(lab: Lab, name: str) -> list[Told]:
    """One trial; again when a busy machine's steady state refused it."""
    for _ in range(TRIES):
        try:
            return trial(lab, name)
        except Refused as e:
            said = str(e)
    raise RuntimeError(said)


def trial(lab: Lab, name: str) -> list[Told]:
    """One run; every part that it told of. Raises Refused."""
    lab.settle()
    skip = len(lab.observer.truth())
    with Knocking(lab, link=False) as knocking:
        run = Watched(lab.command("run", name, "-o", "json"), tree=False).start().wait()
    if not run.results or run.results[0]["recovery"]["steady_s"] is None:
        raise Refused(f"{name}: no recovery told:\n" + "\n".join(m.text for m in run.marks[-10:]))
    truth = _truth(lab.observer.truth()[skip:], name, knocking.predictions)
    told = run.results[0]["recovery"]
    return [
        Told(name, part, told[f"{part}_s"], truth[part], part in told["censored"])
        for part in PARTS
        if truth[part] is not None
    ]


def _truth(events: list[dict], name: str, predictions: list[tuple[float, int]]) -> dict[str, float | None]:
    """Seconds of every part, by the truth log and the predictions."""
    at = {what: [e["mono"] for e in events if e["what"] == what] for what in {e["what"] for e in events}}
    began = min(at["killed"])
    origin = began if name == "kill-once" else max(at["fault_removed"])
    bad = [t for t, status in predictions if status != 200 and t >= began]
    steady = None
    if bad and name == "hold-all":  # one replica's death costs a request or two: no break of the objective
        good = sorted(t for t, status in predictions if status == 200 and t > bad[0])
        steady = next((t for t in good if t >= origin and not any(t < b <= t + DWELL_S for b in bad)), None)
    return {
        "detect": min(at["unready"]) - began,
        "reschedule": max(at["started"]) - origin,
        "ready": max(at["ready"]) - origin,
        "steady": steady and steady - origin,
    }


def peer_rows(text: str) -> tuple[str, str]:
    """The harness's own line: error, and how many outages it missed."""
    found = re.search(r"error of the recovery time, s: (.*?), n (\d+), outage missed (\d+)", text)
    return (f"{found[1]} s", f"{found[2]} (missed {found[3]})") if found else ("–", "–")


def main() -> int:
    """Run both in turns."""
    options = parser(__doc__, 8)
    options.add_argument("--out", type=Path, help="every part as a JSON line")
    args = options.parse_args()
    peer, found = peer_of(args), list[Told]()
    heading("Recovery against the truth log")
    # `running_replicas` tells when a replacement is started.
    bench = environment("bench", **FRAGILE)
    bench["signals"] = [*bench["signals"], "running_replicas"]
    with Lab([bench], EXPERIMENTS) as lab:
        for _ in range(args.n):
            for e in EXPERIMENTS:
                parts = patiently(lab, e["name"])
                found += parts
                if args.out:
                    with args.out.open("a") as f:
                        f.writelines(json.dumps(asdict(p)) + "\n" for p in parts)
    table("experiment | part | n | truth, s | error, ms | p95 of the absolute error, ms | within 50 ms | censored")
    for name in (e["name"] for e in EXPERIMENTS):
        for part in PARTS:
            rows = [t for t in found if (t.experiment, t.part) == (name, part)]
            errors = [t.error_ms for t in rows if t.error_ms is not None]
            if not rows:
                continue
            row(
                name, part, len(rows), spread(t.truth_s for t in rows), spread(errors, 0),
                f"{quantile((abs(e) for e in errors), 0.95):.0f}",
                f"{sum(abs(e) <= 50 for e in errors)} of {len(errors)}", sum(t.censored for t in rows),
            )  # fmt: skip
    if peer.missing():
        print(f"\n{peer.missing()}")
        return 0
    print("\nChaos Toolkit (recovery worked out from its during-chaos series, by the harness)\n")
    table("series | error of the recovery time: median, range | n")
    for frequency, words in (("1.0", "1 Hz"), ("0.1", "10 Hz")):
        row(words, *peer_rows(peer.script("recovery.py", "--n", str(args.n), "--frequency", frequency)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
