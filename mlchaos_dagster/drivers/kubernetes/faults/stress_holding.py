"""The streams that hold stress inside containers, as long as this process lives and speaks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import Agent, each, value
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.errors import DriverError, InjectFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import NAME, ExecStream, Site
from mlchaos_dagster.kube.refs import Ref

SILENCE_S = 20.0
"""A holder that hears nothing for so long ends: its other end is stopped, or cut off from the cluster."""
_BEAT_S = 3.0
_STARTS_S = 10.0
"""An API server that is cut off must not hold up the run; what starts after that is never told to go."""
_ARMED_S = 15.0
"""From the call to a Python that runs in a busy container."""


class Holding:
    """One lease's streams, one a target."""

    def __init__(self, streams: Mapping[Ref, ExecStream]) -> None:
        self.streams = dict(streams)
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="mlchaos-stress-beat", daemon=True)

    def keep(self) -> None:
        """Speak from now on."""
        self._beats.start()

    def close(self) -> None:
        """Let go: every holder reads the end of its input and ends what it holds."""
        self._over.set()
        if self._beats.is_alive():
            self._beats.join(2 * _BEAT_S)
        for stream in self.streams.values():
            with suppress(Exception):  # a broken connection has let go already
                stream.close()

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_S):
            for stream in self.streams.values():
                if stream.running and not self._over.is_set():
                    with suppress(Exception):  # broken: its holder has ended, which `active` sees in the container
                        stream.write("\n")
                        stream.read(0)


_HELD: dict[str, Holding] = {}
"""Lease id → what this process holds."""


def holds(lease_id: str) -> bool:
    """Whether this process made the fault, and has not taken it away."""
    return lease_id in _HELD


def let_go(lease_id: str) -> None:
    """End what this process holds for a lease, if anything."""
    if (holding := _HELD.pop(lease_id, None)) is not None:
        holding.close()


def hold(site: Site, lease: Lease, agent: Agent, orders: Mapping[Ref, tuple[str, dict[str, Any]]], step: Step) -> None:
    """Start a holder in every target's container (`orders`: container, order) and keep it until `let_go`.

    Raises:
        InjectFailed, LeaseRefused: see `_begun`.
    """
    holding = _begun(site, lease, agent, orders, step, _ARMED_S)
    _HELD[lease.id] = holding
    holding.keep()


def act(
    site: Site,
    lease: Lease,
    agent: Agent,
    orders: Mapping[Ref, tuple[str, dict[str, Any]]],
    step: Step,
    within_s: float,
) -> None:
    """The same for programs that do something and end. `within_s`: bound of what they prepare.

    Raises:
        InjectFailed, LeaseRefused: see `_begun`.
    """
    _begun(site, lease, agent, orders, step, within_s).close()


def _begun(
    site: Site,
    lease: Lease,
    agent: Agent,
    orders: Mapping[Ref, tuple[str, dict[str, Any]]],
    step: Step,
    within_s: float,
) -> Holding:
    """Start a program in every target's container.

    First all are armed, then the lease is looked at, then they are told to go. Who takes the lease away looks for armed
    ones, too: if it came before the look, the look fails; if after, there is nobody left to hear the word.

    Raises:
        InjectFailed: one did not start. On failure: all streams are closed, which ends whatever was begun.
        LeaseRefused: the lease is not held any more. Nothing was begun.
    """
    holding = Holding({})

    def start(ref: Ref) -> ExecStream:
        container, order = orders[ref]
        return agent.start(site, ref, container, lease.id, {**order, "silence": SILENCE_S})

    try:
        started = each(list(orders), start, step, _STARTS_S)
        holding.streams.update({ref: stream for ref, stream in started.items() if not isinstance(stream, DriverError)})
        for stream in started.values():
            value(stream)
        _hear(lease, holding.streams, "armed", step, within_s)
        leases.held(site, lease)
        for stream in holding.streams.values():
            stream.write("go\n")
        _hear(lease, holding.streams, "", step, _ARMED_S)
    except BaseException:  # also an interrupt: an armed program ends with its stream
        holding.close()
        raise
    return holding


def _hear(lease: Lease, streams: Mapping[Ref, ExecStream], wanted: str, step: Step, within_s: float) -> None:
    """Wait until every holder has said its next word: `wanted`, or any that is no failure."""
    end, heard = time.monotonic() + within_s, dict.fromkeys(streams, "")
    waiting = list(streams)
    while waiting:
        for ref in list(waiting):
            heard[ref] += streams[ref].read(0.05)
            said = _word(heard[ref])
            if said.get("state") == "failed" or (said and wanted and said.get("state") != wanted):
                raise _failed(lease, f"{ref.shown}: {said.get('error') or said}")
            if said:
                waiting.remove(ref)
            elif not streams[ref].running:
                raise _failed(lease, f"{ref.shown}: {_last_words(streams[ref])}")
        step(len(streams) - len(waiting), len(streams))
        if waiting and time.monotonic() >= end:
            raise _failed(lease, f"{waiting[0].shown}: the program did not start within {within_s:g} s")


def _word(heard: str) -> dict[str, Any]:
    """The first whole line that was heard; empty: none yet."""
    line, newline, _ = heard.partition("\n")
    return json.loads(line) if newline else {}


def _last_words(stream: ExecStream) -> str:
    try:
        ended = stream.finish(1.0)
    except DriverError as e:
        return str(e)
    return (ended.err.strip().splitlines() or [f"the program ended with {ended.code}"])[-1]


def _failed(lease: Lease, said: str) -> InjectFailed:
    return InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
