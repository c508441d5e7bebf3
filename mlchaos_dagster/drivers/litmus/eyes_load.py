"""CPU and memory of a target's container, read from its own cgroup.

What the cgroup counts is the effect itself. Litmus's stressors are put into it from outside, and into the container's
process namespace: there they are seen by name. Python must be in the container to read both.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
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
from mlchaos_dagster.drivers.litmus.eyes import Sight
from mlchaos_dagster.drivers.litmus.tracks import Tracks
from mlchaos_dagster.engine.ports import Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, RecoverFailed
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.objects import mapping, text
from mlchaos_dagster.kube.refs import Ref

_AGENT = "mlchaos_dagster.agent:stress.py"
_MIB = 1 << 20
_LEAST_SHARE = 0.5
"""Of what is asked and allowed: the service and the node's other pods want some of it, too."""
_FULL = 0.8
"""Of its CPU limit a container uses when it is throttled."""
_FILLED = 0.8
"""Of the memory asked for: stress-ng gives some of it back between its rounds."""
_APART_S = 1.0
"""Between two readings of a counter."""
_TAKES_S = 20.0
_ORDER = {"lease": ""}
_STRESSORS = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/stat") as file: name, _, rest = file.read().partition("(")[2].rpartition(")")
    except OSError: continue
    if name.startswith("stress-ng") and rest.split()[0] != "Z": print(pid, end=" ")
"""
"""Prints the pids of living stressors."""
_KILLED = """
import signal
def print(pid, end):
    try: os.kill(int(pid), signal.SIGKILL)
    except OSError: pass
