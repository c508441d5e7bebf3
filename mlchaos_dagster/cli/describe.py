"""`mlchaos describe NAME`."""

from __future__ import annotations

import click

from mlchaos_dagster.cli.app import Names, common, current
from mlchaos_dagster.domain.units import show_duration


@click.command("describe")
@click.argument("name", metavar="NAME", type=Names("experiment"))
@common
def command(name: str) -> None:
    """Show one experiment as a document: hypothesis, scope, prerequisites, success criteria, steps, rollback."""
    from mlchaos_dagster.domain.checks import check_experiment

    app = current()
    environment = app.environment
    experiment = app.catalog.experiment(name)
    problems = check_experiment(experiment, environment)
    backend = environment.backend_for(experiment.fault.kind)
    app.dump(
        {
            "experiment": experiment.model_dump(mode="json", by_alias=True, exclude_none=True),
            "environment": environment.name,
            "backend": backend,
            "window_s": environment.scaled(experiment.duration),
            "source": str(app.catalog.source(name)),
            "problems": [p.what for p in problems],
        }
    )
    if app.json:
        return
    from mlchaos_dagster.evidence.document import experiment_document

    app.out(experiment_document(experiment, environment).rstrip())
    for problem in problems:
        app.out(f"\nIn {environment.name} it cannot run: {problem.what}")
    if not problems:
        app.out(f"\nRun it: mlchaos run {name} (window {show_duration(environment.scaled(experiment.duration))} here)")
