"""The network of a target, looked at from inside the pod by our agent without any capability.

It tries the other end before and during the fault. For delays and losses the kernel's own queue is read, too: Litmus puts a
`netem` on the pod's interface, and what that queue holds and drops is counted there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.faults.network import Network
from mlchaos_dagster.drivers.litmus.eyes import Sight
from mlchaos_dagster.drivers.litmus.tracks import Tracks
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, RecoverFailed
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import Ref

_MORE_S = 60.0
"""By so much the agent outlives the fault that Litmus was asked for: it looks until that is gone."""
_SHOW = ["tc", "-s", "-j", "qdisc", "show"]
_DELETE = "for d in {devices}; do tc qdisc del dev $d root; done; "
_TELL = 'echo "{\\"queues\\": $(tc -s -j qdisc show)}" > /dev/termination-log'
_ENDS_S = 15.0
_MOST_CLEANERS = 3
_SHARE = 0.9
"""Of the delay asked for: what a clock does."""


@dataclass(frozen=True)
class Netem:
    """One queue that Litmus made."""

    device: str
    delay_s: float
    dropped: int
    packets: int


def netems(shown: Iterable[Object]) -> list[Netem]:
    """Queues of kind netem, from what `tc -s -j qdisc show` prints."""
    found: list[Netem] = []
    for queue in shown:
        if queue.get("kind") == "netem":
            options: Object = queue.get("options") or {}
            delay: Object = options.get("delay") or {}
            found.append(
                Netem(
                    str(queue.get("dev", "")),
                    float(delay.get("delay") or 0.0),
                    int(queue.get("drops") or 0),
                    int(queue.get("packets") or 0),
                )
            )
    return found


class Wire:
    """The network experiments that mean what a native fault means.

    Args:
        kind: That native fault; `params`: as it takes them.
    """

    def __init__(self, kind: str, params: dict[str, Any]) -> None:
        self.kind, self.params, self.native = kind, params, Network()
        self.queued = kind in ("network_latency", "network_loss")

    def permissions(self, request: Request) -> Iterable[Permission]:
        """To add the agent's container and to talk to it; Services, for the other end."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            for verb in ("get", "list", "watch", "patch"):
                yield Permission(verb, "pods", namespace)
            yield Permission("patch", "pods/ephemeralcontainers", namespace)
            yield Permission("get", "pods/exec", namespace)
            yield Permission("create", "pods/exec", namespace)
            yield Permission("list", "services", namespace)
            yield Permission("get", "nodes")

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """A pod that does not let the agent in."""
        for ref in request.refs:
            pod = frozen.read(site, ref)
            if text(pod, "spec", "hostNetwork") == "True":
                yield Objection(f"{ref.shown} uses the node's network: the fault would hit the node", "other pods")
            elif pod is not None and (said := agents.refused(site, pod, ref, admin=False)):
                yield Objection(said, "a namespace that lets an unprivileged container of ours look at the network")

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """The other end, and each pod's own addresses."""
        as_native = replace(request, kind=self.kind, params=self.params)
        return {**self.native.undo(site, as_native, step), "mode": "look"}

    def open(self, site: Site, injection: Injection, step: Step) -> None:
        """The agent tries the other end from now on."""
        self.native.inject(site, self._inner(injection), step)

    def close(self, site: Site, injection: Injection, step: Step) -> None:
        """The agent ends."""
        self.native.recover(site, self._inner(injection), step)

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """What the agent sees, and the queues of each pod."""
        tried = self.native.active(site, self._inner(injection))
        standing = [text(p, "metadata", "name") for p in tracks.policies]
        lines = [*tried.lines, *(f"NetworkPolicy {name} stands" for name in standing)]
        if not self.queued:
            return Sight(tried.effective and bool(standing), bool(standing), tuple(lines))
        sights = [self._queue(site, injection.lease, ref, tried) for ref in injection.refs]
        return Sight(
            all(s.effective for s in sights),
            any(s.present for s in sights),
            (*(line for s in sights for line in s.lines), *lines),
        )

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        """Take Litmus's queue away where its helper died without doing so. Raises RecoverFailed: it is still there."""
        for ref in injection.refs if self.queued else ():
            step(0, 0)
            left = _queues(site, injection.lease, ref)
            if left and netems(_own(site, ref, injection.lease, {q.device for q in netems(left)})):
                raise RecoverFailed(f"{ref.shown}: a netem queue is still there", driver=NAME, verb="recover")

    def _queue(self, site: Site, lease: Lease, ref: Ref, tried: Evidence) -> Sight:
        found = netems(_queues(site, lease, ref))
        if not found:
            return Sight(False, lines=(f"{ref.shown}: no netem queue, read from its kernel",))
        lines: list[str] = []
        for q in found:
            said = f"delay {q.delay_s * 1000:.0f} ms, " if self.kind == "network_latency" else ""
            lines.append(f"{ref.shown}: netem on {q.device}: {said}{q.packets} packets passed, {q.dropped} were lost")
        if self.kind == "network_loss":
            return Sight(any(q.dropped for q in found), True, tuple(lines))
        slow = any(q.packets and q.delay_s >= _SHARE * float(self.params["latency_s"]) for q in found)
        return Sight(tried.effective or slow, True, tuple(lines))

    def _inner(self, injection: Injection) -> Injection:
        """As the native fault has it."""
        lease = injection.lease
        as_native = replace(lease, kind=self.kind, params=self.params, duration_s=lease.duration_s + _more_s(injection))
        return Injection(as_native, injection.refs, injection.undo["before"])


