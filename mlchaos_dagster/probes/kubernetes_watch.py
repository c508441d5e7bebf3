"""A mirror of one collection of the API: listed once, then kept by a watch.

Owns the connection's life: a watch that ends goes on from where it was, one that is too old (410) lists anew, a server
that does not answer is asked again with a growing pause. `live` says whether what is held is what the server has, as far
as can be known from here; whoever reads values from a mirror that is not live repeats the past.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Forbidden, Gone, NotFound, Permission
from mlchaos_dagster.kube.objects import Object, text

_WATCH_S = 20.0
"""A watch ends after this long and is opened anew: so long at most does a thread outlive its run."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
"""After a server that did not answer. Short, since an outage seen late is an outage told too long; at random within."""
_ABSENT_PAUSE_S = 5.0
"""While there is no such kind of object (a CRD that is not installed)."""


class Api(Protocol):
    """What a mirror needs of `kube.client.Cluster`."""

    def list_at(self, path: str, *, labels: str = "", fields: str = "") -> tuple[list[dict[str, Any]], str]:
        """All objects, and from where a watch goes on."""
        ...

    def watch(
        self, path: str, resource_version: str, *, labels: str = "", fields: str = "", timeout_s: float = 60.0
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes since."""
        ...


Changed = Callable[[Sequence[Object], Sequence[Object]], None]
"""`changed(there, gone)`: objects that are new or differ, and those that are no more. Called while the mirror is locked."""


class Mirror:
    """One collection, as the API server last told.

    Args:
        api: The cluster.
        path: Of the collection, such as `/api/v1/namespaces/x/pods`.
        labels: Selector; empty: all.
        changed: Told of every change, in the mirror's thread. The first call, with the first list, comes even when it is
            empty.
        lock: Held while `changed` runs and while `live` changes, so that who holds it sees both agree.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        *,
        labels: str = "",
        changed: Changed | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        self.api, self.path, self.labels = api, path, labels
        self.live = False
        self.trouble = ""
        """Why it is not live: one line."""
        self._changed = changed or (lambda there, gone: None)
        self._lock = lock or threading.RLock()
        self._objects: dict[str, Object] = {}
        self._over = threading.Event()
        self._generation = 0

    def start(self) -> None:
        """Begin; again: forget the connection, which may hang, and list anew."""
        with self._lock:
            self._generation += 1
            self.live = False
            generation = self._generation
        threading.Thread(target=self._run, args=(generation,), name=f"watch {self.path}", daemon=True).start()

    def stop(self) -> None:
        """No more changes are told. The thread ends with its watch."""
        self._over.set()
        with self._lock:
            self._generation += 1
            self.live = False

    def objects(self) -> list[Object]:
        """What is there."""
        with self._lock:
            return list(self._objects.values())

    def _run(self, generation: int) -> None:
        version, pause = "", _FIRST_PAUSE_S
        while generation == self._generation:
            try:
                if not version:
                    found, version = self.api.list_at(self.path, labels=self.labels)
                    self._replace(generation, found)
                    pause = _FIRST_PAUSE_S
                timeout_s = _WATCH_S * random.uniform(0.75, 1)  # noqa: S311  not all watches of a run at once
                for kind, one in self.api.watch(self.path, version, labels=self.labels, timeout_s=timeout_s):
                    if generation != self._generation:
                        return
                    version = text(one, "metadata", "resourceVersion") or version
                    if kind != "BOOKMARK":
                        self._apply(generation, kind, one)
            except Gone:
                version = ""
            except DriverError as e:
                version = ""
                self._lost(generation, self._words(e))
                self._over.wait(_ABSENT_PAUSE_S if isinstance(e, NotFound) else pause * random.uniform(0.5, 1))  # noqa: S311
                pause = min(_LONGEST_PAUSE_S, 2 * pause)
            except Exception as e:  # noqa: BLE001  an object that cannot be read: what is held is not what is there
                version = ""
                self._lost(generation, f"{self.path}: {type(e).__name__}: {e}")
                self._over.wait(_LONGEST_PAUSE_S)

    def _words(self, error: DriverError) -> str:
        return f"{error}; add {permission_of(self.path).rule}" if isinstance(error, Forbidden) else str(error)

    def _lost(self, generation: int, why: str) -> None:
        with self._lock:
            if generation == self._generation:
                self.live, self.trouble = False, why

    def _replace(self, generation: int, found: list[Object]) -> None:
        with self._lock:
            if generation != self._generation:
                return
            now = {one["metadata"]["uid"]: one for one in found}
            before, self._objects = self._objects, now
            there = [one for uid, one in now.items() if _differs(one, before.get(uid))]
            self._changed(there, [one for uid, one in before.items() if uid not in now])
            self.live, self.trouble = True, ""

    def _apply(self, generation: int, kind: str, one: Object) -> None:
        with self._lock:
            if generation != self._generation:
                return
            uid = one["metadata"]["uid"]
            if kind == "DELETED":
                self._objects.pop(uid, None)
                self._changed([], [one])
            elif _differs(one, self._objects.get(uid)):
                self._objects[uid] = one
                self._changed([one], [])


def permission_of(path: str, verb: str = "watch") -> Permission:
    """What a watch on a collection needs.

    Args:
        path: `/api/v1/namespaces/NS/pods`, `/apis/GROUP/VERSION/namespaces/NS/RESOURCE`, or without a namespace.
        verb: `watch` (needs `list`, too) or another.
    """
    words = path.strip("/").split("/")
    group = words[1] if words[0] == "apis" else ""
    rest = words[3:] if words[0] == "apis" else words[2:]
    namespace = rest[1] if rest[0] == "namespaces" and len(rest) > 2 else ""
    return Permission(verb, rest[-1], namespace, group)


def _differs(one: Object, before: Object | None) -> bool:
    version = text(one, "metadata", "resourceVersion")
    return before is None or not version or version != text(before, "metadata", "resourceVersion")
