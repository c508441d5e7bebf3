"""A fault that is one patch on an object, with the lease's id on it; and the patch that takes it off."""

from __future__ import annotations

from collections.abc import Callable

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import InjectFailed
from mlchaos_dagster.kube.client import NAME, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, mapping
from mlchaos_dagster.kube.refs import Ref

Body = Callable[[Object], Object]
"""What is to be patched, given the object as it is now."""


def put_on(site: Site, ref: Ref, lease: Lease, body: Body) -> None:
    """Patch and mark in one.

    Raises:
        InjectFailed: it is gone, or carries the fault of another lease.
        LeaseRefused: the lease is no longer held.
    """

    def act(found: Object) -> None:
        other = frozen.marked_by(found)
        if other not in ("", lease.id):
            raise InjectFailed(f"{ref.shown} carries the fault of lease {other}", driver=NAME, verb="inject")
        frozen.patch(site, found, ref.path, _marked(body(found), lease.id))

    if not frozen.change(site, ref, act, lease):
        raise InjectFailed(f"{ref.shown} is gone", driver=NAME, verb="inject")


def take_off(site: Site, ref: Ref, lease: Lease, body: Body) -> None:
    """Patch and unmark in one, where the mark is this lease's; else see that a late `put_on` comes to nothing."""

    def act(found: Object) -> None:
        if frozen.marked_by(found) == lease.id:
            frozen.patch(site, found, ref.path, _marked(body(found), None))

    found = frozen.read(site, ref)
    if found is not None and not frozen.marked_by(found):
        frozen.shut_out(site, ref)
    frozen.change(site, ref, act)


def _marked(body: Object, lease_id: str | None) -> Object:
    meta = mapping(body, "metadata")
    return {**body, "metadata": {**meta, "annotations": {**mapping(meta, "annotations"), LEASE: lease_id}}}
