"""Burns CPU or holds memory inside a container, in the container's own cgroup. Sent to it over an exec stream.

    python3 -c BOOT LENGTHS MLCHAOS_LEASE=ID hold ORDER       holds until standard input ends or falls silent, or the deadline
    python3 -c BOOT LENGTHS - look|end ORDER                  reads what is there | ends all of a lease; one JSON object

A holder first says `armed` and does nothing before it is told `go`: who takes the lease away meanwhile finds it by its
marker and ends it, so that a word that comes late meets nobody. Every process has a deadline of its own in the kernel.

Memory is held in a memfd, not in the process: it counts for the cgroup, but for no process, so that the kernel, when the
limit is reached, does not choose the holder but the service, as it would if the service itself had grown.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import time

MARKER = "MLCHAOS_LEASE="
SLICE_S = 0.1
FILL_S = 1.0
"""Memory grows over a second, as a leak that somebody could watch."""
LAST_S = 1.0
"""How long after its deadline the kernel ends a process that cannot end itself."""
END_S = 3.0
BLOCK = 1024 * 1024
FIRST_TO_GO = 1000
"""Highest `oom_score_adj`: the kernel takes this process before all others of the cgroup."""
CGROUP = "/sys/fs/cgroup"


def say(**words: object) -> None:
    """One JSON line."""
    os.write(1, (json.dumps(words) + "\n").encode())


# -- reading ------------------------------------------------------------------------------------------------------------


def content(path: str) -> str:
    """Of a small file; empty when it cannot be read."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def marked(lease: str, proc: str = "/proc") -> list:
    """Pids of the living processes of a lease."""
    found = []
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                with open(f"{proc}/{name}/cmdline", "rb") as file:  # empty of a zombie
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if (MARKER + lease).encode() in words:
                found.append(int(name))
    return sorted(found)


def stat_of(pid: int | str, proc: str = "/proc") -> list:
    """Fields of `/proc/PID/stat` from the state on (3rd field first); empty: it is gone."""
    return content(f"{proc}/{pid}/stat").rpartition(")")[2].split()


