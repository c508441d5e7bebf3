"""What a client in this pod sees of the fault: connections and name queries, timed, before and during."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlchaos_dagster.agent.network_plan import DNS, LATENCY, LOSS, Plan
from mlchaos_dagster.agent.network_rules import Counted, met

BEFORE_S = 1.0
"""Longest wait for an answer before the fault."""
_EVERY_S = 1.0
_LOSS_EVERY_S = 0.1
"""Until a first packet was lost: two or three packets come in for each connection."""
_LOST_ENOUGH = 1
_DNS_QUERY = (
    struct.pack("!HHHHHH", 0x4D4C, 0x0100, 1, 0, 0, 0) + b"\x0akubernetes\x07default\x03svc\0" + b"\0\x01\0\x01"
)
"""A question for kubernetes.default.svc.; any answer will do, also that there is no such name."""


@dataclass(frozen=True)
class Seen:
    """One try."""

    at: float
    """Monotonic time of its end."""
    answered: bool
    took_s: float


def attempt(probe: str, timeout_s: float) -> Seen:
    """Connect, or ask, and see how long the answer takes."""
    kind, _, place = probe.partition(":")
    start = time.monotonic()
    try:
        (_ask if kind == "dns" else _connect)(place, timeout_s)
        answered = True
    except OSError:
        answered = False
    end = time.monotonic()
    return Seen(end, answered, end - start)


def _connect(place: str, timeout_s: float) -> None:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except ConnectionRefusedError:
        pass  # an answer, too: it came all the way


def _ask(host: str, timeout_s: float) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(timeout_s)
        s.connect((host, 53))
        s.send(_DNS_QUERY)
        s.recv(4096)


class Prober:
    """Tries each place in turn, in a thread of its own, until it is stopped."""

    def __init__(self, plan: Plan, enough: Callable[[], bool]) -> None:
        self.plan, self.enough = plan, enough
        self.before: dict[str, Seen] = {}
        self.since: float | None = None
        self._last: dict[str, Seen] = {}
        self._tries: dict[str, float] = {}
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def look_before(self) -> None:
        """Every place, at the same time; little more than BEFORE_S at most."""

        def one(probe: str) -> None:
            end, seen = time.monotonic() + BEFORE_S, attempt(probe, BEFORE_S)
            # One slow answer of a busy node would hide the delay to come: the fastest of three is what it takes.
            for _ in range(2):
                left = end - time.monotonic()
                if self.plan.kind != LATENCY or not seen.answered or seen.took_s < _least(self.plan) / 4 or left <= 0:
                    break
                again = attempt(probe, left)
                if again.answered and again.took_s < seen.took_s:
                    seen = again
            self.before[probe] = seen

        threads = [threading.Thread(target=one, args=(p,), daemon=True) for p in self.plan.probes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BEFORE_S + 1)

    def start(self) -> None:
        """The fault is on from now."""
        self.since = time.monotonic()
        self._threads = [threading.Thread(target=self._run, args=(p,), daemon=True) for p in self.plan.probes]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more tries; the last ones run out by themselves."""
        self._end.set()

    def seen(self) -> dict[str, Seen]:
        """The last try of each place under the fault; one that waits for its answer counts where it waits longer."""
        now, found = time.monotonic(), dict(self._last)
        for probe, start in list(self._tries.items()):
            last = found.get(probe)
            if self._limit_s() <= now - start or (self.plan.kind == LATENCY and last is None):
                found[probe] = Seen(now, False, now - start)
        return found

    def _limit_s(self) -> float:
        return BEFORE_S + 2 * (self.plan.latency_s + self.plan.jitter_s)

    def _run(self, probe: str) -> None:
        while not self._end.is_set():
            self._tries[probe] = time.monotonic()
            seen = attempt(probe, self._limit_s())
            self._tries.pop(probe, None)
            self._last[probe] = seen
            self._end.wait(_LOSS_EVERY_S if self.plan.kind == LOSS and not self.enough() else _EVERY_S)


def effect(
    plan: Plan, before: dict[str, Seen], during: dict[str, Seen], rules: Iterable[Counted], mean_held_s: float
) -> tuple[bool, list[str]]:
    """Whether the fault's effect was seen, and by what. Pure.

    A place that did not answer before the fault proves nothing. Where there is no place to try, what the kernel did to
    the pod's own traffic is the proof.
    """
    came, took = met(list(rules), plan.lease)
    lines: list[str] = []
    hits = 0
    useful = [p for p in plan.probes if p in before and before[p].answered]
    for probe in useful:
        seen = during.get(probe)
        if seen is None:
            continue
        hit, said = _one(plan, probe, before[probe], seen)
        hits += hit
        lines.append(said)
    for probe in plan.probes:
        if probe not in useful:
            lines.append(f"{_place(probe)} did not answer before the fault either")
    if plan.kind == LOSS:
        share = f" ({took / came:.0%})" if came else ""
        lines.append(f"{took} of {came} packets that came in were lost{share}")
        return took > 0, lines
    if not plan.only_look and took:
        verb = "were held" if plan.kind == LATENCY else "were dropped"
        mean = f", for {mean_held_s * 1000:.0f} ms on average" if plan.kind == LATENCY and mean_held_s else ""
        lines.append(f"{took} packets {verb}{mean}")
    if useful:
        return hits == len(useful), lines
    if plan.kind == LATENCY:
        return mean_held_s >= _least(plan) > 0, lines
    return took > 0, lines


def _least(plan: Plan) -> float:
    """Delay that counts as the fault's: its lower end, and 10 % for what a clock does."""
    return 0.9 * max(plan.latency_s - plan.jitter_s, plan.latency_s / 10)


def _one(plan: Plan, probe: str, before: Seen, seen: Seen) -> tuple[bool, str]:
    was = f"({before.took_s * 1000:.0f} ms before the fault)"
    if plan.kind == LATENCY:
        slow = seen.took_s - before.took_s >= _least(plan)
        word = "answered after" if seen.answered else "has not answered for"
        return slow, f"{_place(probe)} {word} {seen.took_s * 1000:.0f} ms {was}"
    if seen.answered:
        return False, f"{_place(probe)} answered after {seen.took_s * 1000:.0f} ms {was}"
    kind = "no answer" if plan.kind == DNS or probe.startswith("dns") else "no connection"
    return True, f"{kind} from {_place(probe)} within {seen.took_s:.1f} s {was}"


def _place(probe: str) -> str:
    kind, _, place = probe.partition(":")
    return f"the name server {place}" if kind == "dns" else place
