"""Experiments from the command line, as Dagster runs of this process: the same ops, the same history."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.assets import build_assets
from mlchaos_dagster.orchestration.definitions import resources
from mlchaos_dagster.orchestration.instance import open_instance
from mlchaos_dagster.orchestration.platform import RealPlatform
from mlchaos_dagster.orchestration.ports import Platform, Progress
from mlchaos_dagster.settings import Settings


@dataclass(frozen=True)
class LaunchResult:
    """What came of one experiment."""

    run_id: str
    record: RunRecord | None
    verdict: Verdict | None
    record_path: Path | None
    report_path: Path | None
    error: str = ""
    """An error of ours, one line; empty when the run could be judged."""
    cancelled: bool = False
    """Somebody stopped it: what was to come after it should not start."""
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
) -> Iterator[LaunchResult]:
    """One Dagster run per experiment, in order, in this process and its main thread.

    After a run that somebody cancelled, the rest does not start. Nothing is printed unless `verbose`.

    Raises:
        ConfigError: Dagster's storage cannot be opened; nothing was touched.
    """
    platform = platform or RealPlatform(settings)
    with _quiet(verbose):
        instance = open_instance(settings.home)
    with contextlib.ExitStack() as stack:
        stack.callback(instance.dispose)
        for experiment in experiments:
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
            with _quiet(verbose), _own_signals():
                error = _execute(kept, experiment, environment, instance, run_id, tags, progress, verbose)
            result = _result(kept, run_id, error, time.monotonic() - begun)
            yield result
            if result.cancelled:
                return


class _Keeper:
    """The platform, remembering what was judged: a full disk must not lose a verdict on its way to the terminal."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self.record: RunRecord | None = None
        self.verdict: Verdict | None = None
        self.published: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def publish(self, record: RunRecord, samples: Any, verdict: Verdict) -> Any:
        """As `Platform.publish`."""
        self.record, self.verdict = record, verdict
        self.published = self._platform.publish(record, samples, verdict)
        return self.published


def _execute(
    platform: Any,
    experiment: Experiment,
    environment: Environment,
    instance: dg.DagsterInstance,
    run_id: str,
    tags: dict[str, str],
    progress: Progress | None,
    verbose: bool,
) -> str:
    """Run it. Returns an error of ours in one line, or nothing."""
    definitions = dg.Definitions(
        assets=build_assets([(experiment, environment)]),
        resources=resources(platform, progress),
        executor=dg.in_process_executor,
    )
    job = definitions.resolve_implicit_global_asset_job_def()
    level = "INFO" if verbose else "CRITICAL"
    failed = ""
    try:
        result = job.execute_in_process(
            run_config={"loggers": {"console": {"config": {"log_level": level}}}},
            instance=instance,
            raise_on_error=False,
            run_id=run_id,
            tags=tags,
        )
        if not result.success:
            failed = _failure(result)
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        # Dagster raises what the report op re-raised; the run has its record, verdict and status by now.
        pass
    except dg.DagsterError as e:
        failed = str(e).splitlines()[0]
    return failed


def _failure(result: dg.ExecuteInProcessResult) -> str:
    """The first error of a failed run: the innermost cause, in one line."""
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            while error is not None and error.cause is not None:
                error = error.cause
            if error is not None and "Interrupted" not in (error.cls_name or ""):
                return f"{event.step_key}: {error.message.strip().splitlines()[0]}"
    return ""


def _result(kept: _Keeper, run_id: str, error: str, total_s: float) -> LaunchResult:
    record, verdict, published = kept.record, kept.verdict, kept.published
    cancelled = bool(record and record.abort and record.abort.cause in ("signal", "dagster", "stop", "lever"))
    if record is None and not error:
        error = "the run ended before it began"
    return LaunchResult(
        run_id=run_id,
        record=record,
        verdict=verdict,
        record_path=published.record_path if published else None,
        report_path=published.report_path if published else None,
        error="" if verdict is not None and not record_error(record) else error or record_error(record),
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


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Dagster's warnings and loggers silenced: stdout is the user's, stderr is ours."""
    if verbose:
        yield
        return
    logger = logging.getLogger("dagster")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
