"""CPU is burnt and memory is held inside the targets' own containers, so that limits, autoscaler and OOM killer really act.

A program of ours (`agent/stress.py`) runs as the child of an exec session, in the cgroup of the container. It ends when the
stream does (this process died), when it hears nothing for a while (this process hangs), at the lease's deadline, with its
container, and on `recover`, which finds it by the lease's id in `/proc` of the container.

`memory_stress` beyond the limit is one OOM kill of the container's main process, not more: the program dies with the
container and does not come back in the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster.evidence import nothing, of_all
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults import stress_holding
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import (
    Agent,
    NotRunning,
    container_id,
    container_of,
    each,
    is_running,
    objection,
    permissions,
    status_of,
    unfit,
    value,
)
from mlchaos_dagster.engine.ports import Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.objects import Object, mapping, text
from mlchaos_dagster.kube.refs import Ref

_MIB = 1 << 20
_LOOK_S = 0.5
"""Five of the kernel's scheduling periods: a limit is enforced within each."""
_LEAST_SHARE = 0.5
"""Of what is asked and allowed; the service and the node's other pods want some of it, too."""
_AT_THE_LIMIT = 0.8
"""Of its limit a container uses when it is throttled; then a fifth of it is enough for the burners."""
_LEAST_AT_THE_LIMIT = 0.2
_FILLED = 0.95
_BIGGER = 1.2
"""By so much a service must exceed our program, so that what each still allocates makes no difference."""
_TAKES_S = 12.0
"""Of one verb on all targets; the engine tries again."""
FIRST_TO_GO = 1000
"""`oom_score_adj` of the main process while memory beyond the limit is taken (`agent/stress.py`)."""
_AGENT = "mlchaos_dagster.agent:stress.py"


class _Stress:
    """What both have in common: where the program runs and how it ends."""

    kinds = frozenset({"pod"})
    self_limiting = True

    def __init__(self) -> None:
        self.agent = Agent.of(_AGENT)

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Pods are read, commands are run in them."""
        return permissions(request.refs)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """What speaks against it in each container."""
        wanted = request.target.kubernetes.container
        pods = {ref: site.cluster.get(ref.path) for ref in request.refs}
        able = {ref: c for ref, pod in pods.items() if (c := container_of(pod, wanted)) is not None}
        for ref in request.refs:
            if ref not in able:
                yield Objection(
                    f"{ref.shown} has no container {wanted}", "targets.….kubernetes.container: one of its own"
                )
        found = each(
            list(able), lambda ref: unfit(site, self.agent, ref, able[ref]["name"], {"lease": ""}), no_step, _TAKES_S
        )
        for ref, result in found.items():
            seen, said = value(result)
            if said:
                yield objection(said)
            else:
                yield from self._against(ref, able[ref], pods[ref] or {}, seen, request.params)

    def _against(
        self, ref: Ref, container: Object, pod: Object, seen: dict[str, Any], params: dict[str, Any]
    ) -> Iterator[Objection]:
        raise NotImplementedError

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which container of each pod, as it is now: its id, its limits, how likely an OOM victim its main process is."""

        def read(ref: Ref) -> dict[str, Any]:
            pod = site.cluster.get(ref.path)
            container = container_of(pod, request.target.kubernetes.container)
            if text(pod, "metadata", "uid") != ref.uid or container is None:
                raise DriverError(f"{ref.shown} is gone, or has no such container", driver=NAME, verb="undo")
            name = str(container["name"])
            seen = self.agent.ask(site, ref, name, "look", {"lease": ""})
            return {
                "container": name,
                "container_id": container_id(pod, name),
                "restarts": int(status_of(pod, name).get("restartCount", 0)),
                "adj": seen["main"]["adj"],
                "cpu_limit": seen["cgroup"]["cpu_limit"],
                "memory_limit": seen["cgroup"]["memory_limit"],
                "memory": seen["cgroup"]["memory"],
                "oom_kills": seen["cgroup"]["oom_kills"],
            }

        found = each(request.refs, read, step, _TAKES_S)
        return {"pods": {str(ref): value(result) for ref, result in found.items()}}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Start the program in every target's container.

        Raises:
            InjectFailed: a container is another one than it was, or the program did not start. On failure: what was
                started has been told to end.
        """
        lease = injection.lease
        left_s = min(lease.duration_s, lease.deadline_wall - time.time())
        if left_s <= 0:
            raise InjectFailed("the lease's deadline has passed", driver=NAME, verb="inject", lease_id=lease.id)
        orders: dict[Ref, tuple[str, dict[str, Any]]] = {}
        for ref in injection.refs:
            before, pod = injection.undo["pods"][str(ref)], site.cluster.get(ref.path)
            name = before["container"]
            if not is_running(pod, ref, name) or container_id(pod, name) != before["container_id"]:
                said = f"container {name} of {ref.shown} is not the one any more that was frozen"
                raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
            orders[ref] = (name, {**injection.params, "seconds": left_s, "adj": before["adj"]})
        stress_holding.hold(site, lease, self.agent, orders, step)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Let go of the streams, then end in every container whatever carries the lease's id.

        Raises:
            RecoverFailed: a container could not be entered, or a process did not go.
        """
        lease = injection.lease
        stress_holding.let_go(lease.id)

        def end(ref: Ref) -> str:
            before = injection.undo["pods"][str(ref)]
            if not is_running(site.cluster.get(ref.path), ref, before["container"]):
                return ""  # no process outlives its container
            order = {"lease": lease.id, "adj": before["adj"]}
            try:
                left = self.agent.ask(site, ref, before["container"], "end", order)["pids"]
            except NotRunning:
                return ""
            return f"{ref.shown}: process {', '.join(map(str, left))} did not end" if left else ""

        found = each(injection.refs, end, step, _TAKES_S)
        bad = [str(said) for said in found.values() if said]
        if bad:
            raise RecoverFailed("; ".join(bad), driver=NAME, verb="recover", lease_id=lease.id)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """What the container's own `/proc` and cgroup say; effective only where it was seen at every target."""
        found = each(injection.refs, lambda ref: self._active(site, injection, ref), no_step, _TAKES_S)
        return of_all(value(result) for result in found.values())

    def _active(self, site: Site, injection: Injection, ref: Ref) -> Evidence:
        before = injection.undo["pods"][str(ref)]
        pod = site.cluster.get(ref.path)
        if text(pod, "metadata", "uid") != ref.uid:
            return nothing(f"{ref.shown} is gone, and with it whatever ran in it")
        if (ended := self._ended(injection, ref, pod)) is not None:
            return ended
        if not is_running(pod, ref, before["container"]):
            return nothing(f"{ref.shown}: container {before['container']} is not running, no process of ours is in it")
        order = {"lease": injection.lease.id, "interval": _LOOK_S}
        try:
            seen = self.agent.ask(site, ref, before["container"], "look", order)
        except NotRunning:  # it ended while we looked
            pod = site.cluster.get(ref.path)
            gone = nothing(f"{ref.shown}: container {before['container']} ended, and with it whatever ran in it")
            return self._ended(injection, ref, pod) or gone
        return self._seen(injection, ref, seen)

    def _ended(self, injection: Injection, ref: Ref, pod: Object | None) -> Evidence | None:
        """Evidence from how the frozen container ended; None: it says nothing about the fault."""
        return None

    def _seen(self, injection: Injection, ref: Ref, seen: dict[str, Any]) -> Evidence:
        raise NotImplementedError


