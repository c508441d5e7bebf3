"""Safety sensors. They tick every 5 s at best: a run's own limits act at every sample, these stand behind them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.engine.files import write_json
from mlchaos_dagster.engine.guards import read_gate
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration import metadata as md
from mlchaos_dagster.orchestration.jobs import active_runs, stop_runs
from mlchaos_dagster.orchestration.ports import Platform

EVERY_S = 5
"""Dagster's floor."""


def gate_path(platform: Platform, environment: str) -> Path:
    """The gate of an environment, read by the engine's guard `gate_open`."""
    return platform.settings.home.gates / f"{environment}.json"


def write_gate(path: Path, closed: bool, reason: str, at: datetime) -> None:
    """Close or open a gate. Raises StoreError."""
    write_json(path, {"closed": closed, "reason": reason, "at": at.isoformat(timespec="seconds")})


def guard_budget(platform: Platform, instance: dg.DagsterInstance, environment: Environment) -> str:
    """One look at the budget: under the limit, close the gate and stop what runs; back, open it. Says what it did.

    A budget that cannot be read changes nothing here: the run's own guard refuses on it, and a gate closed because
    a sandbox is not up yet would keep its first experiment out.
    """
    path = gate_path(platform, environment.name)
    closed = read_gate(path)
    try:
        budget = platform.budget(environment)
    except Exception as e:  # noqa: BLE001 - whatever the source raises, the sensor must tick again
        state = f"closed: {closed}" if closed else "open"
        return f"the budget cannot be read ({e}); the gate stays {state}, and runs refuse by themselves"
    if budget is None:
        return "no error budget is declared"
    limit = environment.limits.budget_at_least
    words = md.budget_words(budget.remaining, limit)
    if budget.remaining >= limit:
        if closed is None:
            return words
        write_gate(path, False, words, platform.now())
        return f"gate opened: {words}"
    # The gate first: what is stopped must not be started again meanwhile.
    if closed is None:
        write_gate(path, True, words, platform.now())
        platform.incident("refusal", f"gate closed: {words}", environment=environment.name)
    runs = active_runs(instance, environment.name)
    if runs:
        problems = stop_runs(platform, instance, runs, f"error budget: {words}")
        said = f"; {'; '.join(problems)}" if problems else ""
        platform.incident(
            "abort", f"error budget: {words}", environment=environment.name, run_ids=[r.run_id for r in runs]
        )
        return f"gate closed, {len(runs)} runs told to stop: {words}{said}"
    return f"gate closed: {words}"


def budget_sensor(environment: Environment) -> dg.SensorDefinition:
    """ONE sensor for all experiments of an environment."""

    @dg.sensor(
        name=f"{keys.python_name(environment.name)}_error_budget",
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={"platform"},
        description="Stops every experiment and keeps new ones out while the error budget is under its limit.",
    )
    def watch_budget(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        return dg.SkipReason(guard_budget(context.resources.platform, context.instance, environment))

    return watch_budget


def sweeper_sensor() -> dg.SensorDefinition:
    """Faults of owners that are gone."""

    @dg.sensor(
        name="sweeper",
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={"platform"},
        description="Takes away faults whose run died, should its watchdog have died, too.",
    )
    def sweep(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        platform: Platform = context.resources.platform
        if not platform.leases():
            return dg.SkipReason("no open lease")
        done: list[Any] = platform.sweep()
        for line in done:
            context.log.warning(line)
        return dg.SkipReason("; ".join(done) or "every open lease has a living owner")

    return sweep


def all_sensors(environments: Sequence[Environment]) -> list[dg.SensorDefinition]:
    """Budget sensors of environments that declare a budget, and the sweeper."""
    return [*(budget_sensor(e) for e in environments if e.error_budget is not None), sweeper_sensor()]
