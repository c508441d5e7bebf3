"""Who a process is, whether it still runs, and how to end exactly that one.

A pid alone is no identity: it is reused, and it means nothing on another machine, after a reboot or in another
pid namespace. Knows nothing of leases.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Protocol

from mlchaos_dagster.engine.ports import Owner

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
_LINUX = sys.platform.startswith("linux")
_START_TOLERANCE_S = 0.005 if _LINUX else 1.5
"""Linux counts ticks since boot (exact); elsewhere the start is wall time, which a clock step may shift."""
_POLL_S = 0.005


class Processes(Protocol):
    """Processes as sweeper and watchdog need them; a simulation has its own."""

    def is_local(self, owner: Owner) -> bool:
        """Whether that process can be seen, and ended, from here."""
        ...

    def is_running(self, owner: Owner) -> bool:
        """False only when it is known to be gone."""
        ...

    def kill(self, owner: Owner) -> bool:
        """End it; True when it is gone."""
        ...


class SystemProcesses:
    """The real ones."""

    def is_local(self, owner: Owner) -> bool:
        """See `is_local`."""
        return is_local(owner)

    def is_running(self, owner: Owner) -> bool:
        """See `is_running`."""
        return is_running(owner)

    def kill(self, owner: Owner) -> bool:
        """See `kill`."""
        return kill(owner)


@functools.cache
def host() -> str:
    """Name of this host; inside a container with its pid namespace, since pids mean nothing outside of it."""
    name = socket.gethostname()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return name
    return name if namespace == _INITIAL_PID_NAMESPACE else f"{name}/{namespace}"


@functools.cache
def boot_id() -> str:
    """Differs after every start of this machine."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        if answer:
            return answer
    return "unknown"


def current_owner() -> Owner:
    """The calling process. Not cached: a fork is another process."""
    pid = os.getpid()
    return Owner(pid=pid, started=_started(pid) or 0.0, boot_id=boot_id(), host=host())


def is_local(owner: Owner) -> bool:
    """Whether the owner ran on this host (in whatever boot), so that its pid can be judged here."""
    return owner.host == host()


def is_running(owner: Owner) -> bool:
    """False only when that very process is known to be gone: exited, a zombie, its pid reused, the host rebooted.

    A process of another host cannot be judged from here and counts as running: its renewals tell.
    """
    if not is_local(owner):
        return True
    if owner.boot_id != boot_id():
        return False
    started = _started(owner.pid)
    return started is not None and (started == 0.0 or abs(started - owner.started) <= _START_TOLERANCE_S)


def kill(owner: Owner, wait_s: float = 5.0) -> bool:
    """SIGKILL exactly that process and wait at most `wait_s` seconds; works on a stopped one too.

    Returns:
        True when it is gone (also when it was before); False when it is this process, on another host, not ours
        to signal, or did not go in time.
    """
    if not is_running(owner):
        return True
    if not is_local(owner) or owner.pid == os.getpid():
        return False
    try:
        if not _signal_exactly(owner):
            return True
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    end = time.monotonic() + wait_s
    while is_running(owner):
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_S)
    return True


def _signal_exactly(owner: Owner) -> bool:
    """SIGKILL, or False when the pid has meanwhile become somebody else's."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        try:
            descriptor = os.pidfd_open(owner.pid)
        except ProcessLookupError:
            return False
        except OSError:  # a kernel or seccomp profile without pidfd: the plain way, below
            pass
        else:
            try:
                # Checked after the descriptor pins the process: from here on the pid cannot be reused under us.
                if not is_running(owner):
                    return False
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
            finally:
                os.close(descriptor)
    if not is_running(owner):
        return False
    os.kill(owner.pid, signal.SIGKILL)
    return True


def _started(pid: int) -> float | None:
    """When a running process started; None when there is none (a zombie is none), 0.0 when it may not be seen."""
    if pid <= 0:
        return None
    return _started_linux(pid) if _LINUX else _started_psutil(pid)


def _started_linux(pid: int) -> float | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        state, ticks = fields[0], int(fields[19])
        if state in b"ZX":
            # A leader may be a zombie while a thread of it still finishes a system call.
            if len(os.listdir(f"/proc/{pid}/task")) <= 1:
                return None
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return _hidden(pid)
    except (OSError, IndexError, ValueError):
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK")


def _hidden(pid: int) -> float | None:
    """/proc may hide other users' processes (hidepid): not seen is not gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0.0
    return None  # gone and reused in between, or reaped just now: not the process we were asked about


def _started_psutil(pid: int) -> float | None:
    import psutil  # lazily: Linux does not need it

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    except psutil.AccessDenied:
        return 0.0
