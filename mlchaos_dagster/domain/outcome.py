"""The seven ways a run can end, and what `mlchaos run` exits with."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Outcome(str, Enum):
    """What a run found. A deviation is a finding, not a failure of the tool."""

    HELD = "HELD"
    """The fault was seen, enough was measured, and everything promised held."""
    DEVIATED = "DEVIATED"
    """The fault was seen and a promise broke."""
    REFUSED = "REFUSED"
    """A guard or an unsteady baseline said no; nothing was injected."""
    ABORTED = "ABORTED"
    """The fault was taken away early: a limit, a lost measurement, or a person's word."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """Something that a verdict needs was not seen."""
    UNCLEAN = "UNCLEAN"
    """The target was not proven clean: the fault may be live."""
    ERROR = "ERROR"
    """An error of ours; the target is clean."""

    @property
    def exit_code(self) -> int:
        """Exit code of `mlchaos run` for one run with this outcome."""
        return _EXIT[self]

    @property
    def is_pass(self) -> bool:
        """Only HELD is a pass."""
        return self is Outcome.HELD


EXIT_USAGE = 2
EXIT_INTERNAL = 6

_EXIT = {
    Outcome.HELD: 0,
    Outcome.DEVIATED: 1,
    Outcome.REFUSED: 3,
    Outcome.ABORTED: 4,
    Outcome.INCONCLUSIVE: 5,
    Outcome.ERROR: EXIT_INTERNAL,
    Outcome.UNCLEAN: 70,
}
_WORST_FIRST = (70, EXIT_INTERNAL, 4, 1, 5, 3, 0)


def counted(outcome: Outcome, shadow: bool) -> Outcome:
    """What a run counts as: a shadow run never counts as HELD, since nothing was seen to survive anything."""
    return Outcome.INCONCLUSIVE if shadow and outcome is Outcome.HELD else outcome


def exit_code_of(outcomes: Iterable[Outcome]) -> int:
    """The exit code of several runs: the first of 70, 6, 4, 1, 5, 3, 0 that occurred."""
    codes = {o.exit_code for o in outcomes}
    return next((c for c in _WORST_FIRST if c in codes), 0)
