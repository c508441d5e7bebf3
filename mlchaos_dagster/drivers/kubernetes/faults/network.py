"""Network faults on real pods, made inside the pod by an agent of ours (`mlchaos_dagster.agent.network`).

Two steps: the agents of all targets are prepared (rules in place, without effect), then all are told to go; an agent that
nobody tells to prepare makes nothing, and one that nobody tells to go ends by itself. Deadline and dead man's switch are in the pod: see `agent/network_rules.py`.

Where pod security forbids NET_ADMIN, `kubernetes.network: policy` cuts by a NetworkPolicy (network_policy.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from mlchaos_dagster.agent.network_plan import MOST_PORTS, Plan
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.faults import network_links, network_policy
from mlchaos_dagster.engine.ports import Lease, Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import NAME, ApiRefused, ExecStream, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import far

MODULE = "mlchaos_dagster.agent.network"
_START_S = 45.0
"""An image that must be pulled first may take longer: pull it beforehand."""
_PREPARED_S = 20.0
"""A pod with a tenth of a CPU starts a Python in seconds; the agent lives in what the pod has."""
_GO_S = 6.0
_CLEANED_S = 12.0
_RECOVER_S = 25.0
_ACTIVE_S = 6.0
_CLOCKS_S = 60.0
"""By so much the clocks of two machines may differ where a deadline is compared."""
_MOST_CLEANERS = 3
"""Containers that clean after a dead agent; ended ones stay in the pod's spec, so there is an end to it."""


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

        def prepare(ref: Ref) -> ExecStream:
            stream = _prepare(site, injection, ref, halted)
            streams.append(stream)
            if halted.is_set():  # `inject` is over and has closed what it knew of
                stream.close()
            return stream

        try:
            ready = _all(agents.together([_job(prepare, ref) for ref in refs], step, _START_S + _PREPARED_S + 5))
            if injection.undo["mode"] == "policy":
                network_policy.make(site, injection)
            # The last look before the effect. A process that is stopped between this line and the next, for longer
            # than a recovery takes, finds that the agents have ended.
            leases.held(site, lease)
            _all(agents.together([_job(_go, stream) for stream in ready], step, _GO_S + 1))
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
        answers = agents.together([_job(_clear, site, injection, ref) for ref in injection.refs], step, _RECOVER_S)
        failed = [a for a in answers if isinstance(a, DriverError)]
        if failed:
            raise RecoverFailed("; ".join(str(f) for f in failed), driver=NAME, lease_id=injection.lease.id)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Each pod's own netfilter rules, and what a client in it sees. Raises DriverUnavailable."""
        answers = agents.together(
            [_job(_read_back, site, injection, ref) for ref in injection.refs], no_step, _ACTIVE_S
        )
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


def _plan(injection: Injection, ref: Ref) -> Plan:
    undo, params = injection.undo, injection.params
    own = undo["pods"][str(ref)]
    linked = injection.lease.kind not in ("network_isolation", "dns_failure")
    plan = Plan(
        lease=injection.lease.id,
        kind=injection.lease.kind,
        duration_s=injection.lease.duration_s,
        peers=tuple(undo["peers"]) if linked else (),
        ports=tuple(undo["ports"]) if linked else (),
        spare=tuple(own["spare"]),
        families=tuple(own["families"]),
        probes=tuple(undo["probes"]),
        only_look=undo["mode"] != "agent",
    )
    return replace(plan, **{k: params[k] for k in ("latency_s", "jitter_s", "fraction") if k in params})


def _prepare(site: Site, injection: Injection, ref: Ref, halted: threading.Event) -> ExecStream:
    """Start the agent in one pod and wait until it is prepared; the connection on which it waits for `go`."""
    lease, name = injection.lease, agents.name_of(injection.lease)
    plan = _plan(injection, ref)
    made = agents.container(site, name, [MODULE, "keep", plan.to_json()], admin=not plan.only_look)
    agents.add(site, ref, made, lease, halted)
    _, agent = agents.wait(
        site, ref, name, lambda a: a.stuck or a.state in ("running", "ended") or halted.is_set(), _START_S
    )
    if agent.state == "ended":
        raise InjectFailed(f"{ref.shown}: the agent ended at once: {_why(agent)}", driver=NAME)
    if agent.state != "running":
        what = agent.reason or "no reason given"
        raise InjectFailed(
            f"{ref.shown}: the agent (image {site.options.helper_image}) does not start: {what}", driver=NAME
        )
    agents.arm(site, ref, lease, halted)
    stream = site.cluster.open_exec(
        ref.namespace, ref.name, name, ["python3", "-m", MODULE, "go", lease.id], stdin=True
    )
    try:
        said = agents.line(stream, _PREPARED_S)
    except DriverError as e:
        stream.close()
        pod = frozen.read(site, ref)
        ended = agents.look(pod, name) if pod else None
        why = _why(ended) if ended and ended.state == "ended" else str(e)
        raise InjectFailed(f"{ref.shown}: the agent cannot prepare the fault: {why}", driver=NAME) from e
    if said.get("phase") != "prepared":
        stream.close()
        raise InjectFailed(
            f"{ref.shown}: the agent is {said.get('phase')}: {said.get('error') or said.get('why')}", driver=NAME
        )
    return stream


