"""The kernel's part of a network fault: iptables chains of one lease in this network namespace.

    INPUT  ! -i lo, switch is fresh → MLCHAOS-<id>-i ┐
    OUTPUT ! -o lo, switch is fresh → MLCHAOS-<id>-o ┴ node: return · peers → MLCHAOS-<id>-a: drop, drop some, or queue

The switch is a dead man's: a list of the `recent` match with one entry, which the agent renews every second. HOLD_S
seconds after the last renewal the kernel stops jumping to the chains, whatever became of the agent; the rules left are
inert. It needs NET_ADMIN alone; an ipset with a timeout would need NET_RAW, too.

Latency and loss are made on what comes in: a packet that is held on its way out still counts against its sender's
socket and would throttle bulk transfers, and a dropped one is told to the sender of a datagram as "not permitted".
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlchaos_dagster.agent.network_plan import CUTS, DNS, LATENCY, LOSS, Plan, of_family, short_name

HOLD_S = 5
"""The kernel forgets a renewal after this long. 5 s: an agent that gets no CPU for a while does not lose the fault."""
_TOOLS = {4: "iptables", 6: "ip6tables"}
_EVERYBODY = {4: "0.0.0.0", 6: "::"}
_RECENT = Path("/proc/net/xt_recent")
_COUNTED = re.compile(r"\[(\d+):\d+\] (-A .*)")


class RulesError(Exception):
    """The kernel refused, or could not be asked. One line."""


@dataclass(frozen=True)
class Counted:
    """A rule as the kernel shows it."""

    packets: int
    rule: str


def base(lease: str) -> str:
    """What all chains of a lease begin with."""
    return f"MLCHAOS-{short_name(lease)}"


def switch(lease: str, family: int) -> str:
    """Name of the list that the agent renews."""
    return f"mlchaos-{short_name(lease)}-{family}"


def queue_number(lease: str) -> int:
    """Of the packet queue: hardly ever one that the pod uses itself."""
    return 20000 + sum(ord(c) * 31**i for i, c in enumerate(short_name(lease))) % 40000


def script(plan: Plan, family: int) -> str:
    """Everything of one IP version, for iptables-restore: all of it or nothing."""
    chain, cuts = base(plan.lease), plan.kind in CUTS
    sides = [("i", "INPUT", "-i", "-s")] + ([("o", "OUTPUT", "-o", "-d")] if cuts else [])
    lines = ["*filter", *(f":{chain}-{s[0]} - [0:0]" for s in sides), f":{chain}-a - [0:0]"]
    lines.append(f"-A {chain}-a {_action(plan)}")
    for letter, _, _, end in sides:
        lines += [f"-A {chain}-{letter} {end} {a} -j RETURN" for a in of_family(plan.spare, family)]
        peers = [f"{end} {a}" for a in of_family(plan.peers, family)] if plan.peers else [""]
        for peer in peers:
            for what in _ports(plan, letter):
                lines.append(" ".join(f"-A {chain}-{letter} {peer} {what} -j {chain}-a".split()))
    for letter, hook, interface, _ in sides:
        fresh = f"-m recent --name {switch(plan.lease, family)} --mask {_EVERYBODY[family]} --rcheck --seconds {HOLD_S}"
        lines.append(f"-I {hook} 1 ! {interface} lo {fresh} -m comment --comment {plan.lease} -j {chain}-{letter}")
    return "\n".join([*lines, "COMMIT", ""])


def _action(plan: Plan) -> str:
    if plan.kind == LATENCY:
        return f"-j NFQUEUE --queue-num {queue_number(plan.lease)} --queue-bypass"
    if plan.kind == LOSS:
        return f"-m statistic --mode random --probability {plan.fraction:.9f} -j DROP"
    return "-j DROP"


def _ports(plan: Plan, letter: str) -> list[str]:
    if plan.kind == DNS:
        return ["-p udp --sport 53", "-p tcp --sport 53"]
    if not plan.ports:
        return [""]
    side = ("--sports" if letter == "i" else "--dports") if plan.peers else "--ports"
    listed = ",".join(map(str, plan.ports))
    return [f"-p {protocol} -m multiport {side} {listed}" for protocol in ("tcp", "udp")]


def install(plan: Plan) -> None:
    """Put the rules in place, without effect until `renew`. Raises RulesError."""
    for family in plan.families:
        _run([f"{_TOOLS[family]}-restore", "--noflush", "-w", "5"], script(plan, family))


def renew(lease: str, families: tuple[int, ...]) -> None:
    """The fault is wanted for another HOLD_S seconds. Raises RulesError: the rules are gone."""
    for family in families:
        _switch(lease, family, f"+{_EVERYBODY[family]}")


def release(lease: str) -> None:
    """The effect ends now; the rules stay, inert."""
    for family in (4, 6):
        if (_RECENT / switch(lease, family)).exists():
            _switch(lease, family, "/")


def _switch(lease: str, family: int, word: str) -> None:
    try:
        (_RECENT / switch(lease, family)).write_text(word + "\n")
    except OSError as e:
        raise RulesError(f"the kernel's switch {switch(lease, family)} cannot be turned: {e.strerror}") from e


def remove(lease: str, families: Sequence[int] = ()) -> None:
    """Take away every rule and chain of the lease, whoever made them; of all IP versions unless told. Raises RulesError."""
    release(lease)
    for family in families or _families():
        undo = removal(_save(family), base(lease))
        if undo:
            _run([f"{_TOOLS[family]}-restore", "--noflush", "-w", "5"], undo)


def removal(saved: str, chain: str) -> str:
    """The script that takes away what `iptables-save` shows of a lease; empty: nothing is there."""
    jumps: list[str] = []
    chains: list[str] = []
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif table != "filter":
            continue
        elif line.startswith(f":{chain}-"):
            chains.append(line[1:].split()[0])
        elif line.startswith("-A ") and f"-j {chain}-" in line and not line.startswith(f"-A {chain}-"):
            jumps.append("-D " + line[3:])
    if not jumps and not chains:
        return ""
    flush = [f"-F {c}" for c in chains]
    return "\n".join(["*filter", *jumps, *flush, *(f"-X {c}" for c in chains), "COMMIT", ""])


def read(lease: str, families: Sequence[int] = ()) -> list[Counted]:
    """What the kernel holds of the lease now: its rules, with the packets that met them. Raises RulesError."""
    found: list[Counted] = []
    for family in families or _families():
        found += counted(_save(family, "-c"), base(lease))
    return found


def counted(saved: str, chain: str) -> list[Counted]:
    """The lease's rules in what `iptables-save -c` shows; a chain without a rule counts as one."""
    found: list[Counted] = []
    for line in saved.splitlines():
        rule = _COUNTED.match(line)
        if rule and f"{chain}-" in line:
            found.append(Counted(int(rule[1]), rule[2]))
        elif line.startswith(f":{chain}-") and not any(
            f"] -A {line[1:].split()[0]} " in other for other in saved.splitlines()
        ):
            found.append(Counted(0, line))
    return found


def met(rules: list[Counted], lease: str) -> tuple[int, int]:
    """(packets that came to the fault's action, packets that the action took)."""
    chain = base(lease)
    came = sum(r.packets for r in rules if r.rule.endswith(f"-j {chain}-a"))
    took = sum(r.packets for r in rules if r.rule.startswith(f"-A {chain}-a "))
    return came, took


def _families() -> list[int]:
    return [4, 6] if Path("/proc/net/if_inet6").exists() else [4]


def _save(family: int, *options: str) -> str:
    return _run([f"{_TOOLS[family]}-save", *options])


def _run(command: list[str], script: str = "") -> str:
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise RulesError(f"{command[0]}: {e}") from e
    if done.returncode:
        raise RulesError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout
