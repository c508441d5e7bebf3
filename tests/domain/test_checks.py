"""What only an environment can tell: said in words, with the place in the file."""

from __future__ import annotations

import pytest

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.checks import check_experiment, check_suite, through
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.parsing import Parsed, parse_any, parse_model
from mlchaos_dagster.domain.spec import Suite

from .test_parsing import GOOD


@pytest.fixture(scope="module")
def sandbox() -> Environment:
    return Catalog().environment("sandbox")


def problems(text: str, environment: Environment) -> list[str]:
    parsed = parse_any(text, "f.yaml")
    return [str(p) for p in check_experiment(parsed.value, environment, parsed)]


def test_the_example_of_the_design_runs_in_the_sandbox(sandbox: Environment) -> None:
    assert problems(GOOD, sandbox) == []


@pytest.mark.req("R1-06")
def test_one_run_through_another_backend_moves_its_faults_and_no_others(sandbox: Environment) -> None:
    shared = {**sandbox.backends, "model": (*sandbox.backends["model"], "pod_failure")}
    both = sandbox.model_copy(update={"backends": shared, "prefer": "sandbox"})
    moved = through(both, "model", [Catalog().experiment("serving-pod-failure")], "--backend")
    assert (both.backend_for("pod_failure"), moved.backend_for("pod_failure")) == ("sandbox", "model")
    assert moved.backend_for("pod_delete") == "sandbox"


@pytest.mark.req("R1-06")
def test_a_run_through_the_third_backend_has_an_environment_that_its_record_can_hold(sandbox: Environment) -> None:
    text = sandbox.model_dump(mode="json", by_alias=True)
    three = {
        "a": ["pod_failure", "pod_delete"],
        "b": ["pod_failure"],
        "c": ["pod_failure", "pod_delete"],
        "d": ["pod_delete"],
    }
    before = Environment.model_validate({**text, "backends": three, "prefer": "c"})
    moved = through(before, "d", [Catalog().experiment("serving-pod-delete")], "--backend")
    read = Environment.model_validate(moved.model_dump(mode="json", by_alias=True))
    assert (read.backend_for("pod_delete"), read.backend_for("pod_failure")) == ("d", "c")


@pytest.mark.req("R1-06")
def test_one_line_says_which_of_three_backends_serves_what_they_share(sandbox: Environment) -> None:
    text = sandbox.model_dump(mode="json", by_alias=True)
    shared = {"backends": {"a": ["pod_failure"], "b": ["pod_failure"], "c": ["pod_failure", "pod_delete"]}}
    one = Environment.model_validate({**text, **shared, "prefer": "a"})
    assert (one.backend_for("pod_failure"), one.backend_for("pod_delete")) == ("a", "c")
    with pytest.raises(
        ValueError, match="pod_failure is served by both a, b and c. Allowed: one of them, or prefer: c"
    ):
        Environment.model_validate({**text, **shared})


WRONG = [
    ("sli: latency_p95", "sli: latency_p9", 'f.yaml:13:11  steady_state[1].sli: no such SLI "latency_p9". Did you mean "latency_p99"? Allowed in sandbox: availability, '),
    ("sli: error_rate", "sli: zebra", 'f.yaml:17:15  abort[0].sli: no such SLI "zebra". Allowed in sandbox: '),
    ("target: prediction-service", "target: prediction", 'f.yaml:7:9  target: no such target "prediction". Did you mean "prediction-service"? Allowed in sandbox: '),
    ("signal: ready_replicas", "signal: ready", 'f.yaml:15:14  expect[0].signal: no such signal "ready". '),
    ("at_least: 99%", "at_least: 99", "f.yaml:12:35  steady_state[0].at_least: availability is a ratio, not 99 without a unit. Allowed: a percentage, such as 99%."),
    ("below: 300ms", "below: 5%", "f.yaml:13:31  steady_state[1].below: latency_p95 is a time, not a percentage. Allowed: a duration, such as 300ms."),
    ("kind: pod_failure", "kind: network_partition", "f.yaml:8:15  fault.kind: network_partition is for links, and prediction-service selects processes (inference-*) in environment sandbox. Allowed with network_partition: target feature-store, model-link"),
    ("target: prediction-service", "target: feature-store", "f.yaml:8:15  fault.kind: pod_failure is for processes, and feature-store selects links (gateway->feature-store) in environment sandbox. Allowed with pod_failure: target prediction-service,"),
    ("sli: error_rate, above: 5%", "sli: error_rate, below: 5%", "f.yaml:17:34  abort[0].below: error_rate below a limit is what is wished for: it would abort every healthy run. Allowed: above."),
    ("sli: error_rate, above: 5%", "sli: availability, above: 0%", "f.yaml:17:36  abort[0].above: availability above a limit is what is wished for: it would abort every healthy run. Allowed: below."),
    ("sli: error_rate, above: 5%", "sli: fallback_rate, below: 5%", "f.yaml:17:37  abort[0].below: fallback_rate below a limit"),
    ("sli: error_rate, above: 5%", "sli: golden_error_rate, below: 5%", "f.yaml:17:41  abort[0].below: golden_error_rate below a limit"),
    ("at_least: 99%", "at_least: 99%}\n  - {sli: prediction_psi, below: 20%", "f.yaml:13:34  steady_state[1].below: prediction_psi is a plain number, not a percentage."),
    ("fraction: 30%", "count: 4", "f.yaml:9:23  blast_radius.count: 4 is more than exists in environment sandbox. Allowed: 1 to 3."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), WRONG, ids=[w[1] for w in WRONG])
