"""Validation of features before they reach the model: what a feature platform checks, and what it cannot see.

A row is refused when

- a value is null or no finite number (``nulls``),
- a value is more than 6 standard deviations from the schema's mean (``range``),
- ingestion refreshed it too long ago (``stale``),
- it jumped: from the values that were last validated it is farther than 2 standard deviations, root mean square over
  its features (``drift``). That is how a shift of 3 standard deviations is seen, which is well inside the range. A row that
  was never validated has nothing to be compared with; it is refused while the rows as a whole are shifted: a feature's mean
  is more than a quarter of a standard deviation, and more than 6 standard errors, from the schema's.

Not seen: a drift that creeps (each step is below the limit, and the snapshot follows it); a jump smaller than the limit; a
single feature that jumps by less than 2·√8 ≈ 5.7 standard deviations; one that changes the spread and not the mean where
no snapshot is. A true jump of an entity is refused as well, until its snapshot is too old to answer.
Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

REASONS = ("nulls", "range", "stale", "drift")
OUT_OF_RANGE = 6.0
"""Standard deviations from the schema's mean beyond which a value is implausible."""
_JUMP = 2.0
_SHIFT = 0.25
_STANDARD_ERRORS = 6.0

Vector = Sequence["float | None"]


@dataclass(frozen=True)
class Schema:
    """What each feature looked like when the store was made; shape (features,)."""

    mean: Sequence[float]
    std: Sequence[float]

    def shifted(self, vectors: Iterable[Vector]) -> bool:
        """Whether rows as a whole are elsewhere than the schema says. Nulls are left out."""
        rows = list(vectors)
        for feature, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            values = [v for row in rows if feature < len(row) and (v := row[feature]) is not None]
            if values:
                shift = abs(math.fsum(values) / len(values) - mean) / std
                if shift > _SHIFT and shift * math.sqrt(len(values)) > _STANDARD_ERRORS:
                    return True
        return False


@dataclass(frozen=True)
class Checks:
    """What is asked of one row. Without a schema (not read yet) range and jumps cannot be judged."""

    stale_s: float
    schema: Schema | None = None
    shifted: bool = False
    """Whether the rows as a whole were shifted when they were last looked at."""

    def refuse(self, vector: Vector, age_s: float | None, last: Sequence[float] | None) -> str:
        """Why this row must not reach the model, one of ``REASONS``; empty: it may.

        Args:
            vector: as the store serves it.
            age_s: seconds since it was refreshed; None: this platform does not refresh.
            last: what was last validated for this entity, if that is young enough to count.
        """
        values = [value for value in vector if value is not None and math.isfinite(value)]
        if len(values) != len(vector):
            return "nulls"
        if age_s is not None and age_s > self.stale_s:
            return "stale"
        if self.schema is None:
            return ""
        if len(values) != len(self.schema.mean):
            return "range"
        for value, mean, std in zip(values, self.schema.mean, self.schema.std, strict=True):
            if abs(value - mean) > OUT_OF_RANGE * std:
                return "range"
        if last is None:
            return "drift" if self.shifted else ""
        squares = [((v - before) / std) ** 2 for v, before, std in zip(values, last, self.schema.std, strict=True)]
        return "drift" if math.sqrt(math.fsum(squares) / len(squares)) > _JUMP else ""


def imputed(vector: Vector) -> list[float]:
    """What a model gets where nobody checks: zero for null, silently, as serving code likes to do."""
    return [0.0 if value is None else value for value in vector]
