"""The GPU driver: refused where there is no device, and the real code against a device that all processes share.

The device is a C library with CUDA's symbols (`fake_cuda.c`) over a file; what a process had goes with the process.
The tests read that file themselves: they share no code with the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers import gpu
from mlchaos_dagster.drivers.gpu import GpuDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import DriverError, DriverUnavailable, Halted, InjectFailed, RecoverFailed, StoreError
from tests.sandbox.conftest import eventually

pytestmark = [pytest.mark.req("R3-03"), pytest.mark.timeout(180)]

GIB = 1 << 30
TOTAL = 8 * GIB
COMPILER = shutil.which("cc") or shutil.which("gcc")
SLOTS = 64
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@dataclass
class Board:
    """The shared device, as the test sees it."""

    library: Path
    table: Path

    def set(self, *, total: int = TOTAL, delay_s: float = 0.0, devices: int = 1) -> None:
        self.table.write_bytes(struct.pack("4Q", total, int(delay_s * 1e6), devices, 0) + bytes(24 * SLOTS))

    def slow(self, delay_s: float) -> None:
        with open(self.table, "r+b") as f:
            f.seek(8)
            f.write(struct.pack("Q", int(delay_s * 1e6)))

    @property
    def allocations(self) -> int:
        """Ever made."""
        return struct.unpack_from("4Q", self.table.read_bytes())[3]

    def holders(self) -> dict[int, tuple[int, int]]:
        """Living pid → bytes allocated, bytes written to."""
        raw = self.table.read_bytes()[32:]
        slots = [struct.unpack_from("q2Q", raw, 24 * i) for i in range(SLOTS)]
        return {pid: (had, resident) for pid, had, resident in slots if had and alive(pid)}


def alive(pid: int) -> bool:
    """A zombie has given everything back."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Board:
    place = tmp_path_factory.mktemp("cuda")
    library, table = place / "libcuda.so.1", place / "device"
    source = Path(__file__).with_name("fake_cuda.c")
    assert COMPILER
    build = [
        COMPILER,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        f'-DTABLE="{table}"',
        "-o",
        str(library),
        str(source),
    ]
    subprocess.run(build, check=True, timeout=60)
    return Board(library, table)


@pytest.fixture
def board(built: Board) -> Iterator[Board]:
    built.set()
    yield built
    for pid in built.holders():  # what a failed test left
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def driver(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuDriver:
    monkeypatch.setattr(gpu, "_LOOK_S", 20.0)  # on a busy machine a process alone takes seconds to start
    return GpuDriver(tmp_path, str(board.library))


def lease_of(
    driver: GpuDriver, fraction: float = 0.8, seconds: float = 30, targets: tuple[str, ...] = ("gpu-0",)
) -> Lease:
    params = {"fraction": fraction}
    undo = driver.undo("gpu_memory_hog", targets, params)
    now = time.time()
    return Lease(
        id=f"mlchaos-test-{uuid.uuid4().hex[:10]}",
        run_id="run",
        experiment="test",
        environment="sandbox",
        driver="gpu",
        kind="gpu_memory_hog",
        targets=targets,
        params=params,
        undo=undo,
        duration_s=seconds,
        opened_wall=now,
        deadline_wall=now + seconds,
        owner=Owner(os.getpid(), 0.0, "", ""),
    )


# ---- without a device


def has_cuda() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_cuda(), reason="this host has a CUDA driver")
def test_without_cuda_it_is_unavailable_and_says_why(tmp_path: Path) -> None:
    driver = GpuDriver(tmp_path)
    for ask in (
        lambda: driver.resolve(Target(select="0")),
        lambda: driver.undo("gpu_memory_hog", ("gpu-0",), {"fraction": 0.8}),
    ):
        with pytest.raises(DriverUnavailable, match=r"no CUDA device: libcuda\.so\.1 cannot be loaded"):
            ask()


@needs_compiler
def test_a_driver_library_without_a_device_is_unavailable(board: Board, driver: GpuDriver) -> None:
    board.set(devices=0)
    with pytest.raises(DriverUnavailable, match="is here and finds none"):
        driver.resolve(Target(select="0"))


