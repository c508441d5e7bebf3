"""`mlchaos run` of stages: their order, what is not started, and a file of stages on a library experiment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.cli.app import App
from mlchaos_dagster.cli.places import Places
from mlchaos_dagster.cli.run import prepare
from mlchaos_dagster.cli.stop import Stopper
from mlchaos_dagster.engine.active import ActiveRun
from mlchaos_dagster.engine.ports import Owner
from tests.cli.conftest import Cli, fingerprint
from tests.cli.test_execute import RUNS, launched, result  # noqa: F401  a fixture
from tests.domain.test_stages import AS_USERS_WRITE_IT, HEAD, PASTED
from tests.evidence.builders import all_runs

pytestmark = pytest.mark.req("R3-10")
NAME = "serving-progressive"
OPTIONS: dict[str, Any] = dict.fromkeys(
    ("suite", "kind", "name", "target", "duration", "safety_threshold", "config", "stages", "backend")
) | {"param": ()}


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    path = tmp_path / "progressive.yaml"
    path.write_text(AS_USERS_WRITE_IT)
    return path


def test_all_stages_run_in_order(launched: Any) -> None:  # noqa: F811
    answer = launched([result(RUNS["HELD"])] * 3, NAME, "-o", "json")
    assert answer.code == 0
    assert [e.name for e in launched.asked["experiments"]] == [f"{NAME}-{i}" for i in (1, 2, 3)]
    assert [json.loads(line)["not_started"] for line in answer.out.splitlines()] == [[], [], []]


@pytest.mark.parametrize(
    ("outcome", "code"), [("DEVIATED", 1), ("REFUSED", 3), ("ABORTED", 4), ("INCONCLUSIVE", 5), ("ERROR", 6)]
)
def test_after_a_stage_that_did_not_hold_no_other_starts(outcome: str, code: int, launched: Any) -> None:  # noqa: F811
    answer = launched([result(RUNS[outcome]), result(RUNS["HELD"])], NAME, "-o", "json")
    assert answer.code == code, "the exit code is that of what ran"
    (only,) = answer.out.splitlines()
    because = f"{NAME}-1 {outcome}"
    assert json.loads(only)["not_started"] == [{"experiment": f"{NAME}-{i}", "because": because} for i in (2, 3)]
    assert f"2 of 3  {NAME}-2 not started: {because}\n" in answer.err
    assert f"3 of 3  {NAME}-3 not started: {because}\n" in answer.err
    skip, (_, two, three) = launched.asked["skip"], launched.asked["experiments"]
    assert skip(two) and skip(three), "nor does Dagster make a run of it"


def test_only_what_waits_for_it_is_left_out(launched: Any) -> None:  # noqa: F811
    runs = [result(RUNS[o]) for o in ("HELD", "DEVIATED", "HELD")]
    answer = launched(runs, NAME, "serving-pod-failure", "-o", "json")
    found = [json.loads(line) for line in answer.out.splitlines()]
    assert [[n["experiment"] for n in f["not_started"]] for f in found] == [[], [f"{NAME}-3"], []]
    assert answer.code == 1 and "3 runs: 2 HELD, 1 DEVIATED" in answer.err


def test_a_shadow_run_proves_nothing(launched: Any) -> None:  # noqa: F811
    shadow = next(r for r in all_runs().values() if r.record.shadow and r.verdict.outcome.value == "HELD")
    answer = launched([result(shadow)], NAME, "--shadow")
    assert f"{NAME}-2 not started: {NAME}-1 SHADOW-HELD" in answer.err


def test_a_stop_in_a_stage_starts_nothing_more(launched: Any) -> None:  # noqa: F811
    """Ctrl-C after the fault of stage 1 was gone: it held, and yet stage 2 is not started."""
    answer = launched([result(RUNS["HELD"], cancelled=True)], NAME, "-o", "json")
    assert answer.code == 4 and len(answer.out.splitlines()) == 1
    left = json.loads(answer.out)["not_started"]
    assert [n["experiment"] for n in left] == [f"{NAME}-2", f"{NAME}-3"] and "stopped" in left[0]["because"]
    assert f"not started, because a run was stopped: {NAME}-2, {NAME}-3" in answer.err


def test_a_file_of_stages_as_users_write_it(launched: Any, stages: Path) -> None:  # noqa: F811
    answer = launched([result(RUNS["HELD"])] * 3, "serving-pod-failure", "--stages", str(stages))
    assert answer.code == 0, answer.err
    asked = launched.asked["experiments"]
    assert [(e.name, e.depends_on, e.blast_radius.fraction, e.duration) for e in asked] == [
        ("serving-pod-failure-1", None, 0.1, 300.0),
        ("serving-pod-failure-2", "serving-pod-failure-1", 0.3, 600.0),
        ("serving-pod-failure-3", "serving-pod-failure-2", 0.6, 900.0),
    ]
    shares = [{o.sli: o.limit.value for o in e.steady_state} for e in asked]
    assert shares == [{"availability": s, "latency_p95": 0.3} for s in (0.99, 0.95, 0.9)]
    assert "again: mlchaos " in answer.out, "a name alone would not find these stages"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stages", "FILE"], "--stages: goes with one NAME"),
        (["serving-pod-failure", "serving-pod-delete", "--stages", "FILE"], "--stages: goes with one NAME"),
        ([NAME, "--stages", "FILE"], f'"{NAME}" has stages'),
        (["FILE"], "holds stages alone. Run them on an experiment, such as: mlchaos run serving-pod-failure --stages"),
        (["--config", "FILE"], "FILE:2:1  stages alone, no experiment. Run them on an experiment, such as: mlchaos"),
        (["plan", NAME], f'"{NAME}" has stages, each of which is an experiment'),
    ],
)
def test_a_wrong_call_says_the_right_one(words: list[str], says: str, cli: Cli, stages: Path, home: Path) -> None:
    before = fingerprint(home)
    words = [w.replace("FILE", str(stages)) for w in words]
    answer = cli(*(words if words[0] == "plan" else ["run", *words]))
    assert answer.code == 2 and len(answer.lines) == 1
    assert says.replace("FILE", str(stages)) in answer.err
    assert fingerprint(home) == before


def test_wrong_stages_have_their_place(cli: Cli, stages: Path) -> None:
    stages.write_text(AS_USERS_WRITE_IT.replace("success_threshold: 0.95", "steady_state: [{sli: nope, above: 1%}]"))
    answer = cli("run", "serving-pod-failure", "--stages", stages)
    assert (
        answer.code == 2 and f"{stages}:13:26  progressive_chaos.stage_2.steady_state[0].sli: no such SLI" in answer.err
    )


def test_an_experiment_file_with_stages(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "pods.yaml"
    path.write_text(HEAD + PASTED)
    request = prepare(App({}), (), OPTIONS | {"config": str(path)})
    assert [e.name for e in request.experiments] == ["pods-1", "pods-2", "pods-3"]


def test_check_says_what_a_file_of_stages_is_for(cli: Cli, stages: Path) -> None:
    answer = cli("check", stages)
    assert answer.code == 0 and f"mlchaos run serving-pod-failure --stages {stages}" in answer.out
    assert answer.out.endswith("1 file, no problems\n")
    stages.write_text(AS_USERS_WRITE_IT.replace("chaos_percentage: 30", "chaos_percentage: 300"))
    answer = cli("check", stages)
    assert answer.code == 2 and f"{stages}:11:23  progressive_chaos.stage_2.chaos_percentage: 300 is" in answer.out


def test_describe_list_and_the_document_of_a_stage(cli: Cli) -> None:
    document = cli("describe", NAME).out
    for i, share in ((1, "99 %"), (2, "95 %"), (3, "90 %")):
        row = next(line for line in document.splitlines() if line.startswith(f"| `{NAME}-{i}`"))
        assert share in row and (i == 1 or f"`{NAME}-{i - 1}` HELD" in row)
    assert [s["name"] for s in json.loads(cli("describe", NAME, "-o", "json").out)["stages"]] == [
        f"{NAME}-{i}" for i in (1, 2, 3)
    ]
    assert f"`{NAME}-1` HELD in sandbox within the last 4 h" in cli("describe", f"{NAME}-2").out
    assert "(3 stages)" in cli("list").out
    found = json.loads(cli("list", "-o", "json").out)
    assert found["in_stages"][0]["experiments"] == [f"{NAME}-{i}" for i in (1, 2, 3)]


def test_a_suite_of_everything_leaves_out_what_cannot_run_here(cli: Cli, launched: Any) -> None:  # noqa: F811
    answer = launched([result(RUNS["HELD"])] * 6, "--suite", "full", "-e", "sandbox-10")
    assert answer.code == 0, answer.err
    names = {e.name for e in launched.asked["experiments"]}
    assert f"{NAME}-3" in names and "feature-store-delay" not in names
    assert "left out, because sandbox-10 cannot run them: " in answer.err and "feature-store-delay" in answer.err


def test_the_name_of_all_stages_means_whichever_runs(home: Path) -> None:
    """`mlchaos stop serving-progressive` while its second stage runs."""
    me = Owner(pid=os.getpid(), started=0.0, boot_id="", host="")
    running = [
        ActiveRun(
            run_id=f"run-{name}", experiment=name, environment="sandbox", owner=me, started_wall=0.0, longest_s=60
        )
        for name in (f"{NAME}-2", "serving-pod-failure")
    ]
    stopper = Stopper(Places(App({})), "enough")
    assert stopper._of_stages(NAME, running, ()) == {f"run-{NAME}-2"}
    assert stopper._of_stages("serving-pod-delete", running, ()) == set()
