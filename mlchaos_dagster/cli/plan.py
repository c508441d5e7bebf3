"""`mlchaos plan NAME`: how long the window must be to see the effect that the hypothesis speaks of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App, Names, common, current, table
from mlchaos_dagster.domain.units import show_duration, show_value

if TYPE_CHECKING:
    import numpy as np

    from mlchaos_dagster.domain.environment import Environment
    from mlchaos_dagster.domain.spec import Experiment, Objective
    from mlchaos_dagster.judgement.measures import Phase

_SEED = 20


@click.command("plan")
@click.argument("name", metavar="NAME", type=Names("experiment"))
@common
def command(name: str) -> None:
    """Say what this window would see, and how long it must be, from the newest measured baseline of NAME.

    Without a baseline (no run yet, try `run --shadow`) a flawless one is assumed for shares; latencies stay unknown.
    """
    app = current()
    environment = app.environment
    experiment = app.catalog.ready(name, environment)
    baseline, from_run = _baseline(app, experiment, environment)
    window_s = environment.scaled(experiment.duration)
    rows = [_row(objective, environment, window_s, baseline) for objective in experiment.steady_state]
    source = f"the baseline of run {from_run[:8]}" if from_run else "an assumed flawless baseline (no run yet)"
    app.dump(
        {
            "experiment": name,
            "environment": environment.name,
            "window_s": window_s,
            "baseline_s": environment.sampling.baseline,
            "baseline_run": from_run or None,
            "slis": rows,
        }
    )
    lengths = f"window {show_duration(window_s)}, baseline {show_duration(environment.sampling.baseline)}"
    app.out(f"{name} in {environment.name}: {lengths}")
    app.out(f"judged from {source}, with 80 % power at 5 %\n")
    shown = [
        (
            r["sli"],
            r["objective"],
            _value(r["baseline"], r["unit"]),
            _value(r["seen"], r["unit"]),
            _value(r["to_see"], r["unit"]),
            _needed(r),
        )
        for r in rows
    ]
    app.out(table(("SLI", "OBJECTIVE", "BASELINE", "WOULD BE SEEN", "HYPOTHESIS SPEAKS OF", "WINDOW NEEDED"), shown))
    if any(r["needed_s"] is not None and r["needed_s"] > window_s for r in rows):
        app.out("\nlengthen `duration`, or `duration_min` / `duration_scale` of the environment, to the window needed")


def _baseline(app: App, experiment: Experiment, environment: Environment) -> tuple[Phase | None, str]:
    from mlchaos_dagster.engine.store import RecordStore
    from mlchaos_dagster.errors import StoreError
    from mlchaos_dagster.judgement.measures import Phase, reference_of

    store = RecordStore(app.settings.home.records)
    for record, _ in store.all():
        same = record.experiment.name == experiment.name and record.environment.name == environment.name
        if same and record.baseline is not None and record.samples_file:
            try:
                samples = store.samples(record)
                reference = reference_of(samples, record.environment, record.baseline)
                return Phase(samples, record.environment, record.baseline, reference), record.run_id
            except StoreError:
                continue
    return None, ""


def _row(objective: Objective, environment: Environment, window_s: float, baseline: Phase | None) -> dict[str, Any]:
    from mlchaos_dagster.domain.environment import SHIFT_MEASURES

    sli = environment.slis[objective.sli]
    row: dict[str, Any] = {
        "sli": objective.sli,
        "objective": f"{'≥' if objective.floor else '≤'} {show_value(objective.limit.value, sli.shown_unit)}",
        "unit": sli.shown_unit,
        "baseline": baseline.value(objective.sli) if baseline else None,
        "seen": None,
        "to_see": None,
        "needed_s": None,
        "why": "",
    }
    if sli.measure is None:
        row["why"] = "a signal: read, not sampled; it is seen at any length"
        return row
    if sli.measure in SHIFT_MEASURES:
        row["why"] = "a distance between distributions: it is seen from 50 answers on, and finer with more items"
        return row
    bad, quantile = _series(str(sli.measure), environment, baseline)
    if bad is None:
        row["why"] = "unknown before a first run"
        return row
    _plan(row, objective, bad, quantile, environment, window_s)
    return row


def _series(measure: str, environment: Environment, baseline: Phase | None) -> tuple[np.ndarray | None, float | None]:
    """The baseline's samples (bad requests as 1, or latencies), and the quantile that is judged."""
    import numpy as np

    from mlchaos_dagster.domain.environment import RATIO_MEASURES
    from mlchaos_dagster.judgement.census import quantile_of

    shares = measure in RATIO_MEASURES
    if baseline is None or not len(baseline.requests):
        length = max(1, round(environment.probe.rate * environment.sampling.baseline))
        return (np.zeros(length), None) if shares else (None, None)
    if measure == "golden_error_rate":
        return np.asarray(baseline.requests.wrong[baseline.requests.compared], float), None
    if measure == "fallback_rate":
        return np.asarray(baseline.requests.path == "cache", float), None
    if shares:
        return np.asarray(~baseline.requests.ok, float), None
    return np.asarray(baseline.requests.ranked_latency_s), quantile_of(measure)


def _plan(
    row: dict[str, Any],
    objective: Objective,
    series: np.ndarray,
    quantile: float | None,
    environment: Environment,
    window_s: float,
) -> None:
    from mlchaos_dagster.judgement.power import (
        detectable_proportion,
        detectable_shift,
        needed_for_proportion,
        needed_for_shift,
    )

    rate = environment.probe.rate
    planned, ratio = max(1, round(rate * window_s)), environment.sampling.baseline / window_s
    n0 = max(1, round(rate * environment.sampling.baseline))
    share = row["unit"] == "ratio"
    if share:
        seen = detectable_proportion(series, planned, seed=_SEED, n_baseline=n0)
        now = float(series.mean()) if not objective.floor else 1.0 - float(series.mean())
    else:
        seen = detectable_shift(series, planned, seed=_SEED, q=quantile, n_baseline=n0)
        now = row["baseline"] if row["baseline"] is not None else math.nan
    row["seen"] = seen.effect if math.isfinite(seen.effect) else None
    row["why"] = seen.why
    distance = abs(objective.limit.value - now)
    if not math.isfinite(distance) or distance <= 0:
        row["why"] = row["why"] or "the baseline is at its limit already"
        return
    row["to_see"] = distance
    if share:
        needed = needed_for_proportion(series, distance, rate_per_s=rate, seed=_SEED, baseline_ratio=ratio)
    else:
        needed = needed_for_shift(series, distance, rate_per_s=rate, seed=_SEED, q=quantile, baseline_ratio=ratio)
    row["needed_s"] = round(needed.window_s, 1) if math.isfinite(needed.window_s) else None


def _value(value: float | None, unit: str) -> str:
    return "–" if value is None else show_value(value, unit)


def _needed(row: dict[str, Any]) -> str:
    text = show_duration(row["needed_s"]) if row["needed_s"] is not None else "–"
    return f"{text}  ({row['why']})" if row["why"] else text
