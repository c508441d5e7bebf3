"""Containers of ours in somebody else's pod: ephemeral containers that run a program of `mlchaos_dagster/agent`.

A container is named after its lease. The API server takes a name once and never gives it back, so an agent that was
taken away cannot be started again by a process that wakes up late. An ended one stays in the pod's spec: it is inert.
What it left as its last words is read from the pod's status, without entering anything.

An agent that runs is told to begin only by who has armed it: a mark on the pod, made by resource version while the
lease's own mark is there. Taking that one off an agent that was not armed yet is by resource version, too. Of the two one
wins, so an agent that was withdrawn before it ran never begins, and that is proven at the API server alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from mlchaos_dagster.agent.network_plan import short_name
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed
from mlchaos_dagster.kube.client import NAME, ApiRefused, ExecResult, ExecStream, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, items, mapping, part, text
from mlchaos_dagster.kube.refs import Ref

T = TypeVar("T")
ARMED = "mlchaos.dev/armed"
"""Annotation: id of the lease whose agent in this pod may be told to begin."""
EXEC_S = 5.0
"""Bound of one command in an agent's container."""
_STUCK = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError")
_NEVER_RAN = ("StartError", "ContainerCannotRun")
_TICK_S = 0.3


@dataclass(frozen=True)
class Agent:
    """One of our containers, as the pod's status tells."""

    name: str
    state: str
    """`absent`, `waiting`, `running`, `ended`."""
    reason: str = ""
    code: int = 0
    words: dict[str, Any] = field(default_factory=dict[str, Any])
    """Last words of an ended one."""

    @property
    def stuck(self) -> bool:
        """It waits for what will not come by itself."""
        return self.state == "waiting" and self.reason in _STUCK

    @property
    def ended_well(self) -> bool:
        """It read back, at its end, that it left nothing; or it never ran."""
        if self.state != "ended":
            return False
        return self.reason in _NEVER_RAN or (self.code == 0 and self.words.get("rules") == 0)


def name_of(lease: Lease, extra: str = "") -> str:
    """Of a lease's container in each pod."""
    return f"mlchaos-{short_name(lease.id)}{extra}"


def look(pod: Object, name: str) -> Agent:
    """What became of it."""
    if not any(text(c, "name") == name for c in items(pod, "spec", "ephemeralContainers")):
        return Agent(name, "absent")
    for status in items(pod, "status", "ephemeralContainerStatuses"):
        if text(status, "name") == name:
            ended = mapping(status, "state", "terminated")
            if ended:
                code = int(part(ended, "exitCode") or 0)
                return Agent(name, "ended", text(ended, "reason"), code, _words(text(ended, "message")))
            if part(status, "state", "running") is not None:
                return Agent(name, "running")
            return Agent(name, "waiting", text(status, "state", "waiting", "reason"))
    return Agent(name, "waiting")


def _words(message: str) -> dict[str, Any]:
    try:
        found = json.loads(message)
    except ValueError:
        return {"error": message} if message else {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def container(site: Site, name: str, arguments: Sequence[str], *, admin: bool) -> Object:
    """One that runs a program of ours; `admin`: it may change the pod's network, and nothing else.

    Ephemeral containers can have no resources of their own: they live in what the pod has.
    """
    security: Object = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **({"add": ["NET_ADMIN"]} if admin else {})},
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsNonRoot": not admin,
        "runAsUser": 0 if admin else 65534,
    }
    return {
        "name": name,
        "image": site.options.helper_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["tini", "--", "python3", "-m", *arguments],
        "securityContext": security,
    }


def refused(site: Site, pod: Object, ref: Ref, admin: bool) -> str:
    """What the API server says against such a container in this pod (asked without making it); empty: nothing."""
    body = {"spec": {"ephemeralContainers": [container(site, "mlchaos-asked", ["none"], admin=admin)]}}
    try:
        frozen.patch(site, pod, f"{ref.path}/ephemeralcontainers", body, "strategic", dryRun="All")
    except ApiRefused as e:
        return "" if e.code in (404, 409) else str(e)  # it changed meanwhile: whether it may is not what was answered
    return ""


