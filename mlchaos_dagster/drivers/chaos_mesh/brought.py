"""`chaos_mesh_resource`: a team's own resource, of any kind that Chaos Mesh has.

Name, labels, selected pods, mode and duration are ours; all else in its spec is the team's and goes to Chaos Mesh as it is.
Kinds that select no pods (AWSChaos and the like) pass through as they are: the target only says what is locked and watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.chaos_mesh import preflight
from mlchaos_dagster.drivers.chaos_mesh.eyes import Eyes
from mlchaos_dagster.drivers.chaos_mesh.handler import Fault
from mlchaos_dagster.drivers.chaos_mesh.inside_eyes import NetworkEyes, StressEyes
from mlchaos_dagster.drivers.chaos_mesh.mount_eyes import MountEyes
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import GoneEyes, ImageEyes, StartEyes, WordEyes
from mlchaos_dagster.drivers.chaos_mesh.resolver_eyes import ResolverEyes
from mlchaos_dagster.drivers.chaos_mesh.resources import WITHOUT_PODS, frozen_selector
from mlchaos_dagster.drivers.chaos_mesh.specs import Made
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import opted_in
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object, mapping, text, words

_POD_EYES: dict[str, Eyes] = {"pod-kill": GoneEyes(), "pod-failure": ImageEyes(), "container-kill": StartEyes()}
_EYES: dict[str, Eyes] = {
    "NetworkChaos": NetworkEyes(),
    "StressChaos": StressEyes(),
    "DNSChaos": ResolverEyes(),
    "IOChaos": MountEyes(),
}
_NOT_FAULTS = ("PodNetworkChaos", "PodIOChaos", "PodHttpChaos")
"""Chaos Mesh's own notes at pods."""
_OURS = ("selector", "mode", "value", "duration")
"""Of a spec."""


class Brought:
    """Any kind; what looks at it depends on the kind."""

    kinds = frozenset({"pod", "node", "deployment", "statefulset"})
    self_limiting = True

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """As the kind needs."""
        fault, meant = _meant(request)
        yield from fault.permissions(site, meant)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """What cannot be guarded, then as for every kind."""
        found = [*_against(request), *opted_in(site, _other_spaces(request.params["resource"]))]
        yield from found
        if not found:
            fault, meant = _meant(request)
            yield from fault.objections(site, meant)

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """As for every kind, with what the team wrote on it."""
        fault, meant = _meant(request)
        return {**fault.undo(site, meant, step), "marks": preflight.marks(request.params["resource"])}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """See `Fault`."""
        _fault(injection.params["resource"]).inject(site, injection, step)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """See `Fault`."""
        _fault(injection.params["resource"]).recover(site, injection, step)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """See `Fault`."""
        return _fault(injection.params["resource"]).active(site, injection)


def _fault(resource: Object) -> Fault:
    kind, spec = text(resource, "kind"), mapping(resource, "spec")
    eyes = _POD_EYES.get(text(spec, "action")) if kind == "PodChaos" else _EYES.get(kind)
    return Fault(kind, _made, eyes or WordEyes())


def _made(site: Site, request: Request, before: dict[str, Any]) -> Made:
    resource: Object = request.params["resource"]
    kind, spec = text(resource, "kind"), mapping(resource, "spec")
    if kind in WITHOUT_PODS:
        return kind, {key: value for key, value in spec.items() if key != "duration"}
    kept = {key: value for key, value in spec.items() if key not in _OURS}
    return kind, {**kept, **frozen_selector(request.refs)}


def _meant(request: Request) -> tuple[Fault, Request]:
    """The request with the container that the spec names, where it names one."""
    resource: Object = request.params["resource"]
    names = words(mapping(resource, "spec"), "containerNames")
    if names:
        place = request.target.kubernetes.model_copy(update={"container": names[0]})
        request = replace(request, target=request.target.model_copy(update={"kubernetes": place}))
    return _fault(resource), request


def _other_spaces(resource: Object) -> set[str]:
    """Namespaces of the pods at the other end of a link, where rules are made in those, too (`from`, `both`)."""
    spec = mapping(resource, "spec")
    if text(resource, "kind") != "NetworkChaos" or text(spec, "direction") not in ("from", "both"):
        return set()
    chosen = mapping(spec, "target", "selector")
    return {*words(chosen, "namespaces"), *mapping(chosen, "pods")}


def _against(request: Request) -> Iterator[Objection]:
    resource: Object = request.params["resource"]
    kind, spec = text(resource, "kind"), mapping(resource, "spec")
    if kind in _NOT_FAULTS:
        yield Objection(f"{kind} is Chaos Mesh's own note at a pod, not a fault", "the resource that makes the fault")
    if spec.get("remoteCluster"):
        yield Objection(
            f"spec.remoteCluster: {spec['remoteCluster']} is another cluster, which nobody here can see",
            "no remoteCluster, and an environment of that cluster",
        )
    others = sorted({ref.kind for ref in request.refs} - {"pod"})
    if others and kind not in WITHOUT_PODS:
        yield Objection(f"{kind} is not for a {others[0]}", "a target of kind pod (targets.….kubernetes.kind)")
