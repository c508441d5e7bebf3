"""A whole run in the simulated world: every outcome, and what the record says of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sim import World, build

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.engine.ports import Lease, Objection, Owner
from mlchaos_dagster.engine.run import run_experiment
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.judgement.verdict import judge
from mlchaos_dagster.probes.signals import MergedSignals

TEMPLATE = Lease(
    id="mlchaos-other",
    run_id="",
    experiment="other",
    environment="",
    driver="fake",
    kind="pod_failure",
    targets=("elsewhere-1",),
    params={},
    undo={},
    duration_s=1.0,
    opened_wall=0.0,
    deadline_wall=1.0,
    owner=Owner(pid=1, started=1.0, boot_id="b", host="another-host"),
)


def outcome(tmp_path: Path, world: World, **kwargs: Any):
    run = build(tmp_path, world, **kwargs)
    record = run_experiment(run)
    assert not world.faults, "a fault was left behind"
    assert not run.kit.ledger.leases(), "a lease was left open"
    return record, judge(record, run.samples)


@pytest.mark.req("R0-05", "R2-04")
def test_held(tmp_path: Path) -> None:
    world = World()
    record, verdict = outcome(tmp_path, world)
    assert verdict.outcome is Outcome.HELD, verdict.reasons
    assert record.fault is not None and record.fault.confirmed
    assert record.clean is not None and record.clean.proven
    assert verdict.slis["availability"].during == 1.0
    assert verdict.recovery.ready_s == pytest.approx(world.heal_after_s, abs=0.25)
    assert len(world.injections) == 1


def test_stored_record_gives_the_same_verdict(tmp_path: Path) -> None:
    _, verdict = outcome(tmp_path, World(errors_during=0.2))
    store = RecordStore(tmp_path / "records")
    record, _ = store.load("run-1")
    assert judge(record, store.samples(record)) == verdict


def test_deviated_names_the_objective(tmp_path: Path) -> None:
    _, verdict = outcome(tmp_path, World(errors_during=0.1))
    assert verdict.outcome is Outcome.DEVIATED
    assert "availability" in verdict.reasons[0] and "%" in verdict.reasons[0]


def test_expected_effect_not_seen_deviates(tmp_path: Path) -> None:
    _, verdict = outcome(tmp_path, World(), experiment={"expect": [{"signal": "ready_replicas", "rises": True}]})
    assert verdict.outcome is Outcome.DEVIATED
    assert "ready_replicas rises" in verdict.reasons[0]


@pytest.mark.req("RX-06")
def test_slow_recovery_is_censored_and_deviates(tmp_path: Path) -> None:
    _, verdict = outcome(tmp_path, World(heal_after_s=1e6))
    assert verdict.outcome is Outcome.DEVIATED
    assert "ready" in verdict.recovery.censored
    assert verdict.recovery.ready_s is not None and verdict.recovery.ready_s > 10


@pytest.mark.req("RX-04")
def test_fault_without_effect_is_never_a_pass(tmp_path: Path) -> None:
    _, verdict = outcome(tmp_path, World(effective=False))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "not seen" in verdict.reasons[0]


def test_fault_that_ends_early_is_never_a_pass(tmp_path: Path) -> None:
    world = World()
    world.at[world.clock.t + 12] = lambda w: w.faults.clear()
    _, verdict = outcome(tmp_path, world)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "before the window ended" in verdict.reasons[0]


def test_late_probe_is_inconclusive(tmp_path: Path) -> None:
    world = World()
    world.at[world.clock.t + 10] = lambda w: setattr(w, "late_s", 0.2)
    _, verdict = outcome(tmp_path, world, environment={"sampling": {"baseline": "5s", "blind_for": "60s"}})
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "late" in verdict.reasons[0]


def test_too_few_samples(tmp_path: Path) -> None:
    _, verdict = outcome(tmp_path, World(), experiment={"duration": "1s"})
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "at least 100" in verdict.reasons[0] and "window of" in verdict.advice


@pytest.mark.req("RX-05")
def test_limit_aborts_and_times_it(tmp_path: Path) -> None:
    record, verdict = outcome(tmp_path, World(errors_during=0.9))
    assert verdict.outcome is Outcome.ABORTED
    assert record.abort is not None and record.abort.cause == "limit"
    assert record.abort.first_bad_at is not None and record.abort.breach_at - record.abort.first_bad_at >= 2
    assert record.abort.seconds is not None and record.abort.seconds < 1
    assert "error_rate above 50.0 %" in verdict.reasons[0]


@pytest.mark.req("RX-05")
def test_sure_degradation_aborts_without_any_limit(tmp_path: Path) -> None:
    asked = {"degradation": {"margin": "10%"}, "duration": "30s"}
    record, verdict = outcome(tmp_path / "a", World(errors_during=0.4), experiment=asked)
    assert verdict.outcome is Outcome.ABORTED and record.abort is not None
    assert "confidence sequence" in record.abort.reason and "availability" in record.abort.reason
    assert record.window is not None and record.window.length < 25
    for k, world in enumerate([World(), World(errors_during=0.05)]):  # nothing, and within the margin
        assert outcome(tmp_path / f"b{k}", world, experiment=asked)[0].abort is None


def test_blind_aborts(tmp_path: Path) -> None:
    world = World()
    world.mute_from = world.clock.t + 8
    record, verdict = outcome(tmp_path, world)
    assert verdict.outcome is Outcome.ABORTED
    assert record.abort is not None and record.abort.cause == "blind"


def test_lost_watchdog_aborts(tmp_path: Path) -> None:
    world = World()
    world.at[world.clock.t + 8] = lambda w: setattr(w, "watchdog_alive", False)
    record, _ = outcome(tmp_path, world)
    assert record.abort is not None and record.abort.cause == "watcher"


@pytest.mark.req("R4-05")
@pytest.mark.parametrize("after_s", [0.2, 3.0, 8.0])
def test_stop_request(tmp_path: Path, after_s: float) -> None:
    world = World()
    world.at[world.clock.t + after_s] = lambda w: setattr(w, "stop", ("stop", "enough"))
    record, verdict = outcome(tmp_path, world)
    assert verdict.outcome is Outcome.ABORTED
    assert (record.fault is None) == (after_s < 6)


def test_unsteady_baseline_is_refused(tmp_path: Path) -> None:
    world = World(errors_always=0.2)
    record, verdict = outcome(tmp_path, world)
    assert verdict.outcome is Outcome.REFUSED and not world.injections
    assert "availability" in verdict.reasons[0]


@pytest.mark.req("R4-03")
def test_guards_refuse(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"health": 0.5}, "health"),
        ({"budget": 0.05}, "error budget"),
        ({"experiment": {"blast_radius": {"count": 4}}}, "more than exists"),
        ({"environment": {"limits": {"max_fraction": "10%"}}}, "blast radius"),
        (
            {
                "environment": {
                    "freezes": [{"start": "2020-01-01T00:00:00Z", "end": "2099-01-01T00:00:00Z", "reason": "x"}]
                }
            },
            "frozen",
        ),
    ]
    for n, (kwargs, word) in enumerate(cases):
        world = World()
        _, verdict = outcome(tmp_path / str(n), world, **kwargs)
        assert verdict.outcome is Outcome.REFUSED and word in verdict.reasons[0], verdict.reasons
        assert not world.injections
        line = json.loads((tmp_path / str(n) / "incidents.jsonl").read_text().splitlines()[-1])
        assert line["kind"] == "refusal"


def test_crashing_guard_refuses(tmp_path: Path) -> None:
    run = build(tmp_path, World())
    run.kit.driver.resolve = lambda target: [][1]  # type: ignore[method-assign]
    record = run_experiment(run)
    verdict = judge(record, run.samples)
    assert verdict.outcome is Outcome.REFUSED and "could not be checked" in verdict.reasons[0]


def test_a_backend_that_is_not_there_refuses_and_says_so(tmp_path: Path) -> None:
    record, verdict = outcome(tmp_path, World(fail_at=1))
    assert verdict.outcome is Outcome.REFUSED and verdict.reasons[0] == "target resolved: fake.call 1: no answer"
    assert record.guards[-1].needs == "a backend that is there and answers"


def test_closed_gate_refuses(tmp_path: Path) -> None:
    gate = tmp_path / "gates" / "sim.json"
    gate.parent.mkdir(parents=True)
    for content in ('{"closed": true, "reason": "budget"}', "{not json"):
        gate.write_text(content)
        _, verdict = outcome(tmp_path, World())
        assert verdict.outcome is Outcome.REFUSED and "gate" in verdict.reasons[0]
    gate.write_text('{"closed": false}')
    assert outcome(tmp_path, World())[1].outcome is Outcome.HELD


def test_shadow_injects_nothing_and_is_no_pass(tmp_path: Path) -> None:
    world = World(errors_during=1.0)
    record, verdict = outcome(tmp_path, world, shadow=True)
    assert not world.injections and record.shadow
    assert verdict.outcome is Outcome.HELD and not verdict.fault_fired and "shadow" in verdict.reasons[0]


@pytest.mark.req("RX-01")
def test_a_display_that_breaks_disturbs_nothing(tmp_path: Path) -> None:
    def broken(kind: str, data: dict[str, Any]) -> None:
        if kind == "moment" and data["name"] == "recover_requested":
            raise RuntimeError("the terminal is gone")

    world = World()
    run = build(tmp_path, world, progress=broken)
    record = run_experiment(run)
    assert not world.faults and not run.kit.ledger.leases()
    assert judge(record, run.samples).outcome is Outcome.HELD


def test_full_disk_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlchaos_dagster.errors import StoreError

    def full(*_: Any) -> Any:
        raise StoreError("cannot write: No space left on device")

    monkeypatch.setattr(RecordStore, "save", full)
    _, verdict = outcome(tmp_path, World())
    assert verdict.outcome is Outcome.ERROR and "No space left" in verdict.reasons[0]


def test_a_silent_signal_that_matters_aborts(tmp_path: Path) -> None:
    world = World()
    run = build(tmp_path, world)
    drain = run.kit.signals.drain
    begun = world.clock.t
    run.kit.signals.drain = lambda: drain() if world.clock.t < begun + 8 else []  # type: ignore[method-assign]
    run.kit.signals = MergedSignals([run.kit.signals])
    run.kit.signals.sources[0].trouble = "not allowed:\n pods"  # type: ignore[attr-defined]
    run.watch.signal_source = run.kit.signals
    record = run_experiment(run)
    assert record.abort is not None and record.abort.cause == "blind" and "ready_replicas" in record.abort.reason
    assert record.abort.reason.endswith(": not allowed: pods")
    assert not world.faults


def test_of_two_runs_in_one_environment_the_later_is_refused(tmp_path: Path) -> None:
    world = World()
    first = build(tmp_path, world, run_id="a")
    first.check_guards()
    world.clock.sleep(1)
    second = build(tmp_path, world, run_id="b", experiment={"name": "another", "blast_radius": {"count": 1}})
    record = run_experiment(second)
    refused = judge(record, second.samples)
    assert refused.outcome is Outcome.REFUSED and "environment free" in refused.reasons[0]
    first.measure_baseline()
    first.fault_window()
    assert judge(first.finish(), first.samples).outcome is Outcome.HELD


def test_a_stop_during_the_recovery_sampling_ends_it_and_is_remembered(tmp_path: Path) -> None:
    world = World(heal_after_s=1e6)
    run = build(tmp_path, world)
    world.at[world.clock.t + 18] = lambda w: setattr(w, "stop", ("stop", "enough"))
    record = run_experiment(run)
    assert run.stopped_late == "enough" and record.abort is None
    assert record.after is not None and record.after.length < 5


def test_noise_is_no_effect(tmp_path: Path) -> None:
    """A gauge that only wanders is not said to have risen, though twice as many readings exceed its former maximum."""
    from mlchaos_dagster.domain.record import Samples, SignalSample, Span
    from mlchaos_dagster.domain.spec import Expectation
    from mlchaos_dagster.judgement.verdict import _expectation

    record, _ = outcome(tmp_path, World())
    rng = random.Random(3)
    seen = 0
    for _ in range(100):
        noise = [SignalSample(0.05 * k, "noise", rng.gauss(0, 1)) for k in range(460)]
        spans = {"baseline": Span(start=0.0, end=8.0), "window": Span(start=8.0, end=23.0)}
        found = _expectation(
            Expectation(signal="noise", rises=True), record.model_copy(update=spans), Samples([], noise), {}
        )
        seen += bool(found.seen)
    assert seen == 0
    risen = [s._replace(value=s.value + 8) if s.t > 12 else s for s in noise]
    found = _expectation(
        Expectation(signal="noise", rises=True), record.model_copy(update=spans), Samples([], risen), {}
    )
    assert found.seen
    ages = [SignalSample(0.05 * k, "age", (0.05 * k) % 12.0) for k in range(460)]  # it is renewed in the window
    found = _expectation(Expectation(signal="age", drops=True), record.model_copy(update=spans), Samples([], ages), {})
    assert not found.seen, "it was as young at the start"
    spiky = [SignalSample(s.t, "noise", 9.0 if s.t == 4.0 else 0.1 + 0.1 * (s.t > 8)) for s in noise]
    found = _expectation(
        Expectation(signal="noise", rises=True), record.model_copy(update=spans), Samples([], spiky), {}
    )
    assert found.seen, "one spike in the baseline does not hide what lasted"
    counter = [s._replace(value=float(s.t > 7.8)) for s in noise]
    found = _expectation(
        Expectation(signal="noise", rises=True), record.model_copy(update=spans), Samples([], counter), {}
    )
    assert not found.seen, "it rose before the window"
    older = [s._replace(value=s.value + 3) if s.t < 12 else s for s in ages]
    found = _expectation(Expectation(signal="age", drops=True), record.model_copy(update=spans), Samples([], older), {})
    assert found.seen


def test_who_looks_late_has_not_measured_nothing(tmp_path: Path) -> None:
    """The probe goes on while this process does something else for 6 s."""
    world = World()
    run = build(tmp_path, world)
    world.at[world.clock.t + 15] = lambda w: w.clock.sleep(6)
    record = run_experiment(run)
    verdict = judge(record, run.samples)
    assert not run.samples.gaps
    assert verdict.outcome is Outcome.HELD, verdict.reasons


@pytest.mark.req("R2-03")
@pytest.mark.parametrize(
    ("left", "says", "saw"),
    [
        (("replica-1", "replica-2", "replica-3"), (), ""),
        (("replica-1", "replica-2"), (), "not there any more"),
        (("replica-3",), (), "too many"),
        (("replica-1", "replica-2", "replica-3"), (Objection("it was closed", "an open one"),), "it was closed"),
    ],
)
def test_what_changed_during_the_baseline_refuses_the_fault(
    tmp_path: Path, left: tuple[str, ...], says: tuple[Objection, ...], saw: str
) -> None:
    world = World()
    run = build(tmp_path, world, environment={"limits": {"max_fraction": "50%"}})
    driver: Any = run.kit.driver
    resolve, hit = driver.resolve, list[str]()
    driver.recheck = lambda kind, targets, existing, params, *, target: says

    # As the guards see it first; from then on what is left, by its place: the chosen one is the third.
    def now(target: Any) -> tuple[str, ...]:
        if not run.targets:
            return resolve(target)
        hit[:] = run.targets
        others = [r for r in resolve(target) if r not in run.targets]
        return tuple(run.targets[0] if name == "replica-3" else others.pop() for name in left)

    driver.resolve = now
    record = run_experiment(run)
    assert bool(world.injections) == (not saw)
    if saw:
        assert record.guards[-1].name == "target as chosen" and saw in record.guards[-1].saw
        assert not run.kit.ledger.leases()


@pytest.mark.req("R2-03")
@pytest.mark.parametrize("seen", ["guards", "when the lease is open"])
def test_a_run_of_another_machine_in_this_environment_keeps_it_out(tmp_path: Path, seen: str) -> None:
    world = World()
    run = build(tmp_path, world)
    other = replace(TEMPLATE, run_id="other-run", environment=run.environment.name)
    ledger: Any = run.kit.ledger
    ledger.elsewhere = lambda: (other,) if seen == "guards" or ledger.leases() else ()
    record = run_experiment(run)
    assert not world.injections and not ledger.leases()
    assert record.guards[-1].name == "environment free" and "another-host" in record.guards[-1].saw
    ledger.elsewhere = lambda: (replace(other, environment="elsewhere"), replace(other, run_id="run-2"))
    run_experiment(build(tmp_path, world, run_id="run-2"))
    assert world.injections
