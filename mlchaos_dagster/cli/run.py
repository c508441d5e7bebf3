"""`mlchaos run`: find out what to run and whether it can, then hand it to Dagster, then say what came of it.

Everything that can be wrong with the input is said before Dagster is imported and before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App, Names, common, current, leave
from mlchaos_dagster.cli.brought import is_file, no_lost_file, placed, read, taken, tell
from mlchaos_dagster.domain.units import show_duration
from mlchaos_dagster.errors import Problem, SpecError

if TYPE_CHECKING:
    from mlchaos_dagster.domain.environment import Environment
    from mlchaos_dagster.domain.manifests.drafts import Brought
    from mlchaos_dagster.domain.spec import Experiment
    from mlchaos_dagster.domain.stages import Progressive

_SOURCES = "NAME…, --suite S, --type KIND --target T, --config FILE, FILE of Litmus or Chaos Mesh"
_EXIT_ABORTED = 4
_NO_SCALE = 1e-9
"""A scale at which every window is as long as `duration_min`, or as the experiment itself where that is shorter."""


@dataclass
class Request:
    """What is to be run."""

    experiments: list[Experiment]
    environment: Environment


@click.command("run")
@click.argument("names", nargs=-1, metavar="[NAME|FILE]...", type=Names("experiment"))
@click.option("--suite", type=Names("suite"), metavar="SUITE", help="Run the experiments of a suite.")
@click.option("--type", "kind", metavar="KIND", help="Run one fault without a file, such as pod_kill.")
@click.option("--name", metavar="NAME", help="Name of the run of --type.")
@click.option(
    "--target", "--target-app", "target", metavar="TARGET", help="Target of --type; of FILE, instead of its own."
)
@click.option(
    "--duration",
    metavar="TIME",
    help="Length of the fault: of --type; of a NAME at most its own. 30s, 5m, or bare seconds.",
)
@click.option("--param", multiple=True, metavar="NAME=VALUE", help="Parameter of --type, such as latency=300ms.")
@click.option("--safety-threshold", metavar="0..1", help="Health score below which nothing starts.")
@click.option("--stages", metavar="FILE", help="Run NAME in the stages of a file, each only after the one before held.")
@click.option("--config", metavar="FILE", help="An experiment, or the words of --type, as YAML or JSON.")
@click.option("--backend", metavar="BACKEND", help="Which backend makes the faults, where the environment has several.")
@click.option("--shadow", is_flag=True, help="Everything but the injection.")
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Seed of all random choices (default: from the run id)."
)
@common
def command(names: tuple[str, ...], **options: Any) -> None:
    """Run experiments, one after the other: guards, baseline, fault, recovery, verdict, report.

    FILE is YAML of Litmus or Chaos Mesh: a ChaosEngine, a NetworkChaos, … (one of ours goes with --config).

    \b
    Exit code: 0 HELD · 1 DEVIATED · 2 wrong input · 3 REFUSED · 4 ABORTED · 5 INCONCLUSIVE · 6 internal error ·
    70 UNCLEAN. Of several runs: the first of 70, 6, 2, 4, 1, 5, 3, 0 that occurred; 4 for what was left out after a
    stop. Ctrl-C stops, recovers, and starts nothing more.
    """  # noqa: D301  click wants the real character
    app = current()
    request = prepare(app, names, options)
    from mlchaos_dagster.wiring import check_surroundings

    check_surroundings(request.environment, app.settings)
    from mlchaos_dagster.cli.execute import execute

    try:
        code = execute(
            app,
            request.experiments,
            request.environment,
            shadow=options["shadow"],
            seed=options["seed"],
            suite=options["suite"] or "",
            again=_again(app, {**options, "files": [n for n in names if is_file(n)]}),
        )
    except KeyboardInterrupt:
        # Between runs, or so early or late that the run itself could not take it: nothing is claimed here.
        app.note("ABORTED  interrupted; `mlchaos status` shows whether anything is left")
        code = _EXIT_ABORTED
    leave(code)


def _again(app: App, options: dict[str, Any]) -> str | None:
    """The words of this very call where a name alone would not find the experiment; else None."""
    import shlex
    import sys

    by_name = not any(options[o] for o in ("kind", "config", "stages", "backend", "duration", "files"))
    by_name = by_name and not app.given.get("library")
    return None if by_name else f"mlchaos {shlex.join(sys.argv[1:])}"


def prepare(app: App, names: tuple[str, ...], options: dict[str, Any]) -> Request:
    """What the arguments mean.

    Raises:
        SpecError: with every problem found; nothing was touched.
    """  # noqa: D301 - click wants the control character itself
    _one_source(names, options)
    no_lost_file(names)
    environment = app.environment
    threshold = _threshold(options["safety_threshold"])
    if options["kind"]:
        request = _from_words(app, environment, options)
    elif brought := _brought(names, options):
        request = _from_theirs(app, environment, brought, options["target"] or "")
    elif options["config"]:
        if options["target"]:
            raise SpecError("goes with --type, or with files of Litmus and Chaos Mesh.", "--target")
        request, in_file = _from_file(app, environment, Path(options["config"]))
        threshold = in_file if threshold is None else threshold
    elif options["stages"]:
        request = Request(_in_stages(app, environment, names[0], Path(options["stages"])), environment)
    elif options["suite"]:
        request = Request(_of_suite(app, environment, options["suite"]), environment)
    else:
        _no_files(app, names)
        wanted = [n for name in names for n in app.catalog.expand(name)]
        request = Request(_ready(app, wanted, environment), environment)
    if threshold is not None:
        limits = request.environment.limits.model_copy(update={"health_at_least": threshold})
        request.environment = request.environment.model_copy(update={"limits": limits})
    if options["backend"]:
        from mlchaos_dagster.domain.checks import through

        request.environment = through(request.environment, options["backend"], request.experiments, "--backend")
    if options["duration"] and not options["kind"]:
        _shorten(app, request, options["duration"])
    return request


def _shorten(app: App, request: Request, text: str) -> None:
    """Windows of this length in place of the environment's scaled ones, as if its `duration_min` said so.

    The experiments stay what they are, so every record tells of both lengths.
    """
    from mlchaos_dagster.cli.adhoc import seconds

    try:
        wanted = seconds(text)
    except ValueError as e:
        raise SpecError(str(e), "--duration") from e
    environment = request.environment
    for experiment in request.experiments:
        if wanted > experiment.duration:
            own = f"{experiment.name} lasts {show_duration(experiment.duration)} by itself"
            app.note(f"{own}; it is not made longer")
    request.environment = environment.model_copy(update={"duration_scale": _NO_SCALE, "duration_min": wanted})


def _one_source(names: tuple[str, ...], options: dict[str, Any]) -> None:
    given = [
        label
        for label, value in (
            ("NAME", names),
            ("--suite", options["suite"]),
            ("--type", options["kind"]),
            ("--config", options["config"]),
        )
        if value
    ]
    if options["stages"] and len(names) != 1:
        what = "goes with one NAME of an experiment without stages, such as: mlchaos run serving-pod-failure --stages FILE."
        raise SpecError(what, "--stages")
    if not given:
        raise SpecError(f"nothing to run. Allowed: {_SOURCES}. `mlchaos list` shows the names.", "run")
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} at the same time. Allowed: one of {_SOURCES}.", "run")
    if not options["kind"]:
        theirs = options["config"] or any(is_file(n) for n in names)
        for option in ("name", "target", "param"):
            if options[option] and not (option == "target" and theirs):
                raise SpecError(f"goes with --type only. Allowed: {_SOURCES}.", f"--{option}")
        if options["duration"] and options["config"]:
            raise SpecError("goes with NAME, --suite or --type: a file says its own.", "--duration")
    elif not options["target"]:
        raise SpecError("missing; --type needs it. `mlchaos list` shows the targets in use.", "--target")


def _threshold(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise SpecError(f'"{text}" is not a health score. Allowed: 0 to 1, such as 0.8.', "--safety-threshold")
    return value


def _from_words(app: App, environment: Environment, options: dict[str, Any]) -> Request:
    from mlchaos_dagster.cli.adhoc import AdHoc, build, params_of

    words = AdHoc(
        type=options["kind"],
        target=options["target"],
        name=options["name"] or "",
        duration=options["duration"] or "30s",
        params=params_of(options["param"]),
    )
    return _unscaled(build(words, environment), environment)


def _from_file(app: App, environment: Environment, path: Path) -> tuple[Request, float | None]:
    from mlchaos_dagster.catalog import read_spec, runnable, show_source
    from mlchaos_dagster.cli.adhoc import AdHoc, AdHocFile, build
    from mlchaos_dagster.domain.checks import check_experiment
    from mlchaos_dagster.domain.nodes import read_document
    from mlchaos_dagster.domain.parsing import kind_of, sort_problems, validate
    from mlchaos_dagster.domain.spec import Experiment
    from mlchaos_dagster.domain.stages import Progressive

    document = read_document(read_spec(path), show_source(path))
    if kind_of(document) == "stages":
        what = f"stages alone, no experiment. Run them on an experiment, such as: mlchaos run serving-pod-failure --stages {path}."
        raise SpecError(what, document.where(("progressive_chaos",), key=True))
    if not document.has(("type",)):
        in_stages = document.has(("stages",))
        parsed = runnable(validate(document, Progressive) if in_stages else validate(document, Experiment))
        problems = sort_problems([p for one in parsed for p in check_experiment(one.value, environment, one)])
        if problems:
            raise SpecError(problems)
        return Request([one.value for one in parsed], environment), None
    words = validate(document, AdHocFile).value
    target = words.target or words.target_app
    if target is None:
        raise SpecError("missing field target.", document.where(()))
    try:
        experiment = build(AdHoc(words.type, target, words.name, words.duration, words.params), environment)
    except SpecError as e:
        places = {"--type": "type", "--target": "target", "--name": "name", "--param": "params"}
        moved = [
            Problem(document.where((places.get(p.where, ""),)), f"{places[p.where]}: {p.what}") for p in e.problems
        ]
        raise SpecError(moved) from e
    return _unscaled(experiment, environment), words.safety_threshold


def _brought(names: tuple[str, ...], options: dict[str, Any]) -> list[Brought]:
    """What files of other tools bring, by FILE or --config; empty: the arguments are no such files.

    Raises:
        SpecError: one of them cannot be run, or names and files are mixed.
    """
    paths = [Path(n) for n in names if is_file(n)] or ([Path(options["config"])] if options["config"] else [])
    if not paths or options["stages"]:
        return []
    theirs = [path for path in paths if read(path) is not None]
    if not theirs:
        return []
    if len(theirs) < max(len(names), len(paths)):
        other = next((n for n in names if Path(n) not in theirs), "")
        raise SpecError("does not go together with files of Litmus or Chaos Mesh. Allowed: one call for each.", other)
    return taken(theirs)


def _from_theirs(app: App, environment: Environment, files: list[Brought], target: str) -> Request:
    """Their durations are meant as they are; the target of each is the environment's own, or is added to a copy of it."""
    found = placed(files, environment, target)
    for one in files:
        tell(app, one)
        for suite in one.suites:
            if suite.schedule is not None:
                app.note(
                    f"hint     {one.source}: run once, now; `mlchaos import {one.source} --to DIR` keeps its schedule, too"
                )
    environment = found[-1].environment.model_copy(update={"duration_scale": 1.0, "duration_min": 0.0})
    return Request([one.experiment for one in found], environment)


