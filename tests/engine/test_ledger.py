"""The file ledger: durable or not at all, one owner per target, fencing, and what must work on a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from file_target import make_lease, until

from mlchaos_dagster.engine import processes
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Owner, SystemClock
from mlchaos_dagster.engine.processes import boot_id, current_owner, host, is_running, kill
from mlchaos_dagster.errors import InternalError, LeaseRefused, StoreError

pytestmark = pytest.mark.timeout(180)
HERE = Path(__file__).parent


@pytest.fixture
def ledger(tmp_path):
    return FileLedger(tmp_path / "home" / "ledger", SystemClock())


def files(ledger: FileLedger, room: str) -> list[str]:
    directory = ledger.directory / room
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


# -- opening, closing --------------------------------------------------------------------------------------------------


def test_what_was_opened_is_read_back_by_another(ledger):
    lease = ledger.open(make_lease(targets=("t1", "t2"), level=3))
    other = FileLedger(ledger.directory, SystemClock())
    assert other.leases() == (lease,) and other.read("a") == lease and other.unreadable() == ()
    assert lease.token == 1 and files(ledger, "open") == ["a.files.json"]
    other.check(lease)


def test_a_ledger_that_was_never_written_is_empty(ledger):
    assert ledger.leases() == () and ledger.unreadable() == () and ledger.read("a") is None and ledger.beat("a") == 0
    with pytest.raises(LeaseRefused):
        ledger.fence("a", "me")
    with pytest.raises(LeaseRefused):
        ledger.close(make_lease(), ())
    assert not ledger.directory.exists()


def test_one_owner_per_target(ledger):
    ledger.open(make_lease("a", ("t1", "t2")))
    with pytest.raises(LeaseRefused, match=r"t2 held by run run-1 \(an-experiment\), lease a"):
        ledger.open(make_lease("b", ("t2", "t3")))
    assert files(ledger, "open") == ["a.files.json"] and files(ledger, "beats") == ["a"]
    ledger.open(make_lease("c", ("t3",)))


def test_one_lease_per_id(ledger):
    ledger.open(make_lease("a", ("t1",)))
    with pytest.raises(LeaseRefused, match="open already"):
        ledger.open(make_lease("a", ("t2",)))
    assert ledger.leases()[0].targets == ("t1",)


def test_closed_frees_the_target_and_keeps_the_evidence(ledger):
    lease = ledger.open(make_lease())
    ledger.close(lease, ["pid 7 is back"])
    assert ledger.leases() == () and files(ledger, "open") == [] and files(ledger, "beats") == []
    assert json.loads((ledger.directory / "closed" / "a.files.evidence.json").read_text())["evidence"] == [
        "pid 7 is back"
    ]
    with pytest.raises(LeaseRefused):
        ledger.check(lease)
    with pytest.raises(LeaseRefused):
        ledger.renew(lease)
    ledger.close(lease, ())  # the first answer may have been lost
    assert ledger.open(make_lease("b")).token > lease.token


@pytest.mark.parametrize("change", [{"id": "../a"}, {"id": "a.b"}, {"id": ""}, {"driver": "x/y"}, {"targets": ()}])
def test_no_lease_without_a_clean_name_or_targets(ledger, change):
    with pytest.raises(InternalError):
        ledger.open(dataclasses.replace(make_lease(), **change))


def test_large_undo_data_lies_apart_and_is_checked(ledger):
    undo = {"rows": ["x" * 100] * 2000}
    lease = ledger.open(dataclasses.replace(make_lease(), undo=undo))
    assert (ledger.directory / "open" / "a.files.json").stat().st_size < 2000
    assert ledger.leases()[0].undo == undo
    path = ledger.directory / "undo" / "a.json"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"x}")
    assert len(ledger.unreadable()) == 1
    path.unlink()
    assert len(ledger.unreadable()) == 1, "lost undo data is not a lease that went away"
    path.write_bytes(content)
    ledger.close(lease, ())
    assert files(ledger, "undo") == []


def test_a_backup_goes_with_its_lease_but_not_with_one_whose_content_was_lost(ledger):
    for lease_id in ("a", "b"):
        copy = ledger.directory / "backups" / lease_id / "original"
        copy.parent.mkdir(parents=True)
        copy.write_text("x")
    ledger.close(ledger.open(make_lease("a", targets=("t1",))), ())
    assert files(ledger, "backups") == ["b"]
    ledger.open(make_lease("b", targets=("t2",)))
    (ledger.directory / "open" / "b.files.json").write_text("{")
    stub = ledger.fence("b", "somebody")
    assert not stub.targets and stub.environment == "test", "where it is can still be told"
    ledger.close(stub, ())
    assert files(ledger, "backups") == ["b"], "nobody knows what the backup is needed for"
    old = ledger.directory / "backups" / "orphan"
    old.mkdir()
    os.utime(old, (1, 1))
    os.utime(ledger.directory / "backups" / "b", (1, 1))
    ledger.open(make_lease("c", targets=("t3",)))
    assert files(ledger, "backups") == ["b"], "of a process that died between copy and lease"


# -- renewals, fencing -------------------------------------------------------------------------------------------------


def test_renewals_count_in_place(ledger):
    lease = ledger.open(make_lease())
    before = (ledger.directory / "beats" / "a").stat()
    for n in range(1, 4):
        ledger.renew(lease)
        assert ledger.beat("a") == n
    after = (ledger.directory / "beats" / "a").stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)


def test_fenced_the_owner_may_do_nothing_more(ledger):
    lease = ledger.open(make_lease())
    taken = ledger.fence("a", "the watchdog")
    assert taken.token > lease.token and dataclasses.replace(taken, token=lease.token) == lease
    for verb in (ledger.check, ledger.renew, lambda x: ledger.close(x, ())):
        with pytest.raises(LeaseRefused, match="taken over by the watchdog"):
            verb(lease)
    ledger.check(taken)
    again = ledger.fence("a", "another")
    assert again.token > taken.token
    with pytest.raises(LeaseRefused):
        ledger.close(taken, ())
    with pytest.raises(LeaseRefused, match="held by run"):
        ledger.open(make_lease("b"))
    ledger.close(again, ())
    with pytest.raises(LeaseRefused):  # it was closed, but not by this token
        ledger.close(taken, ())


def test_tokens_grow_even_when_the_counter_is_damaged(ledger):
    seen = [ledger.open(make_lease("a", ("t1",))).token, ledger.fence("a", "x").token]
    (ledger.directory / "token").write_bytes(b"garbage")
    seen += [ledger.fence("a", "x").token, ledger.open(make_lease("b", ("t2",))).token]
    ledger.close(ledger.read("a"), ())
    ledger.close(ledger.read("b"), ())
    (ledger.directory / "token").unlink()
    seen.append(ledger.open(make_lease("c")).token)
    assert seen == sorted(set(seen))


def test_a_stopped_holder_of_the_mutex_holds_up_no_take_over(tmp_path):
    ledger = FileLedger(tmp_path / "l", SystemClock(), mutex_wait_s=0.05, takeover_wait_s=0.05)
    ledger.open(make_lease())
    with ledger._files.mutex(1.0) as held:
        assert held
        with pytest.raises(StoreError, match=f"locked by process {os.getpid()}"):
            ledger.open(make_lease("b", ("t2",)))
        ledger.close(ledger.fence("a", "x"), ())
    assert ledger.leases() == ()


def test_an_opener_that_overlooked_a_lease_gives_way(ledger, monkeypatch):
    """A take-over without the mutex renames while the opener lists: it looks again once it has written."""
    ledger.open(make_lease("a"))
    looks = []
    names = ledger._files.names
    monkeypatch.setattr(ledger._files, "names", lambda: looks.append(1) or ([] if len(looks) < 5 else names()))
    with pytest.raises(LeaseRefused, match="held by run"):
        ledger.open(make_lease("b"))
    assert files(ledger, "open") == ["a.files.json"] and len(looks) >= 5


def test_only_one_sweeper_at_a_time(ledger):
    ledger.open(make_lease())
    with ledger.recovering("a", 0.1) as mine, ledger.recovering("a", 0.05) as second:
        assert mine and not second
        ledger.fence("a", "x")  # the lock follows the file
        with ledger.recovering("a", 0.05) as third:
            assert not third
    with ledger.recovering("a", 0.0) as mine:
        assert mine
    with ledger.recovering("b", 0.0) as nothing:
        assert not nothing


def test_a_lease_that_is_fenced_while_it_is_looked_for_is_locked_all_the_same(ledger, monkeypatch):
    ledger.open(make_lease())
    find, looks = ledger._files.find, []

    def stale(lease_id):
        entry = find(lease_id)
        looks.append(entry)
        if len(looks) == 1:
            FileLedger(ledger.directory, SystemClock()).fence("a", "another sweeper")  # renames the file
        return entry

    monkeypatch.setattr(ledger._files, "find", stale)
    with ledger.recovering("a", 0.0) as mine:
        assert mine and len(looks) == 2


# -- damage ------------------------------------------------------------------------------------------------------------

BAD = [b"", b"{", b"[]", b"null", b"7", b'{"id": "a"}', b"\xff\xfe", b"[" * 100_000, b"\0" * 500]


@pytest.mark.parametrize("content", BAD)
def test_an_unreadable_lease_keeps_everybody_out_and_can_be_recovered(ledger, content):
    lease = ledger.open(make_lease())
    path = ledger.directory / "open" / "a.files.json"
    path.write_bytes(content)
    assert ledger.leases() == () and ledger.unreadable() == (str(path),) and ledger.is_open("a")
    with pytest.raises(LeaseRefused, match="unreadable"):
        ledger.open(make_lease("b", ("t9",)))
    with pytest.raises(LeaseRefused):
        ledger.check(lease)
    stub = ledger.stub(path)
    assert stub is not None and (stub.id, stub.driver, stub.undo) == ("a", "files", {})
    taken = ledger.fence("a", "me")
    assert (taken.id, taken.driver) == ("a", "files") and taken.token > lease.token
    ledger.close(taken, ["clean"])
    assert ledger.unreadable() == () and files(ledger, "open") == []


def test_a_lease_under_a_false_name_is_unreadable(ledger):
    ledger.open(make_lease())
    os.rename(ledger.directory / "open" / "a.files.json", ledger.directory / "open" / "b.files.json")
    assert len(ledger.unreadable()) == 1


def test_names_that_tell_nothing(ledger):
    ledger.open(make_lease())
    path = ledger.directory / "open" / "what is this.json"
    path.touch()
    assert ledger.unreadable() == (str(path),) and ledger.stub(path) is None and len(ledger.leases()) == 1


def test_half_written_files_are_nothing_and_go(ledger):
    ledger.close(ledger.open(make_lease()), ())
    (ledger.directory / "open" / ".tmp-xyz").write_bytes(b'{"id": "z", "targets": ["t1"')
    (ledger.directory / "open" / "README.txt").touch()
    assert ledger.unreadable() == () and ledger.leases() == ()
    ledger.open(make_lease("b"))
    assert files(ledger, "open") == ["README.txt", "b.files.json"]


# -- a full disk -------------------------------------------------------------------------------------------------------


class FullDisk:
    """From the k-th call on, whatever needs room fails; renames within and writes in place do not."""

    def __init__(self, monkeypatch, after: int, only_once: bool = False) -> None:
        self.left, self.only_once, self.calls = after, only_once, 0
        for module, name in ((os, "open"), (os, "fsync"), (os, "mkdir"), (tempfile, "mkstemp")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name), name))

    def wrap(self, real, name):
        def call(*args, **options):
            if name == "open" and not args[1] & os.O_CREAT or name == "open" and Path(args[0]).exists():
                return real(*args, **options)
            self.calls += 1
            self.left -= 1
            if self.left < 0 and (self.left == -1 or not self.only_once):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        return call


@pytest.mark.parametrize("fresh", [True, False])
def test_open_on_a_full_disk_leaves_no_lease_whatever_fails(tmp_path, fresh):
    outcomes = []
    for k in range(60):
        ledger = FileLedger(tmp_path / str(k) / "ledger", SystemClock())
        if not fresh:
            ledger.close(ledger.open(make_lease("z")), ())
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, k)
            try:
                lease = ledger.open(make_lease())
            except StoreError as e:
                assert not isinstance(e, LeaseRefused)
                outcomes.append(False)
            else:
                assert ledger.leases() == (lease,)
                outcomes.append(True)
                if k >= disk.calls:
                    break
                continue
        assert files(ledger, "open") == [] and files(ledger, "beats") == [], k
        assert FileLedger(ledger.directory, SystemClock()).open(make_lease("b")).id == "b", "room again, all well again"
    assert outcomes.count(False) >= 8 and outcomes[-1]


def test_everything_but_opening_works_on_a_full_disk(ledger):
    lease = ledger.open(make_lease())
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, 0)
        ledger.renew(lease)
        ledger.request_stop("a", "now")
        assert ledger.beat("a") == 1 and ledger.leases()[0].stop_requested == "now"
        taken = ledger.fence("a", "me")
        with pytest.raises(LeaseRefused):
            ledger.check(lease)
        ledger.close(taken, ["evidence that cannot be written"])
        assert ledger.leases() == () and files(ledger, "open") == []
        with pytest.raises(StoreError):
            ledger.open(make_lease("b"))
    assert files(ledger, "open") == []


@pytest.mark.parametrize("verb", ["rename", "pwrite"])
def test_the_ballast_is_given_up_for_a_rename_that_needs_room(ledger, verb):
    lease = ledger.open(make_lease())
    ballast = ledger.directory / "ballast"
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(os, verb)

        def full(*args):
            if ballast.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        patch.setattr(os, verb, full)
        if verb == "pwrite":
            ledger.renew(lease)
        else:
            lease = ledger.fence("a", "me")
    assert not ballast.exists()
    ledger.close(lease, ())
    ledger.open(make_lease("b"))
    assert ballast.stat().st_size == 64 * 1024


def test_a_rename_that_never_works_leaves_the_lease_open_or_removes_it(ledger):
    lease = ledger.open(make_lease())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(StoreError, match="cannot fence"):
            ledger.fence("a", "me")
        ledger.check(lease)
        ledger.close(lease, ())
    assert ledger.leases() == () and files(ledger, "open") == []


@pytest.fixture
def small_disk(tmp_path):
    """A real tmpfs of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("mounting a tmpfs needs root on Linux")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), open(place / "filler", "ab", buffering=0) as f:
        while True:
            f.write(b"x" * 4096)


