"""An API server of a page: objects by path, resource versions, 404 and 409 where the real one says them.

Every call passes `call`, where a test makes it fail, dies, or lets somebody else go first.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube.client import Conflict, NotFound


class Crash(BaseException):
    """The process is gone: nothing of it may run on, not even its cleaning up."""


class Clock:
    """Moves when somebody sleeps."""

    def __init__(self) -> None:
        self.t = 100.0

    def monotonic(self) -> float:
        return self.t

    def wall(self) -> float:
        return 1.7e9 + self.t

    def sleep(self, seconds: float) -> None:
        self.t += max(seconds, 1e-3)


class Api:
    """The verbs of `Cluster` that ledger and sweeper use."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.crash_at: int | None = None
        self.fail_at: int | None = None
        self.late = False
        """Crash and failure come after the effect: the answer is lost."""
        self.before: dict[int, Callable[[], None]] = {}
        self.down = False
        self._dead = False
        self._versions = itertools.count(1)

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        return self._call(lambda: copy.deepcopy(self.objects.get(path)))

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        wanted = dict(pair.split("=") for pair in labels.split(",") if "=" in pair)
        there = {key for key in labels.split(",") if key and "=" not in key}

        def find() -> list[dict[str, Any]]:
            return [
                copy.deepcopy(o)
                for name, o in sorted(self.objects.items())
                if name.rpartition("/")[0] == path
                and wanted.items() <= (o["metadata"].get("labels") or {}).items()
                and there <= (o["metadata"].get("labels") or {}).keys()
            ]

        return self._call(find)

    def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            name = f"{path}/{body['metadata']['name']}"
            if name in self.objects:
                raise Conflict("there already", 409)
            new = copy.deepcopy(dict(body))
            new["metadata"] |= {"uid": f"u{next(self._versions)}", "resourceVersion": str(next(self._versions))}
            self.objects[name] = new
            return copy.deepcopy(new)

        return self._call(make)

    def replace(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        def put() -> dict[str, Any]:
            old = self._there(path, body)
            new = copy.deepcopy(dict(body))
            new["metadata"] |= {"uid": old["metadata"]["uid"], "resourceVersion": str(next(self._versions))}
            self.objects[path] = new
            return copy.deepcopy(new)

        return self._call(put)

    def patch(self, path: str, body: Mapping[str, Any], *, how: str = "merge", **query: str) -> dict[str, Any]:
        def change() -> dict[str, Any]:
            old = self._there(path, body)
            merge(old, body)
            old["metadata"]["resourceVersion"] = str(next(self._versions))
            return copy.deepcopy(old)

        return self._call(change)

    def delete(self, path: str, *, uid: str = "", resource_version: str = "", **_: Any) -> bool:
        def remove() -> bool:
            old = self.objects.get(path)
            if old is None:
                return False
            if resource_version and old["metadata"]["resourceVersion"] != resource_version:
                raise Conflict("changed since", 409)
            if uid and old["metadata"]["uid"] != uid:
                return False
            del self.objects[path]
            return True

        return self._call(remove)

    def restart(self) -> None:
        """The next process: nothing fails any more."""
        self.crash_at = self.fail_at = None
        self._dead = self.down = False

    def _there(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        old = self.objects.get(path)
        if old is None:
            raise NotFound("not found", 404)
        for fact in ("uid", "resourceVersion"):
            if body["metadata"].get(fact, old["metadata"][fact]) != old["metadata"][fact]:
                raise Conflict(f"another {fact}", 409)
        return old

    def _call(self, work: Callable[[], Any]) -> Any:
        if self._dead:
            raise Crash("it is gone")
        self.calls += 1
        mine = self.calls
        if (other := self.before.pop(mine, None)) is not None:
            other()
        if self.down:
            raise DriverUnavailable("no answer")
        if self.late or mine not in (self.crash_at, self.fail_at):
            result = work()
        else:
            result = None
        if mine == self.crash_at:
            self._dead = True
            raise Crash(f"at call {mine}")
        if mine == self.fail_at:
            raise DriverUnavailable("the answer was lost")
        return result


def merge(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    """RFC 7386, as far as it is used."""
    for key, value in new.items():
        if value is None:
            old.pop(key, None)
        elif isinstance(value, Mapping):
            merge(old.setdefault(key, {}), value)
        else:
            old[key] = value
