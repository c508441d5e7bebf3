"""One job per suite, and the operations: emergency stop, recovery of leases, preflight."""

# No postponed annotations here: Dagster reads `config: EmergencyStop` when the op is made.

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment, Suite
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.kube.remote import Answer, RemoteLedger
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.assets import asset_keys, check_keys
from mlchaos_dagster.orchestration.ops import Pair
from mlchaos_dagster.orchestration.ports import Platform

ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]
SuiteJob = Any
"""What `define_asset_job` returns; Dagster gives the type no public name."""
FIRST = {"dagster/priority": "1000"}
"""Operations are dequeued before experiments."""


def members(suite: Suite, pairs: Iterable[Pair]) -> list[Pair]:
    """The suite's experiments that this environment can run, in the suite's order."""
    by_name = {e.name: (e, env) for e, env in pairs}
    return [by_name[name] for name in suite.experiments if name in by_name]


def suite_job_name(suite: Suite, environment: Environment) -> str:
    """`nightly__sandbox`."""
    return f"{keys.python_name(suite.name)}__{keys.python_name(environment.name)}"


def suite_job(suite: Suite, environment: Environment, pairs: Sequence[Pair]) -> SuiteJob:
    """The job of a suite.

    Schedules request one run of it per experiment; launched whole by hand, it takes them one after the other.
    """
    return dg.define_asset_job(
        name=suite_job_name(suite, environment),
        description=f"{suite.title} ({environment.name})",
        selection=dg.AssetSelection.assets(*(k for p in members(suite, pairs) for k in asset_keys(p))),
        executor_def=dg.in_process_executor,
        tags={keys.TAG_SUITE: suite.name, keys.TAG_ENVIRONMENT: environment.name, keys.TAG_KIND: "experiment"},
    )


def run_request(suite: Suite, pair: Pair, run_key: str, tags: Mapping[str, str]) -> dg.RunRequest:
    """One run of one experiment of a suite."""
    experiment, environment = pair
    return dg.RunRequest(
        run_key=run_key,
        asset_selection=asset_keys(pair),
        asset_check_keys=check_keys(pair),
        tags={**keys.run_tags(experiment, environment), keys.TAG_SUITE: suite.name, **tags},
    )


def active_runs(instance: dg.DagsterInstance, environment: str = "") -> list[dg.DagsterRun]:
    """Chaos runs that are queued or running, of one environment or all."""
    tags = {keys.TAG_KIND: "experiment"}
    if environment:
        tags[keys.TAG_ENVIRONMENT] = environment
    return list(instance.get_runs(filters=dg.RunsFilter(statuses=ACTIVE, tags=tags)))


def stop_runs(
    platform: Platform, instance: dg.DagsterInstance, runs: Iterable[dg.DagsterRun], reason: str
) -> list[str]:
    """Ask runs to stop in every way there is: stop file first (it needs nobody's help), then Dagster.

    Returns:
        What could not be done; a run whose process Dagster cannot reach hears of it by file and by status.
    """
    runs = list(runs)
    problems = request_stops(platform, [run.run_id for run in runs], reason)
    for run in runs:
        try:
            instance.run_coordinator.cancel_run(run.run_id)
        except Exception as e:  # noqa: BLE001 - a run of the CLI: its own thread reads the status
            problems.append(f"{run.run_id[:8]}: {type(e).__name__}: {e}")
            current = instance.get_run_by_id(run.run_id)
            if current is not None and current.status in ACTIVE:
                instance.report_run_canceling(current, message=f"mlchaos: {reason}")
    return problems


