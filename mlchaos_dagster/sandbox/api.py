"""Bring a sandbox up, look at it, take it down. Imports the standard library alone: the CLI must start fast."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
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
from .parts import with_required
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
    "same_config",
    "status",
    "up",
]

_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


_STARTING_S = 30.0
"""A sandbox that is up and not ready may still be starting for this long; a busy machine needs 10 s."""


def up(
    directory: Path | str, config: SandboxConfig | None = None, timeout_s: float = 60, parts: Iterable[str] = ()
) -> dict[str, Any]:
    """Have a ready sandbox in ``directory``, with these parts beyond serving, and return its status.

    One that is up already is taken as it is, ready or not; only one that was started a moment ago is waited for. Two callers at the same moment get the same sandbox. It is detached: it outlives the caller.

    Raises:
        SandboxRefused: one with another configuration is up (``config=None`` takes any).
        SandboxUnavailable: one is up and does not answer.
        SandboxError: it did not become ready within ``timeout_s``; what was started has been taken down again.
    """
    end = time.monotonic() + timeout_s
    home = _home(directory)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(home, end):
        if is_alive(home):
            same_config(home, config)
            return _with_parts(home, parts, end) or _as_it_is(home, end)
        _take_down(home, 5.0)  # what a killed one may have left
        _launch(home, config or SandboxConfig())
        try:
            seen = _wait_ready(home, end)
        except SandboxError:
            _take_down(home, 5.0)
            raise
        return _with_parts(home, parts, end) or seen


def down(directory: Path | str, timeout_s: float = 10) -> dict[str, Any]:
    """Take the sandbox down and prove it: ``{"clean": bool, "was_up": bool, "processes": [{name, pid, gone}]}``.

    Asks first, then kills by pid and start time. Safe to repeat, and where there never was a sandbox.
    """
    home = _home(directory)
    if not home.is_dir():  # it may have been deleted under a living sandbox; then there is no lock, either
        return _take_down(home, timeout_s)
    with _locked(home, time.monotonic() + timeout_s):
        return _take_down(home, timeout_s)


def status(directory: Path | str) -> dict[str, Any] | None:
    """The live status; None when no sandbox is up.

    Raises:
        SandboxUnavailable: its supervisor lives but does not answer, or processes of it live and their files are gone.
    """
    home = _home(directory)
    if is_alive(home):
        return SandboxClient(home).status()
    if left := remains(home):
        said = ", ".join(f"{name} (pid {pid})" for name, pid in left)
        raise SandboxUnavailable(f"no state file in {home} tells of {said}; `mlchaos sandbox down` takes them down")
    return None


def same_config(directory: Path | str, config: SandboxConfig | None) -> None:
    """Look whether a sandbox that is up was started as wished; one that is down may become anything.

    Raises:
        SandboxRefused: it was not; says what differs.
    """
    home = _home(directory)
    if config is None or not is_alive(home):
        return
    there, wanted = (read_state(home) or {}).get("config") or {}, config.to_dict()
    if there != wanted:
        differ = _differences(there, wanted) or "cannot be read"
        raise SandboxRefused(f"a sandbox with another configuration is up ({differ}); `mlchaos sandbox down` first")


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


def _with_parts(home: Path, parts: Iterable[str], end: float) -> dict[str, Any] | None:
    """Start what is missing and wait until its processes are ready; None when nothing is missing."""
    client = SandboxClient(home)
    before = set(client.status()["parts"])
    if not set(with_required(parts)) - before:
        return None
    client.start_parts(parts)
    while True:
        seen = client.status()
        if seen["ready"]:
            return seen
        if time.monotonic() >= end:
            waiting = [f"{p['name']}: {p['reason']}" for p in seen["processes"] if not p["ready"]]
            raise SandboxError(f"{', '.join(parts)} was not ready in time; waiting for {'; '.join(waiting)}")
        time.sleep(0.1)


def _as_it_is(home: Path, end: float) -> dict[str, Any]:
    """The status now; of one whose caller was killed while it started, once it is ready or has had its time."""
    client = SandboxClient(home)
    seen = client.status()
    end = min(end, time.monotonic() + seen["supervisor"]["started_at"] + _STARTING_S - time.time())
    while not seen["ready"] and time.monotonic() < end:
        time.sleep(0.1)
        seen = client.status()
    return seen


def _differences(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    found: list[str] = []
    for name, value in wanted.items():
        if isinstance(value, dict):
            inner = _differences(there.get(name) or {}, value, f"{name}.")  # pyright: ignore[reportUnknownArgumentType]
            found += [inner] if inner else []
        elif there.get(name) != value:
            found.append(f"{prefix}{name} is {json.dumps(there.get(name))}, not {json.dumps(value)}")
    return ", ".join(found)


def _take_down(home: Path, timeout_s: float) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    answers = is_alive(home)
    members = {(pid, name): born for name, pid, born in processes_of(home)}
    for name, child in (read_state(home) or {}).get("children", {}).items():
        if lives(child.get("pid"), child.get("create_time")):
            members.setdefault((child["pid"], name), child["create_time"])
    listed = [(name, pid, born) for (pid, name), born in members.items()]
    if answers:
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
    return {"clean": all(e["gone"] for e in evidence), "was_up": answers or bool(evidence), "processes": evidence}


def _log_tail(home: Path) -> str:
    try:
        return (home / "logs" / "supervisor.log").read_text(errors="replace")[-1500:]
    except OSError:
        return "(no log)"
