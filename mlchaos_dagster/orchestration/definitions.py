"""Everything Dagster loads: assets, checks, jobs, schedules, sensors, resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from mlchaos_dagster import settings as settings_module
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment, Suite
from mlchaos_dagster.orchestration import environment_assets, jobs, schedules, sensors
from mlchaos_dagster.orchestration.assets import build_assets
from mlchaos_dagster.orchestration.io import ResultsIOManager
from mlchaos_dagster.orchestration.ops import Pair
from mlchaos_dagster.orchestration.platform import RealPlatform
from mlchaos_dagster.orchestration.ports import Platform, Progress
from mlchaos_dagster.orchestration.session import sessions_resource
from mlchaos_dagster.settings import Settings


@dataclass(frozen=True)
class Library:
    """What is to be loaded: experiments per environment, and suites."""

    environments: tuple[Environment, ...]
    experiments: tuple[Experiment, ...]
    suites: tuple[Suite, ...] = ()

    def pairs(self) -> list[Pair]:
        """Every experiment in every environment that can serve it (its target and its fault's backend exist)."""
        return [(e, env) for env in self.environments for e in self.experiments if can_run(e, env)]


def can_run(experiment: Experiment, environment: Environment) -> bool:
    """Whether the environment knows the target and serves the fault."""
    return experiment.target in environment.targets and environment.backend_for(experiment.fault.kind) is not None


def read_library(settings: Settings, environments: Sequence[str] = ()) -> Library:
    """The library of the settings.

    Args:
        settings: where the library lies.
        environments: names; default the settings' environment.

    Raises:
        SpecError: files are wrong, with all their problems; or an environment does not exist.
    """
    from mlchaos_dagster.catalog import Catalog

    catalog = Catalog(settings.library)
    names = environments or (settings.environment,)
    return Library(
        environments=tuple(catalog.environment(n) for n in names),
        experiments=tuple(catalog.experiments()),
        suites=tuple(catalog.suites()),
    )


def resources(platform: Platform, progress: Progress | None = None, results: str = "") -> dict[str, object]:
    """Resources by key. Results lie in the state directory unless a base is given."""
    return {
        "platform": dg.ResourceDefinition.hardcoded_resource(platform, "Engine, judgement, evidence."),
        "sessions": sessions_resource(progress),
        "results_io": ResultsIOManager(base=results or str(platform.settings.home.assets)),
    }


def build_definitions(library: Library, platform: Platform, results: str = "") -> dg.Definitions:
    """All definitions.

    Every job, and ad-hoc materialisation (`executor`), runs in one process: the live run is handed from op to op,
    and between the end of a fault and the sampling of the recovery there is no process to start.
    """
    pairs = library.pairs()
    by_environment = {env.name: [p for p in pairs if p[1].name == env.name] for env in library.environments}
    suite_jobs = {
        (suite.name, env.name): jobs.suite_job(suite, env, by_environment[env.name])
        for suite in library.suites
        for env in library.environments
        if jobs.members(suite, by_environment[env.name])
    }
    return dg.Definitions(
        assets=[*build_assets(pairs), *_environment_assets(library, by_environment)],
        jobs=[*suite_jobs.values(), *jobs.operations(library.environments, library.experiments)],
        schedules=list(_schedules(library, by_environment, suite_jobs)),
        sensors=sensors.all_sensors(library.environments),
        resources=resources(platform, results=results),
        executor=dg.in_process_executor,
    )


def _environment_assets(library: Library, pairs: dict[str, list[Pair]]) -> Iterable[dg.AssetsDefinition]:
    for env in library.environments:
        yield from environment_assets.build(env, pairs[env.name])


def _schedules(
    library: Library,
    pairs: dict[str, list[Pair]],
    suite_jobs: dict[tuple[str, str], jobs.SuiteJob],
) -> Iterable[dg.ScheduleDefinition]:
    for suite in library.suites:
        for env in library.environments:
            job = suite_jobs.get((suite.name, env.name))
            if suite.schedule is not None and job is not None:
                yield schedules.suite_schedule(suite, suite.schedule, env, jobs.members(suite, pairs[env.name]), job)


def load(results: str = "", library: Sequence[str] = (), environments: Sequence[str] = ()) -> dg.Definitions:
    """Definitions of the surroundings: `MLCHAOS_*`, the shipped library and the given one.

    Args:
        results: where the IO manager keeps results; default the state directory, else a directory or s3://…
        library: library directories in front of the settings'.
        environments: names of environments; default `MLCHAOS_ENVIRONMENT`.
    """
    settings = settings_module.load()
    if library:
        settings = Settings(
            home=settings.home,
            environment=settings.environment,
            library=(*(Path(p) for p in library), *settings.library),
            color=settings.color,
            user=settings.user,
        )
    return build_definitions(read_library(settings, environments), RealPlatform(settings), results)
