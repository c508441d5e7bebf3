"""What Chaos Mesh notes at a pod of each resource that is on in it, and takes back when the resource is recovered.

Rules of the network, of files and of HTTP are kept in one object a pod (`PodNetworkChaos` and its like, named as the
pod), each entry with its source. A rule that a kernel cannot make is tried again for ever, and its resource then never
recovers; every other resource on the same pod fails with it. Taking our entries out of that object is what the recovery
would do: the daemon clears the pod, the resource's records go on, its finalizer falls by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from mlchaos_dagster.drivers.chaos_mesh.resources import API, GROUP, source
from mlchaos_dagster.drivers.chaos_mesh.states import records
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.engine.ports import Step
from mlchaos_dagster.kube.client import ApiRefused, Conflict, NotFound, Permission, Site
from mlchaos_dagster.kube.objects import Object, mapping, text

NOTES = {"NetworkChaos": "podnetworkchaos", "IOChaos": "podiochaos", "HTTPChaos": "podhttpchaos"}
"""Kind → plural of the object at the pod."""
_TRIES = 5


def permissions(kind: str, spaces: Iterable[str]) -> Iterator[Permission]:
    """To read those notes, and to take ours out."""
    for space in sorted(set(spaces)) if kind in NOTES else ():
        for verb in ("get", "patch"):
            yield Permission(verb, NOTES[kind], space, GROUP)


def take_back(site: Site, injection: Injection, those: Sequence[Object], step: Step) -> list[str]:
    """Take the entries of our resources out; what was done."""
    said: list[str] = []
    sources = {source(one) for one in those}
    for path in _notes(injection, those):
        for _ in range(_TRIES):
            found = site.cluster.get(path)
            if found is None or not any(_has(found, s) for s in sources):
                break
            body: dict[str, Any] = {"spec": _without(mapping(found, "spec"), sources)}
            try:
                frozen.patch(site, found, path, body)
            except NotFound:
                break
            except Conflict:
                continue
            except ApiRefused as e:
                said.append(f"{path.rpartition('/')[2]}: {e}")
                break
            said.append(f"our rules were taken out of {text(found, 'kind') or 'the note'} {path.rpartition('/')[2]}")
            break
        step(0, 0)
    return said


def _notes(injection: Injection, those: Sequence[Object]) -> list[str]:
    """Where the notes of all pods are that our resources touched, those at the other end of a link included."""
    plural = NOTES.get(injection.undo["kind"])
    pods = {(ref.namespace, ref.name) for ref in injection.refs if ref.kind == "pod"}
    for one in those:
        pods |= {(i[0], i[1]) for r in records(one) if len(i := text(r, "id").split("/")) > 1}
    return [f"{API}/namespaces/{space}/{plural}/{name}" for space, name in sorted(pods)] if plural else []


def _has(found: Object, ours: str) -> bool:
    spec = mapping(found, "spec")
    return any(text(entry, "source") == ours for value in spec.values() for entry in _entries(value))


def _without(spec: Object, sources: Iterable[str]) -> Object:
    """The lists of a note, each without what is ours. (A merge patch replaces a list as a whole.)"""
    return {
        key: [e for e in _entries(value) if text(e, "source") not in sources]
        for key, value in spec.items()
        if _entries(value)
    }


def _entries(value: object) -> list[Object]:
    if not isinstance(value, list):
        return []
    return [cast(Object, e) for e in cast("list[Any]", value) if isinstance(e, dict)]
