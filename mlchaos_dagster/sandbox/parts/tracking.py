"""Experiment tracking: a server with a database and its standby, and the workflow runner that logs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Part, Process, View

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.supervisor import Supervisor

_OURS = ("tracking", "tracking-db", "tracking-db-standby", "workflow")


def _settings(supervisor: Supervisor, name: str) -> dict[str, Any]:
    return {"data": str(supervisor.directory / "data")} if name in _OURS else {}


def _read(view: View) -> dict[str, float]:
    server, runner = view.states.get("tracking", {}), view.states.get("workflow", {})
    found = {
        "workflow_rate": runner.get("rate"),
        "spool_length": runner.get("spool_length"),
        "lost_metrics": runner.get("lost"),
        "tracking_breaker": runner.get("breaker_value"),
        "tracking_latency": runner.get("log_p95_s"),
        "database_intact": server.get("database_intact"),
        "on_standby": server.get("on_standby"),
        "tracking_error_rate": server.get("error_rate"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


PART = Part(
    name="tracking",
    describe="Tracking server with a database and its standby; a workflow runner that logs to it",
    processes=(
        Process("tracking-db", "tracking_db"),
        Process("tracking-db-standby", "tracking_db"),
        Process("proxy-tracking", "proxy"),
        Process("tracking", "tracking"),
        Process("workflow", "workflow"),
    ),
    links={
        "tracking->database": ("proxy-tracking", "tracking-db"),
        "workflow->tracking": ("proxy-tracking", "tracking"),
    },
    peers={
        "tracking": {"database": "tracking->database", "standby": "tracking-db-standby"},
        "workflow": {"tracking": "workflow->tracking"},
    },
    signals=(
        "workflow_rate",
        "spool_length",
        "lost_metrics",
        "tracking_breaker",
        "tracking_latency",
        "database_intact",
        "on_standby",
        "tracking_error_rate",
    ),
    read=_read,
    settings=_settings,
)
