"""Ledger, stop files, drivers and incident log of a state directory, for the commands that must work without Dagster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from mlchaos_dagster import wiring
from mlchaos_dagster.cli.app import App
from mlchaos_dagster.cli.there import There
from mlchaos_dagster.engine.active import FAULT, ActiveRun, ActiveRuns
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import Driver, Lease, SystemClock
from mlchaos_dagster.engine.processes import is_running
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.engine.store import RecordStore


class Places:
    """What `status`, `stop` and `recover` work on."""

    def __init__(self, app: App) -> None:
        home = app.settings.home
        self.app, self.clock = app, SystemClock()
        self.ledger = wiring.ledger(home)
        self.there = There(app)
        self.stops = StopFiles(home)
        self.active = ActiveRuns(home.active, self.clock)
        self.incidents = IncidentLog(home.incidents, self.clock)
        self.store = RecordStore(home.records)

    @property
    def never_used(self) -> str:
        """Said when there is no state directory: whoever asks most likely stands in the wrong folder; else empty."""
        root = self.app.settings.home.root
        if root.is_dir():
            return ""
        return f"no state directory at {root}: nothing was ever run from here (MLCHAOS_HOME, --home)"

    def say_where(self) -> None:
        """The state directory that was looked at, or that there is none."""
        self.app.out(self.never_used or f"state  {self.app.settings.home.root}")

    def driver(self, name: str, environment: str) -> Driver:
        """As the sweeper wants it; an unreadable lease has lost its environment, then it is the chosen one."""
        return wiring.driver(name, self.app.settings.home, environment or self.app.settings.environment)

    def evidence(self, lease: Lease) -> list[str]:
        """What was read back from the target when the lease was closed; empty when that could not be written."""
        path = self.ledger.directory / "closed" / f"{lease.id}.{lease.driver}.evidence.json"
        try:
            return [str(line) for line in json.loads(path.read_text())["evidence"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []


def matching(word: str, runs: Sequence[ActiveRun], leases: Sequence[Lease]) -> set[str]:
    """Ids of the runs that a word means: a run id, the start of one (four characters or more), or an experiment."""
    known = [(x.run_id, x.experiment) for x in (*runs, *leases)]
    exact = {run_id for run_id, experiment in known if word in (run_id, experiment)}
    return exact or {run_id for run_id, _ in known if len(word) >= 4 and run_id.startswith(word)}


def lease_json(lease: Lease, now: float) -> dict[str, Any]:
    """One open lease, for people and machines."""
    return {
        "id": lease.id,
        "run_id": lease.run_id,
        "experiment": lease.experiment,
        "environment": lease.environment,
        "driver": lease.driver,
        "fault": lease.kind,
        "targets": list(lease.targets),
        "age_s": round(now - lease.opened_wall, 3),
        "deadline_in_s": round(lease.deadline_wall - now, 3),
        "owner": {"pid": lease.owner.pid, "host": lease.owner.host, "alive": is_running(lease.owner)},
        "stop_requested": lease.stop_requested,
    }


def runs_json(runs: Sequence[ActiveRun], leases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose process lives, with what they hold, oldest first."""
    found = {
        r.run_id: _run_row(r.run_id, r.experiment, r.environment, r.phase, r.owner.pid, r.started_wall) for r in runs
    }
    for lease in leases:
        if lease["owner"]["alive"]:
            who = (lease["run_id"], lease["experiment"], lease["environment"])
            run = found.setdefault(lease["run_id"], _run_row(*who, FAULT, lease["owner"]["pid"], None))
            run["phase"], run["fault"] = FAULT, lease["fault"]
            run["leases"].append(lease["id"])
            run["targets"] += lease["targets"]
    return list(found.values())


def _run_row(
    run_id: str, experiment: str, environment: str, phase: str, pid: int, started: float | None
) -> dict[str, Any]:
    at = None if started is None else datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")
    return {
        "run_id": run_id,
        "experiment": experiment,
        "environment": environment,
        "phase": phase,
        "pid": pid,
        "started_at": at,
        "fault": None,
        "leases": [],
        "targets": [],
    }
