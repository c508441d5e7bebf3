"""The engine's verbs on a Kubernetes cluster, dispatched to the handler of the fault's kind.

Resolves and freezes objects by uid, runs the guards that hold for every kind, and turns what the API server says into the
engine's errors. What a fault is, its handler knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import preflight
from mlchaos_dagster.drivers.cluster.beside import beside
from mlchaos_dagster.drivers.cluster.handler import Handler, Injection, Request
from mlchaos_dagster.engine.ports import Lease, Objection, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.address import recall
from mlchaos_dagster.kube.client import ApiRefused, Cluster, Site
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import select

if TYPE_CHECKING:
    from typing_extensions import Self


class ClusterDriver:
    """What the drivers of one cluster have in common; each says by `handler` what its kinds are.

    Args:
        address: `Home.cluster(environment)`: which cluster it is; read at the first call.
    """

    name: str
    faults: frozenset[str]
    self_limiting: frozenset[str]

    def __init__(self, address: Path | str, site: Site | None = None) -> None:
        self.address = Path(address)
        self._site: Site | None = None
        if site is not None:
            self._arrive(site)

    @classmethod
    def at(cls, cluster: Cluster, options: Kubernetes) -> Self:
        """For who has the connection already: the in-cluster sweeper, `doctor`, tests."""
        return cls(Path(), Site(cluster, options))

    def handler(self, kind: str) -> Handler:
        """What makes faults of this kind. Raises DriverError: this backend has none."""
        raise NotImplementedError

    # -- verbs ------------------------------------------------------------------------------------------------------

    def resolve(self, target: Target) -> tuple[str, ...]:
        """Ids of all objects that match now and are not on their way out, sorted.

        Raises:
            DriverUnavailable: the cluster could not be asked, or this is another cluster than the environment means.
        """
        site = self._reached("resolve")
        try:
            return tuple(sorted(str(ref) for ref in select(site, target)))
        except ApiRefused as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="resolve") from e

    def preflight(
        self, kind: str, targets: tuple[str, ...], existing: tuple[str, ...], params: dict[str, Any], *, target: Target
    ) -> tuple[Objection, ...]:
        """As `Careful.preflight`: opt-in, permissions, pods that are left, other chaos, what would fight the fault."""
        site, chosen = self._reached("preflight"), self.handler(kind)
        request = Request(kind, _refs(targets), _refs(existing), params, target)
        try:
            return tuple(preflight.objections(site, request, chosen, self.name))
        except ApiRefused as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="preflight") from e

    def recheck(
        self, kind: str, targets: tuple[str, ...], existing: tuple[str, ...], params: dict[str, Any], *, target: Target
    ) -> tuple[Objection, ...]:
        """As `Rechecking.recheck`: opt-in, marks, pods that are left, budgets."""
        site = self._reached("recheck")
        try:
            return tuple(preflight.again(site, Request(kind, _refs(targets), _refs(existing), params, target)))
        except ApiRefused as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="recheck") from e

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target,
        backup: Path,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """What recovery needs: the handler's own, and which cluster it was."""
        site = self._reached("undo")
        request = Request(kind, _refs(targets), (), params, target, backup)
        try:
            return {
                "cluster": site.cluster.identity(),
                "options": site.options.model_dump(mode="json"),
                "target": target.model_dump(mode="json", include={"select", "kubernetes"}),
                "fault": beside(lambda told: self.handler(kind).undo(site, request, told), step),
            }
        except ApiRefused as e:
            raise DriverError(str(e), driver=self.name, verb="undo") from e

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """See the handler."""
        site = self._of(lease, "inject")
        try:
            chosen, injection = self.handler(lease.kind), injection_of(lease)
            beside(lambda told: chosen.inject(site, injection, told), step)
        except InjectFailed:
            raise
        except DriverError as e:
            raise InjectFailed(str(e), driver=self.name, verb="inject", lease_id=lease.id) from e

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """See the handler."""
        site = self._of(lease, "recover")
        try:
            chosen, injection = self.handler(lease.kind), injection_of(lease)
            beside(lambda told: chosen.recover(site, injection, told), step)
        except RecoverFailed:
            raise
        except DriverError as e:
            raise RecoverFailed(str(e), driver=self.name, verb="recover", lease_id=lease.id) from e

    def active(self, lease: Lease) -> Evidence:
        """See the handler."""
        site = self._of(lease, "active")
        try:
            return self.handler(lease.kind).active(site, injection_of(lease))
        except ApiRefused as e:
            raise DriverUnavailable(str(e), driver=self.name, verb="active", lease_id=lease.id) from e

    # -- inside -----------------------------------------------------------------------------------------------------

    def _reached(self, verb: str) -> Site:
        """The connection, after the cluster said that it is the one that is meant."""
        if self._site is None:
            cluster, options, uid = recall(self.address)
            found = cluster.identity()
            if found != uid:
                raise DriverUnavailable(
                    f"context {options.context} leads to another cluster now (uid {found}, was {uid})",
                    driver=self.name,
                    verb=verb,
                )
            return self._arrive(Site(cluster, options))
        return self._site

    def _arrive(self, site: Site) -> Site:
        self._site = site
        return site

    def _of(self, lease: Lease, verb: str) -> Site:
        """The connection with the options that were in force when the lease was written."""
        site = self._reached(verb)
        wanted = lease.undo.get("cluster")
        if not lease.undo or not lease.targets:
            raise DriverUnavailable(
                f"lease {lease.id} has lost its content: `mlchaos clean` finds by its marks what it made",
                driver=self.name,
                verb=verb,
                lease_id=lease.id,
            )
        found = site.cluster.identity()
        if wanted != found:
            raise DriverUnavailable(
                f"lease {lease.id} is of another cluster (uid {wanted}, this one is {found})",
                driver=self.name,
                verb=verb,
                lease_id=lease.id,
            )
        return Site(site.cluster, Kubernetes.model_validate(lease.undo["options"]))


def _refs(ids: tuple[str, ...]) -> tuple[Ref, ...]:
    return tuple(Ref.parse(text) for text in ids)


def injection_of(lease: Lease) -> Injection:
    """A lease, as a handler sees it."""
    return Injection(lease, _refs(lease.targets), lease.undo["fault"])