def _go(stream: ExecStream) -> None:
    stream.write("go\n")
    said = agents.line(stream, _GO_S)
    if said.get("error") or said.get("phase") != "on":
        raise InjectFailed(
            f"{stream.where}: the agent did not begin: {said.get('error') or said.get('why')}", driver=NAME
        )


def _clear(site: Site, injection: Injection, ref: Ref) -> None:
    """Take the fault out of one pod, whatever became of its agent."""
    lease = injection.lease
    name = agents.name_of(lease)
    pod = frozen.read(site, ref)
    if pod is not None and agents.look(pod, name).state == "absent":
        frozen.shut_out(site, ref)  # an inject that has read the pod already can no longer add its agent
        pod = frozen.read(site, ref)
    if pod is None:
        _gone_with_its_node_there(site, injection, ref)
    if pod is None or _over(pod):
        return
    agent = agents.look(pod, name)
    if agent.state == "waiting":
        if agents.withdraw(site, ref, lease, (network_policy.LABEL,)):
            return  # it makes nothing until it is told to, and ends by itself
        pod = frozen.read(site, ref)
        if pod is None:
            raise RecoverFailed(f"{ref.shown} was replaced meanwhile", driver=NAME)  # looked at again by the next try
        agent = agents.look(pod, name)
        if agent.state == "waiting":
            raise RecoverFailed(f"{ref.shown}: its node does not say what became of the agent", driver=NAME)
    if agent.state == "running":
        _node_answers(site, pod)
        agent = _stop(site, lease, ref)
    if agent.state == "ended" and not agent.ended_well:
        _clean_after(site, lease, ref, pod)
    agents.unmark(site, ref, lease, (network_policy.LABEL,))


def _stop(site: Site, lease: Lease, ref: Ref) -> agents.Agent:
    """Tell a running agent to take its rules away; what became of it. Raises DriverError: rules may be left."""
    name = agents.name_of(lease)
    try:
        said = agents.said(agents.run(site, ref, name, MODULE, "stop", lease.id))
        if said.get("error") or said.get("rules"):
            raise RecoverFailed(f"{ref.shown}: {said.get('error') or said.get('rules')}", driver=NAME)
        return agents.Agent(name, "running")
    except (ApiRefused, DriverUnavailable):
        # It may have ended under our hands; the kubelet tells within a second or two.
        _, agent = agents.wait(site, ref, name, lambda a: a.state == "ended", 3.0)
        if agent.state != "ended":
            raise
        return agent


def _clean_after(site: Site, lease: Lease, ref: Ref, pod: Object) -> None:
    """A container of its own removes what a dead agent left."""
    found = agents.Agent("", "absent")
    for i in range(1, _MOST_CLEANERS + 1):
        name = agents.name_of(lease, f"-c{i}")
        found = agents.look(pod, name)
        if found.state == "absent":
            agents.add(site, ref, agents.container(site, name, [MODULE, "clean", lease.id], admin=True), None)
        pod, found = agents.wait(site, ref, name, lambda a: a.state == "ended" or a.stuck, _CLEANED_S)
        if found.ended_well:
            return
        if found.state != "ended":
            raise RecoverFailed(f"{ref.shown}: the cleaning container does not start: {found.reason}", driver=NAME)
    raise RecoverFailed(f"{ref.shown}: {_MOST_CLEANERS} cleaning containers failed: {_why(found)}", driver=NAME)