def test_a_real_full_disk(small_disk):
    ledger = FileLedger(small_disk / "ledger", SystemClock())
    lease = ledger.open(make_lease())
    fill(small_disk)
    ledger.renew(lease)
    ledger.request_stop("a", "now")
    assert ledger.beat("a") == 1 and ledger.leases()[0].stop_requested == "now"
    with pytest.raises(StoreError):
        ledger.open(make_lease("b", ("t2",)))
    fill(small_disk)
    ledger.close(ledger.fence("a", "me"), ["evidence"])
    assert ledger.leases() == () and ledger.unreadable() == ()
    (small_disk / "filler").unlink()
    assert ledger.open(make_lease("b")).token > lease.token


# -- several processes -------------------------------------------------------------------------------------------------

RACER = """
import sys, time
from pathlib import Path
from file_target import make_lease
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import SystemClock
from mlchaos_dagster.errors import LeaseRefused
ledger = FileLedger(Path(sys.argv[1]), SystemClock())
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[3])):
    try:
        ledger.open(make_lease(f"{sys.argv[2]}-{turn}", (f"shared-{turn}", f"own-{sys.argv[2]}-{turn}")))
        print("won", turn, flush=True)
    except LeaseRefused as e:
        assert "held by" in str(e), e
print("done", flush=True)
"""


