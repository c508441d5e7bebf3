"""What `mlchaos doctor` looks at on a cluster: one line a thing, and the command that mends it. Reads only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mlchaos_dagster.domain.environment import Environment, Target
from mlchaos_dagster.drivers.cluster import preflight
from mlchaos_dagster.drivers.cluster.handler import Handler, Request
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Forbidden, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, part, text
from mlchaos_dagster.kube.refs import Ref

SAMPLE: dict[str, Any] = {
    "cores": 1.0,
    "load": 1.0,
    "bytes": 1 << 20,
    "latency_s": 0.1,
    "jitter_s": 0.0,
    "fraction": 0.5,
}
"""Parameters as drivers take them, of every kind: which rights a fault needs does not depend on how strong it is."""
_VERSION = re.compile(r":v?(\d+)\.(\d+)(?:\.(\d+))?(?:$|[-+@])")


@dataclass(frozen=True)
class Point:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "missing", "optional"]
    saw: str
    help: str = ""
    """What mends it: a command, or what to set where."""


def guarded(what: str, look: Callable[[], Iterator[Point]], help: str) -> Iterator[Point]:
    """`look`, of which what may not be seen, or cannot be asked, is a point, too."""
    try:
        yield from look()
    except Forbidden as e:
        yield Point(what, "optional", f"only who may look there can tell: {e}", f"the same as another user, or {help}")
    except DriverError as e:
        yield Point(what, "missing", str(e), help)


def on_cluster(environment: Environment) -> dict[str, Target]:
    """Targets of faults that a cluster serves; one with a bucket or the like is another backend's."""
    return {name: t for name, t in environment.targets.items() if t.s3 is None and t.part is None}


def spaces(site: Site, environment: Environment) -> list[str]:
    """Namespaces that hold targets, sorted."""
    targets = on_cluster(environment).values()
    return sorted(
        {t.kubernetes.namespace or site.options.namespace for t in targets if t.kubernetes.kind.lower() != "node"}
    )


def needed(
    site: Site, environment: Environment, kinds: Iterable[str], handler: Callable[[str], Handler]
) -> set[Permission]:
    """What faults of these kinds ask of the API server, on every target that they fit."""
    found: set[Permission] = set()
    for kind in sorted(kinds):
        chosen = handler(kind)
        for target in on_cluster(environment).values():
            object_kind = target.kubernetes.kind.lower()
            if object_kind in chosen.kinds:
                space = "" if object_kind == "node" else target.kubernetes.namespace or site.options.namespace
                refs = (Ref(object_kind, space, "x", "x"),)
                request = Request(kind, refs, refs, dict(SAMPLE), target)
                found |= preflight.permissions(request, iter(chosen.permissions(site, request)))
    return found


def served(cluster_group: Object | None) -> dict[str, str]:
    """Plural → kind of what an API group has, from its discovery document; empty where there is no such group."""
    found = items(cluster_group, "resources")
    return {text(r, "name"): text(r, "kind") for r in found if "/" not in text(r, "name")}


def deployment(what: str, found: Object, without: str) -> Point:
    """Whether a Deployment is there for its work; `without`: what is not done then."""
    name, space = text(found, "metadata", "name"), text(found, "metadata", "namespace")
    place, wanted = f"Deployment {space}/{name}", int(part(found, "spec", "replicas") or 0)
    available = int(part(found, "status", "availableReplicas") or 0)
    if not wanted:
        again = f"kubectl scale deployment {name} -n {space} --replicas=1"
        return Point(what, "missing", f"{place} is scaled to 0: {without}", again)
    if not available:
        logs = f"kubectl describe deployment {name} -n {space}; kubectl logs deployment/{name} -n {space}"
        return Point(what, "missing", f"{place}: none of {wanted} pods is available", logs)
    return Point(what, "ok", f"{place}, {available} of {wanted} pods available")


def images(found: Object) -> list[str]:
    """Images of a workload's containers."""
    return [text(c, "image") for c in items(found, "spec", "template", "spec", "containers")]


def variable(found: Object, name: str) -> str:
    """An environment variable of a workload's first container that has it; a reference to its own namespace is that."""
    for container in items(found, "spec", "template", "spec", "containers"):
        for variable in items(container, "env"):
            if text(variable, "name") == name:
                if text(variable, "valueFrom", "fieldRef", "fieldPath") == "metadata.namespace":
                    return text(found, "metadata", "namespace")
                return text(variable, "value")
    return ""


def version(what: str, image: str, oldest: tuple[int, int], upgrade: str) -> Point:
    """What an image's tag tells of its version."""
    found = _VERSION.search(image)
    if found is None:
        return Point(what, "optional", f"image {image} does not tell which; {_dotted(oldest)} or later is supported")
    have = int(found[1]), int(found[2])
    if have < oldest:
        return Point(
            what, "missing", f"{found[0].strip(':@')} is not supported: {_dotted(oldest)} or later is", upgrade
        )
    return Point(what, "ok", found[0].strip(":@"))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
