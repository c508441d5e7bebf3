"""The life of our resources: created without effect, looked at, let go, stopped, and deleted when nothing is left.

A resource is created paused. So Chaos Mesh selects, and nothing is injected, until we have seen that it selected the
frozen pods and no other; only then the pause is taken off, bound to the version that was read. A process that wakes up
late finds a conflict or nothing: whoever recovers pauses, deletes, and so moves the version on.

Acts that are done at once (a kill) are deaf to a pause. They are created right after the lease was asked for; a process
that is stopped in that millisecond, and woken after the recovery, still makes its act: pods of those names that are there
then. Nothing of it stays, and names of a Deployment's pods are not used again.

Statuses are asked for, five times a second, not watched: a watch ends on the grid of a second, and who wants out must be
heard at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlchaos_dagster.drivers.chaos_mesh import states
from mlchaos_dagster.drivers.chaos_mesh.resources import FORCED, PAUSE, collection, is_one_shot, path_of, shown
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.errors import DriverUnavailable, InjectFailed, LeaseRefused
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import ApiRefused, Conflict, NotFound, Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.selecting import is_there

NAME = "chaos_mesh"
LOOK_S = 0.2
_SELECTED_S = 15.0
"""Its controller selects within a second, and within ten where the machine has no CPU left."""
_TRIES_AGAIN_S = 3.0
"""A target that could not be injected at once (a container that starts) may be at the next try."""
_GONE_S = 3.0
_FORCED_S = 1.5
_TRIES = 10
_WEBHOOK = ("failed calling webhook", "failed to call webhook")


def mine(site: Site, kind: str, namespace: str, lease: Lease) -> list[Object]:
    """Everything of a kind that was made for a lease and is still there."""
    found = site.cluster.list(collection(kind, namespace), labels=f"{LEASE}={lease.id}")
    return [{**one, "kind": kind} for one in found]  # a list leaves the kind of its items out


# -- making ---------------------------------------------------------------------------------------------------------------


def begin(site: Site, injection: Injection, made: Object, step: Step) -> Object:
    """Create it, let it go when it means the frozen pods, and wait until Chaos Mesh says that all are injected.

    Raises:
        InjectFailed: refused, another selection, not injected; with Chaos Mesh's own words.
        LeaseRefused: the lease is not held: nothing was made, or it stays paused.
    """
    limit_s, lease = site.options.chaos_mesh.inject_within, injection.lease
    end = time.monotonic() + limit_s
    one_shot = is_one_shot(text(made, "kind"), mapping(made, "spec"))
    if one_shot:
        _all_frozen(site, injection)
    leases.held(site, lease)
    try:
        found = site.cluster.create(collection(text(made, "kind"), text(made, "metadata", "namespace")), made)
    except Conflict as e:
        raise InjectFailed(f"{shown(made)} exists already: the lease was injected before", driver=NAME) from e
    except ApiRefused as e:
        raise InjectFailed(f"{shown(made)} was refused: {e}", driver=NAME) from e
    if not one_shot:
        found = _selected(site, injection, found, min(end, time.monotonic() + _SELECTED_S), step)
        _all_frozen(site, injection)
        try:
            _let_go(site, found, lease)
        except LeaseRefused:  # who has the lease now may have looked before it was there
            delete(site, [found])
            raise
    return _injected(site, found, end, step)


def _selected(site: Site, injection: Injection, found: Object, end: float, step: Step) -> Object:
    """The resource once it has selected the frozen pods. Raises InjectFailed: others, or none."""
    wanted = {(ref.namespace, ref.name) for ref in injection.refs if ref.kind == "pod"}
    while not states.records(found):
        if time.monotonic() > end:
            raise InjectFailed(f"{shown(found)} selected no target: {_told(site, found)}", driver=NAME)
        found = _again(site, found, step)
    if wanted and states.pods(found) and (why := states.stray(found, wanted)):
        raise InjectFailed(f"{shown(found)}: {why}; nothing was injected", driver=NAME)
    return found


def _all_frozen(site: Site, injection: Injection) -> None:
    """Names are used again; uids are not. Raises InjectFailed: a frozen pod is gone."""
    for ref, found in frozen.read_all(site, injection.refs).items():
        if found is None or not is_there(found):
            raise InjectFailed(f"{ref.shown} is gone: nothing was injected", driver=NAME)


def _let_go(site: Site, found: Object, lease: Lease) -> None:
    def unpause(now: Object) -> None:
        leases.held(site, lease)
        frozen.patch(site, now, path_of(found), {"metadata": {"annotations": {PAUSE: None}}})

    if not _change(site, found, unpause):
        raise InjectFailed(f"{shown(found)} was taken away before it began", driver=NAME)


def _injected(site: Site, found: Object, end: float, step: Step) -> Object:
    failing = 0.0
    while not states.injected(found):
        said = states.failures(found, "Apply")
        failing = (failing or time.monotonic()) if said else 0.0
        if said and time.monotonic() - failing > _TRIES_AGAIN_S:
            raise InjectFailed(f"{shown(found)} could not be injected: {'; '.join(said)}", driver=NAME)
        if time.monotonic() > end:
            said = said or [_told(site, found)]
            raise InjectFailed(f"{shown(found)} was not injected in time: {'; '.join(said)}", driver=NAME)
        found = _again(site, found, step)
    return found


def _again(site: Site, found: Object, step: Step) -> Object:
    """As it is now, a moment later. Raises InjectFailed: somebody took it away."""
    step(0, 0)
    time.sleep(LOOK_S)
    now = _read(site, found)
    if now is None:
        raise InjectFailed(f"{shown(found)} was taken away before it was injected", driver=NAME)
    return now


def _told(site: Site, found: Object) -> str:
    """The newest event about it, in its controller's words."""
    space, uid = text(found, "metadata", "namespace"), text(found, "metadata", "uid")
    try:
        events = site.cluster.list(f"/api/v1/namespaces/{space}/events", fields=f"involvedObject.uid={uid}")
    except ApiRefused:
        events = []
    failed = [e for e in events if text(e, "reason") == "Failed"] or events
    newest = max(failed, key=lambda e: text(e, "lastTimestamp"), default=None)
    if newest is not None:
        return " ".join(text(newest, "message").split())
    return f"the controller in namespace {site.options.chaos_mesh.system_namespace} said nothing about it"