def request_stops(platform: Platform, run_ids: Sequence[str], reason: str) -> list[str]:
    """Stop files for Dagster runs and for every experiment of theirs that runs now. Returns what could not be done."""
    problems: list[str] = []
    try:
        running = platform.running()
    except Exception as e:  # noqa: BLE001 - the ids that we know are still to be asked
        running = ()
        problems.append(f"active runs cannot be read: {e}")
    for run_id in dict.fromkeys([*run_ids, *(i for i in running if of_runs(i, run_ids))]):
        try:
            platform.request_stop([run_id], reason)
        except Exception as e:  # noqa: BLE001 - the others are still to be asked
            problems.append(f"{run_id[:8]}: stop file: {e}")
    return problems


def of_runs(run_id: str, dagster_runs: Sequence[str]) -> bool:
    """Whether a run of ours belongs to one of the Dagster runs: a run of several experiments names each after itself."""
    return any(run_id == i or run_id.startswith(f"{i}.") for i in dagster_runs)


class EmergencyStop(dg.Config):
    """What to stop."""

    run_ids: list[str] = []
    """Empty: every run, of Dagster and of the CLI."""
    lever: bool = True
    """Keep new runs out, here and in the environment's cluster, until it is released. Only without `run_ids`."""
    reason: str = "emergency stop from Dagster"
    within_s: float = 10.0
    """Owners that have not taken their faults away after this long are fenced and their faults taken from them."""


def stop_everything(environments: Sequence[Environment]) -> dg.OpDefinition:
    """The op that stops runs, waits until their faults are proven gone, and takes away what is left."""

    @dg.op(name="stop_everything", required_resource_keys={"platform"})
    def op(context: dg.OpExecutionContext, config: EmergencyStop) -> None:
        platform: Platform = context.resources.platform
        begun = time.monotonic()
        platform.incident("emergency_stop", config.reason, run_ids=config.run_ids, lever=config.lever)
        # Nothing that fails here keeps the next line from stopping somebody: it is told at the end.
        failed: list[str] = []
        everything = not config.run_ids
        pulled: list[Pulled] = []
        if everything and config.lever:
            try:
                platform.pull_lever(config.reason)
            except MlChaosError as e:
                failed.append(f"the lever: {e}")
            pulled = pull_far_levers(platform, environments, config.reason)
        runs = [r for r in active_runs(context.instance) if everything or r.run_id in config.run_ids]
        known = {r.run_id for r in runs}
        others = [i for i in config.run_ids if i not in known]
        if everything:
            try:
                others = [i for i in platform.running() if not of_runs(i, sorted(known))]
            except MlChaosError as e:
                failed.append(f"active runs cannot be read: {e}")
        failed += request_stops(platform, others, config.reason)
        for problem in [*failed, *stop_runs(platform, context.instance, runs, config.reason)]:
            context.log.warning(problem)
        end = begun + config.within_s * 0.6
        while (held := _held(platform, config.run_ids)) and time.monotonic() < end:
            time.sleep(0.1)
        taken = platform.recover(sorted({lease.run_id for lease in held})) if held else []
        left = [lease.id for lease in _held(platform, config.run_ids)]
        for one in pulled:
            still, problems = one.wait()
            left, failed = left + still, failed + problems
        seconds = time.monotonic() - begun
        context.add_output_metadata(
            {"runs_stopped": len(runs), "clean_seconds": seconds, "taken_away": "\n".join(taken) or "nothing had to be"}
        )
        if left:
            raise dg.Failure(f"faults may be live: {', '.join(left)}. Type: mlchaos recover")
        if failed:
            raise dg.Failure(f"not all could be asked to stop: {'; '.join(failed)}", allow_retries=False)
        context.log.info(f"clean after {seconds:.2f} s; {len(runs)} runs were asked to stop")

    return op


@dataclass(frozen=True)
class Pulled:
    """The lever of a cluster, being pulled."""

    environment: str
    cluster: RemoteLedger
    answer: Answer[tuple[Lease, ...]]

    def wait(self) -> tuple[list[str], list[str]]:
        """Leases that were open and are not closed in time, of any machine, and what could not be done."""
        leases, said = self.answer.wait()
        if leases is None:
            return [], [f"the lever of the cluster of {self.environment} is NOT pulled: {said}"]
        gone = self.cluster.until_gone(leases)
        return [f"{lease.id} in {self.environment} ({why})" for lease, _, why in gone if why], []


