"""Bring a sandbox up, look at it, take it down. Imports the standard library alone: the CLI must start fast."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .client import SandboxClient, read_state
from .config import (
    MECHANISMS,
    SandboxConfig,
    SandboxConfigError,
    SandboxError,
    SandboxRefused,
    SandboxUnavailable,
)
from .identity import kill, lives, processes_of, wait_gone
from .tombstones import write_tombstone

__all__ = [
    "MECHANISMS",
    "SandboxClient",
    "SandboxConfig",
    "SandboxConfigError",
    "SandboxError",
    "SandboxRefused",
    "SandboxUnavailable",
    "bury",
    "down",
    "is_alive",
    "read_state",
    "remains",
    "status",
    "up",
]

_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def up(directory: Path | str, config: SandboxConfig | None = None, timeout_s: float = 60) -> dict[str, Any]:
    """Have a ready sandbox in ``directory`` and return its status; one that is up already is taken as it is.

    Two callers at the same moment get the same sandbox. It is detached: it outlives the caller.

    Raises:
        SandboxRefused: one with another configuration is up (``config=None`` takes any).
        SandboxError: it did not become ready within ``timeout_s``; what was started has been taken down again.
    """
    end = time.monotonic() + timeout_s
    home = _home(directory)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(home, end):
        started = False
        if not is_alive(home):
            _take_down(home, 5.0)  # what a killed one may have left
            _launch(home, config or SandboxConfig())
            started = True
        else:
            _same_config(home, config)
        try:
            return _wait_ready(home, end)
        except SandboxError:
            if started:
                _take_down(home, 5.0)
            raise


def down(directory: Path | str, timeout_s: float = 10) -> dict[str, Any]:
    """Take the sandbox down and prove it: ``{"clean": bool, "was_up": bool, "processes": [{name, pid, gone}]}``.

    Asks first, then kills by pid and start time. Safe to repeat, and where there never was a sandbox.
    """
    home = _home(directory)
    if not home.is_dir():
        return {"clean": True, "was_up": False, "processes": []}
    with _locked(home, time.monotonic() + timeout_s):
        return _take_down(home, timeout_s)


def status(directory: Path | str) -> dict[str, Any] | None:
    """The live status; None when no sandbox is up.

    Raises:
        SandboxUnavailable: its supervisor lives but does not answer.
    """
    home = _home(directory)
    return SandboxClient(home).status() if is_alive(home) else None


def is_alive(directory: Path | str) -> bool:
    """True when the supervisor that the state file names is a live process (pid and start time)."""
    state = read_state(_home(directory))
    return state is not None and lives(state.get("pid"), state.get("create_time"))


def remains(directory: Path | str) -> list[tuple[str, int]]:
    """Every live process of the sandbox, asked of the operating system: (name, pid). Empty = no fault can be there."""
    home = _home(directory)
    found = {pid: name for name, pid, _ in processes_of(home)}
    for name, child in (read_state(home) or {}).get("children", {}).items():
        if lives(child.get("pid"), child.get("create_time")):
            found.setdefault(child["pid"], name)
    return sorted((name, pid) for pid, name in found.items())


def bury(directory: Path | str, lease_id: str) -> None:
    """Have any later sandbox in this directory refuse the lease; for when there is none now that could be asked.

    Raises:
        OSError: it could not be written.
    """
    home = _home(directory)
    if home.is_dir():
        write_tombstone(home, lease_id)


def _home(directory: Path | str) -> Path:
    return Path(directory).resolve()


@contextmanager
def _locked(home: Path, end: float) -> Iterator[None]:
    """One caller at a time may start or stop the sandbox in a directory."""
    with open(home / "up.lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise SandboxError(f"somebody else is starting or stopping the sandbox in {home}") from None
                time.sleep(0.02)
        yield


def _launch(home: Path, config: SandboxConfig) -> None:
    (home / "state.json").unlink(missing_ok=True)
    file = os.open(home / "config.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(file, "w") as stream:
        json.dump(config.to_dict(), stream)
    environment = {**os.environ, **_THREADS}
    root = Path(__file__).resolve().parents[2]
    if not root.name.endswith("-packages"):  # a source tree that may not be installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "mlchaos_dagster.sandbox.supervisor", "--sandbox", str(home), "--detach"]
    (home / "logs").mkdir(exist_ok=True)
    with open(home / "logs" / "supervisor.log", "ab") as log:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=home, env=environment, timeout=30
        )
    if done.returncode != 0:
        raise SandboxError(f"the supervisor did not start:\n{_log_tail(home)}")


def _wait_ready(home: Path, end: float) -> dict[str, Any]:
    client = SandboxClient(home)
    seen: dict[str, Any] = {}
    born = time.monotonic()
    while time.monotonic() < end:
        if is_alive(home):
            try:
                seen = client.status()
            except SandboxUnavailable:
                pass
            if seen.get("ready"):
                return seen
        elif time.monotonic() - born > 2.0 and not processes_of(home):
            raise SandboxError(f"the supervisor ended before the sandbox was ready:\n{_log_tail(home)}")
        time.sleep(0.1)  # each look asks every process, which would rather be starting
    waiting = [f"{p['name']}: {p['reason']}" for p in seen.get("processes", []) if not p["ready"]]
    raise SandboxError(f"the sandbox was not ready in time; waiting for {'; '.join(waiting) or 'its supervisor'}")


def _same_config(home: Path, config: SandboxConfig | None) -> None:
    state = read_state(home) or {}
    if config is not None and state.get("config") != config.to_dict():
        raise SandboxRefused("a sandbox with another configuration is up; take it down first")


def _take_down(home: Path, timeout_s: float) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    was_up = is_alive(home)
    members = {(pid, name): born for name, pid, born in processes_of(home)}
    for name, child in (read_state(home) or {}).get("children", {}).items():
        if lives(child.get("pid"), child.get("create_time")):
            members.setdefault((child["pid"], name), child["create_time"])
    listed = [(name, pid, born) for (pid, name), born in members.items()]
    if was_up:
        try:
            SandboxClient(home).shutdown()
            wait_gone(listed, min(3.0, timeout_s / 2))
        except (SandboxUnavailable, SandboxRefused):
            pass  # then without asking
    evidence = kill(listed, max(0.5, end - time.monotonic()))
    # Whatever was started while we were at it.
    late = kill(processes_of(home), 2.0)
    (home / "state.json").unlink(missing_ok=True)
    evidence += late
    return {"clean": all(entry["gone"] for entry in evidence), "was_up": was_up, "processes": evidence}


def _log_tail(home: Path) -> str:
    try:
        return (home / "logs" / "supervisor.log").read_text(errors="replace")[-1500:]
    except OSError:
        return "(no log)"
