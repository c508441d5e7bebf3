"""Looks from inside the frozen pods: rules and queues of their network, what a client there sees, stressors and what they burn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.drivers.chaos_mesh import eye
from mlchaos_dagster.drivers.chaos_mesh.eye import Eye
from mlchaos_dagster.drivers.chaos_mesh.eyes import Seen
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import container_of, status_of
from mlchaos_dagster.drivers.chaos_mesh.resources import chain_names, name_of, set_prefix
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults.network_links import node_addresses, other_end
from mlchaos_dagster.engine.ports import Objection, Step, no_step
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object, mapping, part, text
from mlchaos_dagster.kube.refs import Ref

NAME = "chaos_mesh"
BROUGHT = "chaos_mesh_resource"
_LEAST_DELAY = 0.9
"""Of the delay that was asked for; a clock does the rest."""
_LEAST_SHARE = 0.5
_LEAST_AT_LIMIT = 0.2
"""Of its CPU limit: the service wants some of it, too."""
_FILLED = 0.9
_LOOK_S = 0.5


class _Inside:
    """What both have in common: a container of ours in each pod."""

    capabilities: tuple[str, ...] = ()

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Pods, containers of ours in them."""
        return eye.permissions(sorted({ref.namespace for ref in request.refs if ref.namespace}))

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """A container that is not there; a pod that does not let ours in."""
        for ref, pod in frozen.read_all(site, request.refs).items():
            if pod is None:
                continue
            container = container_of(pod, request.target.kubernetes.container)
            if not container:
                yield Objection(
                    f"{ref.shown} has no container {request.target.kubernetes.container}",
                    "targets.….kubernetes.container: one of its own",
                )
                return
            yield from self._against(request, ref, pod, container)
            if said := eye.refused(site, pod, ref, self.capabilities, self._beside(container)):
                yield Objection(
                    f"{ref.shown} does not let a container of ours look: {said}",
                    f"a namespace whose pod security allows {', '.join(self.capabilities)}",
                )
                return

    def open(self, site: Site, injection: Injection, step: Step) -> dict[str, str]:
        """Start them all, and look once before the fault."""
        eyes = self._eyes(site, injection)
        eye.together(eyes, lambda e: e.open(), step, eye.START_S + 5)
        before = eye.together(eyes, lambda e: e.ask(e.state()[1], "look", {}), step, eye.ALL_S)
        probes = {str(e.ref.uid): mapping(found, "probes") for e, found in zip(eyes, before, strict=True)}
        return {"mlchaos.dev/before": json.dumps(probes, separators=(",", ":"))}

    def reopen(self, site: Site, injection: Injection, step: Step) -> None:
        """Where one was, and does not look any more, another is started."""
        eye.together(
            self._eyes(site, injection), lambda e: e.open(eye.AGAIN_S, first=False), step, eye.AGAIN_S + eye.ALL_S
        )

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """Each pod. Raises DriverUnavailable."""
        before: Object = {}
        for one in those:
            before = json.loads(text(one, "metadata", "annotations", "mlchaos.dev/before") or "{}")
        order: Object = {**self._when(injection), **({"last": injection.lease.id, "probes": []} if last else {})}
        found = eye.together(
            self._eyes(site, injection), lambda e: self._one(injection, e, before, order), no_step, eye.ALL_S
        )
        return Seen(
            any(s.present for s in found),
            bool(found) and all(s.effective for s in found),
            tuple(line for s in found for line in s.lines),
        )

    def mend(self, site: Site, injection: Injection, step: Step) -> list[str]:
        """Take out of effect what is left in the pods."""

        def one(e: Eye) -> str:
            pod, now = e.state()
            if not eye.running(pod) or now.state != "running":
                return ""
            e.ask(now, "mend", {})
            return f"{e.ref.shown}: what was left in it was taken away by us"

        return [said for said in eye.together(self._eyes(site, injection), one, step, eye.ALL_S) if said]

    def _one(self, injection: Injection, e: Eye, before: Object, order: Object) -> Seen:
        pod, now = e.state()
        if not eye.running(pod) or pod is None:
            return Seen(False, False, (f"{e.ref.shown} is gone, and what was in it",))
        if now.state == "absent":
            return Seen(False, False, (f"{e.ref.shown}: nothing of ours was ever started in it",))
        if e.never_ran(pod):
            return Seen(False, False, (f"{e.ref.shown}: our container never started, so nothing was asked for",))
        if now.ended_well:
            said = f"{e.ref.shown}: nothing is left, seen from inside at our last look ({now.words.get('why')})"
            return Seen(False, False, (said,))
        if now.state != "running":
            left = ", ".join(now.words.get("left", ())) or now.words.get("error") or now.reason or now.state
            return Seen(True, False, (f"{e.ref.shown}: nobody looks there now ({left})",))
        return self._seen(injection, e, pod, e.ask(now, "look", order), before.get(e.ref.uid, {}))

    def _eyes(self, site: Site, injection: Injection) -> list[Eye]:
        known: dict[str, Object] = injection.undo["eyes"]["pods"]
        return [
            Eye(
                site,
                injection,
                ref,
                self._order(injection),
                self.capabilities,
                self._beside(str(known[ref.uid]["container"])),
            )
            for ref in injection.refs
        ]

    def _beside(self, container: str) -> str:
        return ""

    def _when(self, injection: Injection) -> Object:
        return {}

    def _against(self, request: Request, ref: Ref, pod: Object, container: str) -> Iterator[Objection]:
        return iter(())

    def _order(self, injection: Injection) -> Object:
        raise NotImplementedError

    def _seen(self, injection: Injection, e: Eye, pod: Object, found: dict[str, Any], before: Object) -> Seen:
        raise NotImplementedError


