"""The lease ledger of a cluster: who may fault what in it, who took over from whom, seen from every machine.

Objects in the control namespace (see lease_objects.py and register.py), every change on condition that nobody changed
the object since it was read. What counts is the Lease object: from its creation on a fault may be live, and its
deletion, after the proof, gives the targets back. Whatever else is left by who died in between is garbage.

    open    Secrets ─ read back ─ Lease ─ register (here one of two wins) ─ look at the lever once more
    close   Lease ─ Secrets

Who died before the register leaves a Lease that nobody renews: the sweeper recovers it (there is nothing) and closes it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from mlchaos_dagster.engine.ports import Clock, Lease, Owner
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.errors import DriverError, LeaseRefused, StoreError
from mlchaos_dagster.kube import kin, labels, register
from mlchaos_dagster.kube.client import Cluster, Conflict, NotFound, Permission, Site
from mlchaos_dagster.kube.lease_objects import (
    Head,
    about,
    head,
    identity,
    lease_object,
    now,
    object_name,
    pack,
    secret_content,
    secret_name,
    secrets,
    unpack,
)
from mlchaos_dagster.kube.lever import ClusterLever
from mlchaos_dagster.kube.objects import text

KEPT = "ledger"
"""Key in `Lease.undo`: which ledger keeps the lease; absent: the cluster's."""
NOWHERE = "nowhere"
"""Value of `KEPT` of a lease that no ledger knows: for tests of single handlers, set by the test itself."""
SWEEPER = "mlchaos-sweeper"
"""The Lease that the sweeper renews."""
INSTALL = "kubectl apply -k manifests/kubernetes"
"""What makes the control namespace and the sweeper."""
_TRIES = 10
"""Changes that meet somebody else's (a stop request, a renewal) are made again."""
_LISTING_S = 0.3
"""How old a listing of beats may be: a look at a hundred leases is one call."""
_KEEP_S = 2.0
"""Between renewals of who recovers a lease."""
_POLL_S = 0.25


def collection(namespace: str) -> str:
    """Path of the Lease objects of a namespace."""
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


def held(site: Site, lease: Lease) -> None:
    """Look, right before something is changed, whether the lease still is its owner's.

    A lease that the cluster does not know is refused. The one exception is a lease that says of itself that no ledger
    keeps it: `lease.undo["ledger"] == "nowhere"`. Only tests of handlers write that; runs never do.

    Raises:
        LeaseRefused: closed, gone, or taken over: change nothing.
        DriverUnavailable: the cluster did not answer: change nothing.
    """
    if lease.undo.get(KEPT) == NOWHERE:
        return
    found: dict[str, Any] | None = site.cluster.get(
        f"{collection(site.options.control_namespace)}/{object_name(lease.id)}"
    )
    if found is None:
        raise LeaseRefused(f"lease {lease.id} is not open in the cluster: closed or gone")
    at = head(found)
    if at.taken_by or at.holder != identity(lease.owner):
        raise LeaseRefused(f"lease {lease.id} was taken over by {at.taken_by or at.holder or 'somebody'}")


def permissions(namespace: str) -> tuple[Permission, ...]:
    """Everything that a run's ledger and the lever ask of the API server in the control namespace."""
    needed = {
        ("coordination.k8s.io", "leases"): ("get", "list", "create", "patch", "delete"),
        ("", "secrets"): ("get", "list", "create", "delete"),
        ("", "configmaps"): ("get", "create", "update", "delete"),
    }
    return tuple(
        Permission(verb, resource, namespace, group) for (group, resource), verbs in needed.items() for verb in verbs
    )


