"""The live run between ops, and everybody who may stop it.

Ops of one Dagster run share one process (in-process executor); the `Sessions` resource carries the
engine's `Run` from op to op and closes it on every path, also when Dagster never reaches the next op.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.checks import through
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import AbortFacts, RunRecord, Samples, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.errors import SpecError
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.interrupts import Noted
from mlchaos_dagster.orchestration.ports import LiveRun, Platform, Progress, Published

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks at the run's status. Runs started by the CLI cannot be reached otherwise."""

SEED_DIGITS = 18
"""A seed that every reader of a record can hold."""

STOPPING = frozenset({dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE})
WORD_OF_SOMEBODY = frozenset({"signal", "dagster", "stop", "lever"})
"""Causes of an abort that end the Dagster run CANCELED. A limit that tripped is a finding: the run succeeds."""


class StatusWatcher:
    """A stop source that reads the status of its own Dagster run."""

    def __init__(self, instance: dg.DagsterInstance, run_id: str, poll_s: float = POLL_S) -> None:
        self._instance, self._run_id, self._poll_s = instance, run_id, poll_s
        self._asked: tuple[str, str] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mlchaos-status", daemon=True)

    def start(self) -> StatusWatcher:
        """Begin to look."""
        self._thread.start()
        return self

    def requested(self) -> tuple[str, str] | None:
        """As `StopSource`."""
        return self._asked

    def ask(self, cause: str, reason: str) -> None:
        """Somebody in this process says stop; the first word stays."""
        self._asked = self._asked or (cause, reason)

    def look(self) -> None:
        """Read the status once."""
        run = self._instance.get_run_by_id(self._run_id)
        if run is not None and run.status in STOPPING:
            failed = run.status is dg.DagsterRunStatus.FAILURE
            self.ask("dagster", "Dagster called the run failed" if failed else "terminated in Dagster")

    def close(self) -> None:
        """Stop looking."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        while self._asked is None and not self._done.wait(self._poll_s):
            try:
                self.look()
            except Exception as e:  # noqa: BLE001 - a locked database is not a reason to end a run, nor to stop looking
                log.debug("cannot read the run's status: %s", e)


class WindowEnd:
    """A stop source: the suite's window closes (a queue may start a run long after it was requested)."""

    def __init__(self, not_after: datetime, now: Callable[[], datetime]) -> None:
        self._not_after, self._now = not_after, now

    def requested(self) -> tuple[str, str] | None:
        """As `StopSource`."""
        if self._now() < self._not_after:
            return None
        return "stop", f"the suite's window closed at {self._not_after.isoformat(timespec='minutes')}"


class LauncherGone:
    """A stop source: Dagster's code server launched this run's process and is gone. Nobody could stop the run any more.

    A run of the command line, or in a pod of its own, has no such parent and is left alone.
    """

    def __init__(self) -> None:
        self._parent = multiprocessing.parent_process()

    def requested(self) -> tuple[str, str] | None:
        """As `StopSource`. One poll of a pipe: cheap enough for every look."""
        if self._parent is None or self._parent.is_alive():
            return None
        return "dagster", "Dagster's code server is gone: the run could not be stopped any more"