def add(site: Site, ref: Ref, made: Object, lease: Lease | None, halted: threading.Event | None = None) -> None:
    """Start a container in the frozen pod, and mark the pod as the lease's while one is given.

    Raises:
        InjectFailed: the pod is gone, carries another lease's fault, or had a container of this name already; `halted`.
        LeaseRefused: the lease is not held.
    """

    def act(found: Object) -> None:
        _go_on(ref, halted)
        if look(found, text(made, "name")).state != "absent":
            raise InjectFailed(f"{ref.shown} had its agent already: the lease was recovered", driver=NAME)
        if text(found, "metadata", "deletionTimestamp"):
            raise InjectFailed(f"{ref.shown} is being deleted", driver=NAME)
        if lease is not None:
            if frozen.marked_by(found) not in ("", lease.id):
                raise InjectFailed(f"{ref.shown} carries the fault of lease {frozen.marked_by(found)}", driver=NAME)
            found = frozen.patch(site, found, ref.path, {"metadata": {"annotations": {LEASE: lease.id}}})
        body = {"spec": {"ephemeralContainers": [made]}}
        frozen.patch(site, found, f"{ref.path}/ephemeralcontainers", body, "strategic")

    if not frozen.change(site, ref, act, lease):
        raise InjectFailed(f"{ref.shown} is gone", driver=NAME)


def arm(site: Site, ref: Ref, lease: Lease, halted: threading.Event) -> None:
    """From now on the agent, which runs, may be told to begin, and must be told to stop.

    Raises:
        InjectFailed: it was withdrawn, or the pod is gone; `halted`.
        LeaseRefused: the lease is not held.
    """

    def act(found: Object) -> None:
        _go_on(ref, halted)
        if frozen.marked_by(found) != lease.id:
            raise InjectFailed(f"{ref.shown} was recovered meanwhile", driver=NAME)
        frozen.patch(site, found, ref.path, {"metadata": {"annotations": {ARMED: lease.id}}})

    if not frozen.change(site, ref, act, lease):
        raise InjectFailed(f"{ref.shown} is gone", driver=NAME)


def withdraw(site: Site, ref: Ref, lease: Lease, labels: Sequence[str] = ()) -> bool:
    """Take the lease's marks off while its agent does not run yet. True: nobody can tell it to begin any more."""
    done = False

    def act(found: Object) -> None:
        nonlocal done
        if waits(found, lease):
            _take_off(site, ref, found, lease, labels)
            done = True

    return frozen.change(site, ref, act) and done


def waits(pod: Object, lease: Lease) -> bool:
    """Whether the lease's agent was never armed, and has not started."""
    return look(pod, name_of(lease)).state == "waiting" and text(pod, "metadata", "annotations", ARMED) != lease.id


def _go_on(ref: Ref, halted: threading.Event | None) -> None:
    """Looked at between reading and writing: who recovers after `halted` moves the version on, and finds nothing late."""
    if halted is not None and halted.is_set():
        raise InjectFailed(f"{ref.shown}: somebody said stop", driver=NAME)


def unmark(site: Site, ref: Ref, lease: Lease, labels: Sequence[str] = ()) -> None:
    """Take the lease's marks (and labels of ours) off the pod."""
    frozen.change(site, ref, lambda found: _take_off(site, ref, found, lease, labels))


def _take_off(site: Site, ref: Ref, found: Object, lease: Lease, labels: Sequence[str]) -> None:
    gone = {k: None for k in labels if text(found, "metadata", "labels", k) == lease.id}
    marks = {k: None for k in (LEASE, ARMED) if text(found, "metadata", "annotations", k) == lease.id}
    if marks or gone:
        frozen.patch(site, found, ref.path, {"metadata": {"annotations": marks, "labels": gone}})


