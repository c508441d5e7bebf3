"""Everything that belongs to one ChaosEngine, as the cluster has it now.

Experiment, helpers and result carry the engine's uid (`chaosUID`) and the engine's own labels, so that they are found by
the lease when the engine is gone; nothing of them is owned by it. A NetworkPolicy carries the uid only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mlchaos_dagster.drivers.kubernetes.faults.network_policy import LABEL
from mlchaos_dagster.drivers.litmus.engine import UID, collection
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.labels import LEASE
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import collection as of_kube


@dataclass(frozen=True)
class Place:
    """Where a lease's things are."""

    namespace: str
    """Of the ChaosEngine, its runner, experiment, helpers and result."""
    name: str
    target_namespace: str
    """Where the experiment makes a NetworkPolicy; empty: it makes none."""
    lease_id: str


@dataclass(frozen=True)
class Tracks:
    """What was found."""

    engine: Object | None = None
    results: list[Object] = field(default_factory=list[Object])
    jobs: list[Object] = field(default_factory=list[Object])
    pods: list[Object] = field(default_factory=list[Object])
    """Runner, experiment and helpers."""
    policies: list[Object] = field(default_factory=list[Object])

    @property
    def uids(self) -> set[str]:
        """Of the engine, as far as anything tells."""
        found = {text(self.engine, "metadata", "uid")}
        found |= {text(o, "metadata", "labels", UID) for o in (*self.results, *self.jobs, *self.pods, *self.policies)}
        return found - {""}

    @property
    def at_work(self) -> list[Object]:
        """Jobs and pods: while there is one, a fault may begin, or be undone."""
        return [*self.jobs, *self.pods]

    @property
    def said(self) -> list[str]:
        """For people: one line each."""
        kinds = (
            ("Job", self.jobs),
            ("pod", self.pods),
            ("NetworkPolicy", self.policies),
            ("ChaosResult", self.results),
        )
        lines = [f"ChaosEngine {_name(self.engine)} is there"] if self.engine else []
        return lines + [f"{kind} {_name(o)} is there" for kind, found in kinds for o in found]


def find(site: Site, place: Place) -> Tracks:
    """All of it. Pods are read before and after the Jobs: a runner may make one and end in between.

    Raises:
        DriverUnavailable: the cluster did not answer.
    """
    engine = site.cluster.get(f"{collection(place.namespace, 'chaosengines')}/{place.name}")
    if text(engine, "metadata", "labels", LEASE) != place.lease_id:
        engine = None
    uid = text(engine, "metadata", "uid")
    # An aborted experiment takes all labels off its result but the engine's uid.
    everyone = site.cluster.list(collection(place.namespace, "chaosresults"))
    results = [r for r in everyone if text(r, "spec", "engine") == place.name]
    uid = uid or next((text(r, "metadata", "labels", UID) for r in results), "")
    before = _of(site, of_kube("pod", place.namespace), place, uid)
    jobs = _of(site, of_kube("job", place.namespace), place, uid)
    pods = {_name(p): p for p in (*before, *_of(site, of_kube("pod", place.namespace), place, uid))}
    found = Tracks(engine, results, jobs, list(pods.values()))
    return replace(found, policies=_policies(site, place, found.uids)) if place.target_namespace else found


def _policies(site: Site, place: Place, uids: set[str]) -> list[Object]:
    """Of the engine, or on the label that only this lease's pods carry."""
    where = f"/apis/networking.k8s.io/v1/namespaces/{place.target_namespace}/networkpolicies"
    return [
        p
        for p in site.cluster.list(where)
        if text(p, "metadata", "labels", UID) in uids
        or (
            text(p, "metadata", "labels", UID)
            and text(p, "spec", "podSelector", "matchLabels", LABEL) == place.lease_id
        )
    ]


def events(site: Site, engine: Object) -> list[Object]:
    """What was said about a ChaosEngine, the oldest first."""
    meta, where = engine["metadata"], f"/api/v1/namespaces/{text(engine, 'metadata', 'namespace')}/events"
    found = site.cluster.list(where, fields=f"involvedObject.name={meta['name']},involvedObject.kind=ChaosEngine")
    mine = [e for e in found if text(e, "involvedObject", "uid") in ("", meta["uid"])]
    return sorted(mine, key=lambda e: text(e, "lastTimestamp") or text(e, "eventTime"))


def _of(site: Site, path: str, place: Place, uid: str) -> list[Object]:
    """By the engine's uid, which all carry; by the lease where the engine is gone (the runner goes with it)."""
    return site.cluster.list(path, labels=f"{UID}={uid}" if uid else f"{LEASE}={place.lease_id}")


def _name(found: Object | None) -> str:
    return text(found, "metadata", "name")