def test_a_library_that_is_not_cuda_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(DriverUnavailable, match="no CUDA driver library: it has no cuInit"):
        GpuDriver(tmp_path, "libc.so.6").resolve(Target(select="0"))


# ---- with one


@needs_compiler
def test_devices_are_selected_by_number(board: Board, driver: GpuDriver) -> None:
    board.set(devices=3)
    assert driver.resolve(Target(select="*")) == ("gpu-0", "gpu-1", "gpu-2")
    assert driver.resolve(Target(select="0, gpu-2")) == ("gpu-0", "gpu-2")
    assert driver.resolve(Target(select="7")) == ()
    with pytest.raises(DriverError, match="there is no gpu-7; there are gpu-0, gpu-1, gpu-2"):
        driver.undo("gpu_memory_hog", ("gpu-7",), {"fraction": 0.5})


@needs_compiler
def test_the_memory_is_held_by_another_process_and_given_back(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver)
    before = driver.active(lease)
    assert not before.present and not before.effective and board.allocations == 0
    steps: list[tuple[int, int]] = []
    driver.inject(lease, lambda done, total: steps.append((done, total)))
    wanted = int(TOTAL * 0.8) // (2 << 20) * (2 << 20)
    holders = board.holders()
    assert list(holders.values()) == [(wanted, wanted)], "allocated and written to"
    assert os.getpid() not in holders and board.allocations == -(-wanted // GIB)
    assert steps and {total for _, total in steps} == {wanted}
    seen = driver.active(lease)
    assert seen.present and seen.effective
    assert "6.5 GiB of 8.0 GiB used, 64 MiB before" in " ".join(seen.lines)
    driver.recover(lease)
    assert board.holders() == {}
    driver.recover(lease)
    after = driver.active(lease)
    assert not after.present and not after.effective
    assert "64 MiB of 8.0 GiB used, 64 MiB before the fault" in after.lines[1]
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)
    left = sorted(path.name for path in (driver.directory).iterdir())
    assert left == [f"{lease.id}.gone"]


@needs_compiler
def test_a_hog_is_not_believed_where_the_device_says_otherwise(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver)
    driver.inject(lease)
    board.set()  # a device that was reset
    seen = driver.active(lease)
    assert seen.present and not seen.effective
    assert "holds 6.4 GiB of gpu-0: 64 MiB of 8.0 GiB used" in seen.lines[0]
    driver.recover(lease)


@needs_compiler
def test_it_is_released_at_its_deadline_though_everything_else_is_dead(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver, fraction=0.25, seconds=5)
    # The run: it injects and is killed at once, with its whole process group.
    code = (
        "import json, os, signal, sys; from mlchaos_dagster.engine.ports import Lease, Owner\n"
        "from mlchaos_dagster.drivers.gpu import GpuDriver\n"
        "lease = Lease(**{**json.loads(sys.argv[1]), 'owner': Owner(0, 0, '', '')})\n"
        "GpuDriver(sys.argv[2], 'unused').inject(lease)\n"
        "os.killpg(0, signal.SIGKILL)"
    )
    told = json.dumps({**vars(lease), "owner": None})
    done = subprocess.run(
        [sys.executable, "-c", code, told, str(driver.directory.parent)], start_new_session=True, timeout=20
    )
    assert done.returncode == -signal.SIGKILL
    [(pid, (had, _))] = board.holders().items()
    assert had == TOTAL // 4 and os.getsid(pid) == pid, "in a session of its own"
    left_s = lease.deadline_wall - time.time()
    assert left_s > 0
    eventually(lambda: not board.holders(), left_s + 30, every_s=0.02)
    assert -0.1 < time.time() - lease.deadline_wall < 10
    eventually(lambda: not _hog_of(lease), every_s=0.02)
    assert json.loads((driver.directory / f"{lease.id}.held").read_bytes())["state"] == "released"
    assert not driver.active(lease).present


