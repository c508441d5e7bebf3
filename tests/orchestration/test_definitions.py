"""What is loaded: keys, executors, no retries, tags, statuses. A snapshot, so that a rename is a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._utils.tags import TagConcurrencyLimitsCounter
from sim_platform import SimPlatform, environment, experiment

from mlchaos_dagster.domain.spec import Suite
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.definitions import Library, build_definitions, load
from mlchaos_dagster.orchestration.jobs import operations
from mlchaos_dagster.orchestration.ops import OPS, make_ops, refuse_retry

SUITE = Suite.model_validate(
    {
        "schema": "mlchaos/v1",
        "name": "nightly",
        "title": "Every night",
        "experiments": ["one", "two", "elsewhere"],
        "schedule": {
            "cron": "0 2 * * 1-5",
            "timezone": "Europe/Berlin",
            "window": "02:00-04:00",
            "days": ["mon", "tue", "wed", "thu", "fri"],
            "min_interval": "8h",
        },
    }
)


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    env = environment(error_budget={"objective": "99%"})
    library = Library(
        (env,), (experiment("one"), experiment("two"), experiment("elsewhere", target="nowhere")), (SUITE,)
    )
    return build_definitions(library, SimPlatform(tmp_path_factory.mktemp("home")))


def test_the_queue_lets_one_experiment_into_an_environment_and_never_holds_an_operation() -> None:
    path = Path(__file__).parents[2] / "dagster.yaml"
    limits = yaml.safe_load(path.read_text())["concurrency"]["runs"]["tag_concurrency_limits"]

    def queued(of: str, **changes: Any) -> dg.DagsterRun:
        one = experiment(of, target=changes.pop("target", "prediction-service"))
        return dg.DagsterRun(job_name="j", tags=keys.run_tags(one, environment(**changes)))

    def blocked(item: dg.DagsterRun) -> bool:
        return TagConcurrencyLimitsCounter(limits, [queued("one")]).is_blocked(item)

    assert blocked(queued("two", target="feature-store")), "its targets share gateway and SLIs"
    assert not blocked(queued("two", name="elsewhere"))
    for job in operations((environment(),), (experiment("one"),)):
        assert not blocked(dg.DagsterRun(job_name=job.name, tags=dict(job.tags))), job.name


@pytest.mark.req("RD")
def test_asset_keys(definitions: dg.Definitions) -> None:
    found = sorted(k.to_user_string() for k in definitions.resolve_asset_graph().get_all_asset_keys())
    assert found == sorted(
        [f"sim/{e}/{p}" for e in ("one", "two") for p in keys.PHASES] + ["sim/error_budget", "sim/experiment_history"]
    ), "an experiment whose target the environment lacks has no assets"


def test_lineage_reads_down_the_graph(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for before, after in zip(keys.PHASES, keys.PHASES[1:], strict=False):
        assert graph.get(dg.AssetKey(["sim", "one", after])).parent_keys == {dg.AssetKey(["sim", "one", before])}


@pytest.mark.req("R3-10")
def test_lineage_shows_what_an_experiment_waits_for(tmp_path: Path) -> None:
    """A stage comes after the verdict of the stage before, of the same environment."""
    library = Library((environment(),), (experiment("one"), experiment("two", depends_on="one")))
    graph = build_definitions(library, SimPlatform(tmp_path)).resolve_asset_graph()
    assert graph.get(dg.AssetKey(["sim", "two", "experiment"])).parent_keys == {dg.AssetKey(["sim", "one", "verdict"])}
    assert graph.get(dg.AssetKey(["sim", "one", "experiment"])).parent_keys == set()


def test_what_people_see_of_an_asset(definitions: dg.Definitions) -> None:
    node = definitions.resolve_asset_graph().get(dg.AssetKey(["sim", "one", "verdict"]))
    assert node.group_name == "serving" and node.owners == ["ml-platform@example.com"]
    assert node.description == "h" and {"one", "pod_failure"} == node.kinds
    assert {k.name for k in node.check_keys} == set(keys.CHECKS)


def test_jobs_and_their_executors(definitions: dg.Definitions) -> None:
    jobs = {j.name: j for j in definitions.resolve_all_job_defs()}
    names = {"emergency_stop", "recover_leases", "release_lever", "preflight", "nightly__sim"}
    assert names < set(jobs)
    assert all(j.executor_def.name == "in_process" for j in jobs.values()), "also the job of ad-hoc materialisation"
    assert jobs["nightly__sim"].tags[keys.TAG_SUITE] == "nightly"
    for name in names - {"nightly__sim"}:
        assert keys.TAG_KIND not in jobs[name].tags, "operations never wait behind experiments"


def test_no_op_retries(definitions: dg.Definitions) -> None:
    """A retry policy on the fault op turns an abort into a second injection (facts: 3 of 3)."""
    for job in definitions.resolve_all_job_defs():
        assert "dagster/max_retries" not in job.tags
        assert job._op_retry_policy is None
        for node in job.all_node_defs:
            assert getattr(node, "retry_policy", None) is None, node.name
    assert set(make_ops({})) == set(OPS)


def test_a_retried_op_refuses() -> None:
    class Retried:
        retry_number = 1

    with pytest.raises(dg.Failure, match="second time"):
        refuse_retry(Retried())  # type: ignore[arg-type]


def test_phases_cannot_be_selected_alone(definitions: dg.Definitions) -> None:
    job = definitions.resolve_implicit_global_asset_job_def()
    with pytest.raises(dg.DagsterInvalidSubsetError):
        job.get_subset(asset_selection={dg.AssetKey(["sim", "one", "chaos_metrics"])})


def test_statuses(definitions: dg.Definitions) -> None:
    """Safety is on by itself; breaking things by the clock is switched on by people."""
    repository = definitions.get_repository_def()
    assert {s.name: s.default_status.value for s in repository.sensor_defs if "automation" not in s.name} == {
        "sim_error_budget": "RUNNING",
        "sweeper": "RUNNING",
    }
    assert {s.name: s.default_status.value for s in repository.schedule_defs} == {"nightly__sim_schedule": "STOPPED"}


def test_the_shipped_library_loads() -> None:
    definitions = load()
    dg.Definitions.validate_loadable(definitions)
    found = {k.path[1] for k in definitions.resolve_asset_graph().get_all_asset_keys() if len(k.path) == 3}
    assert "serving_pod_failure" in found


def test_definitions_py_loads_through_the_component() -> None:
    import importlib

    module = importlib.import_module("definitions")
    names = {j.name for j in module.defs().resolve_all_job_defs()}
    assert {"emergency_stop", "smoke__sandbox"} <= names
