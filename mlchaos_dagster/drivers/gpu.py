"""The GPU backend: a share of a device's memory is really allocated, by a process of its own (`gpu_hog`).

Owns which devices, whether there is room, and the end of the process that holds the memory. Its own process never
loads CUDA: a context costs memory on the very device; `drivers.cuda` is asked instead, and is gone with its answer.
The memory of a dead process is the kernel driver's to take back, so the fault cannot outlive its holder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import psutil

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cuda import LIBRARY, Device, name_of
from mlchaos_dagster.drivers.gpu_hog import Files
from mlchaos_dagster.engine.files import write_atomic, write_json
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.engine.processes import boot_id, host
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, MlChaosError, RecoverFailed, StoreError

NAME = "gpu"
_ASK_S = 10.0
"""Initialising CUDA takes half a second, several on a machine with many devices that nobody uses."""
_LOOK_S = 3.0
"""The same for `active`, which is asked again and again while measurements go on."""
_HOLD_S = 60.0
"""Filling 100 GiB takes seconds; a device that takes longer is not well."""
_PATIENCE_S = 0.5
"""Between SIGTERM, which a stopped process does not hear, and SIGKILL."""
_DYING_S = 5.0
"""A dying process gives its memory back first; tens of gigabytes take a second."""
_GRANULE = 2 << 20
"""CUDA's own unit of allocation: less would be rounded up behind our back."""
_HOG = "mlchaos_dagster.drivers.gpu_hog"
_START_TOLERANCE_S = 1.5
"""psutil derives the start time from the boot time, which a clock correction may shift."""


