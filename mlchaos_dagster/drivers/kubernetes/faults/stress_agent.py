"""Our programs inside a target's container: sent over an exec stream, since the target's image holds nothing of ours.

Knows containers and how to run `mlchaos_dagster.agent` in them; not what a fault is.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, MlChaosError
from mlchaos_dagster.kube.client import NAME, ApiRefused, ExecStream, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref

_R = TypeVar("_R")

PYTHON = (3, 8)
"""What the programs need: `memfd_create`."""
MARKER = "MLCHAOS_LEASE="
"""Before the lease's id among the arguments of whatever holds a fault; nothing else in a container says whose it is."""
_BOOT = (
    "import sys\ni=sys.stdin.buffer\n"
    "for n in sys.argv[1].split(','):exec(compile(i.read(int(n)),'mlchaos','exec'),globals())"
)
_AT_ONCE = 16
_STEP_S = 0.2
_ANSWER_S = 8.0
"""Bound of one question: under CPU stress at a limit of a tenth of a core, Python takes seconds to start."""
_NO_PYTHON = ("executable file not found", "no such file or directory", "permission denied")


class NoPython(DriverError):
    """The container has no python3 to run our programs with."""


class NotRunning(DriverError):
    """The container does not run now: no process of ours can be in it."""


@dataclass(frozen=True)
class Agent:
    """A program for containers: sources that are run one after the other in one namespace."""

    sources: tuple[str, ...]

    @classmethod
    def of(cls, *places: str) -> Agent:
        """From `package:file` names."""
        pairs = (place.split(":") for place in places)
        return cls(tuple((files(package) / name).read_text(encoding="utf-8") for package, name in pairs))

    def command(self, verb: str, order: Mapping[str, Any], marker: str = "-") -> list[str]:
        """What is to be run; the sources follow on standard input."""
        lengths = ",".join(str(len(source.encode())) for source in self.sources)
        # Isolated, without `site`, writing no bytecode: starts in a third of the time and leaves nothing.
        return ["python3", "-I", "-S", "-B", "-c", _BOOT, lengths, marker, verb, json.dumps(dict(order))]

    def ask(
        self, site: Site, ref: Ref, container: str, verb: str, order: Mapping[str, Any], timeout_s: float = _ANSWER_S
    ) -> dict[str, Any]:
        """Run a verb and read its one JSON object.

        Raises:
            NoPython: there is none, or it is too old.
            NotRunning: the container does not run now.
            DriverError: the program says no.
            DriverUnavailable: no answer.
        """
        command, where = self.command(verb, order), f"container {container} of {ref.shown}"
        try:
            done = site.cluster.exec(
                ref.namespace, ref.name, container, command, stdin="".join(self.sources), timeout_s=timeout_s
            )
        except (ApiRefused, DriverUnavailable) as e:
            if not is_running(site.cluster.get(ref.path), ref, container):
                raise NotRunning(f"{where} is not running", driver=NAME, verb="exec") from e
            raise DriverUnavailable(f"{where}: {e}", driver=NAME, verb="exec") from e
        if done.code == 0:
            return json.loads(done.out.splitlines()[-1])
        said = (done.err.strip().splitlines() or [f"it ended with {done.code}"])[-1]
        if done.code in (126, 127) or done.code < 0 and any(word in said for word in _NO_PYTHON):
            raise NoPython(f"{where} has no python3", driver=NAME, verb="exec")
        if "SyntaxError" in said:
            raise NoPython(f"{where} has a python3 before {PYTHON[0]}.{PYTHON[1]}", driver=NAME, verb="exec")
        if done.code < 0 or done.code > 127:  # not started, or killed: with its container, or by the OOM killer
            if not is_running(site.cluster.get(ref.path), ref, container):
                raise NotRunning(f"{where} is not running", driver=NAME, verb="exec")
            raise DriverUnavailable(f"{where}: {said}", driver=NAME, verb="exec")
        raise DriverError(f"{where}: {said}", driver=NAME, verb="exec")

    def start(self, site: Site, ref: Ref, container: str, lease_id: str, order: Mapping[str, Any]) -> ExecStream:
        """Begin a program that holds a fault as long as the stream is open."""
        command = self.command("hold", order, MARKER + lease_id)
        stream = site.cluster.open_exec(ref.namespace, ref.name, container, command, stdin=True)
        try:
            stream.write("".join(self.sources))
        except BaseException:  # also an interrupt: what nobody holds must not wait in the container
            stream.close()
            raise
        return stream


