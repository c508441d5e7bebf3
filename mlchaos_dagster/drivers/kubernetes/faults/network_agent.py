"""The agent of a network fault in one pod: started, told to begin, stopped, cleaned after, and asked.

network.py does it for all targets of a fault.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

from mlchaos_dagster.agent.network_plan import Plan
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.evidence import nothing
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.faults import network_policy
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import NAME, ApiRefused, ExecStream, Site
from mlchaos_dagster.kube.objects import Object, items, text
from mlchaos_dagster.kube.refs import Ref

MODULE = "mlchaos_dagster.agent.network"
START_S = 45.0
"""An image that must be pulled first may take longer: pull it beforehand."""
PREPARED_S = 20.0
"""A pod with a tenth of a CPU starts a Python in seconds; the agent lives in what the pod has."""
GO_S = 6.0
_CLEANED_S = 12.0
_CLOCKS_S = 60.0
"""By so much the clocks of two machines may differ where a deadline is compared."""
_MOST_CLEANERS = 3
"""Containers that clean after a dead agent; ended ones stay in the pod's spec, so there is an end to it."""


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


def prepare(site: Site, injection: Injection, ref: Ref, halted: threading.Event) -> ExecStream:
    """Start the agent in one pod and wait until it is prepared; the connection on which it waits for `go`."""
    lease, name = injection.lease, agents.name_of(injection.lease)
    plan = _plan(injection, ref)
    made = agents.container(site, name, [MODULE, "keep", plan.to_json()], admin=not plan.only_look)
    agents.add(site, ref, made, lease, halted)
    _, agent = agents.wait(
        site, ref, name, lambda a: a.stuck or a.state in ("running", "ended") or halted.is_set(), START_S
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
        said = agents.line(stream, PREPARED_S)
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


def go(stream: ExecStream) -> None:
    """Let a prepared agent begin. Raises InjectFailed: it did not."""
    stream.write("go\n")
    said = agents.line(stream, GO_S)
    if said.get("error") or said.get("phase") != "on":
        raise InjectFailed(
            f"{stream.where}: the agent did not begin: {said.get('error') or said.get('why')}", driver=NAME
        )


def clear(site: Site, injection: Injection, ref: Ref) -> None:
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


def read_back(site: Site, injection: Injection, ref: Ref) -> Evidence:
    """What one pod holds of the fault now."""
    lease = injection.lease
    name = agents.name_of(lease)
    pod = frozen.read(site, ref)
    if pod is None:
        _gone_with_its_node_there(site, injection, ref)
        return nothing(f"{ref.shown} is gone, and its network namespace with it")
    if _over(pod):
        return nothing(f"{ref.shown} has ended, and its network namespace with it")
    agent = agents.look(pod, name)
    if agent.state == "absent":
        return nothing(f"{ref.shown}: no agent was ever started in it")
    if agent.state == "running":
        _node_answers(site, pod)
        return _live(site, lease, ref)
    if agent.state == "waiting":
        if agent.stuck:
            return nothing(f"{ref.shown}: the agent never ran ({agent.reason})")
        if agents.waits(pod, lease) and frozen.marked_by(pod) != lease.id:
            return nothing(f"{ref.shown}: the agent was withdrawn before it ran, and makes nothing")
        return Evidence(present=True, effective=False, lines=(f"{ref.shown}: the agent is being started",))
    if agent.ended_well:
        return nothing(f"{ref.shown}: no rule is left, read back by the agent at its end ({agent.words.get('why')})")
    for i in range(_MOST_CLEANERS, 0, -1):
        cleaner = agents.look(pod, agents.name_of(lease, f"-c{i}"))
        if cleaner.ended_well:
            return nothing(f"{ref.shown}: no rule is left, read back by {cleaner.name} after the agent had died")
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
        return nothing(f"{ref.shown}: no rule is left, read from the pod's netfilter ({said['why'] or said['phase']})")
    lines = [f"{ref.shown}: {seen}" for seen in said["seen"]]
    lines.append(f"{ref.shown}: {len(rules)} netfilter rules, agent {said['phase']}, {said['left_s']:g} s left")
    if said["lapses"]:
        lines.append(
            f"{ref.shown}: the agent got no CPU in time and the fault was off meanwhile, {said['lapses']} times"
        )
    return Evidence(present=True, effective=bool(said["effective"]), lines=tuple(lines))


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


def _over(pod: Object) -> bool:
    return text(pod, "status", "phase") in ("Succeeded", "Failed")


def _why(agent: agents.Agent) -> str:
    words = agent.words.get("error") or agent.words.get("why")
    return str(words or f"{agent.reason or 'ended'}, exit status {agent.code}")