# -- stopping -------------------------------------------------------------------------------------------------------------


def pause(site: Site, found: Object) -> str:
    """Tell Chaos Mesh to recover and keep the status. Returns why it cannot be told; empty: it was.

    Its webhooks see every change, so where they do not answer nothing can be changed, and a call takes as long as they
    may: then only a deletion, which they do not see, is left.
    """
    spec = mapping(found, "spec")
    if is_one_shot(text(found, "kind"), spec) or text(found, "metadata", "deletionTimestamp"):
        return ""
    if is_paused(found):
        return ""
    try:
        _change(site, found, lambda now: _annotate(site, now, found, PAUSE, "true"))
    except DriverUnavailable as e:
        return f"{shown(found)} could not be paused: {e}"
    except ApiRefused as e:
        if not _is_webhook(e):
            raise
        return f"{shown(found)} could not be paused: {e}"
    return ""


def is_paused(found: Object) -> bool:
    """It was never let go, or was told to recover."""
    return text(found, "metadata", "annotations", PAUSE) == "true"


def rested(site: Site, those: Sequence[Object], limit_s: float, step: Step) -> tuple[list[Object], list[str]]:
    """Wait until Chaos Mesh has recovered them all: what is there then, and what it failed at.

    Ends early where its own word is that it cannot: it says so again and again, and a fault is on meanwhile.
    """
    end, failing = time.monotonic() + limit_s, 0.0
    while True:
        now = [one for one in (_read(site, found) for found in those) if one is not None]
        held = [one for one in now if not is_one_shot(text(one, "kind"), mapping(one, "spec"))]
        if all(states.at_rest(one) for one in held):
            return now, []
        said = [w for one in held for w in (*states.failures(one, "Recover"), *states.failures(one, "Apply"))]
        failing = (failing or time.monotonic()) if said else 0.0
        over = time.monotonic() > end
        if over or (said and time.monotonic() - failing > _TRIES_AGAIN_S / 2):
            return now, said or [f"Chaos Mesh did not recover {shown(one)} within {limit_s:g} s" for one in held]
        step(0, 0)
        time.sleep(LOOK_S)


