"""The ring in the cluster: `python -m mlchaos_dagster.sweeper`, a Deployment in the control namespace.

Takes away the fault of every lease that nobody renews, that is long past its deadline, or that is open while the lever
is pulled; proves it and closes it. Of several replicas one sweeps: the one that renews the Lease `mlchaos-sweeper`, which
is also the heart that runs look at. It beats only when the loop went round, so a sweeper that hangs looks dead.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.engine.incidents import IncidentLog, Kind
from mlchaos_dagster.engine.ports import Clock, Driver, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.engine.sweep import OVERDUE_S, Drivers, RenewalObserver, SweepResult, sweep
from mlchaos_dagster.errors import ConfigError, DriverError, MlChaosError
from mlchaos_dagster.kube import labels
from mlchaos_dagster.kube.client import Cluster, Conflict
from mlchaos_dagster.kube.lease_objects import Head, identity, now
from mlchaos_dagster.kube.leases import SWEEPER, ClusterLedger, collection
from mlchaos_dagster.kube.objects import text
from mlchaos_dagster.kube.reach import Reach
from mlchaos_dagster.kube.refs import Ref

TICK_S = 1.0
"""Between two looks."""
BEAT_S = 2.0
"""Between two beats of the heart."""
LEVER_GRACE_S = 5.0
"""After the lever was pulled owners may end by themselves for so long: their own recovery proves more than ours."""
ORPHANS_EVERY_S = 60.0
ORPHAN_S = 300.0
"""How long a Secret without a Lease is left alone: its lease may just be being opened."""
STUCK_S = 90.0
"""Without a finished look for so long the process does not answer its liveness probe."""
WORKERS = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Heart:
    """The Lease that says who sweeps.

    Args:
        cluster: The API server.
        namespace: Of the Lease.
        holder: Who we are.
        clock: Ours.
        ttl_s: Silence of another holder, in seconds, after which we take his place; the same without an answer to our
            own beats, and we step down.
    """

    def __init__(self, cluster: Cluster, namespace: str, holder: str, clock: Clock, ttl_s: float) -> None:
        self.cluster, self.namespace, self.holder, self.clock, self.ttl_s = cluster, namespace, holder, clock, ttl_s
        self._path, self._reach = f"{collection(namespace)}/{SWEEPER}", Reach(cluster, clock)
        self._beat_at, self._seen, self._seen_at = float("-inf"), "", float("-inf")

    @property
    def leads(self) -> bool:
        """Whether our last beat that counted is young: two thirds of what another waits."""
        return self.clock.monotonic() - self._beat_at < self.ttl_s * 2 / 3

    def beat(self) -> bool:
        """One beat, or a look at another's. Returns `leads`. Raises DriverError: the cluster did not answer."""
        started = self.clock.monotonic()
        if started - self._beat_at < BEAT_S:
            return True
        found = self.cluster.get(self._path)
        try:
            if found is None:
                self.cluster.create(collection(self.namespace), self._body(""))
            elif text(found, "spec", "holderIdentity") in (self.holder, "") or self._silent(found):
                self.cluster.replace(self._path, self._body(text(found, "metadata", "resourceVersion")))
            else:
                return False
        except Conflict:
            return False  # another was faster
        self._beat_at = started
        return True

    def rest(self) -> None:
        """Leave the place to another at once. Never raises."""
        if self.leads:
            with contextlib.suppress(DriverError):
                found = self.cluster.get(self._path)
                if text(found, "spec", "holderIdentity") == self.holder:
                    body = self._body(text(found, "metadata", "resourceVersion"))
                    body["spec"]["holderIdentity"] = ""
                    self.cluster.replace(self._path, body)
        self._beat_at = float("-inf")

    def _silent(self, found: dict[str, Any]) -> bool:
        version, at = text(found, "metadata", "resourceVersion"), self.clock.monotonic()
        if version != self._seen:
            self._seen, self._seen_at = version, at
        return at - self._seen_at >= self.ttl_s

    def _body(self, version: str) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "name": SWEEPER,
            "namespace": self.namespace,
            "labels": {labels.MANAGED_BY: labels.OURS, labels.COMPONENT: "sweeper"},
            "annotations": self._reach.annotations(),
        }
        if version:
            metadata["resourceVersion"] = version
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {"holderIdentity": self.holder, "renewTime": now()},
        }


