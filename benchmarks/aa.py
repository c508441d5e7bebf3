"""A/A study: runs in which the fault does nothing; how often do we cry wolf?

    python -m benchmarks.aa [--runs 1000]

The whole engine in the simulated world of the tests, seeded: the same share of requests fails before and during,
one by one or in clusters of five (autocorrelated); the fault is seen but harmless. False aborts and false DEVIATED
are counted, with the degradation guard on at its default level. An absolute objective is a census: where clusters
break it in the window, DEVIATED is right about the window, though the fault was not the cause.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engine"))

from sim import World, build  # noqa: E402  the simulated world lies with the tests

from mlchaos_dagster.engine.run import run_experiment  # noqa: E402
from mlchaos_dagster.judgement.verdict import judge  # noqa: E402


class Sticky(random.Random):
    """Failures come in clusters: a two-state chain with a mean cluster of so many requests."""

    def __init__(self, seed: int, share: float, cluster: int) -> None:
        super().__init__(seed)
        self.share, self.leave, self.bad = share, 1 / cluster, False

    def random(self) -> float:
        """Below every rate while a cluster lasts, above every rate otherwise."""
        enter = self.leave * self.share / (1 - self.share)
        u = super().random()
        self.bad = u >= self.leave if self.bad else u < enter
        return 0.0 if self.bad else 1.0


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    args = parser.parse_args()
    print(
        "| failing requests | in clusters of | objective | runs | HELD | false DEVIATED | false aborts | refused (baseline) | other |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for share, cluster, objective in ((0.0, 1, "99%"), (0.001, 1, "99%"), (0.005, 1, "97%"), (0.001, 5, "97%")):
        counts: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for k in range(args.runs):
                world = World(errors_always=0.5, errors_during=0.5, rng=Sticky(k, share, cluster))
                slos = [{"sli": "availability", "at_least": objective}, {"sli": "latency_p95", "below": "300ms"}]
                run = build(
                    Path(folder) / str(k),
                    world,
                    run_id=f"aa-{k}",
                    experiment={"steady_state": slos, "degradation": {}, "recovery": {"within": "10s", "dwell": "2s"}},
                    environment={"sampling": {"baseline": "10s", "interval": "250ms"}},
                )
                record = run_experiment(run)
                counts[judge(record, run.samples).outcome.value] += 1
        other = sum(counts.values()) - sum(counts[o] for o in ("HELD", "DEVIATED", "ABORTED", "REFUSED"))
        print(
            f"| {share:.1%} | {cluster} | availability ≥ {objective} | {args.runs} | {counts['HELD']} | {counts['DEVIATED']} "
            f"| {counts['ABORTED']} | {counts['REFUSED']} | {other} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