class Session:
    """One experiment in one Dagster run: its engine run and what came of it."""

    def __init__(self, platform: Platform, record_id: str, run: LiveRun, stop: StatusWatcher) -> None:
        self.platform, self.record_id, self.run, self.stop = platform, record_id, run, stop
        self.steady, self.steady_because = False, ""
        self.window_opened = False
        self.cancelled = ""
        """Why the Dagster run ends CANCELED; empty when it does not."""
        self.record: RunRecord | None = None
        self.samples: Samples | None = None
        self.verdict: Verdict | None = None
        self.published: Published | None = None
        self._picture: str | None = None

    def cancel(self, reason: str) -> None:
        """Nothing more is injected; the run ends CANCELED after verdict and report."""
        self.cancelled = self.cancelled or reason
        self.stop.ask("signal", reason)

    def finish(self) -> RunRecord:
        """Probes stopped, record saved. Idempotent."""
        if self.record is None:
            late = self._late()
            self.record = self._told(self.run.finish())
            self.samples = self.run.samples
            abort = self.record.abort
            if abort is not None and abort.cause in WORD_OF_SOMEBODY:
                self.cancelled = self.cancelled or abort.reason
            if self.record.fault is not None:
                self.cancelled = self.cancelled or late
        return self.record

    def _late(self) -> str:
        """Somebody's word that came when the fault was gone: the outcome stands, but nothing comes after this run."""
        if said := self.run.stopped_late:
            return said
        # Asked before the run is finished: its stop file goes with it. A window that closes is nobody's word.
        sources = [s for s in getattr(self.run, "stops", ()) if not isinstance(s, WindowEnd)]
        asked = next((a for s in sources if (a := s.requested()) is not None), None)
        return asked[1] if asked is not None and asked[0] in WORD_OF_SOMEBODY else ""

    @property
    def stopped(self) -> str:
        """Why nothing may come after this run; empty when nobody said so."""
        asked = self.stop.requested()
        return self.cancelled or (asked[1] if asked else "")

    def _told(self, record: RunRecord) -> RunRecord:
        """An interrupt that came before the engine could note it: in the guards, or between two ops."""
        if not self.cancelled or record.abort is not None or record.fault is not None:
            return record
        t = max([0.0, *(m.t for m in record.moments)])
        abort = AbortFacts(cause="signal", reason=self.cancelled, breach_at=t, clean_at=t)
        return record.model_copy(update={"abort": abort})

    def judge(self) -> Verdict:
        """The verdict, judged once."""
        record = self.finish()
        if self.verdict is None:
            self.verdict = self.platform.judge(record, self.samples or Samples())
        return self.verdict

    def publish(self) -> Published:
        """Verdict and report on disk, once."""
        verdict = self.judge()
        if self.published is None:
            assert self.record is not None
            self.published = self.platform.publish(self.record, self.samples or Samples(), verdict)
        return self.published

    def picture(self) -> str:
        """The picture as inline Markdown, drawn once; empty when it cannot be (a drawing never hides a verdict)."""
        if self._picture is None:
            verdict = self.judge()
            assert self.record is not None
            try:
                png = self.platform.picture(self.record, self.samples or Samples(), verdict)
            except Exception as e:  # noqa: BLE001
                log.warning("the picture could not be drawn: %s", e)
                png = None
            shown = base64.b64encode(png).decode() if png else ""
            self._picture = f"![before, during and after](data:image/png;base64,{shown})" if shown else ""
        return self._picture

    def markdown(self) -> str:
        """The report for the Dagster UI, with the picture when there was something to draw."""
        verdict = self.judge()
        assert self.record is not None
        text = self.platform.markdown(self.record, self.samples or Samples(), verdict)
        picture = self.picture() if self.record.baseline is not None else ""
        return f"{text.rstrip()}\n\n{picture}" if picture else text

    def close(self) -> None:
        """Whatever happened: probes stopped, record and verdict on disk. Never raises for a verdict."""
        try:
            self.finish()
            with contextlib.suppress(Exception):
                self.publish()
        finally:
            self.stop.close()

    @contextlib.contextmanager
    def interruptible(self, doing: str) -> Iterator[None]:
        """An interrupt ends what is inside and cancels the session; any other error closes it."""
        try:
            yield
        except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
            self.cancel(f"interrupted while {doing}")
        except BaseException:  # whatever it is, the probes must not outlive their run; it is raised on
            self.close()
            raise

    @contextlib.contextmanager
    def shielded(self, doing: str) -> Iterator[None]:
        """Signals inside are noted, not raised: judging and reporting are short and always finish."""
        main = threading.current_thread() is threading.main_thread()
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
        for s in before:
            signal.signal(s, lambda *_: self.cancel(f"interrupted while {doing}"))
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