class Journal(IncidentLog):
    """The incident log of a pod: one JSON line on standard output for everything that happens."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(Path("/dev/stdout"), clock)

    def write(self, kind: Kind, what: str, **facts: Any) -> str:
        """One line. Never raises."""
        line = json.dumps({"at": round(self.clock.wall(), 3), "kind": kind, "what": what, **facts}) + "\n"
        with contextlib.suppress(OSError):
            os.write(1, line.encode())
        return f"{kind}: {what}"


class Sweeper:
    """The loop's body.

    Args:
        ledger: Of the cluster.
        heart: Who sweeps.
        drivers: As in `sweep`.
        clock: Ours.
        journal: Where everything is written.
        ttl_s: Silence of an owner, in seconds, after which he counts as gone.
        told: Called with every result.
    """

    def __init__(
        self,
        ledger: ClusterLedger,
        heart: Heart,
        drivers: Drivers,
        clock: Clock,
        journal: Journal,
        *,
        ttl_s: float,
        told: Callable[[SweepResult], None] = lambda _: None,
    ) -> None:
        self.ledger, self.heart, self.drivers, self.clock, self.journal = ledger, heart, drivers, clock, journal
        self.told = told
        self.observer = RenewalObserver(ledger, clock, ttl_s)
        self.looked_at = clock.monotonic()
        """When the loop last went round, whether or not the cluster answered."""
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="sweep")
        self._under_way: dict[str, Future[None]] = {}
        self._again: dict[str, tuple[float, float]] = {}
        """Lease id → (not before, pause) after an attempt that failed."""
        self._pulled_at: float | None = None
        self._orphans: dict[str, float] = {}
        self._collected_at = clock.monotonic()
        self._led = False

    def tick(self) -> None:
        """One look, and what follows from it. Raises MlChaosError: the cluster did not answer; try again."""
        try:
            self._tick()
        finally:
            self.looked_at = self.clock.monotonic()

    def _tick(self) -> None:
        leads = self.heart.beat()
        if leads != self._led:
            self._led = leads
            self.journal.write("watcher", "this sweeper leads" if leads else "another sweeper leads")
        heads = self.ledger.heads()
        self.observer.look([h.stub() for h in heads])
        if not leads:  # but who looks on is ready at once
            return
        reason = self.ledger.lever.read()
        at = self.clock.monotonic()
        self._pulled_at = None if reason is None else self._pulled_at if self._pulled_at is not None else at
        self._under_way = {k: f for k, f in self._under_way.items() if not f.done()}
        self._again = {k: v for k, v in self._again.items() if any(h.id == k for h in heads)}
        for h in heads:
            if h.id not in self._under_way and (why := self._why(h, reason, at)):
                self._under_way[h.id] = self._workers.submit(self._sweep, h, why)
        if at - self._collected_at >= ORPHANS_EVERY_S:
            self._collected_at = at
            self._collect(at)

    def close(self) -> None:
        """Let what is under way end, then let go."""
        self._workers.shutdown(wait=True)
        self.heart.rest()

    def _why(self, h: Head, reason: str | None, at: float) -> str:
        if h.id in self._again and h.holder == self.ledger.holder:  # else another has it now
            return "an attempt before failed" if at >= self._again[h.id][0] else ""
        lease = h.stub()
        if self.observer.silent(lease):
            return f"no renewal was seen for {self.observer.ttl_s:g} s"
        if self.ledger.seen_for(h.id) - h.lifetime_s > OVERDUE_S:
            return f"it is more than {OVERDUE_S:g} s past its deadline"
        if self._pulled_at is not None and at - self._pulled_at >= LEVER_GRACE_S:
            return f"the lever is pulled: {reason}"
        return ""

    def _sweep(self, h: Head, why: str) -> None:
        clean = False
        try:
            if why.startswith("no renewal") and not self.observer.still_silent(h.stub()):
                return
            if not self.heart.leads:
                return
            for result in sweep(
                self.ledger,
                self.drivers,
                self.clock,
                self.journal,
                only={h.id},
                force=why,
                by=f"the sweeper {self.heart.holder}",
            ):
                clean = result.clean and not result.error
                self.told(result)
        except Exception as e:  # noqa: BLE001 - the last ring must not break
            self.journal.write("error", f"lease {h.id}: {type(e).__name__}: {e}", lease=h.id)
        finally:
            if clean:
                self._again.pop(h.id, None)
            else:
                pause = min(self._again.get(h.id, (0.0, _FIRST_PAUSE_S / 2))[1] * 2, _LONGEST_PAUSE_S)
                self._again[h.id] = (self.clock.monotonic() + pause, pause)

    def _collect(self, at: float) -> None:
        """Secrets that were never followed by a Lease, or left behind when it was closed."""
        found = self.ledger.orphans()
        self._orphans = {path: self._orphans.get(path, at) for path in found}
        for path, since in self._orphans.items():
            if at - since >= ORPHAN_S:
                self.ledger.cluster.delete(path, uid=found[path])
                self.journal.write("recovered", f"{path} belonged to no lease and was removed")


class Events:
    """Tells the people of a namespace, as Kubernetes Events, what was done there."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __call__(self, result: SweepResult) -> None:
        """At the first targets of the lease. Never raises: whoever may not write Events loses only the notice."""
        lease = result.lease
        said = "was taken away and proven gone" if result.clean else f"MAY BE LIVE: {result.error}"
        for target in lease.targets[:5]:
            with contextlib.suppress(DriverError):
                ref = Ref.parse(target)
                space = ref.namespace or "default"
                event = {
                    "apiVersion": "v1",
                    "kind": "Event",
                    "metadata": {"generateName": "mlchaos-", "namespace": space},
                    "involvedObject": {
                        "kind": ref.kind.capitalize(),
                        "namespace": ref.namespace,
                        "name": ref.name,
                        "uid": ref.uid,
                    },
                    "reason": "FaultRecovered" if result.clean else "FaultMayBeLive",
                    "message": f"{lease.kind} of {lease.experiment} (lease {lease.id}) {said}; {result.why}"[:1000],
                    "type": "Normal" if result.clean else "Warning",
                    "source": {"component": SWEEPER},
                    "firstTimestamp": now()[:19] + "Z",
                    "lastTimestamp": now()[:19] + "Z",
                    "count": 1,
                }
                self.cluster.create(f"/api/v1/namespaces/{space}/events", event)