@needs_compiler
def test_the_kernel_ends_a_hog_that_hangs_past_its_deadline(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver, seconds=4)
    board.slow(30)  # inside one call to CUDA: no code of the hog's runs
    halted = _Stop(lambda: bool(_hog_of(lease)))
    with pytest.raises(Halted):
        driver.inject(lease, halted)
    [hog] = _hog_of(lease)
    eventually(lambda: not _hog_of(lease), every_s=0.02)
    assert 0 < time.time() - lease.deadline_wall < 10, f"hog {hog} ended by its timer"


@needs_compiler
@pytest.mark.parametrize("how", ["kill", "term", "order removed", "stopped"])
def test_whatever_ends_the_hog_ends_the_fault(board: Board, driver: GpuDriver, how: str) -> None:
    lease = lease_of(driver, fraction=0.5)
    driver.inject(lease)
    [pid] = board.holders()
    if how == "kill":
        os.kill(pid, signal.SIGKILL)
    elif how == "term":
        os.kill(pid, signal.SIGTERM)
    elif how == "order removed":
        (driver.directory / f"{lease.id}.json").unlink()
    else:
        os.kill(pid, signal.SIGSTOP)
        assert driver.active(lease).present, "a stopped hog holds its memory"
        driver.recover(lease)
    eventually(lambda: not board.holders(), every_s=0.02)
    eventually(lambda: not driver.active(lease).present, every_s=0.05)
    driver.recover(lease)


@needs_compiler
def test_too_little_free_is_refused_before_anything_is_taken(board: Board, driver: GpuDriver) -> None:
    first = lease_of(driver, fraction=0.5)
    driver.inject(first)
    taken = board.allocations
    with pytest.raises(
        DriverError, match=r"80% of gpu-0 \(Test device 0\) are 6\.4 GiB, and only 3\.9 GiB of its 8\.0 GiB"
    ):
        lease_of(driver, fraction=0.8)
    assert board.allocations == taken
    driver.recover(first)


@needs_compiler
def test_memory_lost_to_others_meanwhile_is_taken_whole_or_not_at_all(board: Board, driver: GpuDriver) -> None:
    late, first = lease_of(driver, fraction=0.6), lease_of(driver, fraction=0.6)
    driver.inject(first)
    with pytest.raises(InjectFailed, match=r"could not be had: cuMemAlloc_v2: out of memory \(2\)"):
        driver.inject(late)
    eventually(lambda: len(board.holders()) == 1, every_s=0.02)
    assert not driver.active(late).present and driver.active(first).effective
    for lease in (late, first):
        driver.recover(lease)
    assert board.holders() == {}


@needs_compiler
def test_a_hog_that_starts_after_its_lease_was_taken_away_allocates_nothing(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver)
    board.slow(0.3)
    with pytest.raises(Halted):  # the run is stopped in the middle of injecting
        driver.inject(lease, _Stop(lambda: board.allocations > 0))
    order = (driver.directory / f"{lease.id}.json").read_bytes()
    driver.recover(lease)
    assert board.holders() == {} and not _hog_of(lease)
    made = board.allocations
    assert 0 < made < 7, "some, not all"
    # A late one finds even its order again, and the tombstone.
    (driver.directory / f"{lease.id}.json").write_bytes(order)
    command = [sys.executable, "-m", "mlchaos_dagster.drivers.gpu_hog", str(driver.directory), lease.id]
    assert subprocess.run(command, timeout=20).returncode == 3
    assert board.allocations == made
    # Not even where recover found no process: the tombstone alone stops one that is between two allocations.
    other = lease_of(driver)
    with pytest.raises(Halted):
        driver.inject(other, _Stop(lambda: board.allocations > made))
    (driver.directory / f"{other.id}.gone").touch()
    eventually(lambda: not _hog_of(other), every_s=0.02)
    assert board.allocations <= made + 3