class NetworkEyes(_Inside):
    """Rules, queues, and connections to the other end (or to the pod's name server)."""

    capabilities = ("NET_ADMIN", "NET_RAW")

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Services and nodes, too: whose addresses are meant, whose are spared."""
        yield from super().permissions(site, request)
        yield Permission("get", "nodes")
        for namespace in sorted({ref.namespace for ref in request.refs if ref.namespace}):
            yield Permission("list", "services", namespace)

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """The other end, and the pods' own nodes."""
        end = other_end(site, request.target)
        pods: dict[str, Any] = {}
        spare: set[str] = set()
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            pods[ref.uid] = {"container": container_of(pod, request.target.kubernetes.container)}
            spare |= set(node_addresses(pod or {})) | gateways(site, pod)
            step(done + 1, len(request.refs))
        return {"pods": pods, "spare": sorted(spare), **end}

    def _against(self, request: Request, ref: Ref, pod: Object, container: str) -> Iterator[Objection]:
        if text(pod, "spec", "hostNetwork") == "True":
            yield Objection(
                f"{ref.shown} uses the node's network: the fault would hit the node", "pods with their own network"
            )

    def _order(self, injection: Injection) -> Object:
        name = name_of(injection.lease.id)
        known = injection.undo["eyes"]
        probes = list(known["probes"]) or ([] if known["peers"] else ["dns:"])
        return {"chains": list(chain_names(name)), "sets": set_prefix(name), "queues": True, "probes": probes}

    def _seen(self, injection: Injection, e: Eye, pod: Object, found: dict[str, Any], before: Object) -> Seen:
        rules: list[str] = found["rules"]
        queues: list[str] = found["queues"]
        here = e.ref.shown
        lines: list[str] = []
        hits: list[bool] = []
        for place, seen in mapping(found, "probes").items():
            was = mapping(before, place)
            if not part(was, "answered"):
                continue
            hit = _is_hit(injection, was, seen)
            hits.append(hit)
            took = f"{seen['took_s'] * 1000:.0f} ms ({was['took_s'] * 1000:.0f} ms before the fault)"
            lines.append(f"{here}: {place} {'answered after' if seen['answered'] else 'gave no answer within'} {took}")
        lines += [f"{here}: {queue}" for queue in queues]
        lines.append(f"{here}: {len(rules)} rules and {len(queues)} queues of Chaos Mesh in effect in its network")
        there = bool(rules or queues)
        # Of a team's own resource nobody knows what a client would see of it: the kernel's rules are what is seen.
        effective = there and (injection.lease.kind == BROUGHT or (bool(hits) and all(hits)))
        return Seen(there, effective, tuple(lines))


