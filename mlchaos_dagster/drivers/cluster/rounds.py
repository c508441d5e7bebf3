"""What replaced the frozen pods is taken again at an interval, by a thread of the run's own process.

It ends with the process, at the lease's deadline, when the lease is taken over, and when `end` is called here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.errors import DriverError, RecoverFailed, StoreError
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.objects import text
from mlchaos_dagster.kube.refs import Ref, collection
from mlchaos_dagster.kube.selecting import is_there

Take = Callable[["Rounds", "list[Ref]"], "list[Ref]"]
"""Takes these pods and says which it took; ends early once the rounds are over. May raise DriverError or StoreError."""


class Rounds(threading.Thread):
    """Rounds every `interval_s`, until they are stopped or `deadline` (monotonic).

    Args:
        site: the cluster.
        injection: whose `undo["owners"]` says which controllers the frozen pods had.
        interval_s: from the beginning of a round to that of the next.
        deadline: as above.
        did: what happens to a pod, such as `deleted`.
        take: makes it happen.
    """

    def __init__(
        self, site: Site, injection: Injection, interval_s: float, deadline: float, did: str, take: Take
    ) -> None:
        super().__init__(name=f"rounds-{injection.lease.id}", daemon=True)
        self.site, self.injection, self.interval_s, self.deadline = site, injection, interval_s, deadline
        self.stop = threading.Event()
        self.error = ""
        """Why the last round did not succeed; empty: it did."""
        self.done = 1
        """Rounds so far; the first was that of `inject`."""
        self._did, self._take = did, take
        self._taken = [ref.name for ref in injection.refs]

    @property
    def over(self) -> bool:
        """Nothing more may be taken."""
        return self.stop.is_set() or time.monotonic() >= self.deadline

    @property
    def said(self) -> str:
        """What it did, in one line."""
        pods = f"{len(self._taken)} pods {self._did} in {self.done} rounds, the last: {self._taken[-1]}"
        return f"{pods}; {self.error}" if self.error else pods

    def run(self) -> None:
        """Rounds at a steady beat, however long each takes."""
        due = time.monotonic()
        while True:
            due = max(due + self.interval_s, time.monotonic())
            if due >= self.deadline:
                self.stop.wait(max(0.0, self.deadline - time.monotonic()))
                return
            if self.stop.wait(due - time.monotonic()):
                return
            try:
                refs = newest(self.site, self.injection)
                if refs and not self.over:
                    self._taken += [ref.name for ref in self._take(self, refs)]
                    self.done += 1
                self.error = ""
            except StoreError as e:  # fenced, or the lease is gone: it is no longer ours to do
                self.error = str(e)
                return
            except DriverError as e:
                self.error = f"the last round failed: {e}"


_running: dict[str, Rounds] = {}
"""Rounds of this process by lease; they end with it."""


def begin(site: Site, injection: Injection, began: float, did: str, take: Take) -> None:
    """Begin the rounds, if the fault has an interval. `began`: when its first round did, monotonic."""
    lease = injection.lease
    if interval_s := injection.params.get("interval_s"):
        _running[lease.id] = Rounds(site, injection, interval_s, began + lease.duration_s, did, take)
        _running[lease.id].start()


def of(lease: Lease) -> Rounds | None:
    """The rounds of a lease, if this process began any; they may be over."""
    return _running.get(lease.id)


def end(site: Site, lease: Lease, step: Step, driver: str) -> None:
    """End the rounds of a lease and wait for the one that is under way. Raises RecoverFailed: it does not end."""
    rounds = of(lease)
    if rounds is None:
        return
    rounds.stop.set()
    until = time.monotonic() + 4 * site.cluster.timeout_s
    while rounds.is_alive():
        if time.monotonic() > until:
            raise RecoverFailed("a round is still under way", driver=driver, lease_id=lease.id)
        step(0, 0)
        rounds.join(0.1)


def newest(site: Site, injection: Injection) -> list[Ref]:
    """As many pods of each controller as were frozen of it, the newest."""
    owners: dict[str, str] = injection.undo["owners"]
    wanted: dict[tuple[str, str], int] = {}
    for ref in injection.refs:
        key = (ref.namespace, owners[ref.uid])
        wanted[key] = wanted.get(key, 0) + 1
    found: list[Ref] = []
    for (namespace, owner), count in wanted.items():
        there = [p for p in site.cluster.list(collection("pod", namespace)) if is_there(p)]
        of_owner = sorted(
            (p for p in there if text(frozen.controller(p), "uid") == owner),
            key=lambda p: (text(p, "metadata", "creationTimestamp"), text(p, "metadata", "name")),
            reverse=True,
        )
        found += [Ref.of("pod", p) for p in of_owner[:count]]
    return found