def cpu_s(pid: int) -> float:
    """CPU time of a process, seconds."""
    exact = content(f"/proc/{pid}/schedstat").split()  # nanoseconds; `stat` counts hundredths of a second
    if exact:
        return int(exact[0]) / 1e9
    fields = stat_of(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def main_process() -> int:
    """Pid of the container's main process: 1, but where the pod's containers share their pids."""
    own = content("/proc/self/cgroup")
    if content("/proc/1/cgroup") == own:
        return 1
    mine = [n for n in os.listdir("/proc") if n.isdigit() and content(f"/proc/{n}/cgroup") == own]
    outside = [(int(f[19]), int(n)) for n in mine for f in [stat_of(n)] if f and f[1] == "0"]
    return min(outside)[1] if outside else 1


def largest(but: list) -> int:
    """Bytes of the biggest process of this container, other than ours."""
    own, found = content("/proc/self/cgroup"), [0]
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in but and content(f"/proc/{name}/cgroup") == own:
            found.append(resident(int(name)))
    return max(found)


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    words = content(f"/proc/{pid}/statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if words else 0


def held_by(pid: int) -> int:
    """Bytes in the memfds of a holder."""
    total = 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:mlchaos"):
                total += os.stat(path).st_blocks * 512
    except OSError:
        pass
    return total


def pairs(text: str) -> dict:
    """`name value` lines."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def integer(text: str) -> int | None:
    """A number, or None for anything else (`max`, -1, nothing)."""
    text = text.strip()
    return int(text) if text.isdigit() else None


def cgroup(root: str = CGROUP) -> dict:
    """What the container uses and may use; None where the kernel does not say.

    Keys: `version`; `cpu_s`, `cpu_limit` (cores), `throttled_s`; `memory`, `cache` (bytes that can be given back),
    `memory_limit`, `oom_kills`, `oom_group`.
    """
    if os.path.exists(root + "/cgroup.controllers"):
        cpu, events = pairs(content(root + "/cpu.stat")), pairs(content(root + "/memory.events"))
        quota = (content(root + "/cpu.max").split() + ["max", "100000"])[:2]
        return {
            "version": 2,
            "cpu_s": cpu["usage_usec"] / 1e6 if "usage_usec" in cpu else None,
            "cpu_limit": int(quota[0]) / int(quota[1]) if quota[0].isdigit() else None,
            "throttled_s": cpu.get("throttled_usec", 0) / 1e6,
            "memory": integer(content(root + "/memory.current")),
            "cache": pairs(content(root + "/memory.stat")).get("inactive_file", 0),
            "memory_limit": integer(content(root + "/memory.max")),
            "oom_kills": events.get("oom_kill"),
            "oom_group": content(root + "/memory.oom.group").strip() == "1",
        }
    used = integer(content(root + "/cpuacct/cpuacct.usage") or content(root + "/cpu,cpuacct/cpuacct.usage"))
    cpu = root + ("/cpu/" if os.path.exists(root + "/cpu/cpu.cfs_quota_us") else "/cpu,cpuacct/")
    quota, period = integer(content(cpu + "cpu.cfs_quota_us")), integer(content(cpu + "cpu.cfs_period_us"))
    limit = integer(content(root + "/memory/memory.limit_in_bytes"))
    return {
        "version": 1,
        "cpu_s": None if used is None else used / 1e9,
        "cpu_limit": quota / period if quota and period else None,
        "throttled_s": pairs(content(cpu + "cpu.stat")).get("throttled_time", 0) / 1e9,
        "memory": integer(content(root + "/memory/memory.usage_in_bytes")),
        "cache": pairs(content(root + "/memory/memory.stat")).get("total_inactive_file", 0),
        "memory_limit": None if limit is None or limit >= 1 << 60 else limit,
        "oom_kills": pairs(content(root + "/memory/memory.oom_control")).get("oom_kill"),
        "oom_group": False,
    }


def look(order: dict) -> dict:
    """What of a lease is there, over `interval` seconds (0: a single reading)."""
    lease, interval = str(order["lease"]), float(order.get("interval", 0))
    pids = marked(lease)
    before, group, at = {pid: cpu_s(pid) for pid in pids}, cgroup(), time.monotonic()
    if interval and pids:
        time.sleep(interval)
    now, took = cgroup(), time.monotonic() - at
    pids = marked(lease) if interval else pids
    burnt = {pid: cpu_s(pid) - before.get(pid, 0.0) for pid in pids}
    main = main_process()
    adj = integer_or_sign(content(f"/proc/{main}/oom_score_adj"))
    return {
        "pids": pids,
        "burners": [pid for pid in pids if (stat_of(pid) + ["", "0"])[1] in map(str, pids)],
        "interval_s": took,
        "burnt_cores": sum(burnt.values()) / took if interval and took > 0 else 0.0,
        "used_cores": rate(group["cpu_s"], now["cpu_s"], took) if interval else None,
        "throttled": rate(group["throttled_s"], now["throttled_s"], took) if interval else None,
        "held": sum(held_by(pid) for pid in pids),
        "cgroup": now,
        "main": {"pid": main, "adj": adj, "resident": resident(main)},
        "largest": largest([*pids, os.getpid()]),
        "own": resident(os.getpid()),
        "cpus": os.cpu_count() or 1,
        "busy": os.getloadavg()[0],
        "python": list(sys.version_info[:2]),
    }


def integer_or_sign(text: str) -> int | None:
    """As `integer`, of a number that may be negative."""
    try:
        return int(text)
    except ValueError:
        return None


def rate(before: float | None, after: float | None, seconds: float) -> float | None:
    """Per second; None where one was not to be read."""
    return None if before is None or after is None or seconds <= 0 else (after - before) / seconds


# -- ending -------------------------------------------------------------------------------------------------------------


def end(order: dict) -> dict:
    """SIGKILL for every process of a lease, until none is left; the main process is as likely a victim as it was."""
    lease, until = str(order["lease"]), time.monotonic() + END_S
    ended = 0
    pids = marked(lease)
    while pids and time.monotonic() < until:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                ended += 1
            except OSError:
                pass  # gone in between
        time.sleep(0.02)
        pids = marked(lease)
    calm(order.get("adj"))
    return dict(look({"lease": lease}), ended=ended)


def calm(adj: int | None) -> None:
    """Give the main process its `oom_score_adj` back, where it is ours."""
    path = f"/proc/{main_process()}/oom_score_adj"
    if adj is not None and adj != FIRST_TO_GO and integer_or_sign(content(path)) == FIRST_TO_GO:
        set_adj(path, adj)


def set_adj(path: str, adj: int) -> bool:
    """False: not allowed."""
    try:
        with open(path, "w") as file:
            file.write(str(adj))
        return True
    except OSError:
        return False


# -- holding ------------------------------------------------------------------------------------------------------------


class Line:
    """Standard input: who holds the other end lives as long as it speaks."""

    def __init__(self, seconds: float, silence_s: float, descriptor: int = 0) -> None:
        self.deadline = time.monotonic() + seconds
        self.silence_s, self.descriptor = silence_s, descriptor
        self.heard, self.said = time.monotonic(), b""

    def held(self, seconds: float) -> bool:
        """Wait so long. False: it is over."""
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            last = min(self.deadline, self.heard + self.silence_s)
            if now >= last:
                return False
            if select.select([self.descriptor], [], [], max(0.0, min(end, last) - now))[0]:
                words = os.read(self.descriptor, 4096)
                if not words:
                    return False
                self.said, self.heard = self.said + words, time.monotonic()
            if time.monotonic() >= end:
                return True

    def told(self, word: bytes) -> bool:
        """Wait for a word. False: it did not come."""
        while word not in self.said:
            if not self.held(0.05):
                return False
        return True


def alarm(seconds: float) -> None:
    """The kernel ends this process then, whatever it does."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))


def hold(order: dict) -> None:
    """Until the line or the deadline ends it."""
    seconds = float(order["seconds"])
    alarm(seconds + LAST_S)
    line = Line(seconds, float(order["silence"]))
    say(state="armed", pid=os.getpid())
    if line.told(b"go\n"):
        if "bytes" in order:
            hold_memory(int(order["bytes"]), order.get("adj"), line)
        else:
            hold_cpu(shares(float(order["cores"]), float(order["load"])), line)


def shares(cores: float, load: float) -> list:
    """How busy each burner is: one a core, a fraction of a core is one that rests in between."""
    return [min(1.0, cores - number) * load for number in range(math.ceil(cores))]


def hold_cpu(loads: list, line: Line) -> None:
    """One process a share."""
    supervisor, burners = os.getpid(), []
    try:
        for load in loads:
            pid = os.fork()
            if not pid:
                try:
                    burn(load, line.deadline, supervisor)
                finally:
                    os._exit(0)
            burners.append(pid)
        say(state="holding", pids=burners)
        while line.held(0.2):
            pass
    finally:
        for pid in burners:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass


def burn(load: float, deadline: float, supervisor: int) -> None:
    """Be busy for `load` of each tenth of a second, as long as the supervisor lives."""
    alarm(deadline + LAST_S - time.monotonic())
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # an open stream would keep the exec session
        os.dup2(nowhere, descriptor)
    while os.getppid() == supervisor:
        begun = time.monotonic()
        if begun >= deadline:
            return
        used = time.process_time()  # by its own CPU time: on a busy node it takes longer, and burns no less
        while time.process_time() < used + load * SLICE_S and time.monotonic() < begun + SLICE_S:
            for _ in range(2000):
                pass
        if load < 1.0:
            time.sleep(max(0.0, begun + SLICE_S - time.monotonic()))


def hold_memory(size: int, adj: int | None, line: Line) -> None:
    """Take `size` bytes over a second. Where they do not fit, the main process is the first to go."""
    group = cgroup()
    beyond = (
        group["memory_limit"] is not None and size > group["memory_limit"] - (group["memory"] or 0) + group["cache"]
    )
    chosen = beyond and set_adj(f"/proc/{main_process()}/oom_score_adj", FIRST_TO_GO)
    try:
        memory = os.memfd_create("mlchaos")
        say(state="filling", beyond=beyond, chosen=chosen)
        begun, held = time.monotonic(), 0
        while held < size:
            step = min(BLOCK, size - held)
            os.posix_fallocate(memory, held, step)  # by the kernel itself: no page of it is ever in this process
            held += step
            if not line.held(max(0.0, begun + FILL_S * held / size - time.monotonic())):
                return
        say(state="holding", bytes=held)
        while line.held(0.2):
            pass
    except OSError as e:
        say(state="failed", error=str(e))
    finally:
        calm(adj)


def main(arguments: list) -> None:
    """`[LENGTHS, MARKER, VERB, ORDER]`."""
    verb, order = arguments[2], json.loads(arguments[3])
    if verb == "hold":
        hold(order)
    else:
        say(**{"look": look, "end": end}[verb](order))


if __name__ == "__main__":
    main(sys.argv[1:])