def _no_files(app: App, names: tuple[str, ...]) -> None:
    """A file where a name is expected: say how a file is run. Raises SpecError."""
    for name in names:
        if Path(name).suffix in (".yaml", ".yml", ".json") and Path(name).is_file():
            from mlchaos_dagster.catalog import read_spec
            from mlchaos_dagster.domain.nodes import read_document
            from mlchaos_dagster.domain.parsing import kind_of

            how = {
                "stages": f"it holds stages alone. Run them on an experiment, such as: mlchaos run serving-pod-failure --stages {name}",
                "suite": "it is a suite. Put it into suites/ of a --library DIR, and name it with --suite",
                "environment": "it is an environment. Put it into environments/ of a --library DIR, and name it with -e",
            }
            kind = kind_of(read_document(read_spec(Path(name)), name))
            raise SpecError(f"{how.get(kind, f'it is a file. Run it: mlchaos run --config {name}')}.", name)


def _of_suite(app: App, environment: Environment, name: str) -> list[Experiment]:
    """A suite of everything takes what can run here, and says what it leaves out; any other is taken at its word."""
    from mlchaos_dagster.domain.checks import check_experiment

    wanted = list(app.catalog.suite(name).experiments)
    if app.catalog.suite(name, expanded=False).everything:
        here = [n for n in wanted if not check_experiment(app.catalog.experiment(n), environment)]
        if left := [n for n in wanted if n not in here]:
            app.note(f"left out, because {environment.name} cannot run them: {', '.join(left)}")
        wanted = here
    return _ready(app, wanted, environment)


