"""Experiments from the command line, as Dagster runs of this process: the same ops, the same history."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.assets import build_assets
from mlchaos_dagster.orchestration.definitions import resources
from mlchaos_dagster.orchestration.instance import open_instance
from mlchaos_dagster.orchestration.platform import RealPlatform
from mlchaos_dagster.orchestration.ports import Platform, Progress
from mlchaos_dagster.orchestration.session import WORD_OF_SOMEBODY
from mlchaos_dagster.settings import Settings

USAGE = frozenset({"SpecError", "ConfigError"})
"""Errors of which errors.py promises that nothing was touched."""
EVENT_LOG_SAYS = "Exception while writing logger call to event log"
"""Dagster writes this to stderr, with the SQL statement and its values, before it raises the same."""


@dataclass(frozen=True)
class LaunchResult:
    """What came of one experiment."""

    run_id: str
    record: RunRecord | None
    verdict: Verdict | None
    record_path: Path | None
    report_path: Path | None
    error: str = ""
    """An error of ours, or that it never began, in one line."""
    kind: str = ""
    """`usage` when the error is a wrong input or surrounding, and nothing was touched."""
    cancelled: bool = False
    """Somebody said stop, in whatever phase: what was to come after it does not start."""
    overhead_s: float = 0.0
    """Everything but guards, baseline, window and recovery."""
    problems: tuple[str, ...] = field(default=())
    """What could not be written, such as the report."""


def launch(
    experiments: Sequence[Experiment],
    environment: Environment,
    settings: Settings,
    *,
    shadow: bool = False,
    progress: Progress | None = None,
    started_by: str = "",
    seed: int | None = None,
    verbose: bool = False,
    suite: str = "",
    platform: Platform | None = None,
    skip: Callable[[Experiment], bool] = lambda experiment: False,
) -> Iterator[LaunchResult]:
    """One Dagster run per experiment, in order, in this process and its main thread.

    `skip` is asked of each when its turn comes, so that what the earlier ones came to can decide; there is then no run.

    Once somebody said stop (a signal, a stop file, the lever, Dagster), whatever was going on, the rest does not
    start. Nothing is printed unless `verbose`, and nothing but `ConfigError` is raised.

    Raises:
        ConfigError: Dagster's storage cannot be opened; nothing was touched.
    """
    platform = platform or RealPlatform(settings)
    with _quiet(verbose):
        instance = open_instance(settings.home)
    with contextlib.ExitStack() as stack:
        stack.callback(_dispose, instance, verbose)
        pulled = platform.lever() is not None
        for experiment in experiments:
            if skip(experiment):
                continue
            begun = time.monotonic()
            run_id = str(uuid.uuid4())
            tags = {
                **keys.run_tags(experiment, environment),
                keys.TAG_STARTED_BY: started_by or settings.user or "mlchaos run",
                **({keys.TAG_SHADOW: "true"} if shadow else {}),
                **({keys.TAG_SEED: str(seed)} if seed is not None else {}),
                **({keys.TAG_SUITE: suite} if suite else {}),
            }
            kept = _Keeper(platform)
            with _Heard() as heard:
                with _quiet(verbose), _own_signals():
                    end = _execute(kept, experiment, environment, instance, run_id, tags, progress, verbose)
                with _own_signals(), _deaf():
                    kept.settle()
                    # A lever that was pulled before all this refuses runs by itself, each with its reason.
                    end.stopped |= heard.interrupted() or (platform.lever() is not None and not pulled)
                    result = _result(kept, run_id, end, time.monotonic() - begun)
            yield result
            if result.cancelled or (platform.lever() is not None and not pulled):
                return


class _Keeper:
    """The platform, remembering what was judged: a full disk must not lose a verdict on its way to the terminal."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self.record: RunRecord | None = None
        self.verdict: Verdict | None = None
        self.published: Any = None
        self._run: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def build_run(self, *of: Any, **more: Any) -> Any:
        """As `Platform.build_run`."""
        self._run = self._platform.build_run(*of, **more)
        return self._run

    def settle(self) -> None:
        """Judge what Dagster did not get to: its storage fails on a full disk, the facts are in memory."""
        if self.verdict is not None or not getattr(self._run, "guards", ()):
            return  # told already, or there is nothing to tell: no guard was asked
        with contextlib.suppress(Exception):
            record: RunRecord = self._run.finish()
            self.record, self.verdict = record, self._platform.judge(record, self._run.samples)
            self.published = self._platform.publish(record, self._run.samples, self.verdict)

    def publish(self, record: RunRecord, samples: Any, verdict: Verdict) -> Any:
        """As `Platform.publish`."""
        self.record, self.verdict = record, verdict
        self.published = self._platform.publish(record, samples, verdict)
        return self.published


@dataclass
class _End:
    """How a Dagster run ended."""

    error: str = ""
    kind: str = ""
    stopped: bool = False


def _execute(
    platform: Any,
    experiment: Experiment,
    environment: Environment,
    instance: dg.DagsterInstance,
    run_id: str,
    tags: dict[str, str],
    progress: Progress | None,
    verbose: bool,
) -> _End:
    """Run it. Never raises."""
    end = _End()
    try:
        _execute_job(platform, experiment, environment, instance, run_id, tags, progress, verbose, end)
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        # Dagster raises what the report op re-raised; the run has its record, verdict and status by now. Or it came
        # before there was a run.
        end.stopped = True
    except Exception as e:  # noqa: BLE001 - a full disk fails wherever Dagster stores something; the verdict is kept
        end.error = f"Dagster could not go on or store the run: {_line(e)}"
    return end


