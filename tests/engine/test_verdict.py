"""Rules of the verdict, each on the stored facts of a simulated run that held, with one thing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sim import World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import STATUS_UNSENT, RunRecord, Samples, SignalSample
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.run import run_experiment
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.judgement.verdict import judge


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Samples]:
    run = build(tmp_path_factory.mktemp("run"), World())
    record = run_experiment(run)
    assert judge(record, run.samples).outcome is Outcome.HELD
    return record, run.samples


def changed(record: RunRecord, **experiment: Any) -> RunRecord:
    spec = {**record.experiment.model_dump(mode="json", by_alias=True), **experiment}
    return record.model_copy(update={"experiment": Experiment.model_validate(spec)})


def test_a_signal_that_was_silent_in_the_window_is_no_pass(held: tuple[RunRecord, Samples]) -> None:
    record, samples = held
    assert record.baseline is not None and record.window is not None
    record = changed(record, steady_state=[{"sli": "ready_replicas", "at_least": 1}], expect=[])
    assert judge(record, samples).outcome is Outcome.HELD
    silent = [s for s in samples.signals if not record.baseline.end < s.t < record.window.end]
    verdict = judge(record, Samples(samples.requests, silent))
    assert verdict.outcome is Outcome.INCONCLUSIVE and verdict.slis["ready_replicas"].during is None


def test_an_injected_run_is_never_told_as_refused(held: tuple[RunRecord, Samples]) -> None:
    record, samples = held
    assert record.baseline is not None
    bad = [r._replace(ok=r.due_s >= record.baseline.end or k % 10 > 0) for k, r in enumerate(samples.requests)]
    verdict = judge(record, Samples(bad, samples.signals))
    assert verdict.outcome is Outcome.INCONCLUSIVE and "before the fault" in verdict.reasons[0]


def test_what_was_there_before_the_fault_was_not_reached_by_it(held: tuple[RunRecord, Samples]) -> None:
    record, samples = held
    verdict = judge(changed(record, expect=[{"signal": "ready_replicas", "reaches": 3}]), samples)
    assert verdict.outcome is Outcome.INCONCLUSIVE and "without the fault" in verdict.reasons[0]


def test_a_request_the_probe_could_not_send_is_not_the_targets_failure(held: tuple[RunRecord, Samples]) -> None:
    record, samples = held
    assert record.window is not None
    start = record.window.start
    few = [
        r._replace(status=STATUS_UNSENT, ok=False) if r.due_s >= start and k % 10 == 0 else r
        for k, r in enumerate(samples.requests)
    ]
    verdict = judge(record, Samples(few, samples.signals))
    assert verdict.slis["availability"].during == 1.0 and verdict.slis["availability"].late > 40
    many = [r._replace(status=STATUS_UNSENT, ok=False) if r.due_s >= start and k % 2 else r for k, r in enumerate(few)]
    assert judge(record, Samples(many, samples.signals)).outcome is Outcome.INCONCLUSIVE


def test_a_request_under_way_at_the_kill_belongs_to_the_fault(held: tuple[RunRecord, Samples]) -> None:
    record, samples = held
    assert record.window is not None
    start = record.window.start
    lost = [r._replace(ok=False, status=0) if r.due_s < start < r.done_s else r for r in samples.requests]
    assert any(not r.ok for r in lost)
    during = judge(record, Samples(lost, samples.signals)).slis["availability"].during
    assert during is not None and during < 1.0


def test_recovery_of_kills_counts_from_the_last_kill(held: tuple[RunRecord, Samples]) -> None:
    record, samples = held
    killed = changed(record, fault={"kind": "pod_delete"})
    ready = judge(killed, samples).recovery.ready_s
    assert record.window is not None and ready is not None
    assert ready > record.window.length - 1, "the replica was down from the kill to the end of the window"
    # Killed once more before it ran: that makes no count of replicas fall, only what tells of the loss rises.
    at = record.window.end - 2
    lost = [SignalSample(t, "lost_replicas", float(t >= at)) for t in (record.window.start, at - 0.1, at)]
    again = judge(killed, Samples(samples.requests, [*samples.signals, *lost])).recovery.ready_s
    assert again is not None and again == pytest.approx(ready - (at - record.window.start), abs=0.5)


@pytest.mark.parametrize("window", ["30d", "90s", "1h30m", "1ms", "123456789s"])
@pytest.mark.parametrize("objective", ["99.99999%", "95%", "33.3%", "0.1%"])
def test_a_record_is_read_back_as_it_was(
    held: tuple[RunRecord, Samples], tmp_path: Path, window: str, objective: str
) -> None:
    record, samples = held
    environment = type(record.environment).model_validate(
        {
            **record.environment.model_dump(mode="json", by_alias=True),
            "error_budget": {"objective": objective, "window": window},
        }
    )
    store = RecordStore(tmp_path)
    saved = store.save(record.model_copy(update={"environment": environment}), samples)
    assert store.load(record.run_id)[0] == saved


def test_a_run_judged_again_stays_as_old_as_it_is(held: tuple[RunRecord, Samples], tmp_path: Path) -> None:
    record, samples = held
    store = RecordStore(tmp_path)
    for run_id in ("older", "newer"):
        store.save(record.model_copy(update={"run_id": run_id}), samples)
    old, _ = store.load("older")
    store.save_verdict(old, judge(old, samples))
    assert store.ids() == ["older", "newer"]
