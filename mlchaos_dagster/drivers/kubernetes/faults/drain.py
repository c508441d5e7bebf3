"""The pods of nodes: which of them a drain takes away, which stay, and why.

As `kubectl drain` sorts them: pods of DaemonSets and static pods stay, pods that are over do not count. Pods with an
`emptyDir` go, and what is in it goes with them. Unlike there, pods that tolerate a cordoned node stay, for they would come
straight back; and pods of namespaces that did not opt in are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.labels import COMPONENT, OPT_IN
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.selecting import is_there

_MIRROR = "kubernetes.io/config.mirror"
_CORDONED = "node.kubernetes.io/unschedulable"


@dataclass
class Load:
    """The pods of some nodes."""

    going: list[Object] = field(default_factory=list[Object])
    """To be taken away, also those that are on their way out."""
    daemons: list[Object] = field(default_factory=list[Object])
    tolerant: list[Object] = field(default_factory=list[Object])
    foreign: list[Object] = field(default_factory=list[Object])
    """Of namespaces that did not opt in."""

    @property
    def staying(self) -> str:
        """For people: what stays on the nodes, and why."""
        kinds = [(self.daemons, "of DaemonSets or static"), (self.tolerant, "tolerate a cordoned node")]
        kinds.append((self.foreign, "of namespaces that did not opt in"))
        return "; ".join(f"{len(pods)} pods stay: {why}" for pods, why in kinds if pods)


def load(site: Site, nodes: Iterable[str]) -> Load:
    """The pods that are on the nodes now."""
    opted_in = {text(n, "metadata", "name") for n in site.cluster.list("/api/v1/namespaces", labels=f"{OPT_IN}=true")}
    found = Load()
    for node in nodes:
        for pod in site.cluster.list("/api/v1/pods", fields=f"spec.nodeName={node}"):
            if text(pod, "status", "phase") in ("Succeeded", "Failed"):
                continue
            if text(frozen.controller(pod), "kind") == "DaemonSet" or _MIRROR in mapping(
                pod, "metadata", "annotations"
            ):
                found.daemons.append(pod)
            elif text(pod, "metadata", "namespace") not in opted_in and not _given_up(site, pod):
                found.foreign.append(pod)
            elif any(map(_lets_stay, items(pod, "spec", "tolerations"))):
                found.tolerant.append(pod)
            else:
                found.going.append(pod)
    return found


def is_sweeper(site: Site, pod: Object) -> bool:
    """Whether it is our own sweeper."""
    here = text(pod, "metadata", "namespace") == site.options.control_namespace
    return here and text(pod, "metadata", "labels", COMPONENT) == "sweeper"


def scratch(pods: Iterable[Object]) -> int:
    """How many of them hold data that goes with them."""
    return sum(any("emptyDir" in v for v in items(pod, "spec", "volumes")) for pod in pods)


def names(pods: Iterable[Object]) -> str:
    """`NAMESPACE/NAME, …`, the first five."""
    every = sorted(f"{text(p, 'metadata', 'namespace')}/{text(p, 'metadata', 'name')}" for p in pods)
    return ", ".join(every[:5]) + (f" and {len(every) - 5} more" if len(every) > 5 else "")


def leaving(pod: Object) -> bool:
    """Whether it was told to go."""
    return not is_there(pod)


def _given_up(site: Site, pod: Object) -> bool:
    """The sweeper of an environment that does not spare its node goes like any other pod."""
    return is_sweeper(site, pod) and not site.options.spare_sweeper_node


def _lets_stay(toleration: Object) -> bool:
    everything = not text(toleration, "key") and text(toleration, "operator") == "Exists"
    return (everything or text(toleration, "key") == _CORDONED) and text(toleration, "effect") in ("", "NoSchedule")
