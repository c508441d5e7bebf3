"""The frozen object and no other: read, changed and shut out by uid and resource version.

A change is made in three steps: read the object, ask whether the lease is still held, write with the resource version
that was read. Who takes a fault away for good calls `shut_out` on what it leaves: it moves the version on, so a writer
that slept between those steps (a stopped process, a slow network) finds a conflict, however late it wakes up.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import NAME, Conflict, NotFound, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, items, part, text
from mlchaos_dagster.kube.refs import Ref, collection

UNDO = "mlchaos.dev/undo"
"""Annotation: JSON of what was there before, so that the object itself tells how it is mended."""
FENCE = "mlchaos.dev/fence"
"""Label: there for the moment of a `shut_out`. No annotation: the Deployment controller copies those to ReplicaSets, also late."""
MARKS = (LEASE, UNDO)
"""All annotations of ours."""
_ONE_BY_ONE = 10
"""So many objects of one place are read singly; more are listed."""
_TRIES = 10
"""Of one change against others who change the object, too. A pod's status moves a few times while it starts."""


def read(site: Site, ref: Ref) -> Object | None:
    """The frozen object; None when it is gone, or another one has its name."""
    found = site.cluster.get(ref.path)
    return found if text(found, "metadata", "uid") == ref.uid else None


def read_all(site: Site, refs: Sequence[Ref]) -> dict[Ref, Object | None]:
    """As `read`, of many: one listing where many are in one place, since a thousand calls take twenty seconds."""
    places: dict[tuple[str, str], list[Ref]] = {}
    for ref in refs:
        places.setdefault((ref.kind, ref.namespace), []).append(ref)
    found: dict[Ref, Object | None] = {}
    for (kind, namespace), there in places.items():
        if len(there) <= _ONE_BY_ONE:
            found.update((ref, read(site, ref)) for ref in there)
            continue
        by_uid = {text(o, "metadata", "uid"): o for o in site.cluster.list(collection(kind, namespace))}
        found.update((ref, by_uid.get(ref.uid)) for ref in there)
    return {ref: found[ref] for ref in refs}


def change(site: Site, ref: Ref, act: Callable[[Object], Any], lease: Lease | None = None) -> bool:
    """Let `act` write, given the object as it is now; again when somebody else was faster. False: it is gone.

    Between reading and writing the `lease` is asked for; None: for who takes a fault away.

    Raises:
        LeaseRefused: the lease is no longer held.
        DriverUnavailable: the cluster did not answer, or the object never stood still.
    """
    for attempt in range(_TRIES):
        found = read(site, ref)
        if found is None:
            return False
        if lease is not None:
            leases.held(site, lease)
        try:
            act(found)
        except NotFound:
            return False
        except Conflict:
            time.sleep(random.uniform(0.0, 0.02 * (attempt + 1)))  # its controller answers to every change of ours
            continue
        return True
    raise DriverUnavailable(f"{ref.shown} is changed by others all the time", driver=NAME)


def patch(site: Site, found: Object, path: str, body: dict[str, Any], how: str = "merge", **query: str) -> Object:
    """A part of this very object, as it was read. Raises Conflict: it changed, or it is another one."""
    meta = {"uid": text(found, "metadata", "uid"), "resourceVersion": text(found, "metadata", "resourceVersion")}
    return site.cluster.patch(path, {**body, "metadata": {**body.get("metadata", {}), **meta}}, how=how, **query)


def shut_out(site: Site, ref: Ref) -> bool:
    """Whatever was read of the object before this call can no longer be written. False: it is gone."""

    def move_on(found: Object) -> None:
        token = secrets.token_hex(4)
        later = patch(site, found, ref.path, {"metadata": {"labels": {FENCE: token}}})
        patch(site, later, ref.path, {"metadata": {"labels": {FENCE: None}}})

    return change(site, ref, move_on)


def controller(found: Object | None) -> Object:
    """The owner that brings an object back (`kind`, `name`, `uid`); empty when there is none."""
    return next((o for o in items(found, "metadata", "ownerReferences") if part(o, "controller")), Object())


def marked_by(found: Object | None) -> str:
    """Id of the lease whose fault the object carries; empty: none."""
    return text(found, "metadata", "annotations", LEASE)