def _execute_job(
    platform: Any,
    experiment: Experiment,
    environment: Environment,
    instance: dg.DagsterInstance,
    run_id: str,
    tags: dict[str, str],
    progress: Progress | None,
    verbose: bool,
    end: _End,
) -> None:
    definitions = dg.Definitions(
        assets=build_assets([(experiment, environment)]),
        resources=resources(platform, progress),
        executor=dg.in_process_executor,
    )
    job = definitions.resolve_implicit_global_asset_job_def()
    level = "INFO" if verbose else "CRITICAL"
    result = job.execute_in_process(
        run_config={"loggers": {"console": {"config": {"log_level": level}}}},
        instance=instance,
        raise_on_error=False,
        run_id=run_id,
        tags=tags,
        # All there is: Dagster's list of runs has a target only for runs with a selection.
        asset_selection=list(job.asset_layer.executable_asset_keys),
    )
    if not result.success:
        end.error, end.kind, end.stopped = _failure(result)


def _failure(result: dg.ExecuteInProcessResult) -> tuple[str, str, bool]:
    """The first error of a failed run, its kind, and whether somebody stopped it.

    The error is the outermost one of ours, which has the words for people, or else the innermost cause; in one line.
    """
    ours, stopped = _names(MlChaosError), False
    for event in result.all_events:
        if not event.is_step_failure:
            continue
        chain = []
        error = event.step_failure_data.error
        while error is not None:
            chain.append(error)
            error = error.cause
        if not chain:
            continue
        if "Interrupt" in (chain[-1].cls_name or ""):
            stopped = True
            continue
        told = next((e for e in chain if e.cls_name in ours), chain[-1])
        # Dagster's message begins with the name of the class.
        text = told.message.strip().splitlines()[0]
        if told.cls_name in ours:
            return text.partition(": ")[2] or text, "usage" if told.cls_name in USAGE else "", stopped
        return f"{event.step_key}: {text}", "", stopped
    return "", "", stopped


def _names(error: type[Exception]) -> set[str]:
    return {error.__name__}.union(*(_names(e) for e in error.__subclasses__()))


def _line(error: Exception) -> str:
    """What a chain of errors began with, in one line: a storage's own error has the statement in it."""
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    return f"{type(first).__name__}: {(str(first).strip() or 'no reason was given').splitlines()[0]}"


def _result(kept: _Keeper, run_id: str, end: _End, total_s: float) -> LaunchResult:
    record, verdict, published = kept.record, kept.verdict, kept.published
    cancelled = end.stopped or bool(record and record.abort and record.abort.cause in WORD_OF_SOMEBODY)
    error = end.error
    if verdict is not None and verdict.outcome in (Outcome.UNCLEAN, Outcome.ERROR):
        error = ""  # Dagster failed the run because of the verdict, which says more
    if record is None and not error:
        error = "interrupted before it began; nothing was injected" if cancelled else "the run ended before it began"
    return LaunchResult(
        run_id=run_id,
        record=record,
        verdict=verdict,
        record_path=published.record_path if published else None,
        report_path=published.report_path if published else None,
        error=error or record_error(record),
        kind=end.kind if verdict is None else "",
        cancelled=cancelled,
        overhead_s=max(0.0, total_s - measured_s(record)),
        problems=published.problems if published else (),
    )


def record_error(record: RunRecord | None) -> str:
    """The record's own error."""
    return record.error if record else ""


def measured_s(record: RunRecord | None) -> float:
    """Seconds of guards, baseline, window and recovery: what the experiment itself takes."""
    if record is None:
        return 0.0
    ends = [m.t for m in record.moments]
    return max([record.guards_s, *ends])


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Dagster maps SIGTERM to SIGINT's handler and leaves it so; put both back."""
    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for s, handler in before.items():
            if handler is not None:
                signal.signal(s, handler)


class _Heard:
    """Whether a signal to stop came, whoever's handler took it: Dagster, engine and session each have their own."""

    _STOP = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def __enter__(self) -> _Heard:
        self._ends: tuple[int, int] | None = None
        self._stopped = False
        if threading.current_thread() is threading.main_thread():
            self._ends = os.pipe()
            for end in self._ends:
                os.set_blocking(end, False)
            self._former = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        return self

    def interrupted(self) -> bool:
        """Since it was entered."""
        with contextlib.suppress(BlockingIOError):
            while self._ends is not None and (numbers := os.read(self._ends[0], 4096)):
                self._stopped |= not self._STOP.isdisjoint(numbers)
        return self._stopped

    def __exit__(self, *_: object) -> None:
        if self._ends is not None:
            signal.set_wakeup_fd(self._former)
            for end in self._ends:
                os.close(end)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Signals are heard and do nothing: a result that is there gets to the terminal. `_own_signals` puts them back."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
    yield


def _dispose(instance: dg.DagsterInstance, verbose: bool) -> None:
    """A storage that cannot be closed says nothing about the runs."""
    with _quiet(verbose), contextlib.suppress(Exception):
        instance.dispose()


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Dagster's warnings and loggers silenced: stdout is the user's, stderr is ours."""
    if verbose:
        yield
        return
    logger = logging.getLogger("dagster")
    level, raising = logger.level, logging.raiseExceptions
    logger.setLevel(logging.CRITICAL)
    logging.raiseExceptions = False
    out, sys.stderr = sys.stderr, _Without(sys.stderr, EVENT_LOG_SAYS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr = out
        logging.raiseExceptions = raising
        logger.setLevel(level)


class _Without:
    """A stream that leaves out what begins with a text."""

    def __init__(self, stream: Any, text: str) -> None:
        self._stream, self._text = stream, text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a text stream."""
        return len(text) if text.startswith(self._text) else self._stream.write(text)
