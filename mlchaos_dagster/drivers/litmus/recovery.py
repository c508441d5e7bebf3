"""A lease's fault taken away: stopped, cleaned, proven, removed; from any process, with or without the operator.

The operator is given a moment to do what a stop asks for. What it does not do is done here as it would: Jobs first (else they
make their pods anew), then pods with the time to undo their fault. Only after nothing runs any more and the targets were
seen clean, the ChaosEngine goes, and only then its finalizer, if the operator does not take that away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.litmus import tracks
from mlchaos_dagster.drivers.litmus.engine import ACTIVE, STOP, collection
from mlchaos_dagster.drivers.litmus.eyes import Eyes
from mlchaos_dagster.drivers.litmus.tracks import Place, Tracks
from mlchaos_dagster.engine.ports import Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, RecoverFailed
from mlchaos_dagster.kube.client import Conflict, NotFound, Site
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import collection as of_kube

NAME = "litmus"
_TICK_S = 0.25
_LATE_S = 15.0
"""Beyond its grace, a pod that is still there is on a node that does not answer."""
_GONE_S = 5.0
"""For an object without finalizers."""
_ORPHANED_S = 5.0
"""A helper that hears a stop has undone its fault by then; one that was killed has not, and its pod does not end before it."""


@runtime_checkable
class Ending(Protocol):
    """Eyes that can end, at the targets, what a helper left there that was killed without grace."""

    def end(self, site: Site, injection: Injection, step: Step) -> None:
        """As far as it is allowed to; `clean` tells what is left. Raises DriverError."""
        ...


def take_away(site: Site, injection: Injection, place: Place, eyes: Eyes, step: Step) -> None:
    """Until nothing of the lease is left.

    Raises:
        RecoverFailed: the fault may be live; says what is left.
        DriverUnavailable: the cluster did not answer.
    """
    left = _ended(site, place, step, lambda: eyes.end(site, injection, step) if isinstance(eyes, Ending) else None)
    for policy in left.policies:  # an experiment that was killed leaves it
        _delete(site, f"/apis/networking.k8s.io/v1/namespaces/{place.target_namespace}/networkpolicies", policy)
    step(0, 0)
    eyes.clean(site, injection, tracks.find(site, place), step)  # found anew: who ended last wrote its last word late
    _removed(site, place, step)
    eyes.close(site, injection, step)


def _ended(site: Site, place: Place, step: Step, orphaned: Callable[[], None]) -> Tracks:
    """Stop, and wait until neither Job nor pod is left."""
    options = site.options.litmus
    found = _stopped(site, tracks.find(site, place))
    patience_s = options.recover_within if _is_stopping(found) else 0.0
    start, ours = time.monotonic(), False
    due: float | None = start + _ORPHANED_S
    while found.at_work:
        waited = time.monotonic() - start
        if due is not None and time.monotonic() >= due:
            due = None
            try:
                orphaned()
            except DriverError:  # what it is about is looked at again, when nothing runs any more
                pass
        idle = [o for o in found.at_work if not text(o, "metadata", "deletionTimestamp")]
        if idle and waited >= patience_s:
            _end(site, place, found, math.ceil(options.grace))
            start, ours = (start, True) if ours else (time.monotonic(), True)
        elif waited > options.grace + _LATE_S:
            names = ", ".join(text(o, "metadata", "name") for o in found.at_work)
            raise RecoverFailed(f"does not end: {names} in namespace {place.namespace}", driver=NAME, verb="recover")
        step(0, 0)
        time.sleep(_TICK_S)
        found = tracks.find(site, place)
        if found.engine is not None and text(found.engine, "spec", "engineState") == ACTIVE:
            found = _stopped(site, found)
    return found


def _stopped(site: Site, found: Tracks) -> Tracks:
    """Ask the operator: by a stop, or, where it has not seen the engine yet, by its deletion."""
    engine = found.engine
    if engine is None or text(engine, "metadata", "deletionTimestamp"):
        return found
    path = _path(engine)
    if not text(engine, "status", "engineStatus"):
        site.cluster.delete(path, uid=text(engine, "metadata", "uid"))
    elif text(engine, "spec", "engineState") == ACTIVE:
        body = {"metadata": {"uid": text(engine, "metadata", "uid")}, "spec": {"engineState": STOP}}
        try:
            site.cluster.patch(path, body)
        except (NotFound, Conflict):
            pass  # it is gone, and another one has its name
    return found


def _is_stopping(found: Tracks) -> bool:
    """Whether the operator has something to do: it leaves alone what has completed, and what it has never seen."""
    return text(found.engine, "status", "engineStatus") == "initialized"


def _end(site: Site, place: Place, found: Tracks, grace_s: int) -> None:
    """Jobs, then pods."""
    for job in found.jobs:
        _delete(site, of_kube("job", place.namespace), job)
    for pod in found.pods:
        if not text(pod, "metadata", "deletionTimestamp"):
            _delete(site, of_kube("pod", place.namespace), pod, grace_s)


def _removed(site: Site, place: Place, step: Step) -> None:
    """The ChaosEngine and its results; the finalizer last, by ourselves where nobody else does it."""
    engines = collection(place.namespace, "chaosengines")
    engine = tracks.find(site, place).engine
    if engine is not None:
        _delete(site, engines, engine)
        if not _within(site.options.litmus.recover_within, lambda: _engine(site, place) is None, step):
            left = tracks.find(site, place)
            if left.at_work or left.policies:
                raise RecoverFailed("; ".join(left.said), driver=NAME, verb="recover")
            _unfinalized(site, left.engine)
            if not _within(_GONE_S, lambda: _engine(site, place) is None, step):
                raise RecoverFailed(f"ChaosEngine {place.name} does not go", driver=NAME, verb="recover")
    for result in tracks.find(site, place).results:
        _delete(site, collection(place.namespace, "chaosresults"), result)
    left = tracks.find(site, place)
    if left.said:
        raise RecoverFailed("; ".join(left.said), driver=NAME, verb="recover")


def _engine(site: Site, place: Place) -> Object | None:
    return site.cluster.get(f"{collection(place.namespace, 'chaosengines')}/{place.name}")


def _unfinalized(site: Site, engine: Object | None) -> None:
    """Let it go: its operator does not."""
    if engine is None:
        return
    meta = {"uid": text(engine, "metadata", "uid"), "resourceVersion": text(engine, "metadata", "resourceVersion")}
    try:
        site.cluster.patch(_path(engine), {"metadata": {**meta, "finalizers": None}})
    except NotFound:
        pass
    except Conflict as e:  # its operator is back at it
        raise DriverUnavailable(str(e), driver=NAME, verb="recover") from e


def _within(seconds: float, look: Callable[[], bool], step: Step) -> bool:
    end = time.monotonic() + seconds
    while not look():
        if time.monotonic() >= end:
            return False
        step(0, 0)
        time.sleep(_TICK_S)
    return True


def _path(engine: Object) -> str:
    return f"{collection(text(engine, 'metadata', 'namespace'), 'chaosengines')}/{text(engine, 'metadata', 'name')}"


def _delete(site: Site, path: str, found: Object, grace_s: int | None = None) -> None:
    site.cluster.delete(
        f"{path}/{text(found, 'metadata', 'name')}", uid=text(found, "metadata", "uid"), grace_s=grace_s
    )
