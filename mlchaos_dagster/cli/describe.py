"""`mlchaos describe NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlchaos_dagster.cli.app import App, Names, common, current
from mlchaos_dagster.cli.brought import no_file
from mlchaos_dagster.domain.units import show_duration

if TYPE_CHECKING:
    from mlchaos_dagster.domain.environment import Environment
    from mlchaos_dagster.domain.stages import Progressive


@click.command("describe")
@click.argument("name", metavar="NAME", type=Names("experiment"))
@common
def command(name: str) -> None:
    """Show one experiment as a document: hypothesis, scope, prerequisites, success criteria, steps, rollback."""
    from mlchaos_dagster.domain.checks import check_experiment

    app = current()
    no_file(name)
    environment = app.environment
    progressive = app.catalog.progressive(name)
    if progressive is not None:
        _in_stages(app, progressive, environment)
        return
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
        window = show_duration(environment.scaled(experiment.duration))
        app.out(f"\nRun it: mlchaos run {name} -e {environment.name} (window {window} here)")


def _in_stages(app: App, progressive: Progressive, environment: Environment) -> None:
    from mlchaos_dagster.domain.checks import check_experiment

    experiments = progressive.experiments()
    problems = list(dict.fromkeys(p.what for e in experiments for p in check_experiment(e, environment)))
    app.dump(
        {
            "experiment": progressive.model_dump(mode="json", by_alias=True, exclude_none=True),
            "stages": [e.model_dump(mode="json", by_alias=True, exclude_none=True) for e in experiments],
            "environment": environment.name,
            "backend": environment.backend_for(progressive.fault.kind),
            "window_s": [environment.scaled(e.duration) for e in experiments],
            "source": str(app.catalog.source(progressive.name)),
            "problems": problems,
        }
    )
    if app.json:
        return
    from mlchaos_dagster.evidence.document import stages_document

    app.out(stages_document(progressive, environment).rstrip())
    for problem in problems:
        app.out(f"\nIn {environment.name} it cannot run: {problem}")
    if not problems:
        app.out(f"\nRun all stages, in order: mlchaos run {progressive.name} -e {environment.name}")
