"""`mlchaos stop`: ask, wait until the target is proven clean, and where the run does not obey, take the fault away here.

Asking is a file that the watch loop reads; it needs neither Dagster nor the run's cooperation to end well.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App, Names, common, current, leave
from mlchaos_dagster.errors import LeaseRefused, SpecError, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.cli.places import Places
    from mlchaos_dagster.engine.ports import Lease

OBEY_S = 5.0
"""How long a live owner may take to stop by itself; its own recovery proves more than ours (it keeps measuring)."""
_POLL_S = 0.02
_UNCLEAN = 70


@click.command("stop")
@click.argument("run", required=False, metavar="[RUN]", type=Names("experiment"))
@click.option("--all", "everything", is_flag=True, help="Stop everything; no run may start until --release.")
@click.option("--release", is_flag=True, help="Let runs start again.")
@click.option("--reason", default="", metavar="TEXT", help="Goes into records and the incident log.")
@common
def command(run: str | None, everything: bool, release: bool, reason: str) -> None:
    """Stop one RUN (id or experiment name), or --all, and wait until it is clean.

    Exits with 0 when all is clean, and with 70 when a fault may still be live.
    """
    from mlchaos_dagster.cli.places import Places

    app = current()
    if sum((run is not None, everything, release)) != 1:
        raise SpecError("needs exactly one of RUN, --all, --release. `mlchaos status` shows what runs.", "stop")
    places = Places(app)
    if release:
        released = places.stops.release_lever()
        app.dump({"lever": None, "released": released})
        app.out("the lever is released: runs may start again" if released else "the lever was not pulled")
        return
    reason = reason or f"mlchaos stop, by {app.settings.user or 'somebody'}"
    stopper = Stopper(places, reason)
    results = stopper.everything() if everything else stopper.one(str(run))
    _show(app, places, results, stopper)


class Stopper:
    """One call of `stop`."""

    def __init__(self, places: Places, reason: str) -> None:
        self.places, self.reason = places, reason
        self.began = time.monotonic()
        self.finished = ""
        """Said when the run was over before."""

    @property
    def seconds(self) -> float:
        """Since the word was given."""
        return time.monotonic() - self.began

    def everything(self) -> list[dict[str, Any]]:
        """Pull the lever first: it also keeps out what is about to start."""
        self.places.stops.pull_lever(self.reason)
        leases = self.places.ledger.leases()
        self.places.incidents.write("emergency_stop", self.reason, leases=[x.id for x in leases])
        return self._until_clean(leases, unreadable=bool(self.places.ledger.unreadable()))

    def one(self, run: str) -> list[dict[str, Any]]:
        """Raises SpecError: no such run."""
        from mlchaos_dagster.cli.places import matching

        leases = matching(self.places.ledger.leases(), run)
        if not leases:
            self._not_running(run)
            return []
        for run_id in {x.run_id for x in leases}:
            self.places.stops.request(run_id, self.reason)
        for lease in leases:
            with contextlib.suppress(LeaseRefused, StoreError):  # the file was the request; this is for other machines
                self.places.ledger.request_stop(lease.id, self.reason)
        self.places.incidents.write("stop", self.reason, run=run, leases=[x.id for x in leases])
        return self._until_clean(leases)

    def _not_running(self, run: str) -> None:
        """No fault of it is active. A run that still measures its baseline is told, and awaited, all the same."""
        measuring = self.places.measuring()
        for run_id in (m for m in measuring if len(run) >= 4 and m.startswith(run)):
            self.places.stops.request(run_id, self.reason)
            self.places.incidents.write("stop", self.reason, run=run_id, leases=[])
            while run_id in self.places.measuring() and self.seconds < OBEY_S:
                time.sleep(_POLL_S)
            ended = f"it ended after {self.seconds:.1f} s" if self.seconds < OBEY_S else "it ends at its next look"
            self.finished = f"run {run_id} was told before a fault of it was active; {ended}"
            return
        try:
            found = self.places.store.find(run)
        except SpecError:
            if run not in self.places.app.catalog.names("experiment"):
                raise
            self.finished = f"no fault of {run} is active"
            if measuring:
                # a run without a lease is known by its id only; the wrong one must not be stopped for it
                self.finished += f"; stop a run that has not begun its fault by its id: {', '.join(measuring)}"
            return
        self.finished = f"run {found} is over; no fault of it is active"

    def _until_clean(self, leases: Sequence[Lease], unreadable: bool = False) -> list[dict[str, Any]]:
        from mlchaos_dagster.engine.processes import is_running

        waiting = {x.id: x for x in leases}
        results: list[dict[str, Any]] = []
        while waiting and self.seconds < OBEY_S:
            still = {x.id for x in self.places.ledger.leases()}
            for lease_id in [i for i in waiting if i not in still]:
                results.append(self._obeyed(waiting.pop(lease_id)))
            if waiting and not any(is_running(x.owner) for x in waiting.values()):
                break
            time.sleep(_POLL_S)
        if waiting or unreadable:
            results += self._take_away(None if unreadable else list(waiting))
        return results

    def _obeyed(self, lease: Lease) -> dict[str, Any]:
        evidence = self.places.evidence(lease)
        return _row(lease, "its own run", True, self.seconds, evidence, "")

    def _take_away(self, only: list[str] | None) -> list[dict[str, Any]]:
        from mlchaos_dagster.engine.sweep import sweep

        places = self.places
        swept = sweep(
            places.ledger,
            places.driver,
            places.clock,
            places.incidents,
            only=only,
            force=self.reason,
            by="mlchaos stop",
        )
        return [_row(r.lease, "mlchaos stop", r.clean, self.seconds, r.evidence, r.command, r.error) for r in swept]


def _row(
    lease: Lease, by: str, clean: bool, seconds: float, evidence: Sequence[str], command: str, error: str = ""
) -> dict[str, Any]:
    return {
        "run_id": lease.run_id,
        "experiment": lease.experiment,
        "lease": lease.id,
        "fault": lease.kind,
        "targets": list(lease.targets),
        "taken_away_by": by,
        "clean": clean,
        "seconds": round(seconds, 3),
        "evidence": list(evidence),
        "error": error,
        "command": command,
    }


def _show(app: App, places: Places, results: list[dict[str, Any]], stopper: Stopper) -> None:
    clean = all(r["clean"] for r in results)
    lever = places.stops.lever()
    app.dump(
        {
            "stopped": results,
            "clean": clean,
            "seconds": round(stopper.seconds, 3),
            "lever": lever,
            "note": stopper.finished,
        }
    )
    for r in results:
        what = f"{r['experiment'] or 'lease ' + r['lease']}  {r['fault']} on {', '.join(r['targets']) or 'unknown targets'}"
        if r["clean"]:
            app.out(f"stopped  {what}: clean after {r['seconds']:.2f} s, taken away by {r['taken_away_by']}")
        else:
            app.out(f"UNCLEAN  {what}: the fault may be live ({r['error']})\n  type: {r['command']}")
        for line in r["evidence"]:
            app.out(f"  {line}")
    if not results:
        app.out(stopper.finished or "nothing was running")
    if lever is not None:
        app.out("the lever is pulled: no run starts until `mlchaos stop --release`")
    if not clean:
        leave(_UNCLEAN)
