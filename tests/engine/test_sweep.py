"""The sweeper: what is due, what is left alone, and what happens when driver, ledger or another sweeper get in the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from file_target import driver, faults, make_lease

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Owner, SystemClock
from mlchaos_dagster.engine.processes import host
from mlchaos_dagster.engine.sweep import RenewalObserver, SweepResult, sweep
from mlchaos_dagster.errors import ConfigError, DriverUnavailable, LeaseRefused, RecoverFailed, StoreError
from mlchaos_dagster.settings import Home

pytestmark = pytest.mark.timeout(180)
HERE = Path(__file__).parent
ALIVE, DEAD = Owner(1, 1.0, "boot", "host"), Owner(2, 1.0, "boot", "host")


class Time:
    """Runs only when slept on, and then calls `each` (an owner that renews, say)."""

    def __init__(self) -> None:
        self.now, self.each = 1000.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + 5e8  # nobody may compare it with monotonic

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.001)
        self.each()


class Table:
    def __init__(self) -> None:
        self.killed, self.immortal = [], False

    def is_local(self, owner):
        return owner.host == "host"

    def is_running(self, owner):
        return owner.pid == 1 and owner.pid not in self.killed

    def kill(self, owner):
        if not self.immortal:
            self.killed.append(owner.pid)
        return not self.immortal


class Scene:
    def __init__(self, home: Home) -> None:
        self.home, self.clock, self.table = home, Time(), Table()
        self.ledger = FileLedger(home.ledger, self.clock)
        self.files = driver("files", home, "")
        self.incidents = IncidentLog(home.incidents, self.clock)
        self.built: list[tuple[str, str]] = []

    def drivers(self, name, environment):
        self.built.append((name, environment))
        if name == "unknown":
            raise ConfigError("no driver 'unknown'")
        return self.files

    def fault(self, lease_id="a", targets=("t1",), owner=DEAD, **options):
        lease = self.ledger.open(make_lease(lease_id, targets, owner=owner, **options))
        self.files.inject(lease)
        return lease

    def sweep(self, **options) -> list[SweepResult]:
        return sweep(self.ledger, self.drivers, self.clock, self.incidents, **{"processes": self.table, **options})

    def observer(self, ttl=3.0):
        return RenewalObserver(self.ledger, self.clock, ttl)

    def kinds(self):
        return [x["kind"] for x in self.incidents.read()]


@pytest.fixture
def scene(tmp_path):
    return Scene(Home(tmp_path / "home"))


def test_nothing_to_do(scene):
    assert scene.sweep() == [] and scene.kinds() == []


def test_a_dead_owners_fault_goes(scene):
    scene.fault(targets=("t1", "t2"))
    [result] = scene.sweep()
    assert result.clean and result.action == "recovered" and not result.error and not result.command
    assert "process 2, is gone" in result.why and result.evidence == ("faults: []",)
    assert not faults(scene.home) and not scene.ledger.leases() and scene.kinds() == ["fenced", "recovered"]
    assert scene.built == [("files", "test")] and not scene.table.killed
    assert {"lease", "run_id", "targets", "clean", "seconds", "command"} <= result.to_json().keys()


def test_a_live_owner_is_left_alone_even_without_renewals_seen(scene):
    scene.fault(owner=ALIVE)
    scene.clock.now += 119  # 60 s and as many of grace
    assert scene.sweep() == [] and faults(scene.home)


def test_a_live_owner_that_renews_is_left_alone(scene):
    lease = scene.fault(owner=ALIVE)
    scene.clock.each = lambda: scene.ledger.renew(lease)
    assert scene.sweep(observer=scene.observer()) == [] and faults(scene.home)
    assert scene.clock.now < 1001, "one renewal tells; there is no need to wait longer"


def test_a_live_owner_that_is_silent_is_fenced_and_killed(scene):
    lease = scene.fault(owner=ALIVE)
    [result] = scene.sweep(observer=scene.observer())
    assert result.clean and result.why == "no renewal was seen for 3 s" and scene.table.killed == [1]
    assert "process 1, was killed" in result.evidence[0]
    assert 1003 <= scene.clock.now < 1004
    with pytest.raises(LeaseRefused):
        scene.ledger.check(lease)


def test_an_owner_that_renews_at_the_last_moment_keeps_its_lease(scene, monkeypatch):
    lease = scene.fault(owner=ALIVE)
    recovering = scene.ledger.recovering
    monkeypatch.setattr(scene.ledger, "recovering", lambda *a: (scene.ledger.renew(lease), recovering(*a))[1])
    [result] = scene.sweep(observer=scene.observer())
    assert result.action == "left" and not scene.table.killed and faults(scene.home)
    scene.ledger.check(lease)


def test_an_observer_that_was_paused_starts_again(scene):
    lease = scene.fault(owner=ALIVE)
    observer = scene.observer()
    observer.look([lease])
    scene.clock.now += 2.9
    observer.look([lease])  # a gap longer than 1.5 s: it did not look in between
    scene.clock.now += 0.2
    observer.look([lease])
    assert not observer.silent(lease)
    for _ in range(30):
        scene.clock.now += 0.1
        observer.look([lease])
    assert observer.silent(lease)


def test_an_owner_on_another_host_is_judged_by_renewals_only(scene):
    foreign = Owner(1, 1.0, "other-boot", "elsewhere")
    scene.fault(owner=foreign, duration_s=1.0)
    scene.clock.now += 10_000  # whatever this clock says of a deadline written by another
    scene.table.is_running = lambda owner: True
    assert scene.sweep() == []
    [result] = scene.sweep(observer=scene.observer())
    assert result.clean and not scene.table.killed


def test_a_deadline_long_over_counts_on_the_clock_shared_with_the_owner(scene, monkeypatch):
    monkeypatch.setattr("mlchaos_dagster.engine.ledger.is_local", lambda owner: True)
    monkeypatch.setattr("mlchaos_dagster.engine.ledger.boot_id", lambda: "boot")
    scene.fault(owner=ALIVE)
    scene.clock.now += 119
    assert scene.sweep() == []
    scene.clock.now += 2
    [result] = scene.sweep()
    assert result.clean and "past its deadline" in result.why


def test_ones_own_lease_is_left_alone_unless_forced_and_one_is_never_killed(scene):
    scene.fault(owner=ALIVE)
    assert scene.sweep(mine=ALIVE, observer=scene.observer(0.0)) == []
    [result] = scene.sweep(mine=ALIVE, force="stop --all")
    assert result.clean and result.why == "stop --all" and not scene.table.killed


def test_forced_takes_all_and_only_takes_some(scene):
    scene.fault("a", ("t1",), ALIVE)
    scene.fault("b", ("t2",), ALIVE)
    assert [x.lease.id for x in scene.sweep(force="recover", only={"b"})] == ["b"]
    assert faults(scene.home) == ["t1.fault"]
    assert [x.lease.id for x in scene.sweep(force="stop --all")] == ["a"]
    assert not faults(scene.home)


def test_dry_run_touches_nothing(scene):
    lease = scene.fault()
    [result] = scene.sweep(dry_run=True)
    assert result.action == "would recover" and not result.clean and result.command == "mlchaos recover a"
    scene.ledger.check(lease)
    assert faults(scene.home) and scene.kinds() == [] and scene.built == []


def test_a_failed_recovery_leaves_the_lease_open_and_the_others_go_on(scene, monkeypatch):
    scene.fault("a", ("t1",))
    scene.fault("b", ("t2",))
    scene.fault("c", ("t3",), driver="unknown")
    recover = scene.files.recover

    def refusing(lease):
        if lease.id == "a":
            raise RecoverFailed("the target is stuck", driver="files", verb="recover", lease_id="a")
        recover(lease)

    monkeypatch.setattr(scene.files, "recover", refusing)
    a, b, c = scene.sweep()
    assert (a.action, a.clean, a.command) == ("failed", False, "mlchaos recover a") and "stuck" in a.error
    assert b.clean and (c.action, c.clean) == ("failed", False) and "ConfigError" in c.error
    assert [x.id for x in scene.ledger.leases()] == ["a", "c"] and scene.kinds().count("unclean") == 2
    monkeypatch.setattr(scene.files, "recover", recover)
    assert [x.clean for x in scene.sweep(only={"a"})] == [True]


@pytest.mark.parametrize("error", [KeyError("pid"), DriverUnavailable("no answer"), OSError(5, "I/O"), ValueError()])
def test_a_crashing_driver_is_tried_again_then_reported(scene, monkeypatch, error):
    scene.fault()
    calls = []
    recover = scene.files.recover

    def shaky(lease):
        calls.append(lease)
        if len(calls) < 3:
            raise error
        recover(lease)

    monkeypatch.setattr(scene.files, "recover", shaky)
    [result] = scene.sweep()
    assert result.clean and len(calls) == 3


def test_clean_is_what_the_target_says(scene, monkeypatch):
    scene.fault()
    monkeypatch.setattr(scene.files, "active", lambda lease: Evidence(present=True, effective=False, lines=("a rule",)))
    [result] = scene.sweep()
    assert not result.clean and "still there: a rule" in result.error and 10 <= result.seconds < 13
    assert scene.ledger.leases()


def test_an_owner_that_cannot_be_killed_does_not_keep_its_fault(scene):
    scene.fault(owner=ALIVE)
    scene.table.immortal = True
    [result] = scene.sweep(force="x")
    assert result.clean and "could not be killed" in result.evidence[0] and not faults(scene.home)


def test_unfenceable_the_owner_is_killed_and_the_fault_goes_anyway(scene, monkeypatch):
    scene.fault(owner=ALIVE)

    def broken(*_):
        raise StoreError("cannot fence the lease a: I/O error")

    monkeypatch.setattr(scene.ledger, "fence", broken)
    [result] = scene.sweep(force="x")
    assert result.clean and "cannot fence" in result.evidence[0] and scene.table.killed == [1]
    assert not faults(scene.home) and not scene.ledger.leases()


def test_a_lease_that_cannot_be_closed_is_said(scene, monkeypatch):
    scene.fault()

    def broken(*_):
        raise StoreError("cannot close")

    monkeypatch.setattr(scene.ledger, "close", broken)
    [result] = scene.sweep()
    assert result.clean and "stays open" in result.error and result.command and not faults(scene.home)


def test_unreadable_leases_are_never_passed_over(scene):
    scene.fault()
    (scene.home.ledger / "open" / "a.files.json").write_text("{")
    (scene.home.ledger / "open" / "some thing.json").write_text("{")
    named, lost = sorted(scene.sweep(), key=lambda x: x.lease.id != "a")
    assert (named.action, named.command) == ("left", "mlchaos recover a") and faults(scene.home)
    assert lost.action == "left" and "some thing.json" in lost.command and not lost.clean
    [result] = scene.sweep(force="recover", only={"a"})
    assert result.clean and not faults(scene.home) and scene.built == [("files", "test")], (
        "it is looked for where it was made"
    )
    assert len(scene.ledger.unreadable()) == 1


def test_an_unreadable_silent_lease_is_recovered_by_its_name(scene):
    scene.fault()
    (scene.home.ledger / "open" / "a.files.json").write_text("{")
    [result] = scene.sweep(observer=scene.observer())
    assert result.clean and not faults(scene.home)


def test_another_sweeper_was_faster(scene, monkeypatch):
    scene.fault()
    other = FileLedger(scene.home.ledger, scene.clock)
    recovering = scene.ledger.recovering

    def late(*arguments):
        taken = other.fence("a", "other")
        scene.files.recover(taken)
        other.close(taken, ())
        return recovering(*arguments)

    monkeypatch.setattr(scene.ledger, "recovering", late)
    [result] = scene.sweep()
    assert result.clean and result.evidence == ("somebody else closed it meanwhile",)


def test_overtaken_in_the_middle_it_stops_touching_the_target(scene, monkeypatch):
    scene.fault()
    recovered = []
    other = FileLedger(scene.home.ledger, scene.clock)

    def slow(lease):
        recovered.append(lease)
        other.fence("a", "other")  # took this one for stuck
        raise RecoverFailed("slow")

    monkeypatch.setattr(scene.files, "recover", slow)
    [result] = scene.sweep()
    assert len(recovered) == 1 and not result.clean and "another sweeper" in result.error


def test_a_full_disk_stops_no_recovery(scene, monkeypatch):
    scene.fault()

    def full(*_, **__):
        raise StoreError("No space left on device")

    monkeypatch.setattr("mlchaos_dagster.engine.incidents.append_line", full)
    monkeypatch.setattr("mlchaos_dagster.engine.ledger.write_json", full)
    [result] = scene.sweep()
    assert result.clean and not result.error and not faults(scene.home) and not scene.ledger.leases()


SWEEPER = """
import sys
from pathlib import Path
import file_target
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import SystemClock
from mlchaos_dagster.engine.sweep import sweep
from mlchaos_dagster.settings import Home
home, clock = Home(Path(sys.argv[1])), SystemClock()
print("ready", flush=True)
sys.stdin.readline()
results = sweep(FileLedger(home.ledger, clock), lambda n, e: file_target.driver(n, home, e), clock,
                IncidentLog(home.incidents, clock))
assert all(x.clean and not x.error for x in results), results
print("done", len(results), flush=True)
"""


def test_three_sweepers_at_once_each_lease_is_closed_once(scene, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    ledger = FileLedger(scene.home.ledger, SystemClock())
    dead = Owner(2**22 - 3, 1.0, "a boot long ago", host())
    for n in range(12):
        scene.files.inject(ledger.open(make_lease(f"l{n}", (f"t{n}",), owner=dead)))
    command = [sys.executable, "-c", SWEEPER, str(scene.home.root)]
    sweepers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        for process in sweepers:
            assert process.stdout.readline() == "ready\n"
        for process in sweepers:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert ["done" in process.stdout.read() for process in sweepers] == [True] * 3
    finally:
        for process in sweepers:
            process.kill()
            process.communicate()
    assert not ledger.leases() and not faults(scene.home)
    assert scene.kinds().count("recovered") == 12, "nobody did another's work again"
