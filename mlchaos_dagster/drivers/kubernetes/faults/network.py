"""Network faults on real pods, made inside the pod by an agent of ours (`mlchaos_dagster.agent.network`).

Two steps: the agents of all targets are prepared (rules in place, without effect), then all are told to go; an agent that
nobody tells to prepare makes nothing, and one that nobody tells to go ends by itself. Deadline and dead man's switch are in the pod: see `agent/network_rules.py`.

Where pod security forbids NET_ADMIN, `kubernetes.network: policy` cuts by a NetworkPolicy (network_policy.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlchaos_dagster.agent.network_plan import MOST_PORTS
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.faults import network_links, network_policy
from mlchaos_dagster.drivers.kubernetes.faults.network_agent import (
    GO_S,
    PREPARED_S,
    START_S,
    clear,
    go,
    prepare,
    read_back,
)
from mlchaos_dagster.engine.ports import Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import NAME, ExecStream, Permission, Site
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import far

_RECOVER_S = 25.0
_ACTIVE_S = 6.0


class Network:
    """What all network faults have in common."""

    kinds = frozenset({"pod"})
    self_limiting = True

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Read pods and Services, add the agent's container and talk to it; policies in policy mode."""
        for namespace in {ref.namespace for ref in request.refs}:
            for verb in ("get", "list", "watch", "patch"):
                yield Permission(verb, "pods", namespace)
            yield Permission("patch", "pods/ephemeralcontainers", namespace)
            yield Permission("get", "pods/exec", namespace)
            yield Permission("create", "pods/exec", namespace)
            yield Permission("list", "services", namespace)
            yield Permission("get", "nodes")
            if site.options.network == "policy":
                for verb in ("get", "list", "create", "delete"):
                    yield Permission(verb, "networkpolicies", namespace, "networking.k8s.io")

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """A pod in the node's own network, a link without an end, a namespace that does not let the agent in."""
        policy = site.options.network == "policy"
        pods = frozen.read_all(site, request.refs)
        for ref, pod in pods.items():
            if pod is not None and _on_host(pod):
                yield Objection(
                    f"{ref.shown} uses the node's network: the fault would hit the node", "pods with their own network"
                )
        if len(request.target.kubernetes.ports) > MOST_PORTS:
            yield Objection(
                f"{len(request.target.kubernetes.ports)} ports", f"at most {MOST_PORTS} (targets.….kubernetes.ports)"
            )
        try:
            end = network_links.other_end(site, request.target)
        except DriverError as e:
            yield Objection(str(e), "a link to pods that are there")
            return
        if len(end["ports"]) > MOST_PORTS:
            yield Objection(
                f"the Services' ports and those behind them are {len(end['ports'])}", f"at most {MOST_PORTS} in all"
            )
        if policy:
            yield from network_policy.objections(site, request, [p for p in pods.values() if p is not None])
        yield from _let_in(site, pods, policy)

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """The far end's addresses and each pod's own, as they are before the fault."""
        found = network_links.other_end(site, request.target)
        pods: dict[str, Any] = {}
        for i, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            step(i, len(request.refs))
            if pod is None:
                raise DriverError(f"{ref.shown} is gone", driver=NAME, verb="undo")
            families = sorted({6 if ":" in ip else 4 for ip in network_links.addresses(pod)}) or [4]
            node = text(pod, "spec", "nodeName")
            pods[str(ref)] = {"spare": network_links.node_addresses(pod), "families": families, "node": node}
        return {"mode": site.options.network, "far": far(request.target.select), **found, "pods": pods}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Prepare all agents, then let them all begin.

        Raises:
            InjectFailed: an agent could not start, or a pod was replaced meanwhile.
            LeaseRefused: the lease was taken over.
        """
        halted = threading.Event()
        refs, lease = injection.refs, injection.lease
        streams: list[ExecStream] = []

        def prepared(ref: Ref) -> ExecStream:
            stream = prepare(site, injection, ref, halted)
            streams.append(stream)
            if halted.is_set():  # `inject` is over and has closed what it knew of
                stream.close()
            return stream

        try:
            ready = _all(agents.together([_job(prepared, ref) for ref in refs], step, START_S + PREPARED_S + 5))
            if injection.undo["mode"] == "policy":
                network_policy.make(site, injection)
            # The last look before the effect. A process that is stopped between this line and the next, for longer
            # than a recovery takes, finds that the agents have ended.
            leases.held(site, lease)
            _all(agents.together([_job(go, stream) for stream in ready], step, GO_S + 1))
        finally:
            halted.set()
            for stream in streams:
                stream.close()

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Stop each agent, which takes its rules away; clean after a dead one; shut out a late inject.

        Raises:
            RecoverFailed: a pod could not be asked, or rules are left.
        """
        if injection.undo.get("mode", "policy") == "policy":  # of a lost lease nobody knows
            network_policy.remove(site, injection)
        answers = agents.together([_job(clear, site, injection, ref) for ref in injection.refs], step, _RECOVER_S)
        failed = [a for a in answers if isinstance(a, DriverError)]
        if failed:
            raise RecoverFailed("; ".join(str(f) for f in failed), driver=NAME, lease_id=injection.lease.id)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Each pod's own netfilter rules, and what a client in it sees. Raises DriverUnavailable."""
        answers = agents.together([_job(read_back, site, injection, ref) for ref in injection.refs], no_step, _ACTIVE_S)
        for answer in answers:
            if isinstance(answer, DriverError):
                raise answer if isinstance(answer, DriverUnavailable) else DriverUnavailable(str(answer), driver=NAME)
        found = [a for a in answers if isinstance(a, Evidence)]
        lines = [line for e in found for line in e.lines]
        present = any(e.present for e in found)
        if injection.undo.get("mode", "policy") == "policy":
            standing, said = network_policy.standing(site, injection)
            lines, present = [*said, *lines], present or standing
        if present and injection.undo.get("far"):
            lines += _replaced(site, injection)
        return Evidence(present=present, effective=present and all(e.effective for e in found), lines=tuple(lines))


