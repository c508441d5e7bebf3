"""The five ops of an experiment. Shared by all experiments: which one an op works for is its graph's name.

Two rules of this module keep faults from being left behind or made twice (facts in docs/adr):
no op has a retry policy, and the fault lives and dies inside one op.
"""

# No postponed annotations here: Dagster reads the type of `context` when an op is made.

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import RunRecord, Samples, Span
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.judgement.measures import Phase, reference_of
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration import metadata as md
from mlchaos_dagster.orchestration.checks import checks
from mlchaos_dagster.orchestration.session import STOPPING, Session, Sessions

Pair = tuple[Experiment, Environment]
RESULTS_IO = "results_io"

OPS = ("check_guards", "measure_baseline", "run_fault_window", "judge", "report")


WAITS_FOR = "waits_for"
"""Input of the first op, and of the graph of an experiment that depends on another one."""


def _asset_out(required: bool) -> dg.Out:
    return dg.Out(is_required=required, io_manager_key=RESULTS_IO)


def _check_out() -> dg.Out:
    # Nothing passes through: the result itself is yielded. (An `Output` around it would be dropped without a word.)
    return dg.Out(dagster_type=dg.Nothing, is_required=False)


def _done() -> dg.Out:
    return dg.Out(dagster_type=dg.Nothing)


def check_output(check: str) -> str:
    """Name of an op's output for a check."""
    return f"verdict_{check}"


def make_ops(pairs: Mapping[str, Pair]) -> dict[str, dg.OpDefinition]:
    """The ops, by name; `pairs` maps graph names to what they run."""
    # One op serves all experiments, so it has the outputs of them all.
    all_checks = dict.fromkeys([*keys.CHECKS, *(c for e, _ in pairs.values() for c in keys.checks_of(e))])

    def op(name: str, outs: dict[str, dg.Out], after: str = "after") -> Any:
        # Later ops first: in a run of several experiments each one is finished before the next one starts,
        # so that no baseline goes stale and no two windows overlap.
        return dg.op(
            name=name,
            ins={after: dg.In(dg.Nothing)},
            out=outs,
            required_resource_keys={"sessions"},
            tags={"dagster/priority": str(OPS.index(name)), "kind": "mlchaos"},
        )

    def check(context: dg.OpExecutionContext, name: str, arguments: Mapping[str, Any]) -> dg.AssetCheckResult:
        experiment, environment = pairs[graph_of(context)]
        return dg.AssetCheckResult(
            asset_key=dg.AssetKey(keys.asset_path(experiment.name, environment.name, "verdict")),
            check_name=name,
            **arguments,
        )

    @op(
        "check_guards",
        {"experiment": _asset_out(True), "done": _done()},
        after=WAITS_FOR,  # the verdict of another experiment; of most, nothing
    )
    def check_guards(context: dg.OpExecutionContext) -> Iterator[Any]:
        refuse_retry(context)
        experiment, environment = pairs[graph_of(context)]
        run = context.instance.get_run_by_id(context.run_id)
        tags = dict(run.tags) if run else {}
        sessions = sessions_of(context)
        if sessions.stopped:
            end_cancelled(context, sessions.stopped)
        try:
            session = sessions.begin(
                experiment,
                environment,
                instance=context.instance,
                run_id=context.run_id,
                tags=tags,
                alone=_alone(context, pairs),
            )
        except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
            # Bringing the environment up takes seconds. There is no run yet that could tell of this.
            end_cancelled(context, "interrupted before it began")
        except MlChaosError as e:  # a line for people, where Dagster would head it with its own
            raise dg.Failure(str(e), allow_retries=False) from e
        guards = ()
        with session.interruptible("checking guards"):
            if missing := {k: v for k, v in keys.run_tags(experiment, environment).items() if k not in tags}:
                context.instance.add_run_tags(context.run_id, missing)
            guards = session.run.check_guards()
        # One line: the event log writes each to disk, and all guards are in the metadata.
        refused = [f"{g.name} REFUSED: {g.saw}" for g in guards if not g.passed]
        context.log.info("; ".join(refused) or f"{len(guards)} guards passed")
        yield dg.Output(
            [md.experiment_row(experiment, environment)],
            "experiment",
            metadata=md.experiment_metadata(experiment, environment, guards),
        )
        yield dg.Output(None, "done")

    @op(
        "measure_baseline",
        {"baseline_metrics": _asset_out(False), "done": _done()},
    )
    def measure_baseline(context: dg.OpExecutionContext) -> Iterator[Any]:
        refuse_retry(context)
        session = session_of(context)
        baseline, steady = None, (False, "")
        with session.interruptible("measuring the baseline"):
            if session.run.may_inject and not session.cancelled:
                baseline = session.run.measure_baseline()
                if baseline is not None:
                    steady = session.run.steady_before()
        if baseline is not None:
            _, environment = pairs[graph_of(context)]
            values = phase_values(session.run.samples, environment, baseline)
            yield dg.Output(
                md.baseline_rows(environment, values),
                "baseline_metrics",
                metadata=md.baseline_metadata(environment, values, steady),
            )
            context.log.info(f"steady before: {'yes' if steady[0] else 'NO'}, {steady[1]}")
        session.steady, session.steady_because = steady
        yield dg.Output(None, "done")

    @op("run_fault_window", {"done": _done()})
    def run_fault_window(context: dg.OpExecutionContext) -> Iterator[Any]:
        refuse_retry(context)
        session = session_of(context)
        if session.window_opened:
            raise dg.Failure("refusing to inject a second time in one run", allow_retries=False)
        run = context.instance.get_run_by_id(context.run_id)
        if run is None or run.status in STOPPING:
            session.cancel(f"Dagster: the run is {run.status.value if run else 'gone'}")
        with session.interruptible("opening the fault window"):
            if session.steady and session.run.may_inject and not session.cancelled:
                session.window_opened = True
                session.run.fault_window()
        with session.shielded("saving the record"):
            record = session.finish()
        for line in moments(record):
            context.log.info(line)
        yield dg.Output(None, "done")

    @op(
        "judge",
        {
            "chaos_metrics": _asset_out(False),
            "recovery_analysis": _asset_out(False),
            "done": _done(),
        },
    )
    def judge(context: dg.OpExecutionContext) -> Iterator[Any]:
        session = session_of(context)
        with session.shielded("judging"):
            record, verdict = session.finish(), session.judge()
            picture = session.picture() if record.window is not None else ""
        if record.window is not None:
            yield dg.Output(md.sli_rows(verdict), "chaos_metrics", metadata=md.chaos_metadata(record, verdict, picture))
        if record.after is not None:
            yield dg.Output(
                md.recovery_rows(verdict), "recovery_analysis", metadata=md.recovery_metadata(record, verdict)
            )
        context.log.info(f"{keys.outcome_word(record, verdict)}: {'; '.join(verdict.reasons)}")
        yield dg.Output(None, "done")

    @op(
        "report",
        {"verdict": _asset_out(True), **{check_output(c): _check_out() for c in all_checks}},
    )
    def report(context: dg.OpExecutionContext) -> Iterator[Any]:
        session = session_of(context)
        with session.shielded("reporting"):
            record, verdict = session.finish(), session.judge()
            published = session.publish()
            markdown = session.markdown()
            word = keys.outcome_word(record, verdict)
            context.instance.add_run_tags(context.run_id, {keys.TAG_OUTCOME: word})
        for problem in published.problems:
            context.log.warning(problem)
        yield dg.Output(
            [md.verdict_row(record, verdict)],
            "verdict",
            metadata=md.verdict_metadata(
                record,
                verdict,
                markdown,
                str(published.record_path) if published.record_path else None,
                str(published.report_path) if published.report_path else None,
            ),
        )
        # After the verdict, so that the UI counts them as results on this verdict and not on the one before.
        promised = keys.checks_of(pairs[graph_of(context)][0])
        for name, arguments in checks(record, verdict, session.steady_because).items():
            if name in promised:
                yield check(context, name, arguments)
        stopped = session.stopped
        session.stop.close()
        if record.error or verdict.outcome.value in ("UNCLEAN", "ERROR"):
            # Our own error, or a fault that may be live: never a green run.
            raise dg.Failure(
                f"{word}: {'; '.join(verdict.reasons) or record.error}",
                metadata={"clear it with": record.clean.command} if record.clean and record.clean.command else None,
                allow_retries=False,
            )
        if stopped:
            end_cancelled(context, stopped)

    return {o.name: o for o in (check_guards, measure_baseline, run_fault_window, judge, report)}


