"""Silent wrongness: answers that arrive in time, as 200, with a number that is not the model's.

Owns the golden predictions (fixed inputs with known answers) and the distance between the predictions of a phase and
those of the baseline. Two questions, because a platform can be wrong in two ways:

* *Is this answer right?* Each item (body of the probe) has a golden number: declared, or the baseline's median for it.
  An answer is wrong when it differs by more than the tolerance or carries no number at all.
* *Have the predictions moved as a whole?* The Population Stability Index and the Kolmogorov-Smirnov distance. The
  probe repeats its items, so a window is compared with what the baseline answered to *the same items as often*:
  a window that happens to hold other items than the baseline's average is no shift, and an unchanged service is
  at distance 0 in any window. What a shift rests on is therefore the number of distinct items, not of requests:
  20 items resolve shares of 5 %, whatever the rate.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlchaos_dagster.domain.record import GoldenFacts
from mlchaos_dagster.judgement.autocorrelation import FloatArray
from mlchaos_dagster.judgement.census import BoolArray, IntArray, Requests

FEWEST_VALUES = 50
"""Fewer numbers than this say nothing of a distribution: the distance is unknown, never 0."""
BINS = 10
"""Deciles of the baseline: the usual choice, and what the thresholds 0.1 and 0.25 of the index are meant for."""
_HALF = 0.5
"""Added to every count, so that an empty bin has a logarithm (Jeffreys' prior); vanishes with the counts."""


@dataclass(frozen=True)
class Shift:
    """How far the predictions of a phase are from the baseline's."""

    values: int
    """Answers of the phase with a number whose item the baseline knows."""
    items: int
    """Distinct items among them: the effective sample size."""
    psi: float | None
    """None below `FEWEST_VALUES`."""
    ks: float | None
    mean_before: float | None
    mean_now: float | None


@dataclass(frozen=True, eq=False)
class Reference:
    """What the baseline answered, by item. Build with :meth:`of`."""

    start_s: float
    """The baseline's span, in which unstable items are counted too: there they are the finding."""
    end_s: float
    tolerance: float
    golden: FloatArray
    """Shape (slots,), at index item + 1 (item −1: a probe without bodies); NaN: unknown."""
    unstable: BoolArray
    """Shape (slots,): the baseline's own answers disagree by more than the tolerance."""
    declared: bool
    numbers: FloatArray
    """Shape (n,): the baseline's numbers, by item and then by time."""
    first: IntArray
    """Shape (slots,): where each item's numbers begin in `numbers`."""
    count: IntArray
    """Shape (slots,): how many there are."""
    edges: FloatArray
    """Inner edges of the index' bins; a number x lies in bin i when edges[i − 1] < x ≤ edges[i]."""

    @classmethod
    def of(
        cls, baseline: Requests, start_s: float, end_s: float, *, tolerance: float, declared: tuple[float, ...] = ()
    ) -> Reference:
        """Learn from the baseline's requests.

        Args:
            baseline: on time ones only.
            start_s: start of the baseline.
            end_s: its end.
            tolerance: largest absolute difference that is no error.
            declared: golden numbers by item, when they are not to be learned.
        """
        known = baseline.select(baseline.ok & np.isfinite(baseline.value))
        slots = max(int(baseline.item.max(initial=-1)) + 2, len(declared) + 1)
        order = np.argsort(known.item, kind="stable")
        numbers = known.value[order]
        count = np.bincount(known.item + 1, minlength=slots).astype(np.int64)
        first = np.cumsum(count) - count
        golden, unstable = np.full(slots, np.nan), np.zeros(slots, dtype=np.bool_)
        for slot in np.flatnonzero(count):
            own = np.sort(numbers[first[slot] : first[slot] + count[slot]])
            # The lower median: an answer that was really given, also where two disagree.
            golden[slot] = own[(len(own) - 1) // 2]
            unstable[slot] = own[-1] - own[0] > tolerance
        if declared:
            # Without bodies every request is the one item −1.
            at = 1 if len(declared) > 1 or int(baseline.item.max(initial=-1)) >= 0 else 0
            golden[:] = np.nan
            golden[at : at + len(declared)] = declared
            unstable[:] = False
        return cls(start_s, end_s, tolerance, golden, unstable, bool(declared), numbers, first, count, _edges(numbers))

    @property
    def stable(self) -> BoolArray:
        """Shape (slots,): items that answers of the window are compared with."""
        return np.isfinite(self.golden) & ~self.unstable

    @property
    def digest(self) -> str:
        """SHA-256 over stable items and their golden numbers, rounded to the tolerance."""
        lines = [f"{slot - 1}:{self._rounded(float(self.golden[slot]))}" for slot in np.flatnonzero(self.stable)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _rounded(self, value: float) -> str:
        return str(round(value / self.tolerance)) if self.tolerance > 0 else repr(value)

    def golden_of(self, items: IntArray) -> FloatArray:
        """The golden number of each item, shape as given; NaN where none is known."""
        return np.where(items + 1 < len(self.golden), self.golden[self._slots(items)], np.nan)

    def judged(self, requests: Requests) -> Requests:
        """The same requests with `compared` and `wrong` filled in.

        Compared are answered requests whose item has a golden number that is stable (in the baseline itself: any), and
        those that carry no number, whatever their item: an answer without a number is never right.
        """
        golden, none = self.golden_of(requests.item), ~np.isfinite(requests.value)
        in_baseline = (requests.due_s >= self.start_s) & (requests.due_s < self.end_s)
        usable = np.isfinite(golden) & (in_baseline | ~self.unstable[self._slots(requests.item)])
        compared = requests.ok & (usable | none)
        with np.errstate(invalid="ignore"):
            differs = np.abs(requests.value - golden) > self.tolerance
        return requests.with_answers(compared=compared, wrong=compared & (none | differs))

    def matched(self, requests: Requests) -> tuple[FloatArray, FloatArray, int]:
        """(expected, seen, distinct items): each number beside one that the baseline gave for the same item.

        The k-th answer of an item goes with the baseline's k-th, beginning anew when those run out: an item that
        scatters keeps its scatter. Differences within the tolerance are none.
        """
        slots = self._slots(requests.item)
        known = (requests.item + 1 < len(self.count)) & (self.count[slots] > 0)
        requests = requests.select(requests.ok & np.isfinite(requests.value) & known)
        order = np.argsort(requests.item, kind="stable")
        slots, seen = requests.item[order] + 1, requests.value[order]
        each = np.bincount(slots, minlength=len(self.count))
        turn = np.arange(len(slots)) - (np.cumsum(each) - each)[slots]
        expected = self.numbers[self.first[slots] + turn % np.maximum(1, self.count[slots])]
        seen = np.where(np.abs(seen - expected) <= self.tolerance, expected, seen)
        return expected, seen, int((each > 0).sum())

    def shift(self, requests: Requests) -> Shift:
        """How far the numbers of these requests are from the baseline's."""
        expected, seen, items = self.matched(requests)
        n = len(seen)
        means = (float(expected.mean()), float(seen.mean())) if n else (None, None)
        if n < FEWEST_VALUES:
            return Shift(n, items, None, None, *means)
        before, now = (
            np.bincount(np.searchsorted(self.edges, v), minlength=len(self.edges) + 1) for v in (expected, seen)
        )
        return Shift(n, items, population_stability(before, now), kolmogorov_smirnov(expected, seen), *means)

    def facts(self, requests: Requests | None) -> GoldenFacts:
        """The golden predictions of a run and how the answers of its window compare; None: there was no window."""
        facts = GoldenFacts(
            digest=self.digest,
            items=int(self.stable.sum()),
            unstable=tuple(int(slot) - 1 for slot in np.flatnonzero(self.unstable)),
            declared=self.declared,
            tolerance=self.tolerance,
        )
        if requests is None:
            return facts
        requests = self.judged(requests)
        wrong = np.flatnonzero(requests.wrong)
        update: dict[str, int | float | None] = {
            "compared": int(requests.compared.sum()),
            "wrong": len(wrong),
            "without_number": int((~np.isfinite(requests.value[wrong])).sum()),
        }
        if len(wrong):
            item, value = requests.item[wrong[:1]], float(requests.value[wrong[0]])
            golden = float(self.golden_of(item)[0])
            update["first_item"] = int(item[0])
            update["first_value"] = value if math.isfinite(value) else None
            update["first_golden"] = golden if math.isfinite(golden) else None
        return facts.model_copy(update=update)

    def _slots(self, items: IntArray) -> IntArray:
        return np.minimum(items + 1, len(self.golden) - 1)


def population_stability(expected: npt.ArrayLike, actual: npt.ArrayLike, *, smooth: float = _HALF) -> float:
    """Population Stability Index of two histograms over the same bins.

    PSI = Σ (aᵢ − eᵢ) · ln(aᵢ / eᵢ), with eᵢ and aᵢ the shares of bin i before and now: the symmetric Kullback-Leibler
    divergence (Siddiqi, Credit Risk Scorecards, 2006). By custom below 0.1 is no change, above 0.25 a large one. Of two
    independent samples of n and m from one distribution in B bins it is (B − 1)(1/n + 1/m) on average (Yurdakul 2018).

    Args:
        expected: shape (bins,), counts or shares before.
        actual: shape (bins,), counts or shares now.
        smooth: added to each count; 0 for shares that are all positive.

    Raises:
        ValueError: unequal bins, or an empty side.
    """
    e, a = (np.asarray(v, dtype=np.float64) + smooth for v in (expected, actual))
    if e.shape != a.shape or e.ndim != 1 or not (e.sum() > 0 and a.sum() > 0):
        raise ValueError("the index needs two histograms over the same bins, neither of them empty")
    e, a = e / e.sum(), a / a.sum()
    return float(((a - e) * np.log(a / e)).sum())


def kolmogorov_smirnov(expected: FloatArray, actual: FloatArray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic: the largest distance of the two empirical distributions, 0 to 1.

    `scipy.stats.ks_2samp` gives the same number (a test holds them equal); importing it takes half a second, which the
    watch loop does not have. No p-value is given: items repeat, so the numbers are not independent.

    Raises:
        ValueError: an empty side.
    """
    x, y = np.sort(expected), np.sort(actual)
    if not len(x) or not len(y):
        raise ValueError("a distance needs numbers on both sides")
    both = np.concatenate([x, y])
    of_x, of_y = (np.searchsorted(v, both, side="right") / len(v) for v in (x, y))
    return float(np.abs(of_x - of_y).max())


def _edges(numbers: FloatArray) -> FloatArray:
    """Inner edges at the baseline's deciles; a number on which deciles pile up gets a bin of its own."""
    if not len(numbers):
        return np.empty(0)
    deciles = np.quantile(numbers, np.arange(1, BINS) / BINS, method="inverted_cdf")
    edges, times = np.unique(deciles, return_counts=True)
    piles = edges[times > 1]
    # Else a service that always said 0.5 and now says less would stay in its one bin.
    return np.unique(np.concatenate([edges, np.nextafter(piles, -np.inf)]))