class CpuStress(_Stress):
    """`cores` burners, busy for `load` of the time."""

    def _against(
        self, ref: Ref, container: Object, pod: Object, seen: dict[str, Any], params: dict[str, Any]
    ) -> Iterator[Objection]:
        asked, cpus = float(params["cores"]) * float(params["load"]), int(seen["cpus"])
        if not seen["cgroup"]["cpu_limit"] and asked > cpus / 2:
            yield Objection(
                f"container {container['name']} of {ref.shown} has no CPU limit: {asked:g} cores are more than half of its "
                f"node's {cpus}",
                "resources.limits.cpu on the container, or fewer cores",
            )

    def _seen(self, injection: Injection, ref: Ref, seen: dict[str, Any]) -> Evidence:
        asked = float(injection.params["cores"]) * float(injection.params["load"])
        limit, burnt, used = seen["cgroup"]["cpu_limit"], float(seen["burnt_cores"]), seen["used_cores"]
        if not seen["pids"]:
            return nothing(f"{ref.shown}: no burner of lease {injection.lease.id} in its container")
        most = min(asked, limit or asked)
        full = bool(limit) and used is not None and used >= _AT_THE_LIMIT * limit
        effective = burnt >= _LEAST_SHARE * most or (full and burnt >= _LEAST_AT_THE_LIMIT * most)
        pids = ", ".join(map(str, seen["burners"]))
        line = (
            f"{ref.shown}: {len(seen['burners'])} burners (pid {pids}) burn {burnt:.3f} cores, {asked:g} asked, "
            f"{f'its limit is {limit:g}' if limit else 'it has no limit: neighbours on the node feel it'} "
            f"(over {seen['interval_s']:.1f} s)"
        )
        whole = "" if used is None else f"{ref.shown}: the container uses {used:.3f} cores"
        waits = "" if not seen["throttled"] else f", throttled {seen['throttled']:.1f} s a second"
        lines = [line, *([whole + waits] if whole else [])]
        if not effective and seen["busy"] > 2 * seen["cpus"]:
            lines.append(
                f"{ref.shown}: its node has no CPU left: load average {seen['busy']:.0f} on {seen['cpus']} cores"
            )
        return Evidence(present=True, effective=effective, lines=tuple(lines))


