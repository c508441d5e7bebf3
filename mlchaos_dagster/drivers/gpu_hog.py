"""The process that holds a GPU's memory. It ends the fault by ending, however it ends.

    python -m mlchaos_dagster.drivers.gpu_hog DIRECTORY LEASE

`DIRECTORY/LEASE.json` orders what to hold and until when (monotonic clock, which all processes of a host share);
`LEASE.held` says what is held; `LEASE.gone` is the tombstone. It releases at its deadline by itself, on SIGTERM, and
when its order is removed or buried. Not bound to its parent: the run may die, and then deadline or watchdog end it.

No lock is needed against whoever takes the lease away: they bury it first and look for this process then, and this
process, which is found by its command line, looks for the tombstone before every allocation. One of both sees the other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlchaos_dagster.drivers.cuda import Cuda, CudaError

CHUNK_BYTES = 1 << 30
_LOOK_S = 0.05
_TELL_S = 0.2
_LAST_S = 1.0
"""How long after its deadline the kernel ends a hog that cannot end itself, for instance inside a call to CUDA."""


@dataclass(frozen=True)
class Files:
    """What a lease has on disk."""

    directory: Path
    lease_id: str

    @property
    def order(self) -> Path:
        """By the driver: library, deadline, bytes per device."""
        return self.directory / f"{self.lease_id}.json"

    @property
    def held(self) -> Path:
        """By the hog: who it is and what it holds."""
        return self.directory / f"{self.lease_id}.held"

    @property
    def partial(self) -> Path:
        """What becomes `held`: by name, so that whoever takes the lease away finds it when the hog died over it."""
        return self.directory / f"{self.lease_id}.partial"

    @property
    def gone(self) -> Path:
        """The tombstone: nothing is allocated for this lease any more."""
        return self.directory / f"{self.lease_id}.gone"

    @property
    def log(self) -> Path:
        """What the hog wrote to its standard streams: nothing, as a rule."""
        return self.directory / f"{self.lease_id}.log"

    def wanted(self) -> bool:
        """Whether the order stands."""
        return self.order.exists() and not self.gone.exists()


def main(arguments: list[str]) -> int:
    """0: held and released; 1: it could not be had (`held` says why); 3: not wanted (any more)."""
    files = Files(Path(arguments[0]), arguments[1])
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # to die is to release, even inside a call to CUDA
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGALRM})
    try:
        order = json.loads(files.order.read_bytes())
    except FileNotFoundError:
        return 3
    left_s = order["deadline_mono"] - time.monotonic()
    if left_s <= 0 or not files.wanted():
        return 3
    signal.setitimer(signal.ITIMER_REAL, left_s + _LAST_S)
    hog = _Hog(files, order)
    try:
        return hog.hold()
    except CudaError as e:
        hog.tell("failed", error=str(e))
        return 1


class _Hog:
    def __init__(self, files: Files, order: dict[str, Any]) -> None:
        import psutil

        self.files, self.deadline, self.devices = files, float(order["deadline_mono"]), dict(order["devices"])
        self.held = dict.fromkeys(self.devices, 0)
        self.known: dict[str, Any] = {
            "pid": os.getpid(),
            "create_time": psutil.Process().create_time(),
            "deadline_mono": self.deadline,
        }
        self.told_at = float("-inf")
        self.library = str(order["library"])
        self.tell("starting")

    def hold(self) -> int:
        """Take all, wait, give all back. Raises CudaError: not all can be had; what was had goes with this process."""
        pointers: list[tuple[int, int]] = []
        cuda = Cuda(self.library)
        here = {device.uuid: device.index for device in cuda.devices()}
        for uuid, wanted in self.devices.items():
            if uuid not in here:
                raise CudaError(f"device {uuid} is not here (any more)")
            cuda.use(here[uuid])
            while self.held[uuid] < wanted:
                if not self.files.wanted() or time.monotonic() >= self.deadline:
                    return 3
                size = min(CHUNK_BYTES, wanted - self.held[uuid])
                pointers.append((here[uuid], cuda.allocate(size)))
                self.held[uuid] += size
                if time.monotonic() - self.told_at >= _TELL_S:
                    self.tell("allocating")
        self.tell("holding")
        while time.monotonic() < self.deadline and self.files.wanted():
            time.sleep(_LOOK_S)
        for index, pointer in pointers:
            cuda.use(index)
            cuda.free(pointer)
        self.held = dict.fromkeys(self.devices, 0)
        with suppress(OSError):
            self.tell("released")
        return 0

    def tell(self, state: str, **more: str) -> None:
        """Say what is held. Raises OSError: who cannot say so may not hold; the process ends."""
        self.told_at = time.monotonic()
        said = {**self.known, "state": state, "held_bytes": self.held, **more}
        self.files.partial.write_text(json.dumps(said))
        os.replace(self.files.partial, self.files.held)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