class GpuDriver:
    """Driver for the CUDA devices of this host.

    Args:
        directory: Where orders and tombstones are kept, in a folder `gpu`.
        library: CUDA's driver library, found as the dynamic linker does.
    """

    name = NAME
    faults = frozenset({"gpu_memory_hog"})
    self_limiting = faults
    """The hog keeps its deadline itself, and the kernel keeps it for a hog that hangs."""

    def __init__(self, directory: Path | str, library: str = LIBRARY) -> None:
        self.directory, self.library = Path(directory) / "gpu", library

    def resolve(self, target: Target) -> tuple[str, ...]:
        """Ids (`gpu-0`) of the devices whose number or id matches one of the globs, sorted.

        Raises:
            DriverUnavailable: there is no CUDA device; says why.
        """
        globs = [glob.strip() for glob in target.select.split(",")]
        names = [(str(device.index), name_of(device.index)) for device in _ask(self.library, (), "resolve")]
        return tuple(
            sorted(own for ways in names for own in ways[1:] if any(fnmatchcase(w, g) for w in ways for g in globs))
        )

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target | None = None,
        backup: Path | None = None,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """Which devices, by UUID, what is used there now, and how many bytes are to be held.

        Raises:
            DriverUnavailable: there is no CUDA device.
            DriverError: a device does not exist, or has too little free: all or nothing.
        """
        here = {name_of(device.index): device for device in _ask(self.library, targets, "undo", step)}
        devices: dict[str, Any] = {}
        for name in targets:
            if name not in here:
                raise DriverError(f"there is no {name}; there are {', '.join(here)}", driver=NAME, verb="undo")
            device, fraction = here[name], float(params["fraction"])
            wanted, free = int(device.total_bytes * fraction) // _GRANULE * _GRANULE, device.free_bytes or 0
            if free < wanted:
                raise DriverError(
                    f"{fraction:.0%} of {name} ({device.name}) are {_size(wanted)}, and only {_size(free)} of its "
                    f"{_size(device.total_bytes)} are free: nothing is taken unless all can be had",
                    driver=NAME,
                    verb="undo",
                )
            devices[name] = {
                "uuid": device.uuid,
                "total_bytes": device.total_bytes,
                "used_bytes": device.total_bytes - free,
                "hold_bytes": wanted,
            }
        return {
            "directory": str(self.directory.resolve()),
            "library": self.library,
            "host": host(),
            "boot_id": boot_id(),
            "devices": devices,
        }

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Start the hog and wait until it holds everything. It outlives this process, until its deadline.

        Raises:
            InjectFailed: buried, too late, or not all memory could be had. On failure: a hog may live until recover.
        """
        files = self._files(lease)
        if files.gone.exists():
            raise _failed(lease, "the lease was taken away and will never inject again")
        if _hogs(lease.id, files):
            raise _failed(lease, "a hog of this lease is there already")
        # An owner that was stopped between lease and inject gets no more than what is left.
        left_s = min(lease.duration_s, lease.deadline_wall - time.time())
        if left_s <= 0:
            raise _failed(lease, "the lease's deadline has passed")
        order = {
            "lease_id": lease.id,
            "library": lease.undo["library"],
            "deadline_mono": time.monotonic() + left_s,
            "devices": {d["uuid"]: d["hold_bytes"] for d in lease.undo["devices"].values()},
        }
        try:
            files.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(files.order, order)
            with open(files.log, "ab") as log:
                # A session of its own, so that no Ctrl-C, hang-up or killed process group decides about the fault.
                process = subprocess.Popen(
                    [sys.executable, "-m", _HOG, str(files.directory), lease.id],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except (OSError, StoreError) as e:
            raise _failed(lease, f"the hog could not be started: {e}") from e
        threading.Thread(target=process.wait, name="gpu-hog-reaper", daemon=True).start()  # it leaves no zombie
        self._wait_held(lease, files, process, step)

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Bury the lease, then end every hog of it, by pid and start time, and wait until they are gone.

        Raises:
            RecoverFailed: on another host, a hog did not go (the memory may be held until its own deadline), or the
                lease could not be buried; then its hogs are gone all the same.
        """
        self._check_host(lease, RecoverFailed, "recover")
        files, unburied = self._files(lease), ""
        try:
            # First: a hog that starts later finds the tombstone, and one that started before is found below.
            write_atomic(files.gone, b"")
        except StoreError as e:  # a full disk must not keep the fault; it is told last
            unburied = str(e)
        begun = time.monotonic()
        while hogs := _hogs(lease.id, files):
            late = time.monotonic() - begun
            if late > _DYING_S:
                said = f"still there: {', '.join(f'hog pid {hog.pid}' for hog in hogs)}"
                raise RecoverFailed(said, driver=NAME, verb="recover", lease_id=lease.id)
            for hog in hogs:
                with suppress(psutil.Error):  # gone in between; or not ours to signal: then it stays, and is told
                    hog.terminate() if late < _PATIENCE_S else hog.kill()
            step(0, len(hogs))
            time.sleep(0.02)
        for path in (files.order, files.held, files.partial, files.log):
            with suppress(OSError):
                path.unlink()
        if unburied:
            raise RecoverFailed(unburied, driver=NAME, verb="recover", lease_id=lease.id)

    def active(self, lease: Lease) -> Evidence:
        """Whether a hog of the lease lives, and what the devices say.

        ``effective`` needs a hog that holds all it was to, and devices that confirm it: at least as much is used.

        Raises:
            DriverUnavailable: on another host, or a hog lives and the devices cannot be asked.
        """
        self._check_host(lease, DriverUnavailable, "active")
        files = self._files(lease)
        hogs = _hogs(lease.id, files)
        devices = cast("dict[str, Any]", lease.undo.get("devices", {}))
        try:
            uuids = [d["uuid"] for d in devices.values()]
            asked = _ask(lease.undo.get("library", self.library), uuids, "active", limit_s=_LOOK_S)
            now = {device.uuid: device for device in asked}
        except DriverUnavailable as e:
            if hogs:
                raise
            return Evidence(present=False, effective=False, lines=(f"no hog of lease {lease.id} is left", str(e)))
        if not hogs:
            gone = f"no hog of lease {lease.id} is left: nothing holds memory for it"
            lines = [_memory_line(name, before, now.get(before["uuid"])) for name, before in devices.items()]
            return Evidence(present=False, effective=False, lines=(gone, *lines))
        held = (_read(files.held) or {}).get("held_bytes", {})
        who = f"hog pid {', '.join(str(hog.pid) for hog in hogs)}"
        lines = [] if devices else [f"{who} lives"]
        effective = bool(devices)
        for name, before in devices.items():
            device, has = now.get(before["uuid"]), int(held.get(before["uuid"], 0))
            full = device is not None and (
                device.free_bytes is None or device.total_bytes - device.free_bytes >= before["hold_bytes"]
            )
            effective = effective and full and has >= before["hold_bytes"]
            lines.append(f"{who} holds {_size(has)} of {_memory_line(name, before, device)}")
        return Evidence(present=True, effective=effective, lines=tuple(lines))

    def _wait_held(self, lease: Lease, files: Files, process: subprocess.Popen[bytes], step: Step) -> None:
        total = sum(int(d["hold_bytes"]) for d in lease.undo["devices"].values())
        end = time.monotonic() + _HOLD_S
        step(0, total)
        while time.monotonic() < end:
            ended = process.poll() is not None  # asked before its last word is read
            said = _read(files.held) or {}
            if said.get("state") == "holding":
                return
            if said.get("state") == "failed":
                raise _failed(lease, f"the memory could not be had: {said['error']}")
            if ended:
                raise _failed(
                    lease, f"the hog ended with {process.returncode}: {_tail(files.log) or 'it said nothing'}"
                )
            step(sum(said.get("held_bytes", {}).values()), total)
            time.sleep(0.02)
        raise _failed(lease, f"the memory is not held after {_HOLD_S:g} s")

    def _files(self, lease: Lease) -> Files:
        """The lease's own place; a lease whose file was damaged has only ours."""
        return Files(Path(lease.undo.get("directory") or self.directory), lease.id)

    @staticmethod
    def _check_host(lease: Lease, error: type[DriverError], verb: str) -> None:
        """Processes of another host, or another pid namespace, cannot be seen from here: not seen is not gone.

        A host may get another name while it runs: then its boot tells, and of its `host` only the namespace counts.
        """
        here, there = host(), str(lease.undo.get("host", host()))
        same_boot = lease.undo.get("boot_id") == boot_id() != "unknown"
        if there != here and not (same_boot and there.partition("/")[2] == here.partition("/")[2]):
            said = f"the memory is held on {there}, and this is {host()}: recover it there"
            raise error(said, driver=NAME, verb=verb, lease_id=lease.id)


