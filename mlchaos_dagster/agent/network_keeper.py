"""The life of one network fault inside a pod: starting → prepared → on → over, and its end in every case.

Until it is told to prepare it changes nothing: an agent that was withdrawn before it started leaves no trace. It ends
at its deadline, on `stop`, on SIGTERM, when the process that holds the packets dies, and, if this process itself dies or
stands still, by the kernel's own switch (network_rules.py).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mlchaos_dagster.agent import network_rules as rules
from mlchaos_dagster.agent.network_client import address
from mlchaos_dagster.agent.network_plan import LATENCY, Plan
from mlchaos_dagster.agent.network_probe import Prober, effect
from mlchaos_dagster.agent.network_queue import Delayer, Queue, Wander

PREPARED_S = 30.0
"""Without the next word (`prepare`, then `go`) for this long the agent gives up: who started it is gone."""
LINGER_S = 15.0
"""It still answers for this long after its fault is over, so that the proof needs no container of its own."""
_RENEW_S = 1.0
_LAST_WORDS = Path("/dev/termination-log")
"""Where Kubernetes reads what an ended container has to say."""


def last_words(**said: Any) -> None:
    """Leave the result in the container's status, where it can be read after the end."""
    try:
        _LAST_WORDS.write_text(json.dumps(said))
    except OSError:
        pass  # not in a container


class Holder:
    """The process that holds packets: a fork, so that nothing else delays it."""

    def __init__(self, plan: Plan) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            # Only its control socket: who asked the agent to prepare waits for the end of the answer on another one.
            os.closerange(3, theirs.fileno())
            os.closerange(theirs.fileno() + 1, 1024)
            os._exit(_hold(plan, theirs))
        theirs.close()
        self.control = ours
        self.control.settimeout(2.0)
        said = self._line()
        if said != "bound":
            raise rules.RulesError(said or "the process that holds packets ended at once")

    def figures(self) -> dict[str, float]:
        """Packets so far, held now, mean delay and largest lateness in seconds; empty when it does not answer."""
        try:
            self.control.send(b"s")
            packets, held, mean, late = self._line().split()
        except (OSError, ValueError):
            return {}
        return {"packets": int(packets), "held": int(held), "mean_held_s": float(mean), "late_s": float(late)}

    def end(self) -> None:
        """What it holds passes, then it ends."""
        self.control.close()
        os.waitpid(self.pid, 0)

    def _line(self) -> str:
        said = b""
        while not said.endswith(b"\n"):
            chunk = self.control.recv(256)
            if not chunk:
                break
            said += chunk
        return said.decode().strip()


def _hold(plan: Plan, control: socket.socket) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # its end is its control socket's: never before the rules are gone
    try:
        queue = Queue(rules.queue_number(plan.lease))
    except OSError as e:
        control.send(f"packets cannot be held: {e.strerror}\n".encode())
        return 1
    control.send(b"bound\n")
    Delayer(queue, Wander(plan.latency_s, plan.jitter_s).at).run(control)
    return 0


