"""`ChaosModelWrapper`: observed failure rates, what a call costs, and whether threads change anything.

    python -m benchmarks.chaos_model [--calls 100000] [--rounds 30] [--seed 7]

Rates: seeded calls against the declared shares, with exact (Clopper-Pearson) 95 % intervals. Cost: bare, wrapped and
off, wrapped and on without failures, in alternating rounds of one process; ratios are taken within a round, so that a
machine that is busy in between disturbs both sides. Prints Markdown; exits with 1 when a rate or the thread test fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.naive_bayes import GaussianNB

from benchmarks.lab import heading, row, table
from mlchaos_dagster.chaos_model import ChaosConfig, ChaosError, ChaosModelWrapper

THREADS = 8


class Trivial:
    """The cheapest model there is: any overhead shows."""

    def predict(self, x: Any) -> Any:
        return x


def outcome(predict: Callable[[Any], Any]) -> str:
    try:
        return "right" if predict(1) == 1 else "wrong"
    except ChaosError:
        return "exceptions"
    except TimeoutError:
        return "timeouts"


def outcomes(config: ChaosConfig, calls: int) -> Counter[str]:
    predict = ChaosModelWrapper(Trivial(), config).predict
    return Counter(outcome(predict) for _ in range(calls))


def in_threads(config: ChaosConfig, calls: int) -> Counter[str]:
    wrapper = ChaosModelWrapper(Trivial(), config)
    seen: list[Counter[str]] = [Counter() for _ in range(THREADS)]
    start = threading.Barrier(THREADS)

    def work(mine: Counter[str]) -> None:
        start.wait()
        mine.update(outcome(wrapper.predict) for _ in range(calls // THREADS))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(seen, Counter())


def rates(calls: int, seed: int) -> bool:
    good = True
    heading(f"ChaosModelWrapper: observed rates, {calls:,} seeded calls")
    table("configuration | failure | declared | observed | 95 % interval | declared is inside")
    for words, config in (
        ("5 / 2 / 1 %", ChaosConfig(timeout_s=0, seed=seed)),
        ("CHAOS_FAILURE_RATE=0.2", ChaosConfig(timeout_s=0, seed=seed, failure_rate=0.2)),
    ):
        seen = outcomes(config, calls)
        for name, share in zip(("exceptions", "timeouts", "wrong"), config.rates, strict=True):
            found = binomtest(seen[name], calls)
            low, high = found.proportion_ci(0.95, "exact")
            # Of twenty true intervals one misses: 95 % is shown, 99.99 % decides.
            low4, high4 = found.proportion_ci(0.9999, "exact")
            good = good and low4 <= share <= high4
            observed = f"{seen[name] / calls:.3%} ({seen[name]})"
            row(
                words,
                name,
                f"{share:.3%}",
                observed,
                f"{low:.3%} – {high:.3%}",
                "yes" if low <= share <= high else "no",
            )
    return good


def timed(call: Callable[[], Callable[[Any], Any]], x: Any, calls: int) -> float:
    """Nanoseconds per call, the look-up of the method included."""
    begun = time.perf_counter_ns()
    for _ in range(calls):
        call()(x)
    return (time.perf_counter_ns() - begun) / calls


def cost(model: Any, x: Any, calls: int, rounds: int) -> list[tuple[float, float, float]]:
    off = ChaosModelWrapper(model, ChaosConfig(enabled=False))
    on = ChaosModelWrapper(model, ChaosConfig(failure_rate=0))
    ways: list[Callable[[], Any]] = [lambda: model.predict, lambda: off.predict, lambda: on.predict]
    found: list[tuple[float, float, float]] = []
    for i in range(rounds + 1):
        order = [(k + i) % 3 for k in range(3)]  # whoever comes first finds cold caches
        ns = {k: timed(ways[k], x, calls) for k in order}
        found.append((ns[0], ns[1], ns[2]))
    return found[1:]


def told(values: Sequence[float], digits: int) -> str:
    quarters = statistics.quantiles(values, n=4)
    return f"{quarters[1]:.{digits}f} ({quarters[0]:.{digits}f} – {quarters[2]:.{digits}f})"


def costs(rounds: int) -> None:
    heading(f"ChaosModelWrapper: cost of a call, median (quartiles) of {rounds} rounds")
    table("model | bare, ns | wrapped off, ns | wrapped on, ns | off / bare | on / bare")
    rows = np.random.default_rng(1).normal(size=(200, 8))
    bayes = GaussianNB().fit(rows, (rows[:, 0] > 0).astype(int))
    for words, model, x, calls in (
        ("returns its input", Trivial(), 1, 20_000),
        ("GaussianNB, one row", bayes, rows[:1], 300),
    ):
        found = cost(model, x, calls, rounds)
        digits = 1 if words.startswith("returns") else 0
        times = [told([f[i] for f in found], digits) for i in range(3)]
        ratios = [told([f[i] / f[0] for f in found], 3) for i in (1, 2)]
        row(words, *times, *ratios)


def threads(calls: int, seed: int) -> bool:
    config = ChaosConfig(timeout_s=0, seed=seed, failure_rate=0.2)
    one, many = outcomes(config, calls), in_threads(config, calls)
    heading(f"ChaosModelWrapper: {calls:,} calls in one thread and in {THREADS}")
    table("outcome | 1 thread | 8 threads")
    for name in ("right", "exceptions", "timeouts", "wrong"):
        row(name, one[name], many[name])
    return one == many


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    good = rates(args.calls, args.seed)
    costs(args.rounds)
    same = threads(args.calls - args.calls % THREADS, args.seed)
    print(f"\nthe same outcomes in threads: {'yes' if same else 'NO'}", flush=True)
    return 0 if good and same else 1


if __name__ == "__main__":
    sys.exit(main())
