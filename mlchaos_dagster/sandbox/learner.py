"""Logistic regression by stochastic gradient descent, in numpy. A step depends on state, data and step number alone.

So a run that resumed from a checkpoint goes on exactly as the one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .training_data import FEATURES

_BATCH = 32
_RATE = 0.1
_SMOOTH = 0.05
_WORST = 1e6

Shard = tuple[np.ndarray, np.ndarray]


class Learner:
    """A model in training."""

    def __init__(self, seed: int, worker: int) -> None:
        self._seed = [seed, worker]
        self.weights = np.zeros(FEATURES + 1)
        self.step_number = 0
        self.rows_seen = 0
        self.loss = float(np.log(2))
        """Cross entropy of the batches, smoothed over the last 20 or so; the start is a coin's."""

    def step(self, shards: Sequence[Shard]) -> None:
        """One batch from one of the shards."""
        rng = np.random.default_rng([*self._seed, self.step_number])
        x, y = shards[int(rng.integers(len(shards)))]
        rows = rng.integers(len(y), size=_BATCH)
        batch = np.column_stack([x[rows], np.ones(_BATCH)])
        wanted = y[rows].astype(float)
        with np.errstate(all="ignore"):  # garbage in the data shows in the loss, not in a warning
            logits = batch @ self.weights
            losses = np.logaddexp(0, logits) - wanted * logits
            found = 1 / (1 + np.exp(-logits))
            self.weights = self.weights - _RATE * (batch.T @ (found - wanted)) / _BATCH
        loss = float(losses.mean())
        # What is not a number any more is as bad as can be told.
        smoothed = self.loss + _SMOOTH * (min(loss, _WORST) - self.loss) if np.isfinite(loss) else _WORST
        self.loss = min(smoothed, _WORST)
        self.step_number += 1
        self.rows_seen += _BATCH

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on."""
        numbers = np.array([self.step_number, self.rows_seen, self.loss])
        return {"weights": self.weights.copy(), "numbers": numbers}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from ``state``."""
        self.weights = np.array(state["weights"], dtype=float)
        self.step_number, self.rows_seen = int(state["numbers"][0]), int(state["numbers"][1])
        self.loss = float(state["numbers"][2])