class Keeper:
    """One plan, kept until its end."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.phase, self.why = plan, "starting", ""
        self.until = 0.0
        """Monotonic time at which the phase ends."""
        self.lapses = 0
        """Renewals that came too late: the kernel had let go meanwhile."""
        self.figures: dict[str, float] = {}
        self.holder: Holder | None = None
        self.prober = Prober(plan, self._enough)
        self._renewed = 0.0
        self._touched = False
        """Whether the kernel may hold anything of this plan."""
        self._selector = selectors.DefaultSelector()

    # -- phases -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything in place, nothing in effect. Raises RulesError."""
        if self.phase != "starting":
            return
        self._touched = not self.plan.only_look
        if self._touched:
            rules.remove(self.plan.lease, self.plan.families)
            if self.plan.kind == LATENCY:
                self.holder = Holder(self.plan)
                self._selector.register(self.holder.control, selectors.EVENT_READ, self._holder_spoke)
            rules.install(self.plan)
        self.prober.look_before()
        self.phase, self.until = "prepared", time.monotonic() + PREPARED_S

    def go(self) -> None:
        """The fault begins. Raises RulesError: it is not prepared, or over."""
        if self.phase == "on":
            return
        if self.phase != "prepared":
            raise rules.RulesError(f"lease {self.plan.lease} is {self.phase}: {self.why}")
        self._renew()
        self.lapses = 0
        self.phase, self.until = "on", time.monotonic() + self.plan.duration_s
        self.prober.start()

    def end(self, why: str) -> None:
        """The effect first, then the rules, then what is held. Idempotent. Raises RulesError: rules are left."""
        self.prober.stop()
        try:
            if self._touched:
                rules.remove(self.plan.lease, self.plan.families)
        finally:
            if self.holder is not None:
                self.figures = self.holder.figures()
                self._selector.unregister(self.holder.control)
                self.holder.end()
                self.holder = None
        if self.phase != "over":
            self.phase, self.why, self.until = "over", why, time.monotonic() + LINGER_S

    # -- words ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What is there now, read from the kernel."""
        found = [] if self.plan.only_look else rules.read(self.plan.lease, self.plan.families)
        figures = self.holder.figures() if self.holder else self.figures
        on = self.phase == "on"
        seen, lines = False, [""]
        if on:
            during = self.prober.seen()
            seen, lines = effect(self.plan, self.prober.before, during, found, figures.get("mean_held_s", 0.0))
        return {
            "lease": self.plan.lease,
            "phase": self.phase,
            "why": self.why,
            "left_s": round(max(0.0, self.until - time.monotonic()), 1),
            "rules": [f"{r.packets} × {r.rule}" for r in found],
            "effective": seen,
            "seen": [line for line in lines if line],
            "lapses": self.lapses,
            "packets": figures,
        }

    def answer(self, word: str) -> dict[str, Any]:
        """To one request on the control socket."""
        try:
            if word == "prepare":
                self._prepare_or_end()
            elif word == "go":
                self.go()
            elif word == "stop":
                self.end("stopped")
            return self.status()
        except rules.RulesError as e:
            return {"lease": self.plan.lease, "phase": self.phase, "error": str(e)}

    def _prepare_or_end(self) -> None:
        try:
            self.prepare()
        except rules.RulesError as e:
            self.why = str(e)
            self._end_anyhow()  # half of it may be in place
            raise

    # -- loop -------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """From start to end; the exit status: 0 when the kernel holds nothing of the lease any more."""
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        door.bind(address(self.plan.lease))
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signals: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: signals.append(n))
        try:
            door.listen(8)
            self.until = time.monotonic() + PREPARED_S
            self._selector.register(door, selectors.EVENT_READ, lambda: self._serve(door))
            self._selector.register(woken, selectors.EVENT_READ, lambda: woken.recv(64))
            while not signals and not (self.phase == "over" and time.monotonic() >= self.until):
                self._tick()
                for key, _ in self._selector.select(max(0.0, min(self._next() - time.monotonic(), 3600.0))):
                    key.data()
            if self.phase != "over":
                self.end(f"signal {signals[0]}" if signals else "ended")
        except rules.RulesError as e:
            self.why = str(e)
            sys.stderr.write(f"mlchaos: {e}\n")
        finally:
            if self.phase != "over":
                self._end_anyhow()
        return self._farewell()

    def _next(self) -> float:
        return min(self.until, self._renewed + _RENEW_S) if self.phase == "on" else self.until

    def _tick(self) -> None:
        now = time.monotonic()
        if self.phase in ("starting", "prepared") and now >= self.until:
            self.end(f"nobody said {'go' if self.phase == 'prepared' else 'prepare'} within {PREPARED_S:g} s")
        elif self.phase == "on" and now >= self.until:
            self.end("its deadline came")
        elif self.phase == "on" and now - self._renewed >= _RENEW_S:
            self._renew()

    def _renew(self) -> None:
        if not self.plan.only_look:
            if time.monotonic() - self._renewed > rules.HOLD_S:
                self.lapses += 1
            rules.renew(self.plan.lease, self.plan.families)
        self._renewed = time.monotonic()

    def _holder_spoke(self) -> None:
        """Nobody asked, so it is dead; the kernel lets packets pass already."""
        if self.holder is not None and not self.holder.figures():
            self.end("the process that held packets died")

    def _serve(self, door: socket.socket) -> None:
        visitor, _ = door.accept()
        with visitor:
            visitor.settimeout(1.0)
            try:
                word = visitor.recv(64).decode(errors="replace").strip()
                visitor.sendall(json.dumps(self.answer(word)).encode() + b"\n")
            except OSError:
                pass  # gone or slow: it asks again

    def _enough(self) -> bool:
        try:
            return rules.met(rules.read(self.plan.lease, self.plan.families), self.plan.lease)[1] > 0
        except rules.RulesError:
            return True

    def _end_anyhow(self) -> None:
        try:
            self.end(self.why or "it failed")
        except rules.RulesError as e:
            self.why = str(e)

    def _farewell(self) -> int:
        left, error = -1, ""
        try:
            left = 0 if self.plan.only_look else len(rules.read(self.plan.lease))
        except rules.RulesError as e:
            error = str(e)
        last_words(lease=self.plan.lease, why=self.why, rules=left, error=error)
        return 0 if left == 0 and not error else 1