def wait(site: Site, ref: Ref, name: str, until: Callable[[Agent], bool], timeout_s: float) -> tuple[Object, Agent]:
    """The pod and the container once `until` says so, or when the time is over. Raises DriverUnavailable: it is gone."""
    end = time.monotonic() + timeout_s
    collection = ref.path.rpartition("/")[0]
    only = f"metadata.name={ref.name}"
    found, version = site.cluster.list_at(collection, fields=only)
    pod = found[0] if found else None
    while True:
        if pod is None or text(pod, "metadata", "uid") != ref.uid:
            raise DriverUnavailable(f"{ref.shown} is gone", driver=NAME)
        agent = look(pod, name)
        left = end - time.monotonic()
        if until(agent) or left <= 0:
            return pod, agent
        for kind, changed in site.cluster.watch(collection, version, fields=only, timeout_s=left):
            version = text(changed, "metadata", "resourceVersion") or version
            if kind == "BOOKMARK":
                continue
            pod = None if kind == "DELETED" else changed
            if pod is None or until(look(pod, name)) or time.monotonic() >= end:
                break


def run(site: Site, ref: Ref, name: str, module: str, *words: str) -> ExecResult:
    """A command of an agent's program in its container; bounded by EXEC_S."""
    return site.cluster.exec(ref.namespace, ref.name, name, ["python3", "-m", module, *words], timeout_s=EXEC_S)


def said(result: ExecResult) -> dict[str, Any]:
    """The JSON that a command printed. Raises DriverUnavailable: none."""
    try:
        found: Any = json.loads(result.out.strip().splitlines()[-1])
        return cast("dict[str, Any]", found)
    except (ValueError, IndexError) as e:
        words = " ".join((result.err or result.out).split()) or f"exit status {result.code}"
        raise DriverUnavailable(f"the agent says nothing: {words}", driver=NAME, verb="exec") from e


def line(stream: ExecStream, timeout_s: float) -> dict[str, Any]:
    """The next line of JSON of a command that runs. Raises DriverUnavailable: none came in time."""
    end, got = time.monotonic() + timeout_s, ""
    while "\n" not in got and time.monotonic() < end:
        got += stream.read(max(0.05, min(0.5, end - time.monotonic())))
        if not stream.running and "\n" not in got:
            break
    if "\n" not in got:
        if stream.running:
            raise DriverUnavailable(f"the agent in {stream.where} says nothing within {timeout_s:g} s", driver=NAME)
        return said(stream.finish(0.0))
    return said(ExecResult(0, got.partition("\n")[0], ""))


def together(jobs: Sequence[Callable[[], T]], step: Step, limit_s: float) -> list[T | DriverError]:
    """All at the same time, each in a thread; what each returned or raised, in their order.

    One that has no answer after `limit_s` (a node that swallows packets) counts as unavailable and is left to its own end.
    """
    results: list[Any] = [None] * len(jobs)
    done = threading.Semaphore(0)

    def one(i: int) -> None:
        try:
            results[i] = (jobs[i](), None)
        except BaseException as e:  # noqa: BLE001  raised again below, where it is looked at
            results[i] = (None, e)
        done.release()

    for i in range(len(jobs)):
        threading.Thread(target=one, args=(i,), daemon=True).start()
    end, ready = time.monotonic() + limit_s, 0
    step(0, len(jobs))
    while ready < len(jobs) and time.monotonic() < end:
        if done.acquire(timeout=_TICK_S):
            ready += 1
        step(ready, len(jobs))
    answers: list[T | DriverError] = []
    for i, result in enumerate(list(results)):
        if result is None:
            answers.append(DriverUnavailable(f"target {i + 1}: no answer within {limit_s:g} s", driver=NAME))
        elif result[1] is not None and not isinstance(result[1], DriverError):
            raise result[1]
        else:
            answers.append(result[1] or result[0])
    return answers
