"""Looks at what somebody else's chaos tool does in this pod, and takes it away where that tool cannot.

    python3 -c SOURCE 0 MLCHAOS_LEASE=ID watch ORDER      the container's main process: stays, and says at its end what it saw
    python3 -c BOOT LENGTHS - look|mend ORDER             one JSON object (sent over an exec stream)

An order says what is meant: `chains` and `sets` (of a network fault, by name), `queues` (whether traffic control is
looked at), `probes` (`tcp:ADDRESS:PORT`, `dns:ADDRESS`; `dns:` the pod's own name server), `stress` (whether stressors
are looked for, for which the container shares the target's processes), `interval` in seconds over which CPU is counted,
`last` (the lease's id: the main process ends a while after this look).

Needs CAP_NET_ADMIN and CAP_NET_RAW (the kernel tells names of ipsets over a raw socket) for the network, CAP_KILL for
stressors; nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

MARKER = "MLCHAOS_LEASE="
LAST_WORDS = "/dev/termination-log"
QUESTION = b"ML\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x0akubernetes\x07default\x03svc\0\x00\x01\x00\x01"
"""A DNS query for kubernetes.default.svc."""
STRESSORS = ("stress-ng", "memStress")
SHAPERS = ("netem", "tbf")
PROBE_S = 1.0
END_S = 2.0
LINGER_S = 15.0
"""It still answers for this long after it was told, so that the proof needs no other container."""


def say(**words: object) -> None:
    """One JSON line."""
    os.write(1, (json.dumps(words) + "\n").encode())


def content(path: str) -> str:
    """Of a small file; empty when it cannot be read."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def run(command: list) -> str:
    """What it says. Raises RuntimeError: it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout


# -- network ------------------------------------------------------------------------------------------------------------


def tables() -> list:
    """Commands of iptables that this image has; the tool may have used either kind."""
    return [t for t in ("iptables", "iptables-legacy", "ip6tables") if shutil.which(t + "-save")]


def rules_of(saved: str, chains: list, sets: str) -> list:
    """The rules in effect of those chains (or with those ipsets) in what `iptables-save -c` shows: those that are reached.

    A chain to which nothing jumps is left by Chaos Mesh when it recovers; it does nothing.
    """
    found, jumps = [], {}
    for line in saved.splitlines():
        rule = line.partition("] ")[2] if line.startswith("[") else line
        words = rule.split()
        if len(words) > 1 and words[0] == "-A":
            where, target = words[1], words[words.index("-j") + 1] if "-j" in words else ""
            jumps.setdefault(target, set()).add(where)
            if where in chains or (sets and f"--match-set {sets}" in rule):
                found.append((where, line))
    reached = {"INPUT", "OUTPUT", "FORWARD"}
    more = True
    while more:
        fresh = {target for target, wheres in jumps.items() if wheres & reached} - reached
        reached |= fresh
        more = bool(fresh)
    return [line for where, line in found if where in reached]


def network(order: dict) -> dict:
    """Rules and queues of the fault that are in effect."""
    rules = [
        rule
        for table in tables()
        for rule in rules_of(run([table + "-save", "-c"]), list(order["chains"]), str(order.get("sets", "")))
    ]
    shown = run(["tc", "-s", "qdisc", "show"]) if order.get("queues") and shutil.which("tc") else ""
    return {"rules": rules, "queues": queues_of(shown)}


def queues_of(shown: str) -> list:
    """Queues that hold back, lose or throttle, with their figures, in what `tc -s qdisc show` says."""
    found = []
    for block in shown.split("qdisc ")[1:]:
        if block.split()[0] in SHAPERS:
            found.append(" ".join(block.split()))
    return found


def probe(place: str) -> dict:
    """One try: whether it was answered, and after how many seconds."""
    kind, _, where = place.partition(":")
    began = time.monotonic()
    try:
        if kind == "dns":
            ask(where or (servers() or [""])[0])
        else:
            host, _, port = where.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
            except ConnectionRefusedError:
                pass  # an answer, too: it came all the way
        answered = True
    except (OSError, ValueError):
        answered = False
    return {"answered": answered, "took_s": round(time.monotonic() - began, 4)}


def ask(server: str) -> None:
    """One DNS query; any answer will do, also that there is no such name."""
    with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(PROBE_S)
        s.connect((server, 53))
        s.send(QUESTION)
        s.recv(4096)


def servers() -> list:
    """The pod's name servers."""
    words = (line.split() for line in content("/etc/resolv.conf").splitlines())
    return [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]


def probes(places: list) -> dict:
    """All at the same time."""
    found: dict = {}
    threads = [threading.Thread(target=lambda p=p: found.update({p: probe(p)}), daemon=True) for p in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_S + 1)
    return found


