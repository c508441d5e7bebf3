"""Files and cluster as one ledger: what one of them says no to does not happen, and neither waits for the other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.paired import PairedLedger, PairedWatcher
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.errors import LeaseRefused, StoreError
from mlchaos_dagster.kube.leases import ClusterLedger
from mlchaos_dagster.kube.pulse import Pulse
from tests.kube.fake_api import Api, Clock
from tests.kube.test_leases import a_lease, ledger


class Both:
    """One machine's two ledgers."""

    def __init__(self, directory: Path, api: Api | None = None, pid: int = 1, within_s: float = 0.3) -> None:
        self.api = api or Api()
        self.cluster: ClusterLedger = ledger(self.api, pid=pid)
        self.local = FileLedger(directory, SystemClock())
        self.paired = PairedLedger(self.local, self._remote, renewed_within_s=within_s)

    def _remote(self, lease: Lease) -> ClusterLedger | None:
        return self.cluster if lease.driver == "kubernetes" else None


def until(look: Callable[[], Any], within: float = 30.0) -> None:
    end = time.monotonic() + within
    while not look():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def _stands_still(look: Callable[[], Any]) -> bool:
    """Ten times as long as the next renewal may take."""
    before = look()
    threading.Event().wait(0.2)
    return look() == before


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlchaos_dagster.engine.paired.RENEW_EVERY_S", 0.02)
    monkeypatch.setattr("mlchaos_dagster.engine.paired.SHOWN_EVERY_S", 0.02, raising=False)


def test_both_hold_it_and_both_let_it_go(tmp_path: Path) -> None:
    both = Both(tmp_path)
    lease = both.paired.open(a_lease())
    assert [x.id for x in both.local.leases()] == [x.id for x in both.cluster.leases()] == [lease.id]
    before = both.cluster.heads()[0].beat
    both.paired.renew(lease)
    until(lambda: both.cluster.heads()[0].beat > before)
    both.paired.check(lease)
    both.paired.close(lease, ("clean",))
    assert both.local.leases() == both.cluster.leases() == ()


@pytest.mark.parametrize("why", ["held", "down"])
def test_what_the_cluster_refuses_is_held_nowhere(tmp_path: Path, why: str) -> None:
    both = Both(tmp_path)
    if why == "held":
        ledger(both.api, pid=2).open(a_lease("mlchaos-other", pid=2))
    both.api.down = why == "down"
    with pytest.raises(LeaseRefused if why == "held" else StoreError):
        both.paired.open(a_lease())
    assert both.local.leases() == ()


def test_a_cluster_that_takes_no_renewal_ends_the_run_in_time_and_never_makes_it_wait(tmp_path: Path) -> None:
    both = Both(tmp_path)
    lease = both.paired.open(a_lease())
    both.paired.renew(lease)
    both.api.down = True
    began, slowest = time.monotonic(), 0.0
    with pytest.raises(StoreError, match="could not be renewed in the cluster"):
        while time.monotonic() - began < 30.0:
            start = time.monotonic()
            both.paired.renew(lease)
            slowest = max(slowest, time.monotonic() - start)
            threading.Event().wait(0.02)
    assert 0.2 < time.monotonic() - began < 20.0 and slowest < 1.0
    both.api.down = False
    until(lambda: _renews(both.paired, lease))  # it is back: recovery goes on under a renewed lease


def test_an_owner_that_hangs_looks_hung_in_the_cluster(tmp_path: Path) -> None:
    both = Both(tmp_path)
    lease = both.paired.open(a_lease())
    both.paired.renew(lease)
    until(lambda: _stands_still(lambda: both.cluster.heads()[0].beat))
    assert _renews(both.paired, lease)  # who did not ask was not refused either: no alarm for a slow step


