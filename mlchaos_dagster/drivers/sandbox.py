"""The sandbox backend: faults on real local processes and the links between them.

Owns the translation between the engine's verbs and the sandbox's control API, and the second look at the target: pids are
checked with the operating system, links by a request through them. It keeps nothing between calls.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.sandbox import api
from mlchaos_dagster.sandbox.faults import NETWORK_KINDS, POD_KINDS
from mlchaos_dagster.sandbox.handlers import HANDLERS
from mlchaos_dagster.sandbox.identity import burner_suffix, lives, processes_of

NAME = "sandbox"
_NETWORK = frozenset(NETWORK_KINDS)
_PODS = frozenset(POD_KINDS)
_STRESS = frozenset({"cpu_stress", "memory_stress"})
_SLOW = ("network_latency", "s3_slow")
_REFUSING = ("s3_unavailable", "database_unavailable")
_THROTTLED = 503
_TRIES = 20
"""Requests until one is throttled; a fraction of 30 % is missed by all of them once in a thousand looks."""
_SILENCE_S = 0.25
"""A link that says nothing for this long passes nothing; two orders above a healthy round trip (1–3 ms)."""
_ALIVE_S = 1.0
"""A link that is silent this long before the fault is down already; a busy machine may take its time."""
_DYING_S = 1.0
"""Children of a killed supervisor are gone within milliseconds; a busy machine may take longer."""


class SandboxDriver:
    """Driver for the sandbox in one directory. Every call is bounded to about four seconds."""

    name = NAME
    faults = _PODS | _NETWORK | frozenset(HANDLERS)
    self_limiting = faults
    """Deadlines are kept by the supervisor (processes) and by each proxy itself (links)."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def resolve(self, target: Target) -> tuple[str, ...]:
        """Names of processes or links that match one of the globs now, sorted.

        A glob with `->` in it picks links, any other picks processes (`trainer-*` is not `trainer->object-store`); `*`
        picks both.
        The proxies are the network, not a service: a glob does not pick them unless it starts with their name.

        Raises:
            DriverUnavailable: no sandbox answered.
        """
        status = self._status("resolve")
        names = [entry["name"] for entry in status["processes"]]
        if not target.select.startswith("proxy"):
            names = [name for name in names if not name.startswith("proxy")]
        globs = [glob.strip() for glob in target.select.split(",")]
        every = (*names, *status["links"])
        picked = {
            name
            for name in every
            for glob in globs
            if fnmatchcase(name, glob) and (glob == "*" or ("->" in glob) == ("->" in name))
        }
        return tuple(sorted(picked))

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target | None = None,
        backup: Path | None = None,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """Where the sandbox is, which processes stand for the targets, and how fast the links answer.

        What is broken already cannot be broken by a fault: every target must be alive now.

        Raises:
            DriverUnavailable: no sandbox answered, or a target is down already.
            DriverError: a target does not exist, or the fault does not fit it.
        """
        state = api.read_state(self.directory)
        if state is None or not api.is_alive(self.directory):
            raise DriverUnavailable(f"no sandbox is up in {self.directory}", driver=NAME, verb="undo")
        network = kind in _NETWORK
        found: dict[str, Any] = {
            "directory": str(self.directory.resolve()),
            "supervisor": {"pid": state["pid"], "create_time": state["create_time"]},
            "processes": {},
            "links": {},
        }
        if network:
            trips = _round_trips(self.directory, targets, _ALIVE_S)
            found["links"] = {link: trip.seconds for link, trip in trips.items() if trip.answered}
        else:
            if kind in HANDLERS:
                self._refuse_unfit(kind, targets)
            children = state["children"]
            alive = {name for name in targets if name in children and _lives(children[name])}
            found["processes"] = {name: children[name] for name in targets if name in alive}
        if down := [name for name in targets if name not in found["links"] and name not in found["processes"]]:
            # Only now, since it asks every process: the run is waiting for its fault.
            status = self._status("undo")
            there = list(status["links"]) if network else [entry["name"] for entry in status["processes"]]
            if unknown := [name for name in down if name not in there]:
                said = f"{kind} needs {'links' if network else 'processes'}; there is no such one: {', '.join(unknown)}"
                raise DriverError(said, driver=NAME, verb="undo")
            raise DriverUnavailable(
                f"{', '.join(down)} is down already: no fault of ours could be told from that", driver=NAME, verb="undo"
            )
        return found

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Put the fault on every target, one after the other, each with the lease's remaining time as its deadline.

        Raises:
            DriverUnavailable: no sandbox is up; nothing was touched.
            InjectFailed: refused (fenced, removed, impossible) or unanswered. On failure: earlier targets have the fault.
        """
        directory = self._directory(lease)
        if not api.is_alive(directory):
            raise DriverUnavailable(f"no sandbox is up in {directory}", driver=NAME, verb="inject", lease_id=lease.id)
        # An owner that was stopped between lease and inject gets no more than what is left.
        remaining_s = min(lease.duration_s, lease.deadline_wall - time.time())
        if remaining_s <= 0:
            raise InjectFailed("the lease's deadline has passed", driver=NAME, verb="inject", lease_id=lease.id)
        client = api.SandboxClient(directory)
        for number, target in enumerate(lease.targets):
            step(number, len(lease.targets))
            try:
                client.add_fault(
                    lease_id=lease.id,
                    token=lease.token,
                    kind=lease.kind,
                    target=target,
                    params=_params(lease),
                    deadline_s=remaining_s,
                )
            except api.SandboxError as error:
                raise InjectFailed(f"{target}: {error}", driver=NAME, verb="inject", lease_id=lease.id) from error

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Remove everything of the lease, and have the sandbox refuse it for ever.

        A sandbox that is dead holds no fault; the lease is then buried for whatever is started there later.

        Raises:
            RecoverFailed: the sandbox lives but did not confirm. On failure: the fault may be live until its deadline.
        """
        directory = self._directory(lease)
        try:
            api.SandboxClient(directory).remove_fault(lease.id)
            return
        except api.SandboxRefused as error:
            raise RecoverFailed(str(error), driver=NAME, verb="recover", lease_id=lease.id) from error
        except api.SandboxUnavailable as error:
            if left := self._wait_dead(directory):
                said = f"{error}; alive: {_people(left)}"
                raise RecoverFailed(said, driver=NAME, verb="recover", lease_id=lease.id) from error
        try:
            api.bury(directory, lease.id)
        except OSError as error:
            said = f"the lease could not be buried: {error}"
            raise RecoverFailed(said, driver=NAME, verb="recover", lease_id=lease.id) from error

    def active(self, lease: Lease) -> Evidence:
        """What the processes and links say now.

        ``effective`` needs every target's effect at this moment, and that it was not so before the lease: the process
        gone (for pod_failure: with none in its place), the link slower or more silent than it was. A link that does not
        exist (any more) has no fault.

        Raises:
            DriverUnavailable: something lives but does not answer.
        """
        directory = self._directory(lease)
        try:
            mine = [fault for fault in api.SandboxClient(directory).faults() if fault["lease_id"] == lease.id]
        except api.SandboxError as error:
            if left := self._wait_dead(directory):
                said = f"{error}; alive: {_people(left)}"
                raise DriverUnavailable(said, driver=NAME, verb="active", lease_id=lease.id) from error
            return Evidence(present=False, effective=False, lines=(_dead_line(lease, directory),))
        trips: dict[str, _Trip] = {}
        if lease.kind in _NETWORK:
            wanted = _THROTTLED if lease.kind == "s3_throttled" and mine else 0
            trips = _round_trips(directory, lease.targets, _patience(lease), wanted)
        children = (api.read_state(directory) or {}).get("children", {})
        lines = [line for fault in mine for line in fault["evidence"]]
        lines += [_trip_line(link, trip) for link, trip in trips.items()]
        seen = {
            fault["target"]
            for fault in mine
            if fault["effective"] and _confirmed(lease, fault["target"], trips.get(fault["target"]), children)
        }
        if not mine:
            lines.insert(0, f"supervisor and proxies have nothing of lease {lease.id}")
        burners = _burners(lease, directory)
        if lease.kind in _STRESS and not mine:
            lines.append(f"still there: {_people(burners)}" if burners else "no burner of it is among the processes")
            lines += _extra_replicas(directory)
        return Evidence(present=bool(mine or burners), effective=seen >= set(lease.targets), lines=tuple(lines))

    def _refuse_unfit(self, kind: str, targets: tuple[str, ...]) -> None:
        """Before anything is written: a kind may be meant for some processes only. Raises DriverError."""
        try:
            fit = api.SandboxClient(self.directory).fault_targets(kind)
        except api.SandboxError as error:
            raise DriverUnavailable(str(error), driver=NAME, verb="undo") from error
        if unfit := [name for name in targets if name not in fit]:
            said = f"{kind} cannot be put on {', '.join(unfit)}. Allowed: {', '.join(fit) or 'nothing that is up'}"
            raise DriverError(said, driver=NAME, verb="undo")

    def _status(self, verb: str) -> dict[str, Any]:
        try:
            status = api.status(self.directory)
        except api.SandboxError as error:
            raise DriverUnavailable(str(error), driver=NAME, verb=verb) from error
        if status is None:
            raise DriverUnavailable(f"no sandbox is up in {self.directory}", driver=NAME, verb=verb)
        return status

    def _directory(self, lease: Lease) -> Path:
        """The lease's own sandbox; a lease whose file was damaged has only ours."""
        return Path(lease.undo.get("directory") or self.directory)

    @staticmethod
    def _wait_dead(directory: Path) -> list[tuple[str, int]]:
        """Processes of a sandbox that did not answer which still live; waits a moment for those that are dying."""
        end = time.monotonic() + _DYING_S
        while (left := api.remains(directory)) and not api.is_alive(directory) and time.monotonic() < end:
            time.sleep(0.02)
        return left