def clear(order: dict) -> None:
    """Take the fault's rules and queues out of effect. Raises RuntimeError."""
    for table in tables():
        for line in run([table + "-save"]).splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "-A" and "-j" in words:
                target = words[words.index("-j") + 1]
                if target in order["chains"] or f"--match-set {order.get('sets') or '-'}" in line:
                    run([table, "-w", "5", "-D", *words[1:]])
    for queue in network(dict(order))["queues"]:
        words = queue.split()
        run(["tc", "qdisc", "del", "dev", words[words.index("dev") + 1], "root"])


# -- stress -------------------------------------------------------------------------------------------------------------


def stat_of(pid: int) -> list:
    """Fields of `/proc/PID/stat` from the state on; empty: it is gone."""
    return content(f"/proc/{pid}/stat").rpartition(")")[2].split()


def stressors() -> list:
    """Pids of stressors that were put in from outside (their ancestor has no parent here), and is not what the container runs."""
    parents, names = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_of(int(name))) and fields[0] != "Z":
            parents[int(name)] = int(fields[1])
            names[int(name)] = content(f"/proc/{name}/comm").strip()

    def top(pid: int) -> int:
        while parents.get(pid, 0) in parents:
            pid = parents[pid]
        return pid

    return sorted(
        p for p, n in names.items() if n.startswith(STRESSORS) and top(p) != 1 and names[top(p)].startswith(STRESSORS)
    )


def cpu_s(pid: int) -> float:
    """CPU time of a process, seconds."""
    exact = content(f"/proc/{pid}/schedstat").split()
    return int(exact[0]) / 1e9 if exact else 0.0


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    words = content(f"/proc/{pid}/statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if words else 0


def stress(interval: float) -> dict:
    """What the stressors burn and hold."""
    before, at = {pid: cpu_s(pid) for pid in stressors()}, time.monotonic()
    if interval and before:
        time.sleep(interval)
    pids, took = stressors(), max(1e-6, time.monotonic() - at)
    burnt = sum(cpu_s(pid) - before[pid] for pid in pids if pid in before)
    return {"pids": pids, "burnt_cores": burnt / took if interval else 0.0, "held": sum(resident(p) for p in pids)}


def kill() -> None:
    """SIGKILL for every stressor, until none is left."""
    until = time.monotonic() + END_S
    while (pids := stressors()) and time.monotonic() < until:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # gone in between
        time.sleep(0.05)


# -- verbs --------------------------------------------------------------------------------------------------------------


def look(order: dict) -> dict:
    """What is there."""
    seen: dict = {}
    if order.get("chains"):
        seen.update(network(order))
    if order.get("stress"):
        seen["stress"] = stress(float(order.get("interval", 0.0)))
    if order.get("probes"):
        seen["probes"] = probes(list(order["probes"]))
    if order.get("last"):
        leave(str(order["last"]))
    return seen


def mend(order: dict) -> dict:
    """Take it away, and look again."""
    if order.get("chains"):
        clear(order)
    if order.get("stress"):
        kill()
    return look(dict(order, probes=[], interval=0.0))


def leave(lease: str) -> None:
    """Tell the main process that nothing more is to be looked at."""
    for name in os.listdir("/proc"):
        words = content(f"/proc/{name}/cmdline").split("\0") if name.isdigit() else []
        if MARKER + lease in words and "watch" in words:
            os.kill(int(name), signal.SIGUSR1)


def watch(order: dict) -> int:
    """Until told, or the time is over; the last look stays in the container's status."""
    until = [time.monotonic() + float(order["seconds"])]
    over = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: until.append(time.monotonic() + LINGER_S))
    for number in (signal.SIGTERM, signal.SIGINT):  # the pod goes: at once
        signal.signal(number, lambda *_: over.set())
    while not over.is_set() and time.monotonic() < min(until):
        over.wait(min(1.0, max(0.0, min(until) - time.monotonic())))
    words: dict = {"why": "told to end" if len(until) > 1 or over.is_set() else "its time was over", "rules": -1}
    try:
        seen = look(dict(order, probes=[], interval=0.0))
        left = [*seen.get("rules", ()), *seen.get("queues", ()), *seen.get("stress", {}).get("pids", ())]
        words.update(rules=len(left), left=[str(one) for one in left[:5]])
    except Exception as e:  # noqa: BLE001  unknown is never clean, and the words must be left
        words["error"] = str(e)
    try:
        with open(LAST_WORDS, "w") as file:
            json.dump(words, file)
    except OSError:
        pass  # not in a container
    return 0 if words["rules"] == 0 else 1


def main(arguments: list) -> int:
    """`[LENGTHS, MARKER, VERB, ORDER]`."""
    verb, order = arguments[2], json.loads(arguments[3])
    if verb == "watch":
        return watch(order)
    try:
        say(**{"look": look, "mend": mend}[verb](order))
        return 0
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
        sys.stderr.write(f"{e}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
