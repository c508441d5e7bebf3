"""`mlchaos list`."""

from __future__ import annotations

import click

from mlchaos_dagster.cli.app import common, current, table


@click.command("list")
@common
def command() -> None:
    """List experiments, suites and environments of the library."""
    from mlchaos_dagster.domain.checks import check_experiment
    from mlchaos_dagster.domain.units import show_duration

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
                    "target": e.target,
                    "duration_s": e.duration,
                    "window_s": environment.scaled(e.duration),
                    "owner": e.owner,
                    "runs_here": not check_experiment(e, environment),
                }
                for e in experiments
            ],
            "suites": [{"name": s.name, "title": s.title, "experiments": s.experiments} for s in suites],
            "environments": [{"name": e.name, "title": e.title} for e in environments],
        }
    )
    rows: list[list[str]] = []
    for e in experiments:
        long, short = show_duration(e.duration), show_duration(environment.scaled(e.duration))
        window = long if long == short else f"{long} → {short}"
        here = "" if not check_experiment(e, environment) else f"(not in {environment.name}) "
        rows.append([e.name, e.area, e.fault.kind, e.target, window, here + e.title])
    app.out(table(("EXPERIMENT", "AREA", "FAULT", "TARGET", "WINDOW", "TITLE"), rows, app.width))
    app.out()
    app.out(
        table(
            ("SUITE", "EXPERIMENTS", "TITLE"), [(s.name, str(len(s.experiments)), s.title) for s in suites], app.width
        )
    )
    app.out()
    mark = {environment.name: "*"}
    named = [(e.name + mark.get(e.name, ""), ", ".join(e.backends), e.title) for e in environments]
    app.out(table(("ENVIRONMENT", "BACKENDS", "TITLE"), named, app.width))