def test_what_the_environment_does_not_have(old: str, new: str, expected: str, sandbox: Environment) -> None:
    (line,) = problems(GOOD.replace(old, new, 1), sandbox)
    assert line.startswith(expected)


def test_a_fault_without_a_backend_and_a_radius_above_the_limit(sandbox: Environment) -> None:
    limits = sandbox.limits.model_copy(update={"max_fraction": 0.2})
    poor = sandbox.model_copy(update={"backends": {"sandbox": ("pod_delete",)}, "limits": limits})
    kind, radius = problems(GOOD, poor)
    assert kind == (
        "f.yaml:8:15  fault.kind: no backend of environment sandbox serves pod_failure. Allowed: pod_delete."
    )
    assert radius.startswith("f.yaml:9:26  blast_radius.fraction: 30 % is above limits.max_fraction")


@pytest.mark.req("RX-03")
def test_an_objective_on_answered_numbers_needs_a_probe_that_reads_them(sandbox: Environment) -> None:
    text = GOOD.replace("{sli: availability, at_least: 99%}", "{sli: golden_error_rate, at_most: 0.5%}")
    assert check_experiment(parse_any(text).value, sandbox) == []
    target = sandbox.targets["prediction-service"]
    blind = target.model_copy(update={"probe": sandbox.probe.model_copy(update={"value": None})})
    other = sandbox.model_copy(update={"targets": {**sandbox.targets, "prediction-service": blind}})
    (line,) = problems(text, other)
    assert line.startswith(
        "f.yaml:12:11  steady_state[0].sli: golden_error_rate is measured on the number in the answer, and "
        "targets.prediction-service.probe.value of environment sandbox does not say where that is."
    )


def test_without_a_file_problems_name_the_experiment(sandbox: Environment) -> None:
    experiment = parse_any(GOOD.replace("sli: error_rate", "sli: zebra")).value
    (problem,) = check_experiment(experiment, sandbox)
    assert problem.where == "serving-pod-failure"


def test_a_suite_of_unknown_and_repeated_names() -> None:
    text = "schema: mlchaos/v1\nname: s\ntitle: S\nexperiments: [good, goood, good]\n"
    parsed: Parsed[Suite] = parse_model(text, "s.yaml", Suite)
    found = [str(p) for p in check_suite(parsed.value, ["good"], parsed)]
    assert found == [
        's.yaml:4:21  experiments[1]: no such experiment "goood". Did you mean "good"? Allowed: good.',
        's.yaml:4:28  experiments[2]: "good" is in the suite twice. Allowed: once.',
    ]


def test_the_mechanisms_of_the_spec_are_those_of_the_sandbox() -> None:
    from typing import get_args

    from mlchaos_dagster.domain.spec import Mechanism
    from mlchaos_dagster.sandbox.config import MECHANISMS

    assert get_args(Mechanism) == MECHANISMS, "the sandbox may import nothing above, so the names stand twice"


@pytest.mark.req("R3-09")
def test_rollback_actions_need_a_backend_and_objects_that_fit(sandbox: Environment) -> None:
    actions = "rollback: {actions: [{scale_up: {target: prediction-service, at_least: 4}}]}\n"
    (line,) = problems(GOOD + actions, sandbox)
    assert line.endswith("backend sandbox takes no rollback actions. Allowed: none, or backend kubernetes.")
    cluster = sandbox.model_copy(update={"backends": {"kubernetes": ("pod_failure",)}, "sandbox": None})
    (line,) = problems(GOOD + actions, cluster)
    assert (
        "scale_up is not for a Pod, which prediction-service is in sandbox. Allowed: a target of kind Deployment"
        in line
    )
    (line,) = problems(GOOD + actions.replace("prediction-service", "predictions"), cluster)
    assert 'no such target "predictions"' in line
    fits = actions.replace("scale_up", "restart_unhealthy").replace("at_least", "at_most")
    assert problems(GOOD + fits, cluster) == []
