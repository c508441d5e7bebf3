"""Exit codes of real runs; all of them: `python -m benchmarks.outcomes`."""

from __future__ import annotations

import pytest

from benchmarks.outcomes import show

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]


@pytest.mark.parametrize("outcome", ["HELD", "UNCLEAN", "ERROR"])
def test_an_outcome_has_its_exit_code(outcome: str) -> None:
    shown = show(outcome)
    assert shown.code == shown.expected, shown
    assert not shown.clean, shown