class Sessions:
    """All sessions of one Dagster run, by graph name."""

    def __init__(self, platform: Platform, progress: Progress | None = None) -> None:
        self.platform, self.progress = platform, progress
        self._open: dict[str, Session] = {}
        self._pid = os.getpid()
        self._noted = Noted(self._interrupted)
        self._interrupt = ""

    @property
    def stopped(self) -> str:
        """Why no further experiment of this Dagster run may begin; empty when nobody said so."""
        return self._interrupt or next((s.stopped for s in self._open.values() if s.stopped), "")

    def begin(
        self,
        experiment: Experiment,
        environment: Environment,
        *,
        instance: dg.DagsterInstance,
        run_id: str,
        tags: Mapping[str, str],
        alone: bool,
    ) -> Session:
        """Build the engine's run. Raises MlChaosError: nothing was touched."""
        seed, not_after = seed_of(tags), not_after_of(tags)
        if backend := tags.get(keys.TAG_BACKEND):
            environment = through(environment, backend, [experiment], f"tag {keys.TAG_BACKEND}")
        name = keys.graph_name(experiment.name, environment.name)
        record_id = run_id if alone else f"{run_id}.{experiment.name}"
        stop = StatusWatcher(instance, run_id)
        stops: list[Any] = [stop, LauncherGone()]
        if not_after is not None:
            stops.append(WindowEnd(not_after, self.platform.now))
        run = self.platform.build_run(
            experiment,
            environment,
            run_id=record_id,
            shadow=tags.get(keys.TAG_SHADOW) == "true",
            seed=seed,
            started_by=started_by(tags),
            progress=self.progress,
            stops=stops,
        )
        stop.start()
        session = self._open[name] = Session(self.platform, record_id, run, stop)
        self._noted.begin()
        return session

    def _interrupted(self, signal_name: str) -> None:
        self._interrupt = self._interrupt or f"{signal_name} received"
        for session in self._open.values():
            session.cancel(f"{signal_name} received")

    def get(self, name: str) -> Session:
        """The session that `check_guards` began in this process.

        Raises:
            dagster.Failure: there is none: another process, or a re-execution of a later op alone.
        """
        session = self._open.get(name)
        if session is None or self._pid != os.getpid():
            raise dg.Failure(
                "No run of this experiment is open in this process. Its ops run together, in one process, from "
                "check_guards on: re-execute the whole run, with the in-process executor.",
                allow_retries=False,
            )
        return session

    def close(self) -> None:
        """Close all sessions; the last line of defence behind the ops' own paths."""
        try:
            for session in self._open.values():
                session.close()
        finally:
            self._noted.end()


def seed_of(tags: Mapping[str, str]) -> int | None:
    """The seed that a run was given. Raises SpecError: it is none."""
    text = tags.get(keys.TAG_SEED)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= SEED_DIGITS):
        raise SpecError(
            f'"{text}" is not a seed. Allowed: a whole number from 0, at most {SEED_DIGITS} digits.',
            f"tag {keys.TAG_SEED}",
        )
    return int(text)


def not_after_of(tags: Mapping[str, str]) -> datetime | None:
    """When the suite's window closes. Raises SpecError: the tag says no time."""
    text = tags.get(keys.TAG_NOT_AFTER)
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise SpecError(
            f'"{text}" is not a time. Allowed: such as 2026-11-23T05:00:00+00:00, with an offset.',
            f"tag {keys.TAG_NOT_AFTER}",
        )
    return found


def started_by(tags: Mapping[str, str]) -> str:
    """Who or what started a run, for people."""
    if tags.get(keys.TAG_STARTED_BY):
        return tags[keys.TAG_STARTED_BY]
    if tags.get("dagster/schedule_name"):
        return f"schedule {tags['dagster/schedule_name']}"
    if tags.get("dagster/sensor_name"):
        return f"sensor {tags['dagster/sensor_name']}"
    return tags.get("user") or "Dagster"


def sessions_resource(progress: Progress | None = None) -> dg.ResourceDefinition:
    """Resource `sessions`: Dagster's teardown runs on success, failure and interrupt alike."""

    @dg.resource(required_resource_keys={"platform"}, description="Carries the live run from op to op.")
    def sessions(context: dg.InitResourceContext) -> Iterator[Sessions]:
        held = Sessions(context.resources.platform, progress)
        try:
            yield held
        finally:
            held.close()

    return sessions
