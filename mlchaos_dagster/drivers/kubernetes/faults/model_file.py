"""A model file inside the targets' containers is damaged; the original stays beside it on the same volume.

A program of ours (`agent/files.py`) does both, over exec. The original keeps its content, owner and times, since only its
name changes. What a restart takes away, it takes away with the fault: a container's own layer is the image's again; on a
volume both files stay. Where the service does not start any more with the damaged file, nothing can be run in its
container: then the original is put back from an ephemeral container that mounts the same volume.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.evidence import nothing, of_all
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults import model_volume, stress_holding
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import (
    Agent,
    NotRunning,
    container_id,
    container_of,
    each,
    is_running,
    objection,
    permissions,
    unfit,
    value,
)
from mlchaos_dagster.engine.ports import Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref

_TAKES_S = 120.0
"""Of one verb on all targets: gigabytes are read, `step` is called meanwhile."""
_LOOK_S = 20.0
_HOLD_S = 300.0
"""Deadline of the program that prepares the damage; it ends when that is in place."""
_HELPER_S = 60
"""Long enough to read the file back through it; in a loop of crashes the next `recover` starts another one."""
_HELPER_STARTS_S = 30.0


class ModelCorruption:
    """`how` at `kubernetes.path` of the target."""

    kinds = frozenset({"pod"})
    self_limiting = False

    def __init__(self) -> None:
        self.agent = Agent.of("mlchaos_dagster.drivers:s3_damage.py", "mlchaos_dagster.agent:files.py")

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Pods are read, commands are run in them; a helper container for those that do not start any more."""
        spaces = sorted({ref.namespace for ref in request.refs})
        helper = [Permission("patch", "pods/ephemeralcontainers", space) for space in spaces]
        return [*permissions(request.refs), *helper]

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """What speaks against it in each container."""
        where = request.target.kubernetes
        if not where.path.startswith("/"):
            yield Objection("the target names no file", "targets.….kubernetes.path: absolute, inside the container")
            return
        pods = {ref: site.cluster.get(ref.path) for ref in request.refs}
        able = {ref: c for ref, pod in pods.items() if (c := container_of(pod, where.container)) is not None}
        for ref in request.refs:
            if ref not in able:
                yield Objection(
                    f"{ref.shown} has no container {where.container}", "targets.….kubernetes.container: one of its own"
                )
        order = {"path": where.path, "lease": ""}
        looks = each(
            list(able), lambda ref: unfit(site, self.agent, ref, able[ref]["name"], order, _TAKES_S), no_step, _TAKES_S
        )
        for ref, result in looks.items():
            seen, said = value(result)
            if said:
                yield objection(said)
            elif why := seen["unfit"] or model_volume.unfit(pods[ref], able[ref], seen["path"]):
                yield Objection(
                    f"{where.path} in {ref.shown} {why}",
                    "targets.….kubernetes.path: a file that the container's user can replace and give back as it was",
                )
            elif seen["kept"] or seen["partial"]:
                yield Objection(f"{where.path} in {ref.shown} is damaged already", "mlchaos recover")

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which file of each pod, its SHA-256, and what that of its damage will be."""
        where = request.target.kubernetes

        def read(ref: Ref) -> dict[str, Any]:
            pod = site.cluster.get(ref.path)
            container = container_of(pod, where.container)
            if text(pod, "metadata", "uid") != ref.uid or container is None:
                raise DriverError(f"{ref.shown} is gone, or has no such container", driver=NAME, verb="undo")
            seed, name = uuid.uuid4().hex, str(container["name"])
            order = {"path": where.path, "lease": "", "how": request.params["how"], "seed": seed}
            seen = self.agent.ask(site, ref, name, "look", order, _TAKES_S)
            if said := seen["unfit"] or model_volume.unfit(pod, container, seen["path"]):
                raise DriverError(f"{where.path} in {ref.shown} {said}", driver=NAME, verb="undo")
            return {
                "container": name,
                "container_id": container_id(pod, name),
                "mount": model_volume.mount_of(pod, container, seen["path"]),
                "seed": seed,
                **{key: seen[key] for key in ("path", "sha256", "damaged_sha256", "size", "ino", "user")},
            }

        found = each(request.refs, read, step, _TAKES_S)
        return {"pods": {str(ref): value(result) for ref, result in found.items()}}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Keep every original, prepare every damage, look at the lease, put the damage in place.

        Raises:
            InjectFailed: a file is another one than it was, or cannot be replaced.
        """
        lease = injection.lease
        orders: dict[Ref, tuple[str, dict[str, Any]]] = {}
        for ref in injection.refs:
            before, pod = injection.undo["pods"][str(ref)], site.cluster.get(ref.path)
            name = before["container"]
            if not is_running(pod, ref, name) or container_id(pod, name) != before["container_id"]:
                said = f"container {name} of {ref.shown} is not the one any more that was frozen"
                raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
            keys = ("path", "sha256", "seed")
            order = {"lease": lease.id, "how": injection.params["how"], "seconds": _HOLD_S}
            orders[ref] = (name, {**order, **{key: before[key] for key in keys}})
        stress_holding.act(site, lease, self.agent, orders, step, _TAKES_S)

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Put every original back by its name; what others wrote since is left.

        Raises:
            RecoverFailed: a container cannot be entered and the volume not be reached from elsewhere, or an original is lost.
        """
        found = each(injection.refs, lambda ref: self._restore(site, injection, ref), step, _TAKES_S)
        bad = [str(said) for said in found.values() if isinstance(said, DriverError)]
        if bad:
            raise RecoverFailed("; ".join(bad), driver=NAME, verb="recover", lease_id=injection.lease.id)

    def _restore(self, site: Site, injection: Injection, ref: Ref) -> None:
        ref, pod, before = model_volume.home(site, ref, injection.undo["pods"][str(ref)])
        if pod is None:
            if claim := model_volume.lost(site, ref, before):
                said = f"{ref.shown} is gone, its file is on the claim {claim}, and no pod that runs mounts that"
                raise RecoverFailed(said, driver=NAME, verb="recover", lease_id=injection.lease.id)
            return
        keys = ("path", "sha256", "damaged_sha256", "ino")
        order = {"lease": injection.lease.id, **{key: before[key] for key in keys}}
        if is_running(pod, ref, before["container"]):
            with suppress(NotRunning):
                self.agent.ask(site, ref, before["container"], "restore", order, _TAKES_S)
                return
        if before["mount"] is None:
            return  # of the container's own layer, which ended with it: the next one is made from the image
        helper = _helper(site, injection, ref, before)
        self.agent.ask(site, ref, helper, "restore", {**order, "path": _seen_from_helper(before)}, _TAKES_S)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """The files' SHA-256 as they are now, and whether anything of ours is beside them."""
        found = each(injection.refs, lambda ref: self._active(site, injection, ref), no_step, _LOOK_S)
        return of_all(value(result) for result in found.values())

    def _active(self, site: Site, injection: Injection, ref: Ref) -> Evidence:
        frozen_ref = ref
        ref, pod, before = model_volume.home(site, ref, injection.undo["pods"][str(ref)])
        if pod is None:
            if claim := model_volume.lost(site, ref, before):
                said = f"{ref.shown} is gone; its file is on the claim {claim}, which no pod that runs mounts"
                return Evidence(present=True, effective=False, lines=(said,))
            return nothing(f"{ref.shown} is gone, and its files with it")
        order, seen = {"lease": injection.lease.id, "path": before["path"]}, None
        if is_running(pod, ref, before["container"]):
            with suppress(NotRunning):
                seen = self.agent.ask(site, ref, before["container"], "look", order, _LOOK_S)
        if seen is None and before["mount"] is not None and (helper := _running_helper(pod, ref, injection.lease.id)):
            with suppress(NotRunning):
                order["path"] = _seen_from_helper(before)
                seen = self.agent.ask(site, ref, helper, "look", order, _LOOK_S)
        if seen is None:
            said = f"{ref.shown}: container {before['container']} is not running"
            if before["mount"] is None:
                return nothing(f"{said}; the file was in its own layer, the next one is made from the image")
            return Evidence(
                present=True, effective=False, lines=(f"{said}: its file is on a volume and cannot be read",)
            )
        found = _evidence(injection, ref, before, seen, container_id(pod, before["container"]))
        if ref == frozen_ref:
            return found
        # What the service of the frozen pod would do with the file is not to be seen any more.
        claim = text(before["mount"], "claim")
        said = f"{frozen_ref.shown} is gone; its file is on the claim {claim}, seen from {ref.shown}"
        return Evidence(present=found.present, effective=False, lines=(said, *found.lines))