@pytest.mark.parametrize("verb", ["open", "check", "close"])
def test_a_slow_cluster_does_not_make_the_owner_look_hung_here(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog kills who does not renew for five seconds; an API server may take so long for one answer."""
    both, slow = Both(tmp_path), threading.Event()
    lease = a_lease() if verb == "open" else both.paired.open(a_lease())
    real = getattr(both.cluster, verb)

    def late(*arguments: Any) -> Any:
        slow.wait(60.0)
        return real(*arguments)

    monkeypatch.setattr(both.cluster, verb, late)
    arguments = {"open": (lease,), "check": (lease,), "close": (lease, ("clean",))}[verb]
    worker = threading.Thread(target=getattr(both.paired, verb), args=arguments)
    worker.start()
    until(lambda: both.local.is_open(lease.id))
    beat = both.local.beat(lease.id)
    until(lambda: both.local.beat(lease.id) >= beat + 2)
    slow.set()
    worker.join()
    assert both.local.is_open(lease.id) == (verb != "close")


def test_a_cluster_that_never_answers_makes_the_owner_look_hung_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlchaos_dagster.engine.paired.ANSWERS_S", 0.1)
    both, never = Both(tmp_path), threading.Event()
    monkeypatch.setattr(both.cluster, "open", lambda lease: never.wait(60.0) and lease)
    worker = threading.Thread(target=both.paired.open, args=(a_lease(),))
    worker.start()
    until(lambda: both.local.beat("mlchaos-a"))
    until(lambda: _stands_still(lambda: both.local.beat("mlchaos-a")))
    never.set()
    worker.join()


def test_taken_over_in_the_cluster_ends_the_run(tmp_path: Path) -> None:
    both = Both(tmp_path)
    lease = both.paired.open(a_lease())
    ledger(both.api, pid=9).fence(lease.id, "the sweeper")
    until(lambda: not _renews(both.paired, lease))
    with pytest.raises(LeaseRefused, match="taken over by the sweeper"):
        both.paired.check(lease)
    with pytest.raises(LeaseRefused):
        both.paired.close(lease, ())
    assert both.local.is_open(lease.id)  # the watchdog looks after it


def test_a_watchdog_takes_over_in_both_and_later_where_the_cluster_is_down(tmp_path: Path) -> None:
    owner = Both(tmp_path)
    lease = owner.paired.open(a_lease())
    watchdog = Both(tmp_path, owner.api, pid=2)
    owner.api.down = True
    taken = watchdog.paired.fence(lease.id, "watchdog")
    with pytest.raises(StoreError):
        watchdog.paired.check(taken)  # nobody may change what might be another's by now
    owner.api.down = False
    watchdog.paired.check(taken)
    with pytest.raises(LeaseRefused):
        owner.cluster.check(replace(lease, token=1))
    watchdog.paired.close(taken, ())
    assert owner.local.leases() == owner.cluster.leases() == ()


def test_what_the_sweeper_closed_is_closed_here_without_asking_again(tmp_path: Path) -> None:
    owner = Both(tmp_path)
    lease = owner.paired.open(a_lease())
    sweeper = ledger(owner.api, pid=9)
    sweeper.close(sweeper.fence(lease.id, "sweeper"), ())
    watchdog = Both(tmp_path, owner.api, pid=2)
    taken = watchdog.paired.fence(lease.id, "watchdog")
    watchdog.paired.check(taken)
    watchdog.paired.close(taken, ())
    assert owner.local.leases() == ()


def test_a_file_that_lost_its_content_is_made_up_for_by_the_cluster(tmp_path: Path) -> None:
    owner = Both(tmp_path)
    lease = owner.paired.open(a_lease())
    (path,) = (tmp_path / "open").iterdir()
    path.write_text("{")
    taken = Both(tmp_path, owner.api, pid=2).paired.fence(lease.id, "watchdog")
    assert (taken.targets, taken.undo) == (lease.targets, lease.undo)


def test_leases_of_this_machine_alone_never_ask_the_cluster(tmp_path: Path) -> None:
    both = Both(tmp_path)
    lease = both.paired.open(replace(a_lease(), driver="sandbox"))
    both.paired.renew(lease)
    both.paired.check(lease)
    both.paired.close(both.paired.fence(lease.id, "me"), ())
    assert both.api.calls == 0


def test_the_client_is_not_even_imported_before_a_lease_of_a_cluster_is_met(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mlchaos_dagster import wiring; from mlchaos_dagster.settings import Home;"
        f"ledger = wiring.ledger(Home(Path({str(tmp_path)!r}))); ledger.leases(); ledger.unreadable(); ledger.is_open('x');"
        "print([m for m in sys.modules if m.startswith('kubernetes') or m.startswith('mlchaos_dagster.kube')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- lever and heart ------------------------------------------------------------------------------------------------


class Well:
    def __init__(self) -> None:
        self.well = True

    def alive(self) -> bool:
        return self.well

    def close(self) -> None:
        self.well = False


def test_a_lever_that_was_never_read_is_pulled_and_one_that_was_stays_as_it_was() -> None:
    api, clock = Api(), Clock()
    pulse = Pulse(api, "control", clock, 15.0)  # type: ignore[arg-type]
    pulse._run = lambda: None  # type: ignore[method-assign]  # looked at by hand
    api.down = True
    assert (pulse.requested() or ("",))[0] == "lever"
    api.down = False
    assert pulse.requested() is None
    api.down = True
    pulse._look()  # pyright: ignore[reportPrivateUsage]
    assert pulse.requested() is None
    api.down = False
    ledger(api).lever.pull("smoke")
    pulse._look()  # pyright: ignore[reportPrivateUsage]
    assert pulse.requested() == ("lever", "smoke")


def test_a_heart_that_was_not_seen_to_beat_is_none() -> None:
    api, clock = Api(), Clock()
    path = "/apis/coordination.k8s.io/v1/namespaces/control/leases"
    pulse = Pulse(api, "control", clock, 15.0)  # type: ignore[arg-type]
    pulse._run = lambda: None  # type: ignore[method-assign]
    watcher = PairedWatcher(Well(), pulse)
    assert not watcher.alive() and "there is none; kubectl apply -k" in watcher.why_not
    api.create(path, {"metadata": {"name": "mlchaos-sweeper"}, "spec": {"holderIdentity": "x"}})
    pulse._look()  # pyright: ignore[reportPrivateUsage]
    assert not watcher.alive()  # it may have been dead for a year
    api.patch(f"{path}/mlchaos-sweeper", {"metadata": {}, "spec": {"renewTime": "now"}})
    pulse._look()  # pyright: ignore[reportPrivateUsage]
    assert watcher.alive() and watcher.why_not == ""
    clock.t += 15.1
    pulse._look()  # pyright: ignore[reportPrivateUsage]
    assert not watcher.alive() and "no heartbeat" in watcher.why_not


def _renews(paired: PairedLedger, lease: Lease) -> bool:
    try:
        paired.renew(lease)
    except StoreError:
        return False
    return True