class MemoryStress(_Stress):
    """`bytes` in the container's cgroup; beyond its limit the kernel kills its main process, once."""

    def _against(
        self, ref: Ref, container: Object, pod: Object, seen: dict[str, Any], params: dict[str, Any]
    ) -> Iterator[Objection]:
        own = text(container, "resources", "limits", "memory") or text(pod, "spec", "resources", "limits", "memory")
        if not own or not seen["cgroup"]["memory_limit"]:
            yield Objection(
                f"container {container['name']} of {ref.shown} has no memory limit: the memory would be taken from its node, "
                "and the kernel would kill processes of other pods",
                "resources.limits.memory on the container",
            )
        elif _beyond(seen["cgroup"], int(params["bytes"])) and not _is_bigger(seen):
            yield Objection(
                f"the service in container {container['name']} of {ref.shown} is smaller ({_mib(seen['largest'])}) than the program "
                f"that takes its memory ({_mib(seen['own'])}): the kernel would kill that instead",
                "a size that fits the limit, or another target",
            )

    def _ended(self, injection: Injection, ref: Ref, pod: Object | None) -> Evidence | None:
        before = injection.undo["pods"][str(ref)]
        status = status_of(pod, before["container"])
        for state in (mapping(status, "state", "terminated"), mapping(status, "lastState", "terminated")):
            if state.get("containerID") == before["container_id"]:
                return self._end(injection, ref, before, status, state)
        return None

    def _end(self, injection: Injection, ref: Ref, before: dict[str, Any], status: Object, state: Object) -> Evidence:
        """How the very container ended that the program was in: no clock is compared."""
        reason, code = text(state, "reason"), text(state, "exitCode")
        restarts = int(status.get("restartCount", 0)) - int(before["restarts"])
        line = (
            f"{ref.shown}: container {before['container']} ended at {text(state, 'finishedAt')}: {reason}, exit code {code}; "
            f"restarted {restarts} times since, {'ready' if status.get('ready') else 'not ready'} now"
        )
        killed = reason == "OOMKilled"
        # An act that is over counts as there for as long as the run that did it has not taken it away.
        return Evidence(present=killed and stress_holding.holds(injection.lease.id), effective=killed, lines=(line,))

    def _seen(self, injection: Injection, ref: Ref, seen: dict[str, Any]) -> Evidence:
        before, group, wanted = injection.undo["pods"][str(ref)], seen["cgroup"], int(injection.params["bytes"])
        raised = seen["main"]["adj"] == FIRST_TO_GO != before["adj"]
        usage = f"{ref.shown}: its container uses {_mib(group['memory'])} of {_mib(group['memory_limit'])}"
        if not seen["pids"]:
            mark = (
                f"; oom_score_adj of its main process is {seen['main']['adj']}, was {before['adj']}" if raised else ""
            )
            who = f"{ref.shown}: no process of lease {injection.lease.id} in its container{mark}"
            kills = (group["oom_kills"] or 0) - (before["oom_kills"] or 0)
            others = f"{ref.shown}: the kernel killed {kills} processes for memory, and not the container's main one"
            return Evidence(present=raised, effective=False, lines=(who, usage, *([others] if kills > 0 else [])))
        line = f"{ref.shown}: pid {seen['pids'][0]} holds {_mib(seen['held'])} of {_mib(wanted)}"
        return Evidence(present=True, effective=seen["held"] >= _FILLED * wanted, lines=(line, usage))


def _beyond(group: dict[str, Any], size: int) -> bool:
    """Whether so much more memory meets the limit."""
    return size > int(group["memory_limit"]) - int(group["memory"] or 0) + int(group["cache"])


def _is_bigger(seen: dict[str, Any]) -> bool:
    """Whether the kernel takes the service, not our program: by size, and by the main process's `oom_score_adj`."""
    bonus = (FIRST_TO_GO - int(seen["main"]["adj"] or 0)) * int(seen["cgroup"]["memory_limit"]) // 1000
    most = max(int(seen["largest"]), int(seen["main"]["resident"]) + bonus)
    return bool(seen["cgroup"]["oom_group"]) or most > _BIGGER * int(seen["own"])


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / _MIB:.0f} MiB"
