"""Error budget: 1 − objective over a window, and how much of it is left."""

from __future__ import annotations


def remaining(total: float, bad: float, objective: float) -> float:
    """Share of the error budget left: 1 untouched, 0 spent, negative overspent.

    Args:
        total: requests in the window; 0 means nobody asked and nothing was spent.
        bad: those that failed.
        objective: 0–1, exclusive.

    Raises:
        ValueError: counts that cannot be.
    """
    if not 0 < objective < 1:
        raise ValueError(f"an objective lies between 0 and 1, not at {objective}")
    if total < 0 or bad < 0 or bad > total:
        raise ValueError(f"{bad:g} bad of {total:g} requests cannot be")
    return 1.0 if total == 0 else 1.0 - (bad / total) / (1.0 - objective)