def _params(lease: Lease) -> dict[str, Any]:
    """The fault's parameters in the sandbox's units."""
    given = {name: value for name, value in lease.params.items() if value is not None}
    if "latency_s" in given:
        return {"latency_ms": given["latency_s"] * 1000, "jitter_ms": given.get("jitter_s", 0.0) * 1000}
    if lease.kind == "pod_delete" and "signal" in given:
        given["signal"] = f"SIG{given['signal'].upper()}"
    return given


@dataclass(frozen=True)
class _Trip:
    """One request through a link."""

    seconds: float
    """How long the request took; of several, the last."""
    status: int | None
    """What was answered; None: nothing."""
    exists: bool = True

    @property
    def answered(self) -> bool:
        """A refusal that came through is an answer."""
        return self.status is not None


def _patience(lease: Lease) -> float:
    """How long to wait for an answer through a link with this fault."""
    return min(1.0, lease.params.get("latency_s", 0.0) * 1.5 + 0.1) if lease.kind in _SLOW else _SILENCE_S


def _round_trips(directory: Path, links: tuple[str, ...], timeout_s: float, wanted: int = 0) -> dict[str, _Trip]:
    """One request through each link, or a few until the `wanted` status comes back. All links at once: a partition is
    waited out only once.
    """
    client = api.SandboxClient(directory)
    known = (api.read_state(directory) or {}).get("link_ports", {})

    def measure(link: str) -> _Trip:
        if link not in known:
            return _Trip(0.0, None, exists=False)
        trip = _Trip(0.0, None)
        for _ in range(_TRIES if wanted else 1):
            began = time.perf_counter()
            try:
                status = client.link_status(link, timeout_s)
            except api.SandboxUnavailable:  # it went between two looks
                return _Trip(0.0, None, exists=False)
            trip = _Trip(time.perf_counter() - began, status)
            if status is None or status == wanted:
                break
        return trip

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(links, pool.map(measure, links), strict=True))


