"""Who runs now: a run says so before its first guard, so that it is found, and stopped, before it holds a lease.

    active/<run_id>.json     line 1: the phase, padded, overwritten in place; line 2: who and what, written once

The order keeps a stop from being missed: a run announces itself, then looks for stop files and the lever; who stops
writes the file or pulls the lever, then reads this list. One of them sees the other. Says nothing of faults: where one
may be live, a lease is open (ledger.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from mlchaos_dagster.engine.files import write_atomic
from mlchaos_dagster.engine.ports import Clock, Owner
from mlchaos_dagster.engine.processes import Processes, SystemProcesses
from mlchaos_dagster.engine.stops import RUN_ID
from mlchaos_dagster.errors import StoreError

GUARDS, BASELINE, FAULT, RESTORING, RECOVERY, ENDED = "guards", "baseline", "fault", "restoring", "recovery", "ended"
"""`restoring`: the fault is being taken away; `recovery`: it is proven gone, and the target is watched coming back."""
HARMLESS = frozenset({RECOVERY, ENDED})
"""Phases after which a run injects nothing more; every other word, also a damaged one, counts as may."""
_PHASE = 16
"""Bytes of the first line, newline included."""
_CLOCKS_S = 3600.0
"""By how much the wall clocks of two hosts may differ."""


@dataclass(frozen=True)
class ActiveRun:
    """One run that has begun and not ended."""

    run_id: str
    experiment: str
    environment: str
    owner: Owner
    started_wall: float
    longest_s: float
    """Upper bound of its length, seconds."""
    phase: str = GUARDS

    @property
    def may_inject(self) -> bool:
        """Whether a fault of it may still come. One that is there already has an open lease."""
        return self.phase not in HARMLESS


_RUN = TypeAdapter(ActiveRun)


class ActiveRuns:
    """The runs of a state directory.

    Args:
        directory: `Home.active`; made by the first `announce`, reading one that was never made is fine.
        clock: Tells when a run of another host, which cannot be looked at from here, must be over.
        processes: How owners are looked at.
    """

    def __init__(self, directory: Path, clock: Clock, processes: Processes | None = None) -> None:
        self.directory, self.clock = directory, clock
        self.processes: Processes = processes or SystemProcesses()

    def announce(
        self, run_id: str, experiment: str, environment: str, owner: Owner, started_wall: float, longest_s: float
    ) -> None:
        """Make the run known, in its guards.

        Raises:
            StoreError: it could not be; nobody could stop it by name, so it must not inject.
        """
        if not RUN_ID.fullmatch(run_id):
            raise StoreError(f"a run with the id {run_id!r} cannot be announced: it could not be stopped")
        run = asdict(ActiveRun(run_id, experiment, environment, owner, started_wall, longest_s))
        del run["phase"]
        write_atomic(self._path(run_id), _line(GUARDS) + json.dumps(run).encode())

    def note(self, run_id: str, phase: str) -> None:
        """How far the run is. Never raises: a phase that is not noted makes a stop wait longer, never shorter."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path(run_id), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, _line(phase), 0)
            finally:
                os.close(descriptor)

    def forget(self, run_id: str) -> None:
        """The run is over. Never raises; what is left of a dead process is removed by the next reader."""
        with contextlib.suppress(OSError):
            self._path(run_id).unlink()

    def running(self) -> tuple[ActiveRun, ...]:
        """Runs whose process lives, oldest first; what others left is removed, what cannot be read left out.

        Raises:
            StoreError: the directory cannot be read.
        """
        try:
            names = [n for n in os.listdir(self.directory) if n.endswith(".json") and not n.startswith(".")]
        except FileNotFoundError:
            return ()
        except OSError as e:
            raise StoreError(f"cannot read {self.directory}: {e.strerror or e}") from e
        found: list[ActiveRun] = []
        for run in map(self._read, names):
            if run is None:
                continue
            if self._lives(run):
                found.append(run)
            else:
                self.forget(run.run_id)
        return tuple(sorted(found, key=lambda r: (r.started_wall, r.run_id)))

    def _path(self, run_id: str) -> Path:
        return self.directory / f"{run_id}.json"

    def _read(self, name: str) -> ActiveRun | None:
        try:
            content = (self.directory / name).read_bytes()
            run = _RUN.validate_json(content[_PHASE:])
        except (OSError, ValueError):
            return None
        if name != f"{run.run_id}.json":
            return None
        return replace(run, phase=content[:_PHASE].decode(errors="replace").strip())

    def _lives(self, run: ActiveRun) -> bool:
        if self.processes.is_local(run.owner):
            return self.processes.is_running(run.owner)
        return self.clock.wall() < run.started_wall + run.longest_s + _CLOCKS_S


def _line(phase: str) -> bytes:
    return f"{phase[: _PHASE - 1]:<{_PHASE - 1}}\n".encode()
