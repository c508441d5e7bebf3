"""Removing everything of ours from a cluster: faults first and with proof, then what is left of them, then the installation.

Works without any state directory: from leases in the cluster, and where those are lost from the marks and labels alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Literal

from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.every import of_cluster
from mlchaos_dagster.drivers.kubernetes import leftovers
from mlchaos_dagster.drivers.kubernetes.faults import handler
from mlchaos_dagster.drivers.kubernetes.leftovers import Leftover
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ports import Clock, Driver, Lease, Owner, no_step
from mlchaos_dagster.engine.sweep import RenewalObserver, SweepResult, sweep
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.lease_objects import object_name
from mlchaos_dagster.kube.leases import ClusterLedger
from mlchaos_dagster.kube.objects import mapping
from mlchaos_dagster.kube.refs import Ref

_MENDS = {
    "pod": ("network_partition", "pod_failure"),
    "deployment": ("scale_to_zero",),
    "statefulset": ("scale_to_zero",),
    "node": ("node_drain",),
    "secret": ("credential_rotation",),
    "rollout": ("bad_model",),
}
"""Kind of a marked object → faults whose handlers take such marks off, from what the object itself says."""
_TOOLS = {"/apis/litmuschaos.io/": "litmus", "/apis/chaos-mesh.org/": "chaos_mesh"}
_RESULTS = frozenset({"chaosresult", "chaosexperiment"})
"""Of these tools, what is no fault."""
_GONE_S = 5.0


@dataclass(frozen=True)
class Row:
    """What became of one thing."""

    what: str
    action: Literal["removed", "would remove", "mended", "would mend", "left", "failed"]
    why: str = ""


class Cleaner:
    """One call of `mlchaos clean`.

    Args:
        site: The cluster.
        clock: For waiting.
        incidents: Faults that were taken away are told there.
        force: Reason that makes leases of live runs due, too; empty: they are left alone.
        dry_run: Change nothing.
        installation: Remove sweeper, permissions and the control namespace as well.
        namespaces: Only what lies there, and leases whose targets do; empty: everywhere.
    """

    def __init__(
        self,
        site: Site,
        clock: Clock,
        incidents: IncidentLog,
        *,
        force: str = "",
        dry_run: bool = False,
        installation: bool = False,
        namespaces: Collection[str] = (),
    ) -> None:
        self.namespaces = frozenset(namespaces)
        self.site, self.clock, self.incidents = site, clock, incidents
        self.force, self.dry_run, self.installation = force, dry_run, installation
        self.ledger = ClusterLedger(site.cluster, site.options.control_namespace, clock)

    def rows(self) -> Iterator[Row]:
        """Everything, in the order in which it is done.

        Raises:
            DriverUnavailable: the cluster did not answer; what was done so far is done.
            ApiRefused: something may not be seen; it is not called clean.
        """
        leases = self.ledger.leases()
        elsewhere = {lease.id for lease in leases if self._elsewhere(lease)}
        swept = self._sweep({lease.id for lease in (*leases, *self._unreadable())} - elsewhere)
        yield from map(self._swept, swept)
        due = {result.lease.id for result in swept}
        live = {lease.id for lease in self.ledger.leases() if not self._elsewhere(lease)} - due
        yield from (Row(f"lease {i}", "left", "its run is alive; --force takes its fault away") for i in sorted(live))
        # What could not be proven gone keeps its lease: it is all that knows how. One that has lost its content knows
        # nothing any more; what it made is found by its marks, and it goes after them.
        failed = {r.lease.id for r in swept if not r.clean and (r.lease.targets or r.action == "left")}
        told = elsewhere | live | (due if self.dry_run else failed)
        everything = list(leftovers.find(self.site.cluster))
        known = {object_name(i) for i in told}
        for found in everything:  # also one that was opened just now
            if found.is_lease and found.lease not in known | {object_name(i) for i in due}:
                told.add(found.lease)
                if self._asked(found):
                    yield Row(found.shown, "left", self._whose(found))
        for found in everything:
            if self._asked(found) and found.lease not in told | known and not leftovers.is_of(found, told):
                for row in self._one(found):
                    if row.action == "failed" and found.lease:
                        told.add(found.lease)
                    yield row

    def _asked(self, found: Leftover) -> bool:
        return not self.namespaces or found.namespace in self.namespaces

    def _elsewhere(self, lease: Lease) -> bool:
        """Whether a lease is surely none of the namespaces that were asked for; one on nodes, or without content, may be."""
        if not self.namespaces or self.ledger.namespace in self.namespaces:
            return False
        try:
            spaces = {Ref.parse(target).namespace for target in lease.targets}
        except DriverError:
            return False
        return bool(spaces) and not spaces & (self.namespaces | {""})

    def _unreadable(self) -> Iterator[Lease]:
        for path in self.ledger.unreadable():
            if stub := self.ledger.stub(path):
                yield stub

    def _whose(self, found: Leftover) -> str:
        if found.namespace == self.ledger.namespace:
            return "its run is alive; --force takes its fault away"
        return f"of another ledger: its own sweeper, or an environment with kubernetes.control_namespace: {found.namespace}"

    def _sweep(self, only: Collection[str]) -> list[SweepResult]:
        def build(name: str, environment: str) -> Driver:
            return of_cluster(name, self.site.cluster, self.site.options)

        observer = RenewalObserver(self.ledger, self.clock, self.site.options.sweeper_ttl)
        return sweep(
            self.ledger,
            build,
            self.clock,
            self.incidents,
            only=only if self.namespaces else None,
            dry_run=self.dry_run,
            force=self.force,
            observer=None if self.force else observer,
            by="mlchaos clean",
        )

    def _swept(self, result: SweepResult) -> Row:
        what = f"{result.lease.kind or 'unknown fault'} of lease {result.lease.id}"
        if result.action == "would recover":
            return Row(what, "would mend", result.why)
        if result.clean:
            return Row(what, "mended", "; ".join(result.evidence))
        return Row(what, "failed", result.error)

    def _one(self, found: Leftover) -> Iterator[Row]:
        if found.how == "object" and not found.lease and not self.installation:
            return
        mends = found.how != "object"
        if self.dry_run:
            yield Row(found.shown, "would mend" if mends else "would remove")
            return
        try:
            if said := self._through_its_tool(found):
                yield Row(found.shown, "mended", said)
                return
            done = self._mend(found) if mends else self._remove(found)
        except DriverError as e:
            yield Row(found.shown, "failed", str(e))
            return
        yield Row(
            found.shown, ("mended" if mends else "removed") if done else "failed", "" if done else "it is still there"
        )

    def _through_its_tool(self, found: Leftover) -> str:
        """What became of a fault that another tool keeps, whose lease is lost; empty: it is none, or it is gone."""
        backend = next((name for place, name in _TOOLS.items() if found.lease and found.path.startswith(place)), "")
        if not backend or found.kind in _RESULTS:
            return ""
        module = import_module(f"mlchaos_dagster.drivers.{backend}.lost")
        lease = _lost(found.lease, found.kind, Ref("pod", found.namespace, "lost", "lost"))
        return module.take_away(self.site, found.path, lease, no_step)

    def _remove(self, found: Leftover) -> bool:
        spec = mapping(self.site.cluster.get(found.path), "spec") if found.kind == "pod" else {}
        grace_s = float(spec.get("terminationGracePeriodSeconds") or 0)
        self.site.cluster.delete(found.path, uid=found.uid)
        gone = partial(self.site.cluster.get, found.path)
        return found.kind == "namespace" or self._until(lambda: gone() is None, _GONE_S + grace_s)

    def _mend(self, found: Leftover) -> bool:
        """From the object's own marks: its lease is lost."""
        ref = Ref(found.kind, found.namespace, found.name, found.uid)
        try:
            for kind in _MENDS[found.kind]:
                handler(kind).recover(self.site, Injection(_lost(found.lease, kind, ref), (ref,), {}), no_step)
        except DriverError:
            # One that was told to end a moment ago, through the mark on its pod, answers no more.
            if found.how != "helper" or not self._until(lambda: not self._is_there(found)):
                raise
        return self._until(lambda: not self._is_there(found))

    def _is_there(self, found: Leftover) -> bool:
        return any(o.uid == found.uid for o in leftovers.find(self.site.cluster) if o.how == found.how)

    def _until(self, done: Callable[[], bool], limit_s: float = _GONE_S) -> bool:
        end = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > end:
                return False
            self.clock.sleep(0.2)
        return True


def _lost(lease_id: str, kind: str, ref: Ref) -> Lease:
    """A lease of which only the mark on an object is left."""
    return Lease(
        id=lease_id,
        run_id="",
        experiment="",
        environment="",
        driver="kubernetes",
        kind=kind,
        targets=(str(ref),),
        params={},
        undo={},
        duration_s=0.0,
        opened_wall=0.0,
        deadline_wall=0.0,
        owner=Owner(pid=0, started=0.0, boot_id="", host=""),
    )