def pull_far_levers(platform: Platform, environments: Iterable[Environment], reason: str) -> list[Pulled]:
    """Begin to pull the levers of all clusters; nobody is waited for."""
    clusters = {env.name: platform.cluster(env) for env in environments}
    return [Pulled(name, far, far.pull(reason)) for name, far in clusters.items() if far is not None]


def _held(platform: Platform, run_ids: Sequence[str]) -> list[Any]:
    return [lease for lease in platform.leases() if not run_ids or of_runs(lease.run_id, run_ids)]


@dg.op(required_resource_keys={"platform"})
def recover_open_leases(context: dg.OpExecutionContext) -> None:
    """Take away the faults whose owners are gone; those of living owners stay theirs."""
    platform: Platform = context.resources.platform
    before = platform.leases()
    done = platform.sweep()
    context.add_output_metadata(
        {"open_before": len(before), "open_after": len(platform.leases()), "done": "\n".join(done) or "nothing to do"}
    )
    for line in done:
        context.log.info(line)


def release_the_lever(environments: Sequence[Environment]) -> dg.OpDefinition:
    """The op that lets runs in again after an emergency stop; refused while a fault may be live."""

    @dg.op(name="release_the_lever", required_resource_keys={"platform"})
    def op(context: dg.OpExecutionContext) -> None:
        platform: Platform = context.resources.platform
        if held := platform.leases():
            raise dg.Failure(f"leases are open: {', '.join(lease.id for lease in held)}. Run recover_leases first.")
        context.log.info("released: runs may start again" if platform.release_lever() else "it was not pulled")
        clusters = {env.name: platform.cluster(env) for env in environments}
        said = {name: far.release() for name, far in clusters.items() if far is not None}
        for name, what in said.items():
            context.log.info(f"{name}: {what}")
        if refused := [f"{name}: {what}" for name, what in said.items() if " NOT " in what]:
            raise dg.Failure("; ".join(refused), allow_retries=False)

    return op


def operations(environments: Sequence[Environment], experiments: Sequence[Experiment]) -> list[dg.JobDefinition]:
    """Jobs for people who must act. None carries the tag that the queue limits, so none waits for experiments."""

    @dg.op(required_resource_keys={"platform"})
    def look_ahead(context: dg.OpExecutionContext) -> None:
        """What would keep experiments from running now; read-only."""
        findings = [f for env in environments for f in context.resources.platform.preflight(env, experiments)]
        for f in findings:
            context.log.info(f"{'ok  ' if f.ok else 'WRONG'} {f.what}: {f.saw}" + (f" → {f.needs}" if f.needs else ""))
        wrong = [f for f in findings if not f.ok]
        rows = [dg.TableRecord({"what": f.what, "ok": f.ok, "saw": f.saw, "needs": f.needs}) for f in findings]
        context.add_output_metadata({"findings": dg.MetadataValue.table(rows)} if rows else {"findings": "none"})
        if wrong:
            raise dg.Failure("; ".join(f"{f.what}: {f.saw}" for f in wrong[:5]), allow_retries=False)

    def job(name: str, op: dg.OpDefinition, about: str) -> dg.JobDefinition:
        @dg.job(name=name, description=about, executor_def=dg.in_process_executor, tags=FIRST)
        def operation() -> None:
            op()

        return operation

    return [
        job(
            "emergency_stop",
            stop_everything(environments),
            "Stop every experiment (or the runs given) and prove that nothing is left.",
        ),
        job("release_lever", release_the_lever(environments), "Let runs in again after an emergency stop."),
        job("recover_leases", recover_open_leases, "Take away faults whose owner is gone."),
        job("preflight", look_ahead, "What would keep experiments from running now? Touches nothing."),
    ]
