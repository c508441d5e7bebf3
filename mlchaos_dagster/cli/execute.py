"""The running part of `mlchaos run`: Dagster, progress on stderr, results on stdout, the exit code."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import EXIT_INTERNAL, EXIT_USAGE, Outcome, counted, exit_code_of
from mlchaos_dagster.domain.spec import Experiment

if TYPE_CHECKING:
    from mlchaos_dagster.orchestration.launch import LaunchResult

_WIDEST = 140


class _Relay:
    """The one progress that is given to Dagster; what it stands for changes from experiment to experiment."""

    def __init__(self) -> None:
        self.target: Any = None

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if self.target is not None:
            self.target(kind, data)


def execute(
    app: App,
    experiments: Sequence[Experiment],
    environment: Environment,
    *,
    shadow: bool = False,
    seed: int | None = None,
    suite: str = "",
    again: str | None = None,
) -> int:
    """Run them in order; print each result as it is there. Returns the exit code.

    `again` is the command that runs them once more; None: each by its name.
    """
    from mlchaos_dagster.orchestration.launch import launch

    relay, order = _Relay(), _Order(experiments)
    results = launch(
        experiments,
        environment,
        app.settings,
        shadow=shadow,
        progress=relay,
        started_by=app.settings.user or "mlchaos run",
        seed=seed,
        suite=suite,
        skip=lambda experiment: order.because(experiment) is not None,
    )
    outcomes: list[Outcome] = []
    wrong: set[int] = set()
    stopped = False
    try:
        for number, experiment in enumerate(experiments, 1):
            if because := order.because(experiment):
                app.note(f"{number} of {len(experiments)}  {experiment.name} not started: {because}")
                continue
            if len(experiments) > 1:
                app.note(f"{number} of {len(experiments)}  {experiment.name}")
            with _progress(experiment, environment, shadow) as relay.target:
                result = next(results, None)
            if result is None:
                stopped = True
                break
            if result.kind == "usage":
                wrong.add(len(outcomes))
            outcomes.append(_outcome(result))
            order.ended(experiment, _word(result))
            stopped = result.cancelled
            left = order.left_out_by(experiment, stopped)
            with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the run's exit code still counts
                _show(app, result, experiment, environment, shadow, again, left)
            if stopped:
                break
    except KeyboardInterrupt:
        if not outcomes:
            raise
        stopped = True
        app.note("ABORTED  interrupted; `mlchaos status` shows whether anything is left")
    left = [e.name for e in order.to_come()] if stopped else []
    if left:
        app.note(f"not started, because a run was stopped: {', '.join(left)}")
    if len(outcomes) > 1:
        app.note(_summary(outcomes))
    # What was asked for and not run because of a stop is no pass, whatever the others found.
    code = exit_code_of([*(o for i, o in enumerate(outcomes) if i not in wrong), *([Outcome.ABORTED] if left else [])])
    return EXIT_USAGE if wrong and code not in (Outcome.UNCLEAN.exit_code, EXIT_INTERNAL) else code


class _Order:
    """Which experiments of one call may start, given what those before them came to.

    The guard would refuse them as well; here not even a run is made of what cannot start.
    """

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.experiments = experiments
        self.words: dict[str, str] = {}
        """Experiment → outcome of its run in this call, the last one where it ran twice."""

    def ended(self, experiment: Experiment, word: str) -> None:
        """It ran, and came to this."""
        self.words[experiment.name] = word

    def because(self, experiment: Experiment) -> str | None:
        """Why it cannot start: `serving-progressive-1 DEVIATED`; None when nothing in this call keeps it from it."""
        by_name = {e.name: e for e in self.experiments}
        name = experiment.depends_on
        for _ in self.experiments:
            if name is None or name not in by_name:
                return None  # what happened before this call is for the guard to judge
            if name in self.words:
                return None if self.words[name] == Outcome.HELD.value else f"{name} {self.words[name]}"
            name = by_name[name].depends_on
        return None

    def to_come(self) -> list[Experiment]:
        """Neither run nor kept from running by an earlier one."""
        return [e for e in self.experiments if e.name not in self.words and self.because(e) is None]

    def left_out_by(self, experiment: Experiment, stopped: bool) -> list[dict[str, str]]:
        """What does not start because of the run that just ended."""
        mine = f"{experiment.name} {self.words[experiment.name]}"
        found: list[dict[str, str]] = []
        for e in self.experiments:
            because = self.because(e)
            if e.name not in self.words and (because == mine or (stopped and because is None)):
                found.append({"experiment": e.name, "because": because or f"{mine}, a run was stopped"})
        return found


@contextlib.contextmanager
def _progress(experiment: Experiment, environment: Environment, shadow: bool) -> Iterator[Any]:
    from mlchaos_dagster.evidence.live import LiveView, PlainProgress

    if sys.stderr.isatty():
        with LiveView(experiment, environment, "", shadow=shadow) as view:
            yield view
    else:
        yield PlainProgress(sys.stderr, prefix=f"{experiment.name}  ")


def _outcome(result: LaunchResult) -> Outcome:
    """An error of ours is one, unless something worse (a fault that may be live) was found."""
    if result.verdict is None:
        return Outcome.ABORTED if result.cancelled else Outcome.ERROR
    if result.error and result.verdict.outcome is not Outcome.UNCLEAN:
        return Outcome.ERROR
    return counted(result.verdict.outcome, result.record is not None and result.record.shadow)


def _word(result: LaunchResult) -> str:
    """The outcome as people read it: a shadow run never says HELD."""
    shadow = result.verdict is not None and result.record is not None and result.record.shadow
    return f"SHADOW-{result.verdict.outcome.value}" if shadow and result.verdict else _outcome(result).value


def _show(
    app: App,
    result: LaunchResult,
    experiment: Experiment,
    environment: Environment,
    shadow: bool,
    again: str | None,
    not_started: Sequence[dict[str, str]],
) -> None:
    for problem in result.problems:
        app.note(problem)
    outcome = _outcome(result)
    record_path = str(result.record_path) if result.record_path else None
    report_path = str(result.report_path) if result.report_path else None
    if result.record is None or result.verdict is None:
        from mlchaos_dagster.evidence.json_output import unjudged_json

        value = unjudged_json(result.run_id, experiment, environment, outcome, result.error, shadow=shadow)
        app.dump({**value, "not_started": not_started})
        word = "error:" if outcome is Outcome.ERROR else f"{outcome.value} "
        app.note(f"{word} {experiment.name}, run {result.run_id}: {result.error}")
        return
    if result.error:
        app.note(f"error: {experiment.name}, run {result.run_id}: {result.error}")
    if app.json:
        from mlchaos_dagster.evidence.json_output import run_json

        value = run_json(result.record, result.verdict, record_path, report_path)
        value["not_started"] = not_started
        value["durations_s"]["overhead"] = round(result.overhead_s, 3)
        click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
        return
    from mlchaos_dagster.evidence.terminal import end_block

    width = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)
    block = end_block(
        result.record, result.verdict, color=app.color, width=width, report_path=report_path or "", again=again
    )
    click.echo(block, color=app.color or None)


def _summary(outcomes: Sequence[Outcome]) -> str:
    counts = {o: outcomes.count(o) for o in Outcome if o in outcomes}
    return f"{len(outcomes)} runs: " + ", ".join(f"{n} {o.value}" for o, n in counts.items())
