"""A target made of files, and its driver: a fault is a file, in a directory that any process can read.

Used by real processes in test_watchdog.py and test_sweep.py. It enforces tombstones under a lock of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import InjectFailed, RecoverFailed
from mlchaos_dagster.settings import Home


class FileDriver:
    name = "files"
    faults = frozenset({"file"})
    self_limiting = frozenset()

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _locked(self):
        with open(self.directory / "lock", "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def resolve(self, target):
        return ()

    def undo(self, kind, targets, params, **_):
        return {}

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        for number, target in enumerate(lease.targets):
            if number and lease.params.get("stop_between"):
                os.kill(os.getpid(), signal.SIGSTOP)
            with self._locked():
                if (self.directory / f"{lease.id}.tombstone").exists():
                    raise InjectFailed("refused: recovered already", driver=self.name, verb="inject", lease_id=lease.id)
                (self.directory / f"{target}.fault").write_text(lease.id)
                with open(self.directory / "history", "a") as f:
                    f.write(f"{time.monotonic()} {lease.id} {target}\n")

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        if (self.directory / "stuck").exists():
            raise RecoverFailed("the target is stuck", driver=self.name, verb="recover", lease_id=lease.id)
        with self._locked():
            (self.directory / f"{lease.id}.tombstone").touch()
            for path in self._faults(lease.id):
                path.unlink()

    def active(self, lease: Lease) -> Evidence:
        found = [p.name for p in self._faults(lease.id)]
        return Evidence(present=bool(found), effective=bool(found), lines=(f"faults: {found}",))

    def _faults(self, lease_id: str) -> list[Path]:
        return [p for p in self.directory.glob("*.fault") if p.read_text() == lease_id]


def faults(home: Home) -> list[str]:
    """What is wrong with the target, seen without the driver."""
    return sorted(p.name for p in (home.root / "target").glob("*.fault"))


def injections(home: Home) -> list[str]:
    history = home.root / "target" / "history"
    return history.read_text().splitlines() if history.exists() else []


def driver(name: str, home: Home, environment: str) -> FileDriver:
    """Factory for the watchdog."""
    assert name == "files", name
    return FileDriver(home.root / "target")


def make_lease(lease_id="a", targets=("t1",), *, run_id="run-1", owner=None, duration_s=60.0, driver="files", **params):
    now = time.time()
    return Lease(
        id=lease_id,
        run_id=run_id,
        experiment="an-experiment",
        environment="test",
        driver=driver,
        kind="file",
        targets=tuple(targets),
        params=params,
        undo={},
        duration_s=duration_s,
        opened_wall=now,
        deadline_wall=now + duration_s,
        owner=owner or current_owner(),
    )


def until(condition, seconds=30.0, what=""):
    """Poll; the value once true. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.01)
    return value
