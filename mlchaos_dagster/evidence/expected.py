"""What had to be seen, and what was: expectations with their values, for people."""

from __future__ import annotations

import re

from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.domain.units import show_value
from mlchaos_dagster.evidence.rows import BREAKER_STATES


def expectation_words(text: str) -> str:
    """An expectation with the breaker's states by name: `breaker_state reaches 2` → `… reaches open`."""
    if "breaker_state" not in text:
        return text

    def name(match: re.Match[str]) -> str:
        return f"{match[1]}{BREAKER_STATES.get(float(match[2]), match[2])}"

    return re.sub(r"(\b(?:reaches|stays at|was|to|and) )([012])(?![\d.%])", name, text)


def expectation_values(record: RunRecord, verdict: Verdict) -> list[tuple[str, str, bool | None]]:
    """Expectation, its values `before → during` (an SLI's also after), and whether it was seen.

    Empty where nothing was injected: then nothing of it was to be seen.
    """
    if record.shadow or record.window is None:
        return []
    subjects = {str(e): e.sli for e in record.experiment.expect}
    said: list[tuple[str, str, bool | None]] = []
    for e in verdict.expectations:
        result = verdict.slis.get(subjects.get(e.expected) or "")
        if result is not None:
            phases = (result.baseline, result.during, result.after)
            values = " → ".join(show_value(v, result.unit) for v in phases)
        elif match := re.search(r" was (.+) before and (.+) during the fault(?:: (.+))?$", expectation_words(e.saw)):
            values = f"{match[1]} → {match[2]}" + (f" ({match[3]})" if match[3] else "")
        else:
            values = expectation_words(e.saw)
        said.append((expectation_words(e.expected).replace("_", " "), values, e.seen))
    return said