def _evidence(injection: Injection, ref: Ref, before: dict[str, Any], seen: dict[str, Any], now_id: str) -> Evidence:
    now, beside = seen["sha256"], seen["kept"] or seen["partial"]
    if now == before["damaged_sha256"]:
        said = f"damaged ({injection.params['how']})"
    elif now == before["sha256"]:
        said = "as before"
    else:
        said = "written by somebody else since, left alone" if now else "gone, removed by somebody else"
    where = f"{ref.shown}: {before['path']}"
    line = f"{where}: SHA-256 {now[:12] or 'none'}…, before {before['sha256'][:12]}…: {said}"
    more = [f"{where}: the original is kept beside it"] if seen["kept"] else []
    if now_id != before["container_id"]:
        kept = "the volume kept both files" if before["mount"] else "its layer is the image's again"
        more.append(f"{ref.shown}: container {before['container']} was restarted since: {kept}")
    damaged = now == before["damaged_sha256"]
    return Evidence(present=damaged or beside, effective=damaged, lines=(line, *more))


# -- where the service does not start any more ---------------------------------------------------------------------------


_VOLUME = "/mlchaos-volume"
"""Where the helper mounts the whole volume: ephemeral containers know no subPath."""


def _seen_from_helper(before: dict[str, Any]) -> str:
    return f"{_VOLUME}{before['mount']['below']}"


