"""Objects that are changed in place: each carries the lease's id while it is changed, and each change is fenced.

A change is prepared from what was read, then the lease is looked at, then it is sent with the `uid` and the
`resourceVersion` of what was read. Taking the fault away gives the object a new `resourceVersion`, also where it finds
nothing to take away: a change that was prepared before, by a process that slept meanwhile, is refused however late it comes.
"""

from __future__ import annotations

from collections.abc import Callable

from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import NAME, Conflict, NotFound, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.leases import held
from mlchaos_dagster.kube.objects import Object, mapping, text
from mlchaos_dagster.kube.refs import Ref

_TRIES = 10
"""Of a change that somebody else's came before: a kubelet writes its node's status every few seconds."""


def holder(found: Object | None) -> str:
    """Id of the lease whose fault is on the object; empty: none."""
    return text(found, "metadata", "annotations", LEASE)


def read(site: Site, ref: Ref) -> Object | None:
    """The frozen object; None: it is gone, or another one has its name."""
    found = site.cluster.get(ref.path)
    return found if text(found, "metadata", "uid") == ref.uid else None


def change(site: Site, ref: Ref, lease: Lease, body: Callable[[Object], Object]) -> None:
    """Put the fault on the object: `body` makes the patch from what is there.

    Raises:
        InjectFailed: it is gone, or carries the fault of another lease.
        LeaseRefused: the lease is not held any more.
    """
    for _ in range(_TRIES):
        found = read(site, ref)
        if found is None:
            raise InjectFailed(f"{ref.shown} is gone", driver=NAME, verb="inject", lease_id=lease.id)
        if holder(found) not in ("", lease.id):
            raise InjectFailed(f"{ref.shown} carries the fault of lease {holder(found)}", driver=NAME, verb="inject")
        wanted = _fenced(found, body(found), {LEASE: lease.id})
        held(site, lease)
        if _sent(site, ref, wanted):
            return
    raise InjectFailed(f"{ref.shown} was changed by others {_TRIES} times over", driver=NAME, verb="inject")


def restore(site: Site, ref: Ref, lease: Lease, body: Callable[[Object], Object]) -> None:
    """Take the fault off the object where it is on it. Raises RecoverFailed."""
    for _ in range(_TRIES):
        found = read(site, ref)
        if found is None or holder(found) not in ("", lease.id):
            return
        if not holder(found):
            # Nothing of ours. The mark alone, put on here and taken off in the next round, moves the object on.
            marked = _sent(site, ref, _fenced(found, {}, {LEASE: lease.id}))
            found = read(site, ref) if marked else None
            if found is None or holder(found) != lease.id:
                continue
        if _sent(site, ref, _fenced(found, body(found), {LEASE: None})):
            return
    raise RecoverFailed(f"{ref.shown} was changed by others {_TRIES} times over", driver=NAME, verb="recover")


def _sent(site: Site, ref: Ref, body: Object) -> bool:
    """False when it was changed since it was read. Nothing is left to change on an object that is gone."""
    try:
        site.cluster.patch(ref.path, body)
    except Conflict:
        return False
    except NotFound:
        return False
    return True


def _fenced(found: Object, body: Object, annotations: Object) -> Object:
    meta = mapping(body, "metadata")
    fence = {k: text(found, "metadata", k) for k in ("uid", "resourceVersion")}
    both = {**mapping(meta, "annotations"), **annotations}
    return {**body, "metadata": {**meta, **fence, "annotations": both}}