def permissions(refs: Sequence[Ref]) -> list[Permission]:
    """To read pods and to run commands in them. (Up to Kubernetes 1.34 a WebSocket asks for `get`, later for `create`.)"""
    spaces = sorted({ref.namespace for ref in refs if ref.namespace})
    verbs = (("get", "pods"), ("get", "pods/exec"), ("create", "pods/exec"))
    return [Permission(verb, resource, space) for space in spaces for verb, resource in verbs]


# -- containers ---------------------------------------------------------------------------------------------------------


def container_of(pod: Object | None, wanted: str) -> Object | None:
    """The spec of the container that is meant; None: the pod has no such."""
    found = items(pod, "spec", "containers")
    return next((c for c in found if not wanted or c["name"] == wanted), None)


def status_of(pod: Object | None, container: str) -> Object:
    """Its status; empty where there is none yet."""
    found = items(pod, "status", "containerStatuses") + items(pod, "status", "ephemeralContainerStatuses")
    return next((s for s in found if s["name"] == container), Object())


def container_id(pod: Object | None, container: str) -> str:
    """Of the container that runs, or ran last."""
    return text(status_of(pod, container), "containerID")


def is_running(pod: Object | None, ref: Ref, container: str) -> bool:
    """Whether processes can be in it: the frozen pod is there, and the container has neither ended nor waits."""
    there = text(pod, "metadata", "uid") == ref.uid
    return there and bool(mapping(status_of(pod, container), "state", "running"))


def unfit(
    site: Site, agent: Agent, ref: Ref, container: str, order: Mapping[str, Any], timeout_s: float = _ANSWER_S
) -> tuple[dict[str, Any], str]:
    """What the program reads in the container, and why it could not (empty: it could). For guards."""
    try:
        return agent.ask(site, ref, container, "look", order, timeout_s), ""
    except (NoPython, NotRunning) as e:
        return {}, str(e).partition(": ")[2]


def objection(said: str) -> Objection:
    """Of a container in which our program cannot run."""
    needs = f"python3 ({PYTHON[0]}.{PYTHON[1]} or later) in a running container; another one of the pod can be named: "
    return Objection(said, needs + "targets.….kubernetes.container")


# -- several at once ----------------------------------------------------------------------------------------------------


def each(refs: Sequence[Ref], work: Callable[[Ref], _R], step: Step, within_s: float) -> dict[Ref, _R | DriverError]:
    """`work` on every object, several at a time; what it raised is its result. `step` is called meanwhile.

    On failure: what is asked still has no result; nobody waits for it.

    Raises:
        DriverUnavailable: not all answered within `within_s` seconds.
        Halted: `step` wants out.
    """
    gate = threading.Semaphore(_AT_ONCE)
    futures = {ref: Future[_R]() for ref in refs}
    for ref, future in futures.items():
        # No executor: Python waits for its threads when it ends, and one may hang on a node that is cut off.
        threading.Thread(target=_do, args=(gate, future, work, ref), name="mlchaos-exec", daemon=True).start()
    end, waiting = time.monotonic() + within_s, set(futures.values())
    while waiting:
        _, waiting = wait(waiting, timeout=_STEP_S, return_when=FIRST_COMPLETED)
        step(len(futures) - len(waiting), len(futures))
        if waiting and time.monotonic() >= end:
            late = next(ref for ref, future in futures.items() if future in waiting)
            raise DriverUnavailable(f"{late.shown} did not answer within {within_s:g} s", driver=NAME, verb="exec")
    return {ref: _result(future) for ref, future in futures.items()}


def _do(gate: threading.Semaphore, future: Future[_R], work: Callable[[Ref], _R], ref: Ref) -> None:
    with gate:
        try:
            future.set_result(work(ref))
        except BaseException as e:  # noqa: BLE001  it is raised where the result is read
            future.set_exception(e)


def _result(future: Future[_R]) -> _R | DriverError:
    try:
        return future.result()
    except MlChaosError as e:
        if isinstance(e, DriverError):
            return e
        raise


def value(result: _R | DriverError) -> _R:
    """A result of `each`. Raises DriverError: there is none."""
    if isinstance(result, DriverError):
        raise result
    return result
