"""The volume that a model file is on: whether it ends with its pod, and from where else the file can be reached.

A claim outlives the pod through which a file on it was damaged: the pod that replaces it serves the damaged file. So the
file is looked for, and put back, through any pod that mounts the claim.
"""

from __future__ import annotations

from typing import Any

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import container_id, container_of, is_running
from mlchaos_dagster.kube.client import Forbidden, Site
from mlchaos_dagster.kube.objects import Object, items, text
from mlchaos_dagster.kube.refs import Ref, collection
from mlchaos_dagster.kube.selecting import is_there

_WITH_THE_POD = ("emptyDir", "ephemeral", "configMap", "secret", "projected", "downwardAPI", "image")
_CLAIM = "persistentVolumeClaim"


def mount_of(pod: Object | None, container: Object, path: str) -> dict[str, str] | None:
    """The volume that the file is on, where on it the file is, and its claim; None: the container's own layer."""
    found = _mount(container, path)
    if found is None:
        return None
    at, sub = _at(found)
    return {
        "name": str(found["name"]),
        "below": (f"/{sub}" if sub else "") + path[len(at) :],
        "claim": text(_volume(pod, str(found["name"])), _CLAIM, "claimName"),
    }


def unfit(pod: Object | None, container: Object, path: str) -> str:
    """Why a file there could not be put back for certain; empty: it could."""
    found = _mount(container, path)
    volume = _volume(pod, str(found["name"])) if found else Object()
    kinds = [kind for kind in volume if kind != "name"]
    if not found or not kinds or kinds[0] == _CLAIM or kinds[0] in _WITH_THE_POD:
        return ""
    return f"is on a volume ({kinds[0]}) that outlives its pod, and that no other pod is known to reach"


def home(site: Site, ref: Ref, before: dict[str, Any]) -> tuple[Ref, Object | None, dict[str, Any]]:
    """The pod in which the file is now, and `before` as seen from there; no pod: nobody has it.

    The frozen pod as long as it lives; of a claim, then, any pod that mounts it.
    """
    pod, mount = frozen.read(site, ref), before["mount"]
    if pod is not None and is_there(pod):
        return ref, pod, before
    if mount is not None and mount.get("claim"):
        for other in site.cluster.list(collection("pod", ref.namespace)):
            if is_there(other) and (seen := _seen_from(other, before)):
                return Ref.of("pod", other), other, seen
    going = pod is not None and bool(text(pod, "metadata", "deletionTimestamp"))
    return ref, pod if going else None, before  # one that is over has no volumes any more


def lost(site: Site, ref: Ref, before: dict[str, Any]) -> str:
    """The claim that keeps the file although no pod has it; empty: the file went with its pod."""
    name = text(before["mount"], "claim")
    if not name:
        return ""
    try:
        found = site.cluster.get(f"/api/v1/namespaces/{ref.namespace}/persistentvolumeclaims/{name}")
    except Forbidden:
        return name  # unknown is not gone
    return name if found is not None else ""


def _seen_from(pod: Object, before: dict[str, Any]) -> dict[str, Any] | None:
    """The same file in another pod's container; None: that one does not have it, or does not run."""
    container = container_of(pod, before["container"])
    if container is None or not is_running(pod, Ref.of("pod", pod), before["container"]):
        return None
    for mount in items(container, "volumeMounts"):
        at, sub = _at(mount)
        mount_sub, below = (f"/{sub}" if sub else ""), before["mount"]["below"]
        if text(_volume(pod, str(mount["name"])), _CLAIM, "claimName") != before["mount"]["claim"]:
            continue
        if below.startswith(f"{mount_sub}/"):
            seen = {**before["mount"], "name": str(mount["name"])}
            path = at + below[len(mount_sub) :]
            return {**before, "path": path, "mount": seen, "container_id": container_id(pod, before["container"])}
    return None


def _mount(container: Object, path: str) -> Object | None:
    mounts = [
        m for m in items(container, "volumeMounts") if f"{path}/".startswith(str(m["mountPath"]).rstrip("/") + "/")
    ]
    return max(mounts, key=lambda m: len(str(m["mountPath"])), default=None)


def _at(mount: Object) -> tuple[str, str]:
    return str(mount["mountPath"]).rstrip("/"), str(mount.get("subPath") or "").strip("/")


def _volume(pod: Object | None, name: str) -> Object:
    return next((v for v in items(pod, "spec", "volumes") if text(v, "name") == name), Object())
