"""Ledger, stop files, drivers and incident log of a state directory, for the commands that must work without Dagster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlchaos_dagster import wiring
from mlchaos_dagster.cli.app import App
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Driver, Lease, SystemClock
from mlchaos_dagster.engine.processes import is_running
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.engine.store import RecordStore

_BEAT_S = 3.0
"""A watchdog writes its beat five times a second; one that has not for so long is gone."""


class Places:
    """What `status`, `stop` and `recover` work on."""

    def __init__(self, app: App) -> None:
        home = app.settings.home
        self.app, self.clock = app, SystemClock()
        self.ledger = FileLedger(home.ledger, self.clock)
        self.stops = StopFiles(home)
        self.incidents = IncidentLog(home.incidents, self.clock)
        self.store = RecordStore(home.records)

    def driver(self, name: str, environment: str) -> Driver:
        """As the sweeper wants it; an unreadable lease has lost its environment, then it is the chosen one."""
        return wiring.driver(name, self.app.settings.home, environment or self.app.settings.environment)

    def measuring(self) -> list[str]:
        """Ids of runs that live and hold no lease: before their fault, or after it. Their watchdogs' beats tell."""
        holding = {x.run_id for x in self.ledger.leases()}
        found: set[str] = set()
        for beat in (self.ledger.directory / "watchers").glob("*.beat"):
            try:
                fresh = self.clock.wall() - beat.stat().st_mtime < _BEAT_S
            except OSError:  # its run has just ended
                continue
            if fresh:
                found.add(beat.stem.rpartition("-")[0])
        return sorted(found - holding)

    def evidence(self, lease: Lease) -> list[str]:
        """What was read back from the target when the lease was closed; empty when that could not be written."""
        path = self.ledger.directory / "closed" / f"{lease.id}.{lease.driver}.evidence.json"
        try:
            return [str(line) for line in json.loads(path.read_text())["evidence"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []


def matching(leases: Sequence[Lease], run: str) -> list[Lease]:
    """Leases of a run id, of the start of one (four characters or more), or of an experiment."""
    exact = [x for x in leases if run in (x.run_id, x.experiment)]
    return exact or [x for x in leases if len(run) >= 4 and x.run_id.startswith(run)]


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


def runs_of(leases: Sequence[dict[str, Any]], measuring: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs whose process lives, with what they hold; `measuring` are those that hold nothing (yet, or any more)."""
    runs: dict[str, dict[str, Any]] = {}
    for lease in leases:
        if lease["owner"]["alive"]:
            run = runs.setdefault(
                lease["run_id"],
                {
                    "run_id": lease["run_id"],
                    "experiment": lease["experiment"],
                    "environment": lease["environment"],
                    "phase": "fault",
                    "fault": lease["fault"],
                    "pid": lease["owner"]["pid"],
                    "leases": [],
                    "targets": [],
                },
            )
            run["leases"].append(lease["id"])
            run["targets"] += lease["targets"]
    for run_id in measuring:
        nothing = {"experiment": None, "environment": None, "phase": "no fault active", "fault": None, "pid": None}
        runs[run_id] = {"run_id": run_id, **nothing, "leases": [], "targets": []}
    return list(runs.values())