def drivers(cluster: Cluster, namespace: str) -> Callable[[str, str], Driver]:
    """The driver of every lease of this cluster; what it needs to know of the environment is in the lease."""
    from mlchaos_dagster.drivers.every import of_cluster

    options = Kubernetes(namespace=namespace, control_namespace=namespace)

    def find(name: str, environment: str) -> Driver:
        return of_cluster(name, cluster, options)

    return find


def serve_health(port: int, well: Callable[[], bool]) -> http.server.ThreadingHTTPServer:
    """`/healthz` for the liveness probe, from a thread of its own."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if well() else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("", port), Answer)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep until told to end (SIGTERM)."""
    options = _parse(arguments)
    over = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    clock = SystemClock()
    journal = Journal(clock)
    try:
        cluster = Cluster(options.context, options.kubeconfig)
    except ConfigError as e:
        sys.stderr.write(f"mlchaos_dagster.sweeper: {e}\n")
        return 2
    ledger = ClusterLedger(cluster, options.namespace, clock)
    sweeper = Sweeper(
        ledger,
        Heart(cluster, options.namespace, identity(current_owner()), clock, options.ttl),
        drivers(cluster, options.namespace),
        clock,
        journal,
        ttl_s=options.ttl,
        told=Events(cluster),
    )
    server = serve_health(options.port, lambda: clock.monotonic() - sweeper.looked_at < STUCK_S)
    pause = TICK_S
    while not over.wait(pause):
        try:
            sweeper.tick()
            pause = TICK_S
        except MlChaosError as e:
            journal.write("error", f"the cluster was not looked at: {e}")
            pause = min(pause * 2, 5.0)
        except Exception as e:  # noqa: BLE001 - a bug of ours: told, and tried again
            journal.write("error", f"{type(e).__name__}: {e}")
    sweeper.close()
    server.shutdown()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlchaos_dagster.sweeper", description=__doc__)
    parser.add_argument("--namespace", default="mlchaos-system", help="control namespace: leases, lever, heart")
    parser.add_argument("--ttl", type=float, default=15.0, help="seconds of silence after which an owner is gone")
    parser.add_argument("--port", type=int, default=8080, help="of /healthz")
    parser.add_argument("--context", default="", help="of the kubeconfig; empty: this pod's service account")
    parser.add_argument("--kubeconfig", default="", help="path; empty: KUBECONFIG, else ~/.kube/config")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