def _more_s(injection: Injection) -> float:
    return float(injection.undo["inject_within"]) + _MORE_S


def _queues(site: Site, lease: Lease, ref: Ref) -> list[Object]:
    """Of a pod's network, through the agent that looks there, or through a container of its own once that has ended."""
    pod = frozen.read(site, ref)
    if pod is None or text(pod, "status", "phase") in ("Succeeded", "Failed"):
        return []
    agent = agents.look(pod, agents.name_of(lease))
    if agent.state == "absent" or agents.waits(pod, lease):  # the experiment was never asked for
        return []
    if agent.state == "running":
        done = site.cluster.exec(ref.namespace, ref.name, agent.name, _SHOW, timeout_s=agents.EXEC_S)
        try:
            return cast("list[Object]", json.loads(done.out))
        except ValueError as e:
            said = done.err.strip() or f"exit status {done.code}"
            raise DriverUnavailable(f"{ref.shown}: its queues cannot be read: {said}", driver=NAME) from e
    for i in range(_MOST_CLEANERS, 0, -1):  # cleaned when nothing of Litmus ran any more: no later word is needed
        cleaner = agents.look(pod, agents.name_of(lease, f"-d{i}"))
        if "queues" in cleaner.words:
            return cast("list[Object]", cleaner.words["queues"])
    return _own(site, ref, lease, set())


def _own(site: Site, ref: Ref, lease: Lease, devices: set[str]) -> list[Object]:
    """What a container of its own reads, after it has taken away the queues of `devices`."""
    script = (_DELETE.format(devices=" ".join(sorted(devices))) if devices else "") + _TELL
    for i in range(1, _MOST_CLEANERS + 1):
        name = agents.name_of(lease, f"-{'d' if devices else 'q'}{i}")
        pod = frozen.read(site, ref)
        if pod is None:
            return []
        found = agents.look(pod, name)
        if found.state == "ended" and i < _MOST_CLEANERS:
            continue
        if found.state == "absent":
            made = {**agents.container(site, name, [], admin=bool(devices)), "command": ["sh", "-c", script]}
            agents.add(site, ref, made, None)
        _, found = agents.wait(site, ref, name, lambda a: a.state == "ended" or a.stuck, _ENDS_S)
        if "queues" in found.words:
            return cast("list[Object]", found.words["queues"])
        if found.state != "ended":
            break
    raise DriverError(f"{ref.shown}: its queues cannot be read: no container of ours starts there", driver=NAME)
