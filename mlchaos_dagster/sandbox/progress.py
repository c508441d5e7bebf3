"""What a trainer has done so far, in a small file that survives its death: mapped into memory, written at every step.

A process that is killed cannot tell how far it was; its memory map can. The kernel keeps what was written to it, whatever
ends the process, at the cost of a store to memory. One writer, any number of readers; each number is whole, several of
them may be from two moments.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

_FORMAT = "<qqqqqqqqqddddd"
_SIZE = struct.calcsize(_FORMAT)
_RATE_LASTS_S = 1.0


@dataclass
class Progress:
    """Numbers of one worker; moments are seconds of the monotonic clock, which all processes share. 0.0 = never."""

    pid: int = 0
    """Who wrote it, once it had resumed; 0 while a new process has not."""
    sandbox: int = 0
    """Which sandbox it belongs to: a number drawn from its token."""
    step: int = 0
    best: int = 0
    """Highest step ever."""
    checkpoint_step: int = 0
    lost_steps: int = 0
    """Steps done before the last death that had to be done again."""
    checkpoints_skipped: int = 0
    """Damaged ones, when it last looked for one to resume from."""
    bad_shards: int = 0
    """Set aside now."""
    store_failures: int = 0
    """Requests to the object store that failed, of this process."""
    loss: float = 0.0
    checkpoint_at: float = 0.0
    started_at: float = 0.0
    """When this process began to train."""
    rate: float = 0.0
    """Steps in the last second."""
    updated_at: float = 0.0


class ProgressFile(Progress):
    """The writer's end: set attributes, then ``write``."""

    def __init__(self, path: Path, sandbox: int) -> None:
        """Open it with what an earlier process of the same sandbox left, else empty."""
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read(path)
        super().__init__(*(astuple(earlier) if earlier is not None and earlier.sandbox == sandbox else ()))
        self.sandbox = sandbox
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(file, _SIZE)
            self._map = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)
        self.pid = 0
        self.write()

    def recall(self) -> None:
        """What an earlier process left was read when the file was opened."""

    def write(self) -> None:
        """Make it known."""
        struct.pack_into(_FORMAT, self._map, 0, *(getattr(self, field.name) for field in fields(Progress)))


def read(path: Path) -> Progress | None:
    """What stands there now; None when there is no such file."""
    try:
        return Progress(*struct.unpack(_FORMAT, path.read_bytes()))
    except (OSError, struct.error):
        return None


def path_of(directory: Path, worker: str) -> Path:
    """Where a worker's progress is kept."""
    return directory / "training" / f"{worker}.progress"


def summary(known: Mapping[str, Progress], alive: Collection[str], now: float) -> dict[str, float]:
    """The gauges of training, over all workers.

    Args:
        known: progress of every worker that ever began to train.
        alive: those of them whose process trains now.
        now: on the clock of their moments.
    """
    # A dead worker is where it will resume from: all that was in its memory is gone.
    steps = {name: p.step if name in alive else p.checkpoint_step for name, p in known.items()}
    return {
        "training_step": sum(steps.values()),
        "training_step_rate": sum(
            p.rate for name, p in known.items() if name in alive and now - p.updated_at < _RATE_LASTS_S
        ),
        "steps_behind": sum(max(0, p.best - steps[name]) for name, p in known.items()),
        "lost_steps": max(p.lost_steps for p in known.values()),
        "checkpoint_age": max(now - (p.checkpoint_at or p.started_at) for p in known.values()),
        "checkpoints_skipped": sum(p.checkpoints_skipped for p in known.values()),
        "training_loss": max(p.loss for p in known.values()),
        "bad_shards": sum(p.bad_shards for p in known.values()),
        "store_failures": sum(p.store_failures for p in known.values()),
    }
