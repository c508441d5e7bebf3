"""Stop files, lever, signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import sim
from file_target import make_lease

from mlchaos_dagster import wiring
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import SystemClock
from mlchaos_dagster.engine.stops import FileStop, LeaseStop, SignalStop, StopFiles
from mlchaos_dagster.errors import LeaseRefused, SpecError, StoreError
from mlchaos_dagster.settings import Home, Settings

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def test_a_request_reaches_its_run_and_no_other(home):
    stops = StopFiles(home)
    assert FileStop(stops, "r1").requested() is None
    stops.request("r1", "Friday evening")
    assert FileStop(stops, "r1").requested() == ("stop", "Friday evening")
    assert FileStop(stops, "r2").requested() is None
    stops.forget("r1")
    stops.forget("r1")
    assert stops.requested("r1") is None


def test_the_lever_stops_all_and_keeps_new_runs_out(home):
    stops, ledger = StopFiles(home), FileLedger(home.ledger, SystemClock())
    stops.request("r1", "mine")
    stops.pull_lever("the site is down")
    assert FileStop(stops, "r1").requested() == ("lever", "the site is down")
    assert FileStop(stops, "r2").requested() == ("lever", "the site is down")
    with pytest.raises(LeaseRefused, match="the lever is pulled: the site is down"):
        ledger.open(make_lease())
    assert stops.release_lever() and not stops.release_lever()
    assert ledger.open(make_lease()).token


def test_words_that_are_no_text_stop_all_the_same(home):
    """A shell hands over any bytes; Python keeps the odd ones as lone surrogates."""
    odd = "pager \udcff is down"
    stops, clock = StopFiles(home), SystemClock()
    ledger = FileLedger(home.ledger, clock)
    lease = ledger.open(make_lease())
    ledger.request_stop(lease.id, odd)
    assert LeaseStop(ledger, lease.run_id).requested() == ("stop", "pager ? is down")
    IncidentLog(home.incidents, clock).write("stop", odd, run="r1")
    assert "pager ? is down" in home.incidents.read_text()
    ledger.close(lease, [odd])
    stops.pull_lever(odd)
    assert FileStop(stops, "r1").requested() == ("lever", "pager ? is down")


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", "-x", "a" * 200, "a\n"])
def test_not_a_run_id(home, run_id):
    with pytest.raises(SpecError):
        StopFiles(home).request(run_id, "x")


def test_on_a_full_disk_the_words_are_lost_but_not_the_request(home, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    stops = StopFiles(home)
    stops.pull_lever("x")
    assert stops.lever() == "no reason was recorded"


def test_what_cannot_be_read_counts_as_asked(home):
    stops = StopFiles(home)
    (stops.directory / "lever").mkdir(parents=True)
    assert "cannot be read" in (stops.lever() or "")
    with pytest.raises(StoreError):
        stops.release_lever()


def test_a_stop_requested_on_the_lease(home):
    ledger = FileLedger(home.ledger, SystemClock())
    stop = LeaseStop(ledger, "run-1")
    lease = ledger.open(make_lease())
    assert stop.requested() is None
    ledger.request_stop(lease.id, "enough\nof it")
    assert stop.requested() == ("stop", "enough of it") and LeaseStop(ledger, "run-2").requested() is None
    with pytest.raises(LeaseRefused):
        ledger.request_stop("b", "x")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_become_a_word_and_handlers_come_back(name):
    number = getattr(signal, name)
    seen = []
    former = signal.signal(number, lambda n, _: seen.append(n))
    try:
        mine = signal.getsignal(number)
        with SignalStop() as stop:
            assert stop.requested() is None
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested() == ("signal", f"{name} received") and stop.count == 2 and not seen
        assert signal.getsignal(number) is mine
        signal.raise_signal(number)
        assert seen == [number] and stop.count == 2
    finally:
        signal.signal(number, former)


def test_entered_twice_it_restores_once_at_the_end():
    before = signal.getsignal(signal.SIGTERM)
    stop = SignalStop()
    with stop:
        with stop:
            pass
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before and stop.name == "SIGTERM"


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), SignalStop():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before


def test_nohup_is_respected():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalStop() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.requested() is None
    finally:
        signal.signal(signal.SIGHUP, former)


def test_outside_the_main_thread_it_does_nothing():
    before, errors = signal.getsignal(signal.SIGTERM), []

    def work():
        try:
            with SignalStop() as stop:
                assert signal.getsignal(signal.SIGTERM) is before and stop.requested() is None
        except Exception as e:  # noqa: BLE001 - carried to the test's own thread
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_run_as_it_is_wired_hears_the_word_on_its_lease(tmp_path):
    """For who can reach the ledger only."""
    settings = Settings(home=Home(tmp_path / "home"), environment="sim", library=(), color=False, user="tester")
    environment = Environment.model_validate({**sim.ENVIRONMENT, "backends": {"sandbox": ["pod_failure"]}})
    run = wiring.build_run(Experiment.model_validate(sim.EXPERIMENT), environment, settings, run_id="run-1")
    lease = run.kit.ledger.open(make_lease())
    assert lease.run_id == "run-1" and run.watch.stop_asked(0.0) is None
    run.kit.ledger.request_stop(lease.id, "enough")
    abort = run.watch.stop_asked(0.0)
    assert abort is not None and (abort.cause, abort.reason) == ("stop", "enough")


def test_a_ledger_that_cannot_be_read_is_no_word(home, monkeypatch):
    def unreadable(_):
        raise StoreError("cannot read the ledger")

    monkeypatch.setattr(FileLedger, "leases", unreadable)
    assert LeaseStop(FileLedger(home.ledger, SystemClock()), "run-1").requested() is None
