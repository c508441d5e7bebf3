"""What was read at each target as evidence of the whole fault."""

from __future__ import annotations

from collections.abc import Iterable

from mlchaos_dagster.domain.record import Evidence


def of_all(found: Iterable[Evidence]) -> Evidence:
    """Present where it is at one target, effective where it is at every one; every line."""
    each = list(found)
    return Evidence(
        present=any(e.present for e in each),
        effective=all(e.effective for e in each),
        lines=tuple(line for e in each for line in e.lines),
    )


def nothing(line: str) -> Evidence:
    """Nothing of the fault is at this target, and how that is known."""
    return Evidence(present=False, effective=False, lines=(line,))