def test_of_several_processes_exactly_one_gets_the_target(ledger, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    turns = 10
    command = [sys.executable, "-c", RACER, str(ledger.directory)]
    racers = [
        subprocess.Popen([*command, str(n), str(turns)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        lines = [line for racer in racers for line in racer.stdout.read().splitlines()]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert lines.count("done") == 4
    assert sorted(line for line in lines if line != "done") == sorted(f"won {n}" for n in range(turns))
    held = [t for lease in ledger.leases() for t in lease.targets]
    assert len(ledger.leases()) == turns and len(held) == len(set(held))
    tokens = [lease.token for lease in ledger.leases()]
    assert len(set(tokens)) == turns


def test_a_reader_never_misses_a_lease_that_is_being_taken_over(ledger):
    ledger.open(make_lease())
    stop, missed = threading.Event(), []

    def read():
        other = FileLedger(ledger.directory, SystemClock())
        while not stop.is_set():
            if not other.is_open("a"):
                missed.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(200):
            ledger.fence("a", "me")
    finally:
        stop.set()
        reader.join()
    assert not missed


# -- identity of processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def child():
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=-1
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def owner_of(pid: int) -> Owner:
    started = processes._started(pid)
    assert started
    return Owner(pid, started, boot_id(), host())


def test_this_process_runs_and_cannot_be_told_to_kill_itself():
    me = current_owner()
    assert me.pid == os.getpid() and is_running(me) and not kill(me)


def test_killed_is_gone_also_as_a_zombie(child):
    owner = owner_of(child.pid)
    assert is_running(owner) and kill(owner) and not is_running(owner)
    assert child.returncode is None, "not reaped: still in the process table"
    assert kill(owner), "gone already"


def test_a_stopped_process_runs_and_can_be_killed(child):
    owner = owner_of(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: is_running(owner))
    assert kill(owner)


@pytest.mark.parametrize("change", [{"started": 12.5}, {"boot_id": "another"}])
def test_a_reused_pid_is_somebody_else_and_stays_unharmed(child, change):
    former = dataclasses.replace(owner_of(child.pid), **change)
    assert not is_running(former) and kill(former)
    assert child.poll() is None


def test_a_process_of_another_host_can_be_neither_judged_nor_killed(child):
    foreign = dataclasses.replace(owner_of(child.pid), host="elsewhere")
    assert is_running(foreign) and not kill(foreign) and child.poll() is None


def test_without_pidfd_it_works_too(child, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert kill(owner_of(child.pid)) and child.wait(5) == -signal.SIGKILL


def test_the_portable_way_tells_the_same(child):
    started = processes._started_psutil(child.pid)
    assert started and processes._started_psutil(child.pid) == started
    child.kill()
    until(lambda: processes._started_psutil(child.pid) is None)  # a zombie


# -- the barrier after the lever ---------------------------------------------------------------------------------------


def test_after_the_barrier_an_open_that_was_under_way_is_seen(ledger):
    inside, go = threading.Event(), threading.Event()
    slow = FileLedger(ledger.directory, SystemClock())
    ballast = slow._files.ensure_ballast

    def wait():
        inside.set()
        assert go.wait(10)
        ballast()

    slow._files.ensure_ballast = wait
    thread = threading.Thread(target=lambda: slow.open(make_lease()))
    thread.start()
    try:
        assert inside.wait(10) and ledger.leases() == ()
        threading.Timer(0.3, go.set).start()
        assert ledger.settled()
        assert [x.id for x in ledger.leases()] == ["a"]
    finally:
        go.set()
        thread.join(10)


def test_the_barrier_is_bounded_and_touches_nothing(ledger):
    assert ledger.settled() and not ledger.directory.exists()
    ledger.open(make_lease())
    impatient = FileLedger(ledger.directory, SystemClock(), takeover_wait_s=0.1)
    with ledger._files.mutex(1.0) as held:
        assert held and not impatient.settled()
    assert impatient.settled()