def helper_prefix(lease_id: str) -> str:
    """Of the names of a lease's helper containers; a number follows."""
    return f"mlchaos-file-{hashlib.sha256(lease_id.encode()).hexdigest()[:10]}-"


def _running_helper(pod: Object | None, ref: Ref, lease_id: str) -> str:
    """Name of the lease's helper that runs now; empty: none does."""
    names = [text(c, "name") for c in items(pod, "spec", "ephemeralContainers")]
    return next((n for n in names if n.startswith(helper_prefix(lease_id)) and is_running(pod, ref, n)), "")


def _helper(site: Site, injection: Injection, ref: Ref, before: dict[str, Any]) -> str:
    """An ephemeral container on the same volume, running when this returns. It ends by itself; its entry stays listed.

    Raises:
        DriverUnavailable: it does not start.
    """
    lease_id, pod = injection.lease.id, frozen.read(site, ref)
    if running := _running_helper(pod, ref, lease_id):
        return running
    name = f"{helper_prefix(lease_id)}{len(items(pod, 'spec', 'ephemeralContainers'))}"
    container = container_of(pod, before["container"]) or Object()
    uid, gid = before["user"]
    helper = {
        "name": name,
        "image": site.options.helper_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", str(_HELPER_S)],
        # As the service: what that may do on the volume, this may, and no more.
        "securityContext": {**mapping(container, "securityContext"), "runAsUser": uid, "runAsGroup": gid},
        "volumeMounts": [{"name": before["mount"]["name"], "mountPath": _VOLUME}],
    }
    body = {"spec": {"ephemeralContainers": [helper]}}
    frozen.change(
        site, ref, lambda found: frozen.patch(site, found, f"{ref.path}/ephemeralcontainers", body, "strategic")
    )
    end = time.monotonic() + _HELPER_STARTS_S
    while time.monotonic() < end:
        if is_running(frozen.read(site, ref), ref, name):
            return name
        time.sleep(0.25)
    raise DriverUnavailable(f"the helper {name} in {ref.shown} does not start", driver=NAME, verb="recover")