def _ask(
    library: str, memory_of: Collection[str], verb: str, step: Step = no_step, limit_s: float = _ASK_S
) -> list[Device]:
    """The devices, asked in a process that is gone afterwards; free memory for those named. Raises DriverUnavailable."""
    command = [sys.executable, "-m", "mlchaos_dagster.drivers.cuda", library, *memory_of]
    end = time.monotonic() + limit_s
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    out, errors = process.communicate(timeout=0.25)
                    break
                except subprocess.TimeoutExpired as e:
                    step(0, 1)
                    if time.monotonic() >= end:
                        said = f"CUDA did not answer within {limit_s:g} s"
                        raise DriverUnavailable(said, driver=NAME, verb=verb) from e
        except MlChaosError:
            process.kill()
            raise
    try:
        found = json.loads(out)
    except ValueError as e:
        said = errors.strip().splitlines()[-1:] or [f"it ended with {process.returncode}"]
        raise DriverUnavailable(f"CUDA could not be asked: {said[0]}", driver=NAME, verb=verb) from e
    if "error" in found:
        raise DriverUnavailable(found["error"], driver=NAME, verb=verb)
    return [Device(**device) for device in found["devices"]]


def _hogs(lease_id: str, files: Files) -> list[psutil.Process]:
    """Living hogs of a lease: by their command line, which is there before they do anything, and as they told."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if _HOG in command and command[-1] == lease_id and _lives(process):
                found[process.pid] = process
    # The command line of one that is half dead, its memory not given back yet, is gone.
    said = _read(files.held) or {}
    with suppress(psutil.Error, KeyError, TypeError, ValueError):
        process = psutil.Process(int(said["pid"]))
        same = abs(process.create_time() - float(said["create_time"])) <= _START_TOLERANCE_S
        if same and _lives(process):
            found[process.pid] = process
    return list(found.values())


def _lives(process: psutil.Process) -> bool:
    """A leader may be a zombie while a thread of it is still inside the kernel, with the memory."""
    return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""


def _failed(lease: Lease, said: str) -> InjectFailed:
    return InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)


def _memory_line(name: str, before: dict[str, Any], now: Device | None) -> str:
    used, total = _size(before["used_bytes"]), _size(before["total_bytes"])
    if now is None:
        return f"{name}: device {before['uuid']} is not visible any more"
    if now.free_bytes is None:
        return f"{name}: full, it has no room for another context ({used} of {total} used before)"
    return f"{name}: {_size(now.total_bytes - now.free_bytes)} of {total} used, {used} before the fault"


def _size(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
