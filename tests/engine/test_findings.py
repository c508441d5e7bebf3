"""A backend that judges for itself: asked once, waited for without going blind, and never taken for more than it said."""

from __future__ import annotations

from pathlib import Path

import pytest
from sim import World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import Finding, RunRecord
from mlchaos_dagster.engine.findings import FINDINGS_S
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.engine.run import Run, run_experiment
from mlchaos_dagster.errors import DriverUnavailable, Halted
from mlchaos_dagster.judgement.verdict import judge

PASSED = Finding(name="check-login", passed=True, saw="expected 200, found 200")
FAILED = Finding(name="check-login", passed=False, saw="expected 200, found 503")
UNKNOWN = Finding(name="check-login", passed=None, saw="N/A")


def judged(tmp_path: Path, world: World, answer: Finding | Exception, takes_s: float = 0.0) -> Run:
    world.judged, world.judging_s = answer, takes_s
    return build(tmp_path, world)


def failing(world: World, start_s: float, end_s: float) -> None:
    """Every request fails between two moments, seconds from now, if a fault is on."""
    now = world.clock.t
    world.at[now + start_s] = lambda w: setattr(w, "errors_during", 1.0)
    world.at[now + end_s] = lambda w: setattr(w, "errors_during", 0.0)


@pytest.mark.req("R3-01")
@pytest.mark.parametrize(
    ("answer", "outcome", "said"),
    [
        (PASSED, Outcome.HELD, "fake judged the same: check-login"),
        (FAILED, Outcome.DEVIATED, "check-login did not pass: expected 200, found 503"),
        (UNKNOWN, Outcome.INCONCLUSIVE, "check-login is not known: N/A"),
        (
            DriverUnavailable("no answer", driver="fake", verb="findings"),
            Outcome.INCONCLUSIVE,
            "fake.findings: no answer",
        ),
    ],
)
def test_what_the_backend_judged_is_part_of_the_verdict(
    tmp_path: Path, answer: Finding | Exception, outcome: Outcome, said: str
) -> None:
    world = World()
    run = judged(tmp_path, world, answer)
    record = run_experiment(run)
    verdict = judge(record, run.samples)
    assert verdict.outcome is outcome and said in " ".join(verdict.reasons), verdict.reasons
    assert world.asked == [True], "once, while the fault is still there"
    stored = record.model_dump(mode="json")
    assert RunRecord.model_validate(stored) == record
    assert RunRecord.model_validate({k: v for k, v in stored.items() if k != "findings"}).findings == ()


def test_the_owner_lives_and_nobody_takes_the_fault_from_it_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, beats = World(), list[float]()
    run = judged(tmp_path, world, PASSED, takes_s=80.0)
    renew, clock = run.kit.ledger.renew, world.clock

    def noted(lease: Lease) -> None:
        beats.append(clock.t)
        assert clock.wall() < lease.deadline_wall, "the watchdog would have taken it"
        renew(lease)

    monkeypatch.setattr(run.kit.ledger, "renew", noted)
    record = run_experiment(run)
    assert record.findings == (PASSED,) and record.moment("judged") is not None
    assert max(b - a for a, b in zip(beats, beats[1:], strict=False)) < run.environment.safety.lease_ttl / 2


def test_harm_is_not_thinned_out_by_the_wait(tmp_path: Path) -> None:
    """3 % of the requests fail in the 10 s window and none in the 80 s after it, in which the fault is over."""
    world = World(errors_during=0.03)
    run = judged(tmp_path, world, PASSED, takes_s=80.0)
    world.at[world.clock.t + 24.0] = lambda w: setattr(w, "errors_during", 0.0)
    record = run_experiment(run)
    assert record.window is not None and record.window.length > 80
    verdict = judge(record, run.samples)
    assert verdict.outcome is Outcome.DEVIATED and "availability" in verdict.reasons[0]
    assert verdict.slis["availability"].samples < 700


def test_harm_is_not_thinned_out_by_a_backend_that_is_slow_to_begin(tmp_path: Path) -> None:
    """Ten requests fail: 2 % of the 500 while the fault was on, 0.7 % of those since it was begun to be made."""
    world = World(batches={"inject": 50})
    run = build(tmp_path, world)
    failing(world, 30.0, 30.2)
    record = run_experiment(run)
    assert record.full is not None and record.window is not None
    assert record.full.length == pytest.approx(10, abs=0.1) and record.window.length > 30
    verdict = judge(record, run.samples)
    assert verdict.outcome is Outcome.DEVIATED and "broke while the fault was on" in verdict.reasons[0], verdict.reasons
    assert verdict.slis["availability"].met and verdict.held is False, "nor does the asset check pass"


