"""Frozen ids: an object's kind, place, name and uid as one string, `pod/NAMESPACE/NAME@UID`.

A name alone is reused (StatefulSets, a Deployment that was deleted and applied again); what was resolved is that object
and no later one. The uid is the lock, too: two selectors that overlap meet in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mlchaos_dagster.errors import DriverError

_ID = re.compile(r"(?P<kind>[a-z]+)/(?P<namespace>[a-z0-9.-]*)/(?P<name>[A-Za-z0-9.:_-]+)@(?P<uid>[A-Za-z0-9-]+)")

PATHS = {
    "pod": "/api/v1/namespaces/{namespace}/pods",
    "deployment": "/apis/apps/v1/namespaces/{namespace}/deployments",
    "statefulset": "/apis/apps/v1/namespaces/{namespace}/statefulsets",
    "job": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "rollout": "/apis/argoproj.io/v1alpha1/namespaces/{namespace}/rollouts",
    "node": "/api/v1/nodes",
    "secret": "/api/v1/namespaces/{namespace}/secrets",
    "configmap": "/api/v1/namespaces/{namespace}/configmaps",
    "service": "/api/v1/namespaces/{namespace}/services",
}
"""Kind → path of its collection."""


@dataclass(frozen=True, order=True)
class Ref:
    """One object of the cluster, and no later one of that name."""

    kind: str
    namespace: str
    """Empty for nodes."""
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}@{self.uid}"

    @property
    def shown(self) -> str:
        """For people: without the uid."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"

    @property
    def path(self) -> str:
        """Its place in the API."""
        return f"{collection(self.kind, self.namespace)}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Ref:
        """The object behind an id. Raises DriverError: it is none."""
        found = _ID.fullmatch(text)
        if found is None or found["kind"] not in PATHS:
            raise DriverError(f'"{text}" is not the id of an object. Allowed: KIND/NAMESPACE/NAME@UID')
        return cls(found["kind"], found["namespace"], found["name"], found["uid"])

    @classmethod
    def of(cls, kind: str, found: dict[str, Any]) -> Ref:
        """The id of an object as the API returned it; `kind` in lower case."""
        meta = found["metadata"]
        return cls(kind, meta.get("namespace", ""), meta["name"], meta["uid"])


def collection(kind: str, namespace: str) -> str:
    """Path of all objects of a kind in a namespace."""
    return PATHS[kind].format(namespace=namespace)