def _confirmed(lease: Lease, target: str, trip: _Trip | None, children: dict[str, Any]) -> bool:
    """Whether our own look at the target agrees with what the sandbox says of it, and it was different before."""
    if lease.kind not in _NETWORK | _PODS:
        return True  # the sandbox read it from the target a moment ago; there is no second place to look
    if lease.kind in _PODS:
        before = lease.undo.get("processes", {}).get(target)
        if before is None or _lives(before):
            return False
        # Held down is held down now: nobody has taken its place.
        return lease.kind != "pod_failure" or not (target in children and _lives(children[target]))
    if trip is None or target not in lease.undo.get("links", {}):
        return False
    # Silence is waited for; a refused or broken connection is told at once.
    silent = not trip.answered and trip.seconds >= 0.9 * _patience(lease)
    if lease.kind in _SLOW:
        least_s = 0.9 * (lease.params["latency_s"] - lease.params.get("jitter_s", 0.0))
        return silent or (trip.answered and trip.seconds >= least_s)
    if lease.kind == "network_partition":
        return silent
    if lease.kind in _REFUSING:
        return not trip.answered and not silent
    if lease.kind == "s3_throttled":
        return trip.status == _THROTTLED
    return True  # loss: one request may get through; the proxy's count of lost chunks is the evidence


def _lives(process: dict[str, Any]) -> bool:
    return lives(process["pid"], process["create_time"])


def _burners(lease: Lease, directory: Path) -> list[tuple[str, int]]:
    """Burners of the lease that the operating system knows, whatever the sandbox says: (name, pid)."""
    if lease.kind not in _STRESS:
        return []
    ours = burner_suffix(lease.id)
    found = processes_of(directory.resolve())
    return [(name, pid) for name, pid, _ in found if name.startswith("burner-") and name.endswith(ours)]


def _extra_replicas(directory: Path) -> list[str]:
    """What an autoscaler added for the fault and has not taken away yet: no fault, but good to know."""
    state = api.read_state(directory) or {}
    there = sum(name.startswith("inference-") for name in state.get("children", {}))
    wanted = state.get("config", {}).get("replicas", there)
    return [f"{there} replicas run, {wanted} are configured"] if there > wanted else []


def _trip_line(link: str, trip: _Trip) -> str:
    if not trip.exists:
        return f"there is no link {link}: no fault can be there"
    said = f"answers {trip.status} in {trip.seconds * 1000:.1f} ms" if trip.answered else "does not answer"
    return f"{link} {said} (GET /healthz through the link)"


def _dead_line(lease: Lease, directory: Path) -> str:
    pid = lease.undo.get("supervisor", {}).get("pid")
    who = f"supervisor pid {pid}" if pid else "the supervisor"
    return f"{who} is gone and no process of the sandbox in {directory} is left: no fault can be there"


def _people(processes: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} (pid {pid})" for name, pid in processes)