# ---- what ops share


def graph_of(context: dg.OpExecutionContext) -> str:
    """Name of the graph this op runs in."""
    parent = context.op_handle.parent
    assert parent is not None
    return parent.name


def _alone(context: dg.OpExecutionContext, pairs: Mapping[str, Pair]) -> bool:
    """Whether this is the run's only experiment. (The op's own asset selection is that of its graph.)"""
    return sum(node.name in pairs for node in context.job_def.graph.nodes) <= 1


def sessions_of(context: dg.OpExecutionContext) -> Sessions:
    """The sessions of this Dagster run."""
    return context.resources.sessions


def session_of(context: dg.OpExecutionContext) -> Session:
    """The session of this op's experiment. Raises Failure when `check_guards` did not begin it here."""
    return sessions_of(context).get(graph_of(context))


def refuse_retry(context: dg.OpExecutionContext) -> None:
    """A retry would turn an abort into a second injection. Raises Failure."""
    if context.retry_number:
        raise dg.Failure("refusing to run a second time: a retry would inject again", allow_retries=False)


def end_cancelled(context: dg.OpExecutionContext, reason: str) -> NoReturn:
    """Re-raise the cancellation, now that all is told. Dagster calls an interrupt that nobody announced a failure."""
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.status not in STOPPING:
        context.instance.report_run_canceling(run, message=f"mlchaos: {reason}")
    raise dg.DagsterExecutionInterruptedError(reason)


def phase_values(samples: Samples, environment: Environment, span: Span) -> dict[str, float | None]:
    """Every SLI of the environment over a span."""
    phase = Phase(samples, environment, span, reference_of(samples, environment, span))
    return {name: phase.value(name) for name in environment.slis}


def moments(record: RunRecord) -> list[str]:
    """One line a moment, for the run's log."""
    return [f"{m.t:8.3f} s  {m.name.replace('_', ' ')}" + (f": {m.note}" if m.note else "") for m in record.moments]
