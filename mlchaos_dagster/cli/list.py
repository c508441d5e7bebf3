"""`mlchaos list`."""

from __future__ import annotations

import click

from mlchaos_dagster.cli.app import common, current, table
from mlchaos_dagster.domain.checks import check_experiment
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.domain.stages import Progressive
from mlchaos_dagster.domain.units import show_duration

_TITLE = 40
"""Of a title so many characters are worth more than a further column."""


@click.command("list")
@common
def command() -> None:
    """List experiments, suites and environments of the library."""
    app = current()
    environment = app.environment
    experiments, suites, environments = app.catalog.experiments(), app.catalog.suites(), app.catalog.environments()
    app.dump(
        {
            "environment": environment.name,
            "experiments": [
                {
                    "name": e.name,
                    "title": e.title,
                    "area": e.area,
                    "fault": e.fault.kind,
                    "backend": environment.backend_for(e.fault.kind),
                    "target": e.target,
                    "duration_s": e.duration,
                    "window_s": environment.scaled(e.duration),
                    "owner": e.owner,
                    "depends_on": e.depends_on,
                    "runs_here": not check_experiment(e, environment),
                }
                for e in experiments
            ],
            "in_stages": [
                {"name": p.name, "title": p.title, "experiments": p.stage_names}
                for p in app.catalog.written()
                if isinstance(p, Progressive)
            ],
            "suites": [{"name": s.name, "title": s.title, "experiments": s.experiments} for s in suites],
            "environments": [{"name": e.name, "title": e.title} for e in environments],
        }
    )
    rows = [_row(spec, environment) for spec in app.catalog.written()]
    shown = _fitting(("EXPERIMENT", "AREA", "FAULT", "TARGET", "WINDOW", "TITLE"), rows, app.width)
    app.out(shown)
    if "→" in shown:
        app.out(f"(WINDOW: as written → in {environment.name}; `mlchaos describe NAME` shows all of one)")
    app.out()
    app.out(
        table(
            ("SUITE", "EXPERIMENTS", "TITLE"), [(s.name, str(len(s.experiments)), s.title) for s in suites], app.width
        )
    )
    app.out()
    mark = {environment.name: "*"}
    named = [(e.name + mark.get(e.name, ""), _backends(e), e.title) for e in environments]
    app.out(table(("ENVIRONMENT", "BACKENDS", "TITLE"), named, app.width))


def _fitting(headers: tuple[str, ...], rows: list[list[str]], width: int) -> str:
    """The table with as many columns as leave room for a title; the title says more than where it belongs."""
    left = list(range(len(headers)))
    for column in ("AREA", "WINDOW", "TARGET", "FAULT"):
        others = sum(max(len(line[i]) for line in (headers, *rows)) + 2 for i in left[:-1])
        if not width or width - others >= _TITLE:
            break
        left.remove(headers.index(column))
    return table([headers[i] for i in left], ([row[i] for i in left] for row in rows), width)


def _backends(environment: Environment) -> str:
    """All of them, and which one serves what it shares with another."""
    return ", ".join(b + (" (preferred)" if b == environment.prefer else "") for b in environment.backends)


def _row(spec: Experiment | Progressive, environment: Environment) -> list[str]:
    """One experiment, or one in stages: a line either way."""
    ones = [spec] if isinstance(spec, Experiment) else spec.experiments()
    long = show_duration(sum(e.duration for e in ones))
    short = show_duration(sum(environment.scaled(e.duration) for e in ones))
    window = long if long == short else f"{long} → {short}"
    here = "" if not any(check_experiment(e, environment) for e in ones) else f"(not in {environment.name}) "
    stages = "" if isinstance(spec, Experiment) else f" ({len(ones)} stages)"
    return [spec.name, spec.area, spec.fault.kind, spec.target, window, f"{here}{spec.title}{stages}"]