def test_harm_that_a_kill_does_before_it_is_seen_is_not_thinned_out(tmp_path: Path) -> None:
    """Twenty fail in the last second in which it is made, as when a pod is deleted: 0.8 % of all, 3 % since then."""
    world = World(batches={"inject": 100})
    run = build(tmp_path, world)
    failing(world, 44.6, 45.0)
    record = run_experiment(run)
    first = next(r.due_s for r in run.samples.requests if not r.ok)
    assert record.full is not None and 0 < record.full.start - first < 2
    verdict = judge(record, run.samples)
    assert verdict.slis["availability"].met
    assert verdict.outcome is Outcome.DEVIATED and "before it was seen" in verdict.reasons[0], verdict.reasons


def test_a_slow_backend_does_not_lend_its_healthy_requests_to_a_short_fault(tmp_path: Path) -> None:
    """1,500 requests while it was made, 500 while it was there: of these 600 are needed."""
    world = World(batches={"inject": 75})
    run = build(tmp_path, world, environment={"sampling": {"baseline": "15s", "min_samples": 600}})
    verdict = judge(run_experiment(run), run.samples)
    assert verdict.outcome is Outcome.INCONCLUSIVE, verdict.reasons
    assert "requests were measured while the fault was on; at least 600 are needed" in verdict.reasons[0]


def test_harm_that_comes_only_while_waiting_is_seen(tmp_path: Path) -> None:
    world = World()
    run = judged(tmp_path, world, PASSED, takes_s=20.0)
    world.at[world.clock.t + 24.0] = lambda w: setattr(w, "errors_during", 0.3)
    verdict = judge(run_experiment(run), run.samples)
    assert verdict.outcome is Outcome.DEVIATED and "before the fault was taken away" in verdict.reasons[0]


@pytest.mark.req("R4-05")
def test_a_limit_that_is_crossed_while_waiting_aborts(tmp_path: Path) -> None:
    world = World()
    run = judged(tmp_path, world, PASSED, takes_s=80.0)
    world.at[world.clock.t + 30.0] = lambda w: setattr(w, "errors_during", 1.0)
    record = run_experiment(run)
    assert judge(record, run.samples).outcome is Outcome.ABORTED
    assert record.abort is not None and record.abort.cause == "limit" and record.findings == ()
    assert record.moment("window_ended") is not None, "it was crossed after the window"
    assert not world.faults


def test_an_aborted_run_and_a_shadow_ask_nobody(tmp_path: Path) -> None:
    world = World(errors_during=1.0)
    run = judged(tmp_path / "aborted", world, FAILED)
    record = run_experiment(run)
    assert judge(record, run.samples).outcome is Outcome.ABORTED and world.asked == []

    world = World(judged=FAILED)
    assert run_experiment(build(tmp_path / "shadow", world, shadow=True)).findings == () and world.asked == []


def never_answers(run: Run) -> list[Step]:
    """Whatever the driver is asked it answers at once, but for what it judged. Returns the steps it was given."""
    given: list[Step] = []

    def findings(lease: Lease, step: Step = no_step) -> tuple[Finding, ...]:
        given.append(step)
        return ()

    def in_the_background(work):
        before, result = len(given), work()
        return lambda: (False, None) if len(given) > before else (True, result)

    run.kit.driver.findings = findings
    run.kit.background = in_the_background
    return given


def test_an_answer_that_never_comes_is_waited_for_no_longer_than_its_bound(tmp_path: Path) -> None:
    world = World()
    run = judged(tmp_path, world, PASSED)
    given = never_answers(run)
    record = run_experiment(run)
    assert [f.passed for f in record.findings] == [None] and "100 s" in record.findings[0].saw
    ended, told = record.moment("window_ended"), record.moment("judged")
    assert ended is not None and told is not None and FINDINGS_S <= told - ended < FINDINGS_S + 4
    assert judge(record, run.samples).outcome is Outcome.INCONCLUSIVE and not world.faults
    with pytest.raises(Halted):
        given[0](0, 0)


def test_a_stop_ends_the_wait_for_a_driver_that_does_not_step(tmp_path: Path) -> None:
    world = World()
    run = judged(tmp_path, world, PASSED)
    never_answers(run)
    world.at[world.clock.t + 40.0] = lambda w: setattr(w, "stop", ("stop", "enough"))
    record = run_experiment(run)
    assert record.abort is not None and record.abort.reason == "enough" and not world.faults
    assert record.abort.seconds is not None and record.abort.seconds < 1 and record.findings == ()