"""
"""Before the former: kills them instead, where the container's user may (stressors are root's)."""


class Load:
    """`pod-cpu-hog` and `pod-memory-hog`.

    Args:
        asked: What the experiment asks of each target: `cores`, or `bytes`.
    """

    def __init__(self, asked: dict[str, float]) -> None:
        self.asked, self.agent = asked, Agent.of(_AGENT)

    def permissions(self, request: Request) -> Iterable[Permission]:
        """Pods are read, commands are run in them."""
        return permissions(request.refs)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """No such container, no Python in it; memory without a limit would be the node's."""
        for ref in request.refs:
            pod = frozen.read(site, ref)
            container = container_of(pod, request.target.kubernetes.container)
            if pod is None or container is None:
                yield Objection(f"{ref.shown} has no such container", "targets.….kubernetes.container: one of its own")
                continue
            seen, said = unfit(site, self.agent, ref, container["name"], _ORDER)
            if said:
                yield objection(said)
            elif "cores" in self.asked and not seen["cgroup"]["cpu_limit"] and self.asked["cores"] > seen["cpus"] / 2:
                yield Objection(
                    f"container {container['name']} of {ref.shown} has no CPU limit: {self.asked['cores']:g} cores are more "
                    f"than half of its node's {seen['cpus']}",
                    "resources.limits.cpu on the container, or fewer cores",
                )
            elif "bytes" in self.asked and not seen["cgroup"]["memory_limit"]:
                yield Objection(
                    f"container {container['name']} of {ref.shown} has no memory limit: the memory would be its node's",
                    "resources.limits.memory on the container",
                )

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """What each container uses without the fault."""

        def read(ref: Ref) -> dict[str, Any]:
            pod = frozen.read(site, ref)
            container = container_of(pod, request.target.kubernetes.container)
            if pod is None or container is None:
                raise DriverError(f"{ref.shown} is gone, or has no such container", driver=NAME, verb="undo")
            name = str(container["name"])
            kept = {"container": name, "id": container_id(pod, name)}
            return {**kept, "restarts": int(status_of(pod, name).get("restartCount", 0)), **self._use(site, ref, name)}

        found = each(request.refs, read, step, _TAKES_S)
        return {"use": {ref.uid: value(result) for ref, result in found.items()}}

    def open(self, site: Site, injection: Injection, step: Step) -> None:
        """Nothing is needed."""

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        """No stressor is in the containers: one whose helper was killed lives on until its own end. Raises RecoverFailed."""

        def left(ref: Ref) -> str:
            name = str(injection.undo["before"]["use"][ref.uid]["container"])
            if not is_running(frozen.read(site, ref), ref, name):
                return ""
            done = site.cluster.exec(ref.namespace, ref.name, name, ["python3", "-I", "-S", "-c", _STRESSORS])
            if done.code != 0:
                if not is_running(frozen.read(site, ref), ref, name):
                    return ""
                raise DriverUnavailable(f"{ref.shown}: its processes cannot be read: {done.err.strip()}", driver=NAME)
            return f"{ref.shown}: stressor still runs, pid {done.out.strip()}" if done.out.strip() else ""

        found = [value(said) for said in each(injection.refs, left, step, _TAKES_S).values()]
        if any(found):
            raise RecoverFailed("; ".join(filter(None, found)), driver=NAME, verb="recover")

    def end(self, site: Site, injection: Injection, step: Step) -> None:
        """Kill the stressors of a helper that was killed without grace: they would live on until their own end."""

        def kill(ref: Ref) -> None:
            name = str(injection.undo["before"]["use"][ref.uid]["container"])
            if is_running(frozen.read(site, ref), ref, name):
                site.cluster.exec(ref.namespace, ref.name, name, ["python3", "-I", "-S", "-c", _KILLED + _STRESSORS])

        for done in each(injection.refs, kill, step, _TAKES_S).values():
            value(done)

    def close(self, site: Site, injection: Injection, step: Step) -> None:
        """Nothing was left."""

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """What each container uses now, against before."""
        found = each(injection.refs, lambda ref: self._seen(site, injection, ref), no_step, _TAKES_S)
        sights = [value(result) for result in found.values()]
        lines = tuple(line for s in sights for line in s.lines)
        return Sight(all(s.effective for s in sights), lines=lines)

    def _use(self, site: Site, ref: Ref, container: str) -> dict[str, Any]:
        first, at = self.agent.ask(site, ref, container, "look", _ORDER)["cgroup"], time.monotonic()
        if "bytes" in self.asked:
            return {"memory": first["memory"], "memory_limit": first["memory_limit"], "oom_kills": first["oom_kills"]}
        time.sleep(_APART_S)
        later, took = self.agent.ask(site, ref, container, "look", _ORDER)["cgroup"], time.monotonic() - at
        burnt = float(later["cpu_s"] or 0.0) - float(first["cpu_s"] or 0.0)
        return {"cores": burnt / took, "cpu_limit": later["cpu_limit"]}

    def _seen(self, site: Site, injection: Injection, ref: Ref) -> Sight:
        before: dict[str, Any] = injection.undo["before"]["use"][ref.uid]
        pod, name = frozen.read(site, ref), str(before["container"])
        if pod is None:
            return Sight(False, lines=(f"{ref.shown} is gone",))
        for state in ("state", "lastState"):
            ended = mapping(status_of(pod, name), state, "terminated")
            if ended and text(ended, "containerID") == before["id"]:
                killed = text(ended, "reason") == "OOMKilled" and "bytes" in self.asked
                return Sight(killed, lines=(f"{ref.shown}: container {name} ended: {text(ended, 'reason')}",))
        try:
            now = self._use(site, ref, name)
        except NotRunning as e:
            return Sight(False, lines=(str(e),))
        return (_memory if "bytes" in self.asked else _cpu)(ref, self.asked, before, now)


def _cpu(ref: Ref, asked: dict[str, float], before: dict[str, Any], now: dict[str, Any]) -> Sight:
    limit, used = now["cpu_limit"], float(now["cores"])
    most = min(asked["cores"], limit or asked["cores"])
    more = used - float(before["cores"])
    full = bool(limit) and used >= _FULL * limit and more > 0
    line = (
        f"{ref.shown}: its container uses {used:.3f} cores ({before['cores']:.3f} before), {asked['cores']:g} asked, "
        f"{f'its limit is {limit:g}' if limit else 'it has no limit'}"
    )
    return Sight(more >= _LEAST_SHARE * most or full, lines=(line,))


def _memory(ref: Ref, asked: dict[str, float], before: dict[str, Any], now: dict[str, Any]) -> Sight:
    more = int(now["memory"] or 0) - int(before["memory"] or 0)
    kills = int(now["oom_kills"] or 0) - int(before["oom_kills"] or 0)
    line = (
        f"{ref.shown}: its container uses {int(now['memory'] or 0) / _MIB:.0f} MiB "
        f"({int(before['memory'] or 0) / _MIB:.0f} before) of {int(now['memory_limit'] or 0) / _MIB:.0f} MiB, "
        f"{asked['bytes'] / _MIB:.0f} MiB asked"
    )
    lines = (line, f"{ref.shown}: the kernel killed {kills} processes in it for memory") if kills > 0 else (line,)
    return Sight(more >= _FILLED * asked["bytes"] or kills > 0, lines=lines)
