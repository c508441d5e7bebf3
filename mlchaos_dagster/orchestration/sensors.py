"""Safety sensors. They tick every 5 s at best: a run's own limits act at every sample, these stand behind them."""

from __future__ import annotations

import json
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
WAITING = frozenset({dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING})
"""Has not asked a guard yet."""


def gate_path(platform: Platform, environment: str) -> Path:
    """The gate of an environment, read by the engine's guard `gate_open`."""
    return platform.settings.home.gates / f"{environment}.json"


def write_gate(path: Path, closed: bool, reason: str, at: datetime) -> None:
    """Close or open a gate. Raises StoreError."""
    write_json(path, {"closed": closed, "reason": reason, "at": at.isoformat(timespec="milliseconds")})


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
    if runs := _past_the_gate(platform, instance, environment.name, path):
        problems = stop_runs(platform, instance, runs, f"error budget: {words}")
        said = f"; {'; '.join(problems)}" if problems else ""
        platform.incident(
            "abort", f"error budget: {words}", environment=environment.name, run_ids=[r.run_id for r in runs]
        )
        return f"gate closed, {len(runs)} runs told to stop: {words}{said}"
    return f"gate closed: {words}"


def _past_the_gate(
    platform: Platform, instance: dg.DagsterInstance, environment: str, gate: Path
) -> list[dg.DagsterRun]:
    """Runs that may have passed the gate before it was closed.

    What is still queued, or began later, is kept out by its own guard and ends REFUSED, which tells people more than
    a run that vanished. A run that holds a lease passed somehow: it goes whatever the clocks say.
    """
    closed_at = _closed_at(gate)
    holders = {lease.run_id.partition(".")[0] for lease in platform.leases()}
    found: list[dg.DagsterRun] = []
    for run in active_runs(instance, environment):
        record = instance.get_run_record_by_id(run.run_id)
        began = record.start_time if record is not None else None
        waits = run.status in WAITING or (began is not None and closed_at is not None and began > closed_at)
        if run.run_id in holders or not waits:
            found.append(run)
    return found


def _closed_at(gate: Path) -> float | None:
    """When it was closed; None when the file does not say, and then every run counts as older."""
    try:
        return datetime.fromisoformat(json.loads(gate.read_text())["at"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
