"""Our eye in a target pod: an ephemeral container beside the service, that looks (and mends) when it is asked to.

Opened before the fault, ended after it; its last look stays as its last words in the pod's status, so that the proof
needs nothing that runs. One that died is followed by another, from whatever process recovers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import MARKER, Agent
from mlchaos_dagster.engine.ports import Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import ApiRefused, Permission, Site
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import Ref

T = TypeVar("T")
NAME = "chaos_mesh"
START_S = 30.0
"""An image that must be pulled first may take longer: pull it beforehand."""
AGAIN_S = 8.0
ALL_S = 14.0
"""Of one verb on all pods."""
_ANSWER_S = 10.0
"""On a busy node a command takes seconds to start."""
_STAYS_S = 120.0
"""Longer than the fault may last: the proof of its end needs no other container then."""
_MOST = 4
"""Containers of one lease in a pod; ended ones stay in its spec, so there is an end to it."""
_PLACE = "mlchaos_dagster.agent:eye.py"


def permissions(spaces: Sequence[str]) -> list[Permission]:
    """To add a container to a pod and to talk to it."""
    verbs = (
        ("get", "pods"),
        ("list", "pods"),
        ("watch", "pods"),
        ("patch", "pods/ephemeralcontainers"),
        ("get", "pods/exec"),
        ("create", "pods/exec"),
    )
    return [Permission(verb, resource, space) for space in spaces for verb, resource in verbs]


def made(site: Site, name: str, lease_id: str, order: Object, capabilities: Sequence[str], beside: str) -> Object:
    """The container; `beside`: name of the container whose processes it shares, empty: none."""
    found = agents.container(site, name, [], admin=True)
    source = (files("mlchaos_dagster.agent") / "eye.py").read_text(encoding="utf-8")
    words = ["0", MARKER + lease_id, "watch", json.dumps(order)]
    found["command"] = ["python3", "-I", "-S", "-B", "-c", source, *words]
    found["securityContext"]["capabilities"] = {"drop": ["ALL"], "add": list(capabilities)}
    return {**found, **({"targetContainerName": beside} if beside else {})}


def refused(site: Site, pod: Object, ref: Ref, capabilities: Sequence[str], beside: str) -> str:
    """What the API server says against it (asked by a dry run); empty: nothing."""
    body = {"spec": {"ephemeralContainers": [made(site, "mlchaos-asked", "asked", {}, capabilities, beside)]}}
    try:
        frozen.patch(site, pod, f"{ref.path}/ephemeralcontainers", body, "strategic", dryRun="All")
    except ApiRefused as e:
        return "" if e.code in (404, 409) else str(e)
    return ""


class Eye:
    """In one pod, of one lease.

    Args:
        order: What is looked at: see `agent/eye.py`.
        beside: Container whose processes it shares.
    """

    def __init__(
        self, site: Site, injection: Injection, ref: Ref, order: Object, capabilities: Sequence[str], beside: str = ""
    ) -> None:
        self.site, self.injection, self.ref, self.order = site, injection, ref, order
        self.capabilities, self.beside = capabilities, beside
        self._agent = Agent.of(_PLACE)

    def open(self, within_s: float = START_S, *, first: bool = True) -> None:
        """Start one where none looks. Raises InjectFailed: it does not start; LeaseRefused."""
        lease = self.injection.lease
        pod = frozen.read(self.site, self.ref)
        if pod is None:
            if first:
                raise InjectFailed(f"{self.ref.shown} is gone", driver=NAME)
            return
        now = self._newest(pod)
        if not first and self.never_ran(pod):
            return
        if now.state == "running" or (now.state == "absent" and not first) or now.ended_well:
            return
        if now.state in ("absent", "ended") or now.stuck:
            name = self._next(pod)
            seconds = lease.duration_s + self.site.options.chaos_mesh.inject_within + _STAYS_S
            order = {**self.order, "seconds": seconds if first else _STAYS_S}
            body = made(self.site, name, lease.id, order, self.capabilities, self.beside)
            if first:
                leases.held(self.site, lease)
            agents.add(self.site, self.ref, body, None)
        else:
            name = now.name
        _, now = agents.wait(self.site, self.ref, name, lambda a: a.stuck or a.state in ("running", "ended"), within_s)
        if now.state != "running":
            why = now.words.get("error") or now.reason or "no reason given"
            image = self.site.options.helper_image
            raise InjectFailed(f"{self.ref.shown}: our container (image {image}) does not start: {why}", driver=NAME)

    def state(self) -> tuple[Object | None, agents.Agent]:
        """The pod, and the newest of our containers in it."""
        pod = frozen.read(self.site, self.ref)
        return pod, self._newest(pod) if pod is not None else agents.Agent("", "absent")

    def never_ran(self, pod: Object) -> bool:
        """The first of our containers has not started: nothing was asked of Chaos Mesh, which waits for all of them."""
        return agents.look(pod, self._name(0)).state == "waiting"

    def ask(self, now: agents.Agent, verb: str, order: Object) -> dict[str, Any]:
        """`look` or `mend`. Raises DriverUnavailable: no answer."""
        try:
            return self._agent.ask(self.site, self.ref, now.name, verb, {**self.order, **order}, _ANSWER_S)
        except DriverError as e:
            raise DriverUnavailable(str(e), driver=NAME, verb="exec") from e

    def _newest(self, pod: Object) -> agents.Agent:
        found = agents.Agent("", "absent")
        for i in range(_MOST):
            now = agents.look(pod, self._name(i))
            if now.state == "absent":
                break
            found = now
        return found

    def _next(self, pod: Object) -> str:
        for i in range(_MOST):
            if agents.look(pod, self._name(i)).state == "absent":
                return self._name(i)
        raise DriverUnavailable(f"{self.ref.shown}: {_MOST} containers of ours ended in it", driver=NAME)

    def _name(self, number: int) -> str:
        return agents.name_of(self.injection.lease, f"-e{number}")


def together(eyes: Sequence[Eye], call: Callable[[Eye], T], step: Step, limit_s: float) -> list[T]:
    """The same of all, at the same time. Raises DriverError: the first that failed."""
    answers = agents.together([lambda eye=eye: call(eye) for eye in eyes], step, limit_s)
    for answer in answers:
        if isinstance(answer, DriverError):
            raise answer
    return [a for a in answers if not isinstance(a, DriverError)]


def running(pod: Object | None) -> bool:
    """Whether a network namespace or a process of it can be there."""
    return pod is not None and text(pod, "status", "phase") not in ("Succeeded", "Failed")