def _read_back(site: Site, injection: Injection, ref: Ref) -> Evidence:
    """What one pod holds of the fault now."""
    lease = injection.lease
    name = agents.name_of(lease)
    pod = frozen.read(site, ref)
    if pod is None:
        _gone_with_its_node_there(site, injection, ref)
        return _nothing(f"{ref.shown} is gone, and its network namespace with it")
    if _over(pod):
        return _nothing(f"{ref.shown} has ended, and its network namespace with it")
    agent = agents.look(pod, name)
    if agent.state == "absent":
        return _nothing(f"{ref.shown}: no agent was ever started in it")
    if agent.state == "running":
        _node_answers(site, pod)
        return _live(site, lease, ref)
    if agent.state == "waiting":
        if agent.stuck:
            return _nothing(f"{ref.shown}: the agent never ran ({agent.reason})")
        if agents.waits(pod, lease) and frozen.marked_by(pod) != lease.id:
            return _nothing(f"{ref.shown}: the agent was withdrawn before it ran, and makes nothing")
        return Evidence(present=True, effective=False, lines=(f"{ref.shown}: the agent is being started",))
    if agent.ended_well:
        return _nothing(f"{ref.shown}: no rule is left, read back by the agent at its end ({agent.words.get('why')})")
    for i in range(_MOST_CLEANERS, 0, -1):
        cleaner = agents.look(pod, agents.name_of(lease, f"-c{i}"))
        if cleaner.ended_well:
            return _nothing(f"{ref.shown}: no rule is left, read back by {cleaner.name} after the agent had died")
    said = (
        f"{ref.shown}: the agent died ({_why(agent)}): its rules have no effect any more, and are still to be removed"
    )
    return Evidence(present=True, effective=False, lines=(said,))


def _live(site: Site, lease: Lease, ref: Ref) -> Evidence:
    result = agents.run(site, ref, agents.name_of(lease), MODULE, "status", lease.id)
    said = agents.said(result)
    if said.get("error"):
        raise DriverUnavailable(f"{ref.shown}: {said['error']}", driver=NAME)
    rules: list[str] = said["rules"]
    if not rules and said["phase"] != "on":
        return _nothing(f"{ref.shown}: no rule is left, read from the pod's netfilter ({said['why'] or said['phase']})")
    lines = [f"{ref.shown}: {seen}" for seen in said["seen"]]
    lines.append(f"{ref.shown}: {len(rules)} netfilter rules, agent {said['phase']}, {said['left_s']:g} s left")
    if said["lapses"]:
        lines.append(
            f"{ref.shown}: the agent got no CPU in time and the fault was off meanwhile, {said['lapses']} times"
        )
    return Evidence(present=True, effective=bool(said["effective"]), lines=tuple(lines))


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


def _gone_with_its_node_there(site: Site, injection: Injection, ref: Ref) -> None:
    """A pod that was deleted by force is gone from the API, and lives on as long as its node is cut off: the node is
    asked for, until the agent's own deadline is over for certain. Raises DriverUnavailable.
    """
    pods: dict[str, dict[str, Any]] = injection.undo.get("pods", {})
    name = pods.get(str(ref), {}).get("node", "")
    if name and time.time() < injection.lease.deadline_wall + _CLOCKS_S:
        _answers(site, name)


def _node_answers(site: Site, pod: Object) -> None:
    """What runs on a node that does not answer is not known, also where its pod is being deleted: the pod may live on.

    A command into it would hang, so the node's own word is read first. Raises DriverUnavailable.
    """
    _answers(site, text(pod, "spec", "nodeName"))


def _answers(site: Site, name: str) -> None:
    node = site.cluster.get(f"/api/v1/nodes/{name}")
    ready = [c for c in items(node, "status", "conditions") if text(c, "type") == "Ready"]
    if ready and text(ready[0], "status") != "True":
        raise DriverUnavailable(f"node {name} does not answer: what its pods hold is not known", driver=NAME)


def _on_host(pod: Object) -> bool:
    return text(pod, "spec", "hostNetwork") == "True"


def _over(pod: Object) -> bool:
    return text(pod, "status", "phase") in ("Succeeded", "Failed")


def _nothing(said: str) -> Evidence:
    return Evidence(present=False, effective=False, lines=(said,))


def _why(agent: agents.Agent) -> str:
    words = agent.words.get("error") or agent.words.get("why")
    return str(words or f"{agent.reason or 'ended'}, exit status {agent.code}")


def _job(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: call(*arguments)


def _all(answers: list[Any]) -> list[Any]:
    """Every answer, or the first failure with the number of the others."""
    failed = [a for a in answers if isinstance(a, DriverError)]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InjectFailed(f"{failed[0]}{more}", driver=NAME, verb="inject") from failed[0]
    return answers