def delete(site: Site, those: Sequence[Object]) -> None:
    """Ask for their end."""
    for found in those:
        site.cluster.delete(path_of(found), uid=text(found, "metadata", "uid"))


def gone(site: Site, those: Sequence[Object], limit_s: float, step: Step) -> list[Object]:
    """Those that are still there after a while."""
    end = time.monotonic() + limit_s
    while True:
        left = [one for one in (_read(site, found) for found in those) if one is not None]
        if not left or time.monotonic() > end:
            return left
        step(0, 0)
        time.sleep(LOOK_S)


def release(site: Site, those: Sequence[Object], step: Step) -> tuple[list[Object], list[str]]:
    """Take the finalizers off what does not go. Only after our own look at the target proved it clean.

    Chaos Mesh's own way first (the annotation), then ours. Its webhooks see both: where its controller is down, neither
    is let through, and what is left waits for it. So does what was injected since `those` were read: its controller
    works, and was slow.

    Returns:
        What is still there, and what was done.
    """
    said: list[str] = []
    before = {text(one, "metadata", "uid"): states.injections(one) for one in those}
    left = gone(site, those, _GONE_S, step)
    for body, what, limit_s in (
        ({"annotations": {FORCED: "forced"}}, f"{FORCED}=forced", _FORCED_S),
        ({"finalizers": None}, "its finalizers were taken off", _GONE_S),
    ):
        if not left:
            return [], said
        if late := [one for one in left if states.injections(one) > before[text(one, "metadata", "uid")]]:
            return left, [*said, *(f"{shown(one)} was injected after our look" for one in late)]
        for found in left:
            try:
                if _change(
                    site, found, lambda now, body=body: frozen.patch(site, now, path_of(now), {"metadata": body})
                ):
                    said.append(f"{shown(found)} did not go, and its target was proven clean: {what}")
            except DriverUnavailable as e:
                said.append(f"{shown(found)}: {what}: {e}")
            except ApiRefused as e:
                if not _is_webhook(e):
                    raise
                said.append(f"{shown(found)}: {what} was refused: {e}")
        left = gone(site, left, limit_s, step)
    return left, said


def inert(found: Object) -> bool:
    """It waits for its controller to let it go, and can inject nothing any more: deleted, and no target halfway."""
    return bool(text(found, "metadata", "deletionTimestamp")) and states.settled(found)


# -- inside ---------------------------------------------------------------------------------------------------------------


def _read(site: Site, found: Object) -> Object | None:
    """That very resource, as it is now."""
    now = site.cluster.get(path_of(found))
    return now if text(now, "metadata", "uid") == text(found, "metadata", "uid") else None


def _change(site: Site, found: Object, act: Callable[[Object], object]) -> bool:
    """As `frozen.change`, of a resource. Its controller writes to it all the time while it is young."""
    for _ in range(_TRIES):
        now = _read(site, found)
        if now is None:
            return False
        try:
            act(now)
        except NotFound:
            return False
        except Conflict:
            time.sleep(LOOK_S / 4)
            continue
        return True
    raise DriverUnavailable(f"{shown(found)} is changed by others all the time", driver=NAME)


def _annotate(site: Site, now: Object, found: Object, key: str, value: str) -> None:
    frozen.patch(site, now, path_of(found), {"metadata": {"annotations": {key: value}}})


def _is_webhook(error: ApiRefused) -> bool:
    """Whether it was refused because nobody was there to ask."""
    return any(word in str(error) for word in _WEBHOOK)


def finalizers(found: Object) -> list[str]:
    """What keeps it from going."""
    return [str(f) for f in items(found, "metadata", "finalizers")]