def _in_stages(app: App, environment: Environment, name: str, path: Path) -> list[Experiment]:
    """A library experiment in the stages of a file.

    Raises:
        SpecError: either is wrong, or they do not go together; with places in the file of stages.
    """
    from functools import partial

    from pydantic import ValidationError

    from mlchaos_dagster.catalog import read_spec, show_source
    from mlchaos_dagster.domain.checks import check_experiment
    from mlchaos_dagster.domain.nodes import read_document
    from mlchaos_dagster.domain.parsing import Parsed, sort_problems, validate
    from mlchaos_dagster.domain.stages import StageFile, staged

    experiment = app.catalog.ready(name, environment)
    document = read_document(read_spec(path), show_source(path))
    stages = validate(document, StageFile).value.progressive_chaos
    try:
        progressive = staged(experiment, stages)
    except ValidationError as e:
        what = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(f"with {name}: {what}", document.where(("progressive_chaos",), key=True)) from e
    problems: list[Problem] = []
    for i, one in enumerate(progressive.experiments()):
        problems += check_experiment(one, environment, Parsed(one, document, partial(_in_file, progressive, i)))
    if problems:
        raise SpecError(sort_problems(problems))
    return progressive.experiments()


def _in_file(progressive: Progressive, index: int, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where in a file of stages a field of a stage's experiment stands; at its stage when it stands elsewhere."""
    head, *rest = progressive.origin(index, path)
    return ("progressive_chaos", *rest) if head == "stages" else ("progressive_chaos", index)


def _unscaled(experiment: Experiment, environment: Environment) -> Request:
    """Whoever types a duration means it: the environment's scale is for experiments written for production."""
    from mlchaos_dagster.domain.checks import check_experiment

    problems = check_experiment(experiment, environment)
    if problems:
        raise SpecError(problems)
    return Request([experiment], environment.model_copy(update={"duration_scale": 1.0, "duration_min": 0.0}))


def _ready(app: App, names: list[str], environment: Environment) -> list[Experiment]:
    found: list[Experiment] = []
    problems: list[Problem] = []
    for name in names:
        try:
            found.append(app.catalog.ready(name, environment))
        except SpecError as e:
            problems += e.problems
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    return found
