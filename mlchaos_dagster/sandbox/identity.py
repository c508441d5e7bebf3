"""Who is that process? Pids are used again, so a process is its pid *and* its start time. psutil is imported late."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_START_TOLERANCE_S = 1.0
"""psutil derives the start time from the boot time, which a clock correction may shift a little."""


def lives(pid: int | None, create_time: float | None) -> bool:
    """True when the process with this pid that started then is there and is not a zombie."""
    import psutil

    if not pid or create_time is None:
        return False
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - create_time) <= _START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def processes_of(directory: Path) -> list[tuple[str, int, float]]:
    """Every live process of the sandbox in ``directory``, found by its command line: (name, pid, start time)."""
    import psutil

    found: list[tuple[str, int, float]] = []
    wanted = str(directory)
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "--sandbox" not in command or process.status() == psutil.STATUS_ZOMBIE:
                continue
            at = command.index("--sandbox")
            module = next((word for word in command[:at] if word.startswith("mlchaos_dagster.sandbox.")), None)
            if module is None or command[at + 1 : at + 2] != [wanted]:
                continue
            name = command[at + 3] if command[at + 2 : at + 3] == ["--name"] else module.rpartition(".")[2]
            found.append((name, process.pid, process.create_time()))
        except psutil.Error:
            continue
    return found


def burner_suffix(lease_id: str) -> str:
    """How the names of a lease's burners end, by which they can be told from the outside."""
    return "-" + re.sub(r"[^A-Za-z0-9.-]", "_", lease_id)


def kill(members: Iterable[tuple[str, int, float]], within_s: float) -> list[dict[str, Any]]:
    """SIGKILL these very processes and wait; return per process ``{name, pid, gone}``."""
    import psutil

    members = list(members)
    for _, pid, create_time in members:
        if lives(pid, create_time):
            try:
                psutil.Process(pid).kill()
            except psutil.Error:
                continue
    return wait_gone(members, within_s)


def wait_gone(members: Iterable[tuple[str, int, float]], within_s: float) -> list[dict[str, Any]]:
    """Wait for these processes to be gone; return per process ``{name, pid, gone}``."""
    members = list(members)
    end = time.monotonic() + within_s
    while time.monotonic() < end and any(lives(pid, born) for _, pid, born in members):
        time.sleep(0.01)
    return [{"name": name, "pid": pid, "gone": not lives(pid, born)} for name, pid, born in members]
