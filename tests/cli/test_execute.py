"""From what was launched to exit code, stdout and stderr; Dagster itself is replaced."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.cli.conftest import Answer, Cli
from tests.evidence.builders import Run, all_runs

CONTRACT = {
    *("run_id", "experiment", "environment", "outcome", "reasons", "started_at", "durations_s", "targets", "fault"),
    *("slis", "abort", "recovery", "clean", "record_path", "report_path"),
}
CODES = {"HELD": 0, "DEVIATED": 1, "REFUSED": 3, "ABORTED": 4, "INCONCLUSIVE": 5, "ERROR": 6, "UNCLEAN": 70}
RUNS = {run.verdict.outcome.value: run for name, run in sorted(all_runs().items()) if not run.record.shadow}


def result(run: Run | None, *, error: str = "", cancelled: bool = False, kind: str = "") -> SimpleNamespace:
    return SimpleNamespace(
        run_id=run.record.run_id if run else "r-1",
        record=run.record if run else None,
        verdict=run.verdict if run else None,
        record_path=Path("/x/record.json"),
        report_path=None,
        error=error,
        kind=kind,
        cancelled=cancelled,
        overhead_s=0.25,
        problems=("the report could not be written: disk full",) if error else (),
    )


@pytest.fixture
def launched(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call `mlchaos run` with results that are given; what launch was asked for is kept in `.asked`."""

    class Launched:
        asked: dict[str, Any]

        def __call__(self, results: list[SimpleNamespace], *words: str) -> Answer:
            def launch(experiments: Any, environment: Any, settings: Any, **more: Any) -> Iterator[SimpleNamespace]:
                self.asked = {"experiments": experiments, "environment": environment, **more}
                for r in results:
                    more["progress"]("phase", {"name": "baseline", "seconds": 8.0})
                    yield r
                    if r.cancelled:
                        return

            module = ModuleType("mlchaos_dagster.orchestration.launch")
            module.launch = launch  # type: ignore[attr-defined]
            package = ModuleType("mlchaos_dagster.orchestration")
            monkeypatch.setitem(sys.modules, "mlchaos_dagster.orchestration", package)
            monkeypatch.setitem(sys.modules, "mlchaos_dagster.orchestration.launch", module)
            return cli("run", *words)

    return Launched()


@pytest.mark.parametrize("outcome", CODES)
def test_exit_codes_and_the_contracted_object(outcome: str, launched: Any) -> None:
    assert outcome in RUNS
    answer = launched([result(RUNS[outcome])], "serving-pod-failure", "-o", "json")
    assert answer.code == CODES[outcome]
    found = json.loads(answer.out)
    assert set(found) >= CONTRACT and found["outcome"] == outcome
    assert found["durations_s"]["overhead"] == 0.25
    assert "baseline" in answer.err


@pytest.mark.parametrize("outcome", CODES)
def test_people_get_the_block_with_the_outcome_first(outcome: str, launched: Any) -> None:
    answer = launched([result(RUNS[outcome])], "serving-pod-failure")
    assert answer.out.startswith(outcome)


def test_several_runs_are_one_object_a_line_and_the_worst_exit_code(launched: Any) -> None:
    names = ("serving-pod-failure", "serving-pod-delete", "feature-store-delay")
    runs = [result(RUNS[o]) for o in ("HELD", "DEVIATED", "REFUSED")]
    answer = launched(runs, *names, "-o", "json", "--shadow", "--seed", "7")
    assert answer.code == 1
    assert [json.loads(line)["outcome"] for line in answer.out.splitlines()] == ["HELD", "DEVIATED", "REFUSED"]
    assert "3 runs: 1 HELD, 1 DEVIATED, 1 REFUSED" in answer.err
    assert tuple(e.name for e in launched.asked["experiments"]) == names
    assert (launched.asked["shadow"], launched.asked["seed"]) == (True, 7)


def test_after_a_stopped_run_the_rest_is_named(launched: Any) -> None:
    answer = launched([result(RUNS["ABORTED"], cancelled=True)], "--suite", "smoke")
    assert answer.code == 4
    assert "not started, because a run was stopped: feature-store-delay, gateway-to-model-latency" in answer.err
    assert launched.asked["suite"] == "smoke"


def test_a_run_without_a_record_is_an_error_of_ours(launched: Any) -> None:
    answer = launched([result(None, error="the sandbox cannot be started")], "serving-pod-failure", "-o", "json")
    assert answer.code == 6
    assert json.loads(answer.out)["reasons"] == ["the sandbox cannot be started"]
    assert "disk full" in answer.err


def test_what_never_began_because_somebody_said_stop_is_aborted(launched: Any) -> None:
    stopped = result(None, error="interrupted before it began; nothing was injected", cancelled=True)
    answer = launched([stopped], "--suite", "smoke", "-o", "json")
    assert answer.code == 4
    assert json.loads(answer.out)["outcome"] == "ABORTED"
    assert "ABORTED  " in answer.err and "error:" not in answer.err
    assert "not started, because a run was stopped" in answer.err


def test_a_suite_that_was_not_run_to_its_end_is_no_pass(launched: Any) -> None:
    """Ctrl-C while the first run looked at its recovery, or was judged: its own outcome stands."""
    answer = launched([result(RUNS["HELD"], cancelled=True)], "--suite", "smoke")
    assert answer.code == 4 and answer.out.startswith("HELD")
    assert launched([result(RUNS["HELD"], cancelled=True)], "serving-pod-failure").code == 0


def test_an_interrupt_between_runs_keeps_what_was_found(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlchaos_dagster.cli.execute._show", interrupted)
    answer = launched([result(RUNS["UNCLEAN"])], "--suite", "smoke")
    assert answer.code == 70 and "not started, because a run was stopped" in answer.err


def test_wrong_surroundings_are_a_usage_error(launched: Any) -> None:
    wrong = result(None, error="the sandbox is up with another configuration", kind="usage")
    assert launched([wrong], "serving-pod-failure").code == 2
    names = ("serving-pod-failure", "serving-pod-delete")
    assert launched([result(RUNS["HELD"]), wrong], *names).code == 2
    assert launched([result(RUNS["UNCLEAN"]), wrong], *names).code == 70


def test_an_error_of_ours_never_hides_a_fault_that_may_be_live(launched: Any) -> None:
    assert launched([result(RUNS["UNCLEAN"], error="bug")], "serving-pod-failure").code == 70
    assert launched([result(RUNS["HELD"], error="bug")], "serving-pod-failure").code == 6


def test_an_interrupt_that_the_run_could_not_take_claims_nothing(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlchaos_dagster.cli.execute.execute", interrupted)
    answer = launched([], "serving-pod-failure")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err == "ABORTED  interrupted; `mlchaos status` shows whether anything is left\n"