class ClusterLedger:
    """`ports.Ledger` and `sweep.SweepLedger` in a namespace of a cluster. Threads may share it.

    Args:
        cluster: The API server.
        namespace: The control namespace.
        clock: The caller's own; no other clock is compared with it.
        holder: Who takes leases over; default: this process.
    """

    def __init__(self, cluster: Cluster, namespace: str, clock: Clock, holder: Owner | None = None) -> None:
        self.cluster, self.namespace, self.clock = cluster, namespace, clock
        self.holder = identity(holder or current_owner())
        self.lever = ClusterLever(cluster, namespace)
        self._leases, self._secrets = collection(namespace), f"/api/v1/namespaces/{namespace}/secrets"
        self._lock = threading.Lock()
        self._mine: dict[str, Head] = {}
        """Leases that were opened or taken over here, as last seen."""
        self._first_seen: dict[str, float] = {}
        self._beats: dict[str, int] = {}
        self._listed_at = float("-inf")

    # -- the owner's verbs ------------------------------------------------------------------------------------------

    def open(self, lease: Lease) -> Lease:
        """As `Ledger.open`; the token counts the take-overs of this lease."""
        lease = replace(lease, token=1)
        made: list[str] = []
        with _told(f"cannot write the lease {lease.id} to the cluster"):
            try:
                self._refuse_unless_well()
                held_keys = kin.held(lease.targets) | kin.held_later(lease)
                within = kin.within(self.cluster, lease.targets)
                content = pack(lease)
                for secret in secrets(lease, self.namespace, content):
                    self._make(self._secrets, secret, lease.id, made)
                body = lease_object(lease, self.namespace, identity(lease.owner), content, held_keys, within)
                unpack(head(body), self._parts(head(body)))  # what cannot be read back is no undo data
                found = self._make(self._leases, body, lease.id, made)
                register.enter(
                    self.cluster,
                    self.namespace,
                    lease.id,
                    self.heads,
                    lambda other: _clash(other, held_keys, within),
                    self.clock,
                )
                self._note(head(found))
                self.renew(lease)  # from now on the lease itself tells that it won, should the register be lost
                # Once more: who pulled it after the look above may not have seen the lease.
                self._refuse_if_pulled()
            except ValueError as e:
                self._discard(lease.id, made)
                raise StoreError(f"cannot write the lease {lease.id} to the cluster: {e}") from e
            except BaseException:  # also an interrupt: a lease that open() did not return must not stay
                self._discard(lease.id, made)
                raise
        return lease

    def renew(self, lease: Lease) -> None:
        """As `Ledger.renew`; one call."""
        with _told(f"cannot renew the lease {lease.id} in the cluster"):
            self._change(
                lease,
                lambda at: {
                    "metadata": {"annotations": about(beat=str(at.beat + 1))},
                    "spec": {"renewTime": now()},
                },
            )

    def check(self, lease: Lease) -> None:
        """As `Ledger.check`. Raises StoreError when the cluster does not answer."""
        with _told(f"cannot check the lease {lease.id} in the cluster"):
            self._of(lease)

    def close(self, lease: Lease, evidence: Sequence[str]) -> None:
        """As `Ledger.close`. Nothing is kept in the cluster; evidence is the record's and the sweeper's log's."""
        with _told(f"cannot close the lease {lease.id} in the cluster"):
            for _ in range(_TRIES):
                at = self._head(lease.id)
                if at is None:
                    if lease.id not in self._mine:
                        raise LeaseRefused(f"lease {lease.id} cannot be closed in the cluster: it is closed or gone")
                    break  # only who holds it deletes it: the answer to an earlier try was lost
                self._refuse_unless_ours(at, lease)
                path = f"{self._leases}/{object_name(lease.id)}"
                try:
                    self.cluster.delete(path, uid=at.uid, resource_version=at.version)
                    break
                except Conflict:
                    continue  # a stop request, or somebody took it over: look again
            else:
                raise StoreError(f"cannot close the lease {lease.id} in the cluster: it keeps changing")
        self._mine.pop(lease.id, None)
        with contextlib.suppress(DriverError):  # without its Lease it is garbage: the sweeper removes it
            self._remove_secrets(lease.id)

    # -- the observers' verbs ---------------------------------------------------------------------------------------

    def fence(self, lease_id: str, by: str) -> Lease:
        """As `Ledger.fence`. The beat moves, too: another sweeper waits its whole time to live from now on."""
        with _told(f"cannot take the lease {lease_id} over in the cluster"):
            for _ in range(_TRIES):
                at = self._head(lease_id)
                if at is None:
                    raise LeaseRefused(f"no open lease {lease_id} in the cluster")
                change = {
                    "metadata": {
                        "uid": at.uid,
                        "resourceVersion": at.version,
                        "annotations": about(token=str(at.token + 1), beat=str(at.beat + 1), taken_by=by),
                    },
                    "spec": {"holderIdentity": self.holder, "renewTime": now(), "leaseTransitions": at.token},
                }
                try:
                    found = self.cluster.patch(f"{self._leases}/{object_name(lease_id)}", change)
                except Conflict:
                    continue
                except NotFound:
                    raise LeaseRefused(f"no open lease {lease_id} in the cluster") from None
                at = head(found)
                self._note(at)
                try:
                    return unpack(at, self._parts(at))
                except ValueError:
                    return at.stub()
        raise StoreError(f"cannot take the lease {lease_id} over in the cluster: it keeps changing")

    def request_stop(self, lease_id: str, reason: str) -> None:
        """Ask the owner to stop; it shows in `Lease.stop_requested`. Raises LeaseRefused: no such lease; StoreError."""
        with _told(f"cannot ask the lease {lease_id} to stop"):
            try:
                change = {"metadata": {"annotations": about(stop=reason or "stop")}}
                self.cluster.patch(f"{self._leases}/{object_name(lease_id)}", change)
            except NotFound:
                raise LeaseRefused(f"no open lease {lease_id} in the cluster") from None

    def stop_requested(self, run_id: str) -> str:
        """Of a run whose leases were opened here, as of their last renewal; empty: nobody asked. Asks nobody."""
        return next((at.stop for at in list(self._mine.values()) if at.run_id == run_id and at.stop), "")

    def heads(self) -> tuple[Head, ...]:
        """All open leases as far as their objects tell; one call. Raises DriverError."""
        found = self.cluster.list(self._leases, labels=f"{labels.OURS_SELECTOR},{labels.COMPONENT}=lease")
        heads = tuple(sorted((head(o) for o in found if not _going(o)), key=lambda h: h.id))
        at = self.clock.monotonic()
        with self._lock:
            self._beats = {h.id: h.beat for h in heads}
            self._first_seen = {h.id: self._first_seen.get(h.id, at) for h in heads}
            self._listed_at = at
        return heads

    def leases(self) -> tuple[Lease, ...]:
        """All open leases that can be read, by id."""
        return self._read_all()[0]

    def unreadable(self) -> tuple[str, ...]:
        """`NAMESPACE/NAME` of Lease objects whose content is missing or was changed."""
        return self._read_all()[1]

    def is_open(self, lease_id: str) -> bool:
        """Whether there is an open lease of this id, readable or not."""
        with _told(f"cannot look for the lease {lease_id} in the cluster"):
            return self._head(lease_id) is not None

    def stub(self, path: str) -> Lease | None:
        """An unreadable lease as far as its object tells; None when it is gone."""
        name = path.rpartition("/")[2]
        with _told(f"cannot look for the lease {name} in the cluster"):
            at = self._head(name)
        return None if at is None else at.stub()

    def seen_for(self, lease_id: str) -> float:
        """Seconds since this observer first saw the lease; -inf when it never did."""
        since = self._first_seen.get(lease_id)
        return float("-inf") if since is None else self.clock.monotonic() - since

    def overdue(self, lease: Lease) -> float:
        """Seconds past the deadline since this observer first saw it: an observer that comes late waits longer."""
        return self.seen_for(lease.id) - (lease.deadline_wall - lease.opened_wall)

    def sweeper(self) -> str:
        """Who sweeps this cluster, as the heart's object says; empty: nobody. Raises DriverError."""
        return text(self.cluster.get(f"{self._leases}/{SWEEPER}"), "spec", "holderIdentity")

    def beat(self, lease_id: str) -> int:
        """The renewal counter, at most 0.3 s old. Raises StoreError."""
        if self.clock.monotonic() - self._listed_at > _LISTING_S:
            with _told("cannot read the leases of the cluster"):
                self.heads()
        return self._beats.get(lease_id, 0)

    @contextlib.contextmanager
    def recovering(self, lease_id: str, wait_s: float) -> Generator[bool, None, None]:
        """Be the only sweeper of this lease: wait while another who took it over renews it; renew it ourselves once it
        is ours, until the body ends.

        Yields:
            False when another still had it after `wait_s` seconds.
        """
        free = self._wait_for_other(lease_id, wait_s)
        over = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(lease_id, over), name="lease-keeper", daemon=True)
        keeper.start()
        try:
            yield free
        finally:
            over.set()
            keeper.join()

    # -- what the sweeper collects ----------------------------------------------------------------------------------

    def orphans(self) -> dict[str, str]:
        """Path → uid of Secrets whose Lease is not there (or not there yet). Raises DriverError."""
        # In this order: what is being opened has its Secrets first.
        found = self.cluster.list(self._secrets, labels=f"{labels.OURS_SELECTOR},{labels.COMPONENT}=undo")
        names = {object_name(h.id) for h in self.heads()}
        return {
            f"{self._secrets}/{text(o, 'metadata', 'name')}": text(o, "metadata", "uid")
            for o in found
            if text(o, "metadata", "labels", labels.LEASE) not in names
        }

    # -- inside -----------------------------------------------------------------------------------------------------

    def _refuse_unless_well(self) -> None:
        self._refuse_if_pulled()
        if bad := self.unreadable():
            raise LeaseRefused(
                f"leases in the cluster cannot be read, a fault may be live: {', '.join(bad)}; mlchaos clean"
            )

    def _refuse_if_pulled(self) -> None:
        if (reason := self.lever.read()) is not None:
            raise LeaseRefused(f"the lever of the cluster is pulled: {reason}")

    def _make(self, path: str, body: dict[str, Any], lease_id: str, made: list[str]) -> dict[str, Any]:
        """Create it; noted before, since a lost answer may hide that it was made."""
        name = f"{path}/{body['metadata']['name']}"
        made.insert(0, name)
        try:
            return self.cluster.create(path, body)
        except Conflict as e:
            made.remove(name)
            raise LeaseRefused(f"lease {lease_id} is open in the cluster already") from e
        except NotFound as e:
            raise StoreError(f"there is no namespace {self.namespace} in the cluster; {INSTALL}") from e

    def _discard(self, lease_id: str, made: list[str]) -> None:
        """The Lease first. What cannot be removed now, the sweeper removes."""
        self._mine.pop(lease_id, None)
        for path in made:
            with contextlib.suppress(DriverError):
                self.cluster.delete(path)

    def _remove_secrets(self, lease_id: str) -> None:
        selector = f"{labels.OURS_SELECTOR},{labels.COMPONENT}=undo,{labels.LEASE}={object_name(lease_id)}"
        for secret in self.cluster.list(self._secrets, labels=selector):
            self.cluster.delete(f"{self._secrets}/{text(secret, 'metadata', 'name')}")

    def _head(self, lease_id: str) -> Head | None:
        found = self.cluster.get(f"{self._leases}/{object_name(lease_id)}")
        return None if found is None or _going(found) else head(found)

    def _of(self, lease: Lease) -> Head:
        """Raises LeaseRefused unless the lease is in force with this token."""
        at = self._head(lease.id)
        if at is None:
            raise LeaseRefused(f"lease {lease.id} is not open in the cluster: closed or gone")
        self._refuse_unless_ours(at, lease)
        return at

    @staticmethod
    def _refuse_unless_ours(at: Head, lease: Lease) -> None:
        if at.token != lease.token:
            raise LeaseRefused(f"lease {lease.id} was taken over by {at.taken_by or at.holder}")

    def _change(self, lease: Lease, change: Callable[[Head], dict[str, Any]]) -> None:
        """A fenced patch; made again when somebody else changed the object and the lease is still ours."""
        at = self._mine.get(lease.id)
        for _ in range(_TRIES):
            if at is None or at.token != lease.token:
                at = self._of(lease)
            body = change(at)
            body["metadata"] |= {"uid": at.uid, "resourceVersion": at.version}
            try:
                self._note(head(self.cluster.patch(f"{self._leases}/{object_name(lease.id)}", body)))
                return
            except Conflict:
                at = None
            except NotFound:
                raise LeaseRefused(f"lease {lease.id} is not open in the cluster: closed or gone") from None
        raise StoreError(f"the lease {lease.id} in the cluster keeps changing")

    def _note(self, at: Head) -> None:
        self._mine[at.id] = at

    def _parts(self, at: Head) -> list[bytes | None]:
        names = (secret_name(at.id, i) for i in range(at.parts))
        return [secret_content(self.cluster.get(f"{self._secrets}/{name}")) for name in names]

    def _read_all(self) -> tuple[tuple[Lease, ...], tuple[str, ...]]:
        good: list[Lease] = []
        bad: list[str] = []
        with _told("cannot read the leases of the cluster"):
            heads = self.heads()
            found = self.cluster.list(self._secrets, labels=f"{labels.OURS_SELECTOR},{labels.COMPONENT}=undo")
            contents = {text(o, "metadata", "name"): secret_content(o) for o in found}
            for at in heads:
                try:
                    good.append(unpack(at, [contents.get(secret_name(at.id, i)) for i in range(at.parts)]))
                except ValueError:
                    if self._head(at.id) is not None:  # else it was closed between the two listings
                        bad.append(f"{self.namespace}/{object_name(at.id)}")
        return tuple(good), tuple(bad)

    def _wait_for_other(self, lease_id: str, wait_s: float) -> bool:
        start = moved_at = self.clock.monotonic()
        beat: int | None = None
        while (at := self.clock.monotonic()) - start < wait_s:
            try:
                found = self._head(lease_id)
            except DriverError:
                return False
            if found is None or not found.taken_by or found.holder == self.holder:
                return True
            # Somebody took it over: as long as he renews it, it is his; after three beats' silence he is gone.
            if found.beat != beat:
                beat, moved_at = found.beat, at
            elif at - moved_at > 3 * _KEEP_S:
                return True
            self.clock.sleep(_POLL_S)
        return False

    def _keep(self, lease_id: str, over: threading.Event) -> None:
        while not over.wait(_KEEP_S):
            at = self._mine.get(lease_id)
            if at is not None and at.holder == self.holder and at.taken_by:
                with contextlib.suppress(StoreError):  # fenced: the next check tells
                    self.renew(at.stub())


def _clash(other: Head, mine: dict[str, str], within: frozenset[str]) -> str:
    """What keeps a lease out, in words; empty: nothing."""
    whose = f"run {other.run_id} ({other.experiment}), lease {other.id}"
    if shared := other.holds & set(mine):
        return f"{', '.join(sorted({mine[k] for k in shared}))} held by {whose}"
    if part := other.within & set(mine):
        return f"a part of {', '.join(sorted({mine[k] for k in part}))} is held by {whose}"
    if other.holds & within:
        return f"what a target is part of is held by {whose}"
    return ""


def _going(found: dict[str, Any]) -> bool:
    return bool(text(found, "metadata", "deletionTimestamp"))


@contextlib.contextmanager
def _told(what: str) -> Generator[None, None, None]:
    """The ledger's errors are those of a ledger."""
    try:
        yield
    except DriverError as e:
        raise StoreError(f"{what}: {e}") from e