class Latency(Network):
    """What comes in from the other side is held back: round trip + latency ± jitter."""


class Loss(Network):
    """A fraction of the packets that come in from the other side is dropped."""


class Partition(Network):
    """Nothing passes, in both directions, connections that stand included."""


class Isolation(Network):
    """Nothing passes but what comes from and goes to the pod's own node (the kubelet's probes)."""


class DnsFailure(Network):
    """Answers of the pod's name servers do not arrive."""


def _replaced(site: Site, injection: Injection) -> Iterator[str]:
    """Right-hand pods that came after the addresses were frozen."""
    undo = injection.undo
    try:
        pods = network_links.far_pods(site, injection.refs[0].namespace, undo["far"])
    except DriverError:
        return
    new = [p for p in pods if not set(network_links.addresses(p)) & set(undo["peers"])]
    if new:
        by = f"through {', '.join(undo['services'])} only" if undo["services"] else "not at all: no Service leads to it"
        names = ", ".join(text(p, "metadata", "name") for p in new)
        yield f"came to the link's right side after the fault began, and is hit {by}: {names}"


def _let_in(site: Site, pods: dict[Ref, Object | None], policy: bool) -> Iterator[Objection]:
    for ref, pod in pods.items():
        if pod is None or _on_host(pod):
            continue
        said = agents.refused(site, pod, ref, admin=not policy)
        if said and policy:
            yield Objection(said, "a namespace that lets an unprivileged container of ours look at the network")
            return
        if said:
            yield Objection(
                said,
                "a namespace that allows the capability NET_ADMIN; or kubernetes.network: policy, which can only cut "
                "(network_partition, network_isolation)",
            )
            return


def _on_host(pod: Object) -> bool:
    return text(pod, "spec", "hostNetwork") == "True"


def _job(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: call(*arguments)


def _all(answers: list[Any]) -> list[Any]:
    """Every answer, or the first failure with the number of the others."""
    failed = [a for a in answers if isinstance(a, DriverError)]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InjectFailed(f"{failed[0]}{more}", driver=NAME, verb="inject") from failed[0]
    return answers
