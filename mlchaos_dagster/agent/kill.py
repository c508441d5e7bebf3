"""Kill the main process of one container, from beside it in its process namespace.

    python3 kill.py CONTAINER_ID NOT_AFTER

The kernel shields the first process of a process namespace from signals that come from inside, SIGKILL included. It does
not shield it from the end of its tracer (`PTRACE_O_EXITKILL`, ptrace(2)): so we attach and leave. Needs CAP_SYS_PTRACE.

Exit status: 0 killed, 3 nothing was done; the reason is on standard error.
"""

import ctypes
import os
import signal
import sys
import time

SEIZE, EXITKILL = 0x4206, 0x00100000
"""`PTRACE_SEIZE` does not stop the process; Linux 3.8 and younger knows both."""


def main_process(container_id):
    """Pid of a container's first process: by its cgroup, which carries the id whatever the runtime; None: not seen."""
    parents = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cgroup") as groups:
                if container_id not in groups.read():
                    continue
            with open(f"/proc/{name}/stat") as stat:
                parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended just now
    tops = [pid for pid, parent in parents.items() if parent not in parents]
    return min(tops) if tops else None


def kill(pid):
    """SIGKILL, whatever the process is. Returns only when it was not allowed, with the reason."""
    if pid != 1:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError as e:
            return e.strerror
        os._exit(0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(SEIZE, pid, 0, EXITKILL) < 0:
        return os.strerror(ctypes.get_errno())
    os._exit(0)


def main(container_id, not_after):
    """Kill it now, or say why not."""
    if time.time() > float(not_after):
        return "too late: the fault is over"
    pid = main_process(container_id)
    if pid is None:
        return f"no process of container {container_id[:12]} is to be seen"
    return f"process {pid} cannot be killed: {kill(pid)}"


if __name__ == "__main__":
    sys.stderr.write(main(*sys.argv[1:]) + "\n")
    sys.exit(3)