class StressEyes(_Inside):
    """Stressors among the target container's processes, the CPU they burn, the memory they hold."""

    capabilities = ("KILL",)

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which container of each pod, and its limits."""
        pods: dict[str, Any] = {}
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            name = container_of(pod, request.target.kubernetes.container)
            if "running" not in mapping(status_of(pod, name), "state"):
                raise DriverError(f"container {name} of {ref.shown} does not run", driver=NAME, verb="undo")
            pods[ref.uid] = {"container": name, "cpu": limit_of(pod, name, "cpu")}
            step(done + 1, len(request.refs))
        return {"pods": pods}

    def _against(self, request: Request, ref: Ref, pod: Object, container: str) -> Iterator[Objection]:
        if "running" not in mapping(status_of(pod, container), "state"):
            yield Objection(f"container {container} of {ref.shown} does not run", "a container that runs")
        if request.kind == "memory_stress":
            limit, asked = limit_of(pod, container, "memory"), int(request.params["bytes"])
            if not limit:
                yield Objection(
                    f"container {container} of {ref.shown} has no memory limit: the memory would be taken from its node",
                    "resources.limits.memory on the container",
                )
            elif asked >= limit:
                yield Objection(
                    f"{asked >> 20} MiB are more than container {container} of {ref.shown} may have ({int(limit) >> 20} "
                    "MiB): the kernel would kill the stressor of Chaos Mesh, not the service",
                    "a size that fits the limit; or the backend kubernetes, which makes the service the victim",
                )

    def _beside(self, container: str) -> str:
        return container

    def _order(self, injection: Injection) -> Object:
        return {"stress": True, "chains": []}

    def _when(self, injection: Injection) -> Object:
        return {"interval": _LOOK_S}

    def _seen(self, injection: Injection, e: Eye, pod: Object, found: dict[str, Any], before: Object) -> Seen:
        stress = mapping(found, "stress")
        pids: list[int] = stress["pids"]
        here, params = e.ref.shown, injection.params
        if not pids:
            return Seen(False, False, (f"{here}: no stressor among the processes of its container",))
        if injection.lease.kind == "cpu_stress" or "bytes" not in params:
            limit = float(injection.undo["eyes"]["pods"][e.ref.uid]["cpu"] or 0.0)
            asked = float(params.get("cores", 0.0)) * float(params.get("load", 1.0))
            burnt = float(stress["burnt_cores"])
            least = _LEAST_AT_LIMIT * limit if limit and limit <= asked else _LEAST_SHARE * asked
            line = f"{here}: {len(pids)} stressors burn {burnt:.3f} cores" + (f", {asked:g} asked" if asked else "")
            return Seen(True, burnt >= least > 0 or (not asked and burnt > 0), (line + _bound(limit),))
        held = int(stress["held"])
        line = f"{here}: {len(pids)} stressors hold {held >> 20} MiB of {int(params['bytes']) >> 20} MiB"
        return Seen(True, held >= _FILLED * int(params["bytes"]), (line,))


def gateways(site: Site, pod: Object | None) -> set[str]:
    """Whence a kubelet asks, besides its node's own address: the first address of the pods' network on that node."""
    node = site.cluster.get(f"/api/v1/nodes/{text(pod, 'spec', 'nodeName')}") if pod is not None else None
    cidr = text(node, "spec", "podCIDR")
    base, _, _ = cidr.partition("/")
    words = base.split(".")
    return {".".join([*words[:3], str(int(words[3]) + 1)])} if len(words) == 4 else set()


def limit_of(pod: Object | None, container: str, what: str) -> float:
    """A container's limit, in cores or bytes; 0: none."""
    for one in part(pod, "spec", "containers") or ():
        if text(one, "name") == container:
            said = text(one, "resources", "limits", what)
            return quantity(said) if said else 0.0
    return 0.0


def quantity(said: str) -> float:
    """A Kubernetes quantity as a number."""
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("m", 1e-3), ("k", 1e3)):
        if said.endswith(suffix):
            return float(said[: -len(suffix)]) * factor
    for suffix, factor in (("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if said.endswith(suffix):
            return float(said[:-1]) * factor
    return float(said)


def _is_hit(injection: Injection, was: Object, seen: Object) -> bool:
    params = injection.params
    if injection.lease.kind == "network_latency":
        least = _LEAST_DELAY * max(params["latency_s"] - params["jitter_s"], params["latency_s"] / 10)
        return float(seen["took_s"]) - float(was["took_s"]) >= least
    return not seen["answered"]


def _bound(limit: float) -> str:
    return f", its limit is {limit:g}" if limit else ", it has no limit: neighbours on the node feel it"
