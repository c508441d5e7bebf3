"""A service that answers everything in time, as 200, with another number: whole runs in the simulated world."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from sim import ENVIRONMENT, EXPERIMENT, World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.engine.run import Run, run_experiment
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.judgement.verdict import judge

pytestmark = pytest.mark.req("RX-03")
ITEMS = 100
SCORES = [random.Random(4).betavariate(2, 5) for _ in range(ITEMS)]
PROBE: dict[str, Any] = {
    "url": "http://sim/predict", "rate": 50, "timeout": "1s", "value": "score",
    "items": {"name": "entity_id", "from": 0, "to": 297, "step": 3},
}  # fmt: skip
SLIS: dict[str, Any] = {
    **ENVIRONMENT["slis"],
    "golden_error_rate": {"measure": "golden_error_rate"},
    "prediction_psi": {"measure": "prediction_psi"},
    "prediction_ks": {"measure": "prediction_ks"},
}
AVAILABLE = {"sli": "availability", "at_least": "99%"}
GOLDEN = {"sli": "golden_error_rate", "at_most": "0.5%"}
STABLE = {"sli": "prediction_psi", "below": 0.2}


def right(item: int, k: int) -> float:
    return SCORES[item]


def moved(item: int, k: int) -> float:
    return min(1.0, SCORES[item] + 0.3)


def run_in(
    tmp_path: Path,
    world: World,
    *objectives: dict[str, Any],
    probe: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    **experiment: Any,
) -> tuple[Run, RunRecord, Verdict]:
    world.items = ITEMS
    run = build(
        tmp_path,
        world,
        experiment={"steady_state": [AVAILABLE, *objectives], **experiment},
        environment={
            "probe": PROBE | (probe or {}),
            "slis": SLIS,
            "sampling": {**ENVIRONMENT["sampling"], **(sampling or {})},
        },
    )
    record = run_experiment(run)
    assert not world.faults, "a fault was left behind"
    return run, record, judge(record, run.samples)


def test_a_wrong_model_at_full_availability_deviates_in_words(tmp_path: Path) -> None:
    run, record, verdict = run_in(tmp_path, World(score=right, score_during=moved), GOLDEN, STABLE)
    assert verdict.outcome is Outcome.DEVIATED
    slis = verdict.slis
    assert slis["availability"].during == 1.0 and slis["availability"].met is True
    assert (slis["golden_error_rate"].baseline, slis["golden_error_rate"].met) == (0.0, False)
    n = slis["golden_error_rate"].samples
    golden, psi = verdict.reasons
    assert golden.startswith("golden_error_rate ≤ 0.5 % broke: ") and "(0.0 % before, first 0 ms" in golden
    assert verdict.golden is not None and verdict.golden.wrong > 0.9 * n
    assert f"{verdict.golden.wrong} of {n} answers differ from the golden predictions (answered 200, wrong" in golden
    item = verdict.golden.first_item
    assert item is not None
    assert f"first at item {item} (entity_id {3 * item}): {moved(item, 0):.4g} instead of {SCORES[item]:.4g}." in golden
    assert psi.startswith("prediction_psi < 0.20 broke: ") and f"of {ITEMS} items, mean " in psi
    assert slis["golden_error_rate"].ci_low is not None and slis["golden_error_rate"].ci_low > 0.9
    assert slis["prediction_psi"].ci_low is None and f"{ITEMS} different items" in slis["prediction_psi"].why
    # Wrong for as long as the fault: back with it.
    assert verdict.recovery.steady_s is not None and verdict.recovery.steady_s < 0.5 and verdict.recovery.met
    # The stored record says the same.
    store = RecordStore(tmp_path / "records")
    stored, _ = store.load("run-1")
    assert judge(stored, store.samples(stored)) == verdict == judge(record, run.samples)


def test_right_answers_are_held_and_the_table_is_told(tmp_path: Path) -> None:
    _, record, verdict = run_in(tmp_path, World(score=right), GOLDEN, STABLE)
    assert verdict.outcome is Outcome.HELD, verdict.reasons
    assert record.after is not None and record.after.length < 5, "steady is seen when it is there; 13 s were allowed"
    assert verdict.slis["golden_error_rate"].during == verdict.slis["prediction_psi"].during == 0.0
    assert verdict.golden is not None and verdict.golden.items == ITEMS and verdict.golden.unstable == ()
    assert len(verdict.golden.digest) == 64


def test_what_nobody_compares_stays_unseen(tmp_path: Path) -> None:
    """The same fault without the objectives holds: this is what the probes are for."""
    _, _, verdict = run_in(tmp_path, World(score=right, score_during=moved))
    assert verdict.outcome is Outcome.HELD
    assert verdict.slis["golden_error_rate"].during is not None and verdict.slis["golden_error_rate"].during > 0.9


def test_a_small_drift_of_some_items_is_golden_but_no_shift(tmp_path: Path) -> None:
    def some(item: int, k: int) -> float:
        return SCORES[item] + (0.001 if item % 20 == 0 else 0.0)

    _, _, verdict = run_in(tmp_path, World(score=right, score_during=some), GOLDEN, STABLE)
    assert verdict.outcome is Outcome.DEVIATED and len(verdict.reasons) == 1
    assert verdict.slis["golden_error_rate"].during == pytest.approx(0.05, abs=0.01)
    assert verdict.slis["prediction_psi"].met is True


def test_answers_without_a_number_are_wrong(tmp_path: Path) -> None:
    _, _, verdict = run_in(tmp_path, World(score=right, score_during=lambda item, k: float("nan")), GOLDEN)
    assert (
        verdict.outcome is Outcome.DEVIATED and "answers carry no number at score (answered 200)" in verdict.reasons[0]
    )
    assert verdict.slis["availability"].during == 1.0
    assert verdict.slis["prediction_psi"].during is None, "too few numbers are no distance"


@pytest.mark.parametrize(
    "watched",
    [{"sli": "golden_error_rate", "above": "20%", "for": "1s"}, {"sli": "prediction_psi", "above": 0.25, "for": "1s"}],
)
def test_the_watch_loop_aborts_on_wrong_answers(tmp_path: Path, watched: dict[str, Any]) -> None:
    _, record, verdict = run_in(tmp_path, World(score=right, score_during=moved), abort=[watched])
    assert verdict.outcome is Outcome.ABORTED
    assert record.abort is not None and record.abort.cause == "limit"
    assert record.abort.reason.startswith(f"{watched['sli']} above ")
    assert record.window is not None and record.window.length < 5, "10 s were planned"
    assert record.abort.clean_at is not None


@pytest.mark.parametrize(
    "watched",
    [
        {"sli": "golden_error_rate", "above": "0%", "for": "100ms"},
        {"sli": "prediction_ks", "above": 0.001, "for": "100ms"},
    ],
)
def test_right_answers_never_abort(tmp_path: Path, watched: dict[str, Any]) -> None:
    _, _, verdict = run_in(tmp_path, World(score=right), GOLDEN, abort=[watched])
    assert verdict.outcome is Outcome.HELD, verdict.reasons


def test_answers_that_stay_wrong_after_the_fault_are_not_recovered(tmp_path: Path) -> None:
    world = World(score=right, score_during=moved, wrong_for_s=4.0)
    _, record, verdict = run_in(tmp_path, world, GOLDEN, recovery={"within": "2s"})
    assert verdict.recovery.steady_s == pytest.approx(4.0, abs=0.1) and verdict.recovery.met is False
    assert any("recovery took too long" in r for r in verdict.reasons)
    assert record.after is not None and record.after.length > 4.0, "it was looked at until it was steady"
    _, _, shifted = run_in(tmp_path / "psi", World(score=right, score_during=moved, wrong_for_s=4.0), STABLE)
    assert shifted.recovery.steady_s == pytest.approx(4.0, abs=0.5) and shifted.recovery.met is True


def test_a_service_that_flaps_already_is_refused_and_told_why(tmp_path: Path) -> None:
    def flaps(item: int, k: int) -> float:
        return SCORES[item] + (0.2 if k % 7 == 0 else 0.0)

    _, _, verdict = run_in(tmp_path, World(score=flaps), GOLDEN)
    assert verdict.outcome is Outcome.REFUSED
    assert "answers differ from the golden predictions" in verdict.reasons[0] and "instead of" in verdict.reasons[0]


def test_a_value_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    _, _, verdict = run_in(tmp_path, World(), GOLDEN)
    assert verdict.outcome is Outcome.REFUSED and "carry no number at score" in verdict.reasons[0]
    _, _, verdict = run_in(tmp_path / "psi", World(), STABLE)
    assert verdict.outcome is Outcome.REFUSED and "prediction_psi: 0 samples" in verdict.reasons[0]


def test_a_few_unstable_items_are_left_out_and_told(tmp_path: Path) -> None:
    def jitters(item: int, k: int) -> float:
        return SCORES[item] + (0.01 * (k // ITEMS % 2) if item in (5, 60) else 0.0)

    lenient = {"sli": "golden_error_rate", "at_most": "5%"}
    _, _, verdict = run_in(tmp_path, World(score=jitters), lenient)
    assert verdict.outcome is Outcome.HELD, verdict.reasons
    assert verdict.golden is not None and verdict.golden.unstable == (5, 60) and verdict.golden.items == ITEMS - 2
    result = verdict.slis["golden_error_rate"]
    assert result.during == 0.0 and result.baseline is not None and 0 < result.baseline < 0.05


def test_too_few_comparable_answers_are_no_pass(tmp_path: Path) -> None:
    """Most answers are to items that flap: what is left is right, and says too little."""

    def mostly_flapping(item: int, k: int) -> float:
        return SCORES[item] + (0.1 * (k // ITEMS % 2) if item >= 10 else 0.0)

    lenient = {"sli": "golden_error_rate", "at_most": "60%"}
    _, record, verdict = run_in(tmp_path, World(score=mostly_flapping), lenient)
    assert record.after is not None and record.after.length < 5
    assert verdict.outcome is Outcome.INCONCLUSIVE, verdict.reasons
    assert "answers could be compared with the baseline; at least 100 are needed" in verdict.reasons[0]


def test_declared_golden_numbers_need_no_faith_in_the_baseline(tmp_path: Path) -> None:
    _, _, verdict = run_in(tmp_path, World(score=right), GOLDEN, probe={"golden": SCORES})
    assert verdict.outcome is Outcome.HELD and verdict.golden is not None and verdict.golden.declared
    _, _, verdict = run_in(tmp_path / "bad", World(score=moved), GOLDEN, probe={"golden": SCORES})
    assert verdict.outcome is Outcome.REFUSED and "100.0 %" in verdict.reasons[0]


def test_a_record_of_before_these_columns_is_read_and_judged(tmp_path: Path) -> None:
    run = build(tmp_path, World(errors_during=0.2))
    record = run_experiment(run)
    before = judge(record, run.samples)
    store = RecordStore(tmp_path / "records")
    path = store.directory / record.samples_file
    columns = json.loads(gzip.decompress(path.read_bytes()))
    for name in ("item", "value"):
        del columns["requests"][name]
    packed = gzip.compress(json.dumps(columns).encode())
    path.write_bytes(packed)
    body = json.loads(store.path("run-1").read_text())
    body["record"]["samples_sha256"] = hashlib.sha256(packed).hexdigest()
    for name in ("items", "value", "golden", "golden_tolerance"):
        body["record"]["environment"]["probe"].pop(name)
    store.path("run-1").write_text(json.dumps(body))
    old, _ = store.load("run-1")
    samples = store.samples(old)
    assert all(r.item == -1 and r.value != r.value for r in samples.requests) and len(samples.requests) > 500
    assert judge(old, samples) == before and before.golden is None
    assert EXPERIMENT["name"] == old.experiment.name
