"""Which SLIs people are shown, and in what order: one rule for the terminal, the report, Dagster and `describe`.

An environment may declare dozens of SLIs; an experiment speaks of a few, and the others matter where they moved.
"""

from __future__ import annotations

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import RunRecord, SliResult, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.domain.units import show_value

ALWAYS = (
    "availability",
    "error_rate",
    "latency_p50",
    "latency_p95",
    "latency_p99",
    "fallback_rate",
    "golden_error_rate",
)
"""What is asked of every service, whatever was done to it."""

_VISIBLE = 0.1
"""Share of the larger value by which an SLI without an interval must move: below it noise fills the table."""


def spoken_slis(experiment: Experiment, environment: Environment) -> list[str]:
    """SLIs of this environment that the experiment speaks of, then those asked of every service; no name twice.

    In the order objectives, abort limits (its own, then the environment's), expectations. An expectation on a signal
    counts for the SLIs that are read from that signal.
    """
    names = [o.sli for o in experiment.steady_state]
    names += [c.sli for c in (*experiment.abort, *environment.limits.abort)]
    for expected in experiment.expect:
        names += [
            n for n, s in environment.slis.items() if n == expected.sli or (s.signal and s.signal == expected.signal)
        ]
    return [n for n in dict.fromkeys((*names, *ALWAYS)) if n in environment.slis]


def shown_slis(record: RunRecord, verdict: Verdict) -> list[str]:
    """SLIs of the verdict that are shown: those spoken of, then the others that moved visibly.

    What was never measured is left out, but for an objective once a fault was there: that it could not be measured
    is then a finding.
    """
    spoken = spoken_slis(record.experiment, record.environment)
    objectives = {o.sli for o in record.experiment.steady_state}
    kept = [
        n
        for n in spoken
        if n in verdict.slis and (measured(verdict.slis[n]) or (record.window is not None and n in objectives))
    ]
    return kept + [n for n, result in verdict.slis.items() if n not in spoken and _moved(result)]


def measured(result: SliResult) -> bool:
    """Whether any phase has a sample of it."""
    return result.samples > 0 or any(v is not None for v in (result.baseline, result.during, result.after))


def sli_label(name: str, environment: Environment) -> str:
    """`p95`, `error rate`; with how its readings become one number, where that is not their mean: `job wait (max)`."""
    declared = environment.slis.get(name)
    reduced = declared is not None and declared.measure is None and declared.reduce != "mean"
    return shown_name(name) + (f" ({declared.reduce})" if declared is not None and reduced else "")


def shown_name(name: str) -> str:
    """`latency_p95` → `p95`, `error_rate` → `error rate`."""
    if name.startswith("latency_p"):
        return name.removeprefix("latency_")
    return name.replace("_", " ")


def _moved(result: SliResult) -> bool:
    """Its interval excludes zero; without one: what is shown differs, by a tenth at least."""
    if result.ci_low is not None and result.ci_high is not None:
        return result.ci_low > 0 or result.ci_high < 0
    before = result.baseline
    for value in (result.during, result.after):
        if value is None or before is None or show_value(value, result.unit) == show_value(before, result.unit):
            continue
        # `not <` so that what is infinite counts as having moved.
        if not abs(value - before) < _VISIBLE * max(abs(value), abs(before)):
            return True
    return False