@needs_compiler
def test_recover_needs_nothing_but_the_id(board: Board, driver: GpuDriver, tmp_path: Path) -> None:
    lease = lease_of(driver)
    driver.inject(lease)
    (driver.directory / f"{lease.id}.held").unlink()
    damaged = replace(lease, undo={}, targets=(), params={}, environment="")
    GpuDriver(tmp_path / "elsewhere").recover(damaged)
    assert board.holders() == {}
    assert not GpuDriver(tmp_path / "elsewhere").active(damaged).present


@needs_compiler
def test_another_hosts_hog_is_unknown_not_gone(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver)
    away = replace(lease, undo={**lease.undo, "host": "another", "boot_id": "another"})
    container = replace(lease, undo={**lease.undo, "host": "another/pid:[1]"})  # of this host: the boot is the same
    for one in (away, container):
        with pytest.raises(RecoverFailed, match="recover it there"):
            driver.recover(one)
        with pytest.raises(DriverUnavailable, match="held on another"):
            driver.active(one)


@needs_compiler
def test_a_host_that_got_another_name_recovers_its_own(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver, fraction=0.2)
    driver.inject(lease)
    namespace = lease.undo["host"].partition("/")[1:]
    renamed = replace(lease, undo={**lease.undo, "host": "".join(("old-name", *namespace))})
    assert driver.active(renamed).present
    driver.recover(renamed)
    assert board.holders() == {} and not driver.active(renamed).present


@needs_compiler
def test_on_a_full_disk_the_hog_is_ended_and_the_missing_tombstone_is_told(
    board: Board, driver: GpuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = lease_of(driver, fraction=0.2)
    driver.inject(lease)

    def full(*_: Any) -> None:
        raise StoreError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "write_atomic", full)
        with pytest.raises(RecoverFailed, match="No space left"):
            driver.recover(lease)
    assert board.holders() == {}
    driver.recover(lease)


@needs_compiler
def test_a_hog_that_dies_over_its_words_leaves_nothing(board: Board, driver: GpuDriver) -> None:
    lease = lease_of(driver)
    order = {"library": str(board.library), "deadline_mono": time.monotonic() + 30, "devices": {}}
    driver.directory.mkdir()
    (driver.directory / f"{lease.id}.json").write_text(json.dumps(order))
    code = (
        "import os, sys; from mlchaos_dagster.drivers import gpu_hog\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "gpu_hog.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(driver.directory), lease.id], timeout=20)
    assert done.returncode == -signal.SIGKILL
    driver.recover(lease)
    assert [path.name for path in driver.directory.iterdir()] == [f"{lease.id}.gone"]


def test_cuda_that_does_not_answer_holds_the_look_up_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu._LOOK_S <= 3
    monkeypatch.setattr(gpu, "_LOOK_S", 0.2)
    os.mkfifo(tmp_path / "libcuda.so.1")  # nobody writes to it: whoever loads it hangs
    driver = GpuDriver(tmp_path, str(tmp_path / "libcuda.so.1"))
    owner, now = Owner(os.getpid(), 0.0, "", ""), time.time()
    targets, kind = ("gpu-0",), "gpu_memory_hog"
    lease = Lease("mlchaos-mute", "r", "x", "e", "gpu", kind, targets, {}, {}, 9.0, now, now + 9, owner)
    begun = time.monotonic()
    evidence = driver.active(lease)
    assert time.monotonic() - begun < 5
    assert not evidence.present and "did not answer within 0.2 s" in evidence.lines[1]


@needs_compiler
def test_an_expired_lease_injects_nothing(board: Board, driver: GpuDriver) -> None:
    lease = replace(lease_of(driver), deadline_wall=time.time() - 1)
    with pytest.raises(InjectFailed, match="deadline has passed"):
        driver.inject(lease)
    assert board.allocations == 0


class _Stop:
    """A step that halts the verb once a condition holds."""

    def __init__(self, when: Callable[[], Any]) -> None:
        self.when = when

    def __call__(self, done: int, total: int) -> None:
        if self.when():
            raise Halted("stopped by the test")


def _hog_of(lease: Lease) -> list[int]:
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-1:] == [lease.id] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
