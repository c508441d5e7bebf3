"""From a target's selector to the objects it means now."""

from __future__ import annotations

from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube.client import NAME, NotFound, Permission, Site
from mlchaos_dagster.kube.objects import text
from mlchaos_dagster.kube.refs import Ref, collection

_OVER = ("Succeeded", "Failed")
_INSTALL = {"rollout": "Argo Rollouts is not installed (docs/rollouts.md)"}
"""Kind that is somebody's extension → what to do where it is missing."""


def near(select: str) -> str:
    """The selector of what is hit: the left side of a link."""
    return select.partition("->")[0].strip()


def far(select: str) -> str:
    """The selector of the other end of a link; empty where there is no link."""
    return select.partition("->")[2].strip()


def namespace_of(site: Site, target: Target) -> str:
    """Where the target's objects are; empty for nodes."""
    if target.kubernetes.kind == "Node":
        return ""
    return target.kubernetes.namespace or site.options.namespace


def select(site: Site, target: Target) -> list[Ref]:
    """Objects that match and are not being deleted; of pods only those that have not ended.

    Raises:
        DriverUnavailable: the selector is none, or the cluster did not answer.
    """
    kind, labels = target.kubernetes.kind.lower(), near(target.select)
    if not labels:
        raise DriverUnavailable(
            f'"{target.select}" selects everything. Allowed: labels, such as app=inference', driver=NAME
        )
    try:
        return [Ref.of(kind, found) for found in matching(site, kind, namespace_of(site, target), labels)]
    except NotFound as e:
        said = f"the cluster knows no {target.kubernetes.kind}; {_INSTALL.get(kind, 'is it the API server?')}"
        raise DriverUnavailable(said, driver=NAME) from e


def permission_to(verb: str, kind: str, namespace: str) -> Permission:
    """For objects of a kind; `list` is what `select` needs."""
    group, _, plural = collection(kind, namespace).removeprefix("/").rpartition("/")
    return Permission(verb, plural, namespace, group.split("/")[1] if group.startswith("apis/") else "")


def matching(site: Site, kind: str, namespace: str, labels: str) -> list[dict[str, Any]]:
    """The same as objects."""
    return [o for o in site.cluster.list(collection(kind, namespace), labels=labels) if is_there(o)]


def is_there(found: dict[str, Any]) -> bool:
    """Neither on its way out nor over."""
    return not text(found, "metadata", "deletionTimestamp") and not has_ended(found)


def has_ended(found: dict[str, Any]) -> bool:
    """Nothing of a pod runs any more, and what was in it is gone."""
    return text(found, "status", "phase") in _OVER
