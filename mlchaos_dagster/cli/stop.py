"""`mlchaos stop`: ask, wait until the target is proven clean, and where the run does not obey, take the fault away here.

Asking is a file that the watch loop reads; it needs neither Dagster nor the run's cooperation to end well.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App, Names, common, current, leave
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.errors import LeaseRefused, SpecError, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.cli.places import Places
    from mlchaos_dagster.engine.active import ActiveRun
    from mlchaos_dagster.engine.ports import Lease

OBEY_S = 5.0
"""How long a live owner may take to begin to take its fault away, and be silent while it does; its own recovery proves more
than ours (it keeps measuring), and a backend may need many seconds. Bounded by the owner's own `safety.recover_timeout`."""
LONGEST_S = 300.0
"""How long a run is awaited that goes on renewing: its bound is its own word, and a driver may step for ever."""
_EVIDENCE_S = 0.5
"""How long to wait for the evidence of a closed lease; on a full disk there is none."""
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
    if places.never_used and not places.there.exists:
        raise SpecError(places.never_used, "stop")
    if release:
        released = places.stops.release_lever()
        cluster = places.there.release() if places.there.exists else ""
        app.dump({"home": str(app.settings.home.root), "lever": None, "released": released, "cluster": cluster})
        places.say_where()
        app.out("the lever is released: runs may start again" if released else "the lever was not pulled")
        if cluster:
            app.out(cluster)
        return
    reason = reason.encode(errors="replace").decode() or f"mlchaos stop, by {app.settings.user or 'somebody'}"
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
        self.cluster = ""
        """What became of the lever of the cluster, or of asking it; empty where there is none."""

    @property
    def seconds(self) -> float:
        """Since the word was given."""
        return time.monotonic() - self.began

    def everything(self) -> list[dict[str, Any]]:
        """Pull the lever first: it also keeps out what is about to start."""
        places = self.places
        places.stops.pull_lever(self.reason)
        pulled = places.there.pull(self.reason) if places.there.exists else None
        # A lease that is being written by who looked at the lever before is there after this, or never.
        places.ledger.settled()
        runs, leases = places.active.running(), places.ledger.leases()
        places.incidents.write(
            "emergency_stop", self.reason, runs=[r.run_id for r in runs], leases=[x.id for x in leases]
        )
        results = self._until_safe(None, runs, leases, unreadable=bool(places.ledger.unreadable()))
        if pulled is not None:
            elsewhere, said = pulled.wait()
            self.cluster = f"NOT pulled: {said}" if elsewhere is None else "pulled"
            mine = {x.id for x in leases}
            results += self._elsewhere([x for x in elsewhere or () if x.id not in mine])
        return results

    def one(self, run: str) -> list[dict[str, Any]]:
        """Every active run that the word means. Raises SpecError: no such run."""
        from mlchaos_dagster.cli.places import matching

        places = self.places
        runs, leases = places.active.running(), places.ledger.leases()
        ids = matching(run, runs, leases) or self._of_stages(run, runs, leases)
        if not ids:
            return self._of_other_machines(run) or self._not_running(run)
        runs, leases = [r for r in runs if r.run_id in ids], [x for x in leases if x.run_id in ids]
        for run_id in sorted(ids):
            places.stops.request(run_id, self.reason)
        for lease in leases:
            with contextlib.suppress(LeaseRefused, StoreError):  # the file was the request; this is for other machines
                places.ledger.request_stop(lease.id, self.reason)
        places.incidents.write("stop", self.reason, run=run, runs=sorted(ids), leases=[x.id for x in leases])
        results = self._until_safe(ids, runs, leases)
        alive = {r.run_id for r in places.active.running()} | {x.run_id for x in places.ledger.leases()}
        for run_id in ids - alive:
            places.stops.forget(run_id)  # it left before it was asked, or was killed: nobody else would
        return results

    def _of_other_machines(self, run: str) -> list[dict[str, Any]]:
        """What the word means among the leases of the cluster; empty: nothing, or it does not answer."""
        from mlchaos_dagster.cli.places import matching

        there = self.places.there
        if not there.exists:
            return []
        found, said = there.ask(lambda ledger: ledger.leases()).wait()
        if found is None:
            self.cluster = f"unknown: {said}"
            return []
        ids = matching(run, [], found) or self._of_stages(run, [], found)
        leases = [x for x in found if x.run_id in ids]
        if leases:
            there.stop(leases, self.reason)
            self.places.incidents.write("stop", self.reason, run=run, runs=sorted(ids), leases=[x.id for x in leases])
        return self._elsewhere(leases)

    def _elsewhere(self, leases: Sequence[Lease]) -> list[dict[str, Any]]:
        """Leases of other machines: closed only after the proof, by their own runs or by the sweeper."""
        return [
            _row(lease, "its own run, or the sweeper", not error, seconds, (), "mlchaos status" if error else "", error)
            for lease, seconds, error in self.places.there.until_gone(leases)
        ]

    def _of_stages(self, run: str, runs: Sequence[ActiveRun], leases: Sequence[Lease]) -> set[str]:
        """Whichever stage of an experiment in stages is running; a library that is wrong keeps nobody from stopping."""
        from mlchaos_dagster.cli.places import matching

        with contextlib.suppress(SpecError):
            names = self.places.app.catalog.expand(run)
            return {i for name in names if name != run for i in matching(name, runs, leases)}
        return set()

    def _not_running(self, run: str) -> list[dict[str, Any]]:
        try:
            found = self.places.store.find(run)
        except SpecError:
            if run not in self.places.app.catalog.names("experiment"):
                raise
            self.finished = f"no run of {run} is active"
            return []
        self.finished = f"run {found} is over; no fault of it is active"
        return []

    def _until_safe(
        self, ids: set[str] | None, runs: Sequence[ActiveRun], leases: Sequence[Lease], unreadable: bool = False
    ) -> list[dict[str, Any]]:
        """Wait until no run of `ids` (None: any) holds a lease or may open one; take away what is not obeyed in time."""
        from mlchaos_dagster.engine.active import RESTORING
        from mlchaos_dagster.engine.processes import is_running
        from mlchaos_dagster.engine.sweep import RenewalObserver

        places = self.places
        renewals = RenewalObserver(places.ledger, places.clock, OBEY_S)
        held = {x.id: x for x in leases}
        told = {r.run_id: r for r in runs}
        taken: set[str] = set()  # once: what could not be taken away is told, with the command
        results: list[dict[str, Any]] = []
        while True:
            # In this order: a run that has left has left its lease open, if it left one.
            alive = {r.run_id: r for r in places.active.running()}
            still = {x.id: x for x in places.ledger.leases() if x.id not in taken and (ids is None or x.run_id in ids)}
            held.update(still)
            for lease in held.values():
                told.pop(lease.run_id, None)  # from here on its lease tells
            damaged = {i for i in held.keys() - still.keys() if places.ledger.is_open(i)}  # it cannot be read any more
            for lease_id in held.keys() - still.keys() - damaged:
                results.append(self._obeyed(held.pop(lease_id)))
            for run_id in [i for i in told if i not in alive or not alive[i].may_inject]:
                results.append(self._harmless(told.pop(run_id), gone=run_id not in alive))
            if not told and not any(is_running(x.owner) for x in held.values()):
                break
            renewals.look(list(held.values()))
            if self.seconds >= OBEY_S:
                results += [self._deaf(alive[i]) for i in told]
                told.clear()
                at_work = {r.run_id for r in alive.values() if r.phase == RESTORING and self.seconds < LONGEST_S}
                late = {i: x for i, x in held.items() if i in damaged or x.run_id not in at_work or renewals.silent(x)}
                if unreadable or len(late) == len(held):
                    break
                if late:
                    results += self._take_away(list(late), late)
                    taken |= late.keys()
                    held = {i: x for i, x in held.items() if i not in late}
            time.sleep(_POLL_S)
        if held or unreadable:
            results += self._take_away(None if unreadable else list(held), held)
        return results

    def _harmless(self, run: ActiveRun, gone: bool) -> dict[str, Any]:
        said = f"it was told in its {run.phase} phase and {'has ended' if gone else 'injects nothing more'}"
        return _run_row(run, self.seconds, evidence=[f"no fault of it is active: {said}"])

    def _deaf(self, run: ActiveRun) -> dict[str, Any]:
        """It has not obeyed, and holds no lease that can be read. It is not killed: there is nothing to take from it."""
        from mlchaos_dagster.engine.active import FAULT

        unknown = run.phase == FAULT and bool(self.places.ledger.unreadable())
        error = f"process {run.owner.pid} has not ended, phase {run.phase}; "
        error += "a lease cannot be read" if unknown else "it holds no lease and reads this request before it injects"
        return _run_row(run, self.seconds, error=error, clean=not unknown, command="mlchaos recover" if unknown else "")

    def _obeyed(self, lease: Lease) -> dict[str, Any]:
        seconds, evidence = self.seconds, self.places.evidence(lease)
        while not evidence and self.seconds < seconds + _EVIDENCE_S:  # it is written after the lease is closed
            time.sleep(_POLL_S)
            evidence = self.places.evidence(lease)
        return _row(lease, "its own run", True, seconds, evidence, "")

    def _take_away(self, only: list[str] | None, known: Mapping[str, Lease]) -> list[dict[str, Any]]:
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
            known=known,
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


def _run_row(
    run: ActiveRun,
    seconds: float,
    *,
    evidence: Sequence[str] = (),
    error: str = "",
    clean: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """A run that held no lease: nothing had to be taken away."""
    return {
        "run_id": run.run_id,
        "experiment": run.experiment,
        "lease": None,
        "fault": None,
        "targets": [],
        "taken_away_by": "",
        "clean": clean,
        "seconds": round(seconds, 3),
        "evidence": list(evidence),
        "error": error,
        "command": command,
    }


def _show(app: App, places: Places, results: list[dict[str, Any]], stopper: Stopper) -> None:
    # A cluster that was not reached may carry faults of other machines: unknown is never clean.
    clean = all(r["clean"] for r in results) and not stopper.cluster.startswith("NOT")
    lever = places.stops.lever()
    app.dump(
        {
            "home": str(app.settings.home.root),
            "stopped": results,
            "clean": clean,
            "seconds": round(stopper.seconds, 3),
            "lever": lever,
            "note": stopper.finished,
            "cluster": stopper.cluster,
        }
    )
    places.say_where()
    for r in results:
        for line in _lines(r):
            app.out(line)
    if not results:
        app.out(stopper.finished or "nothing was running")
    if lever is not None:
        app.out(f"the lever is pulled: no run starts until `mlchaos stop --release -e {app.settings.environment}`")
    if stopper.cluster:
        app.out(f"cluster of {app.settings.environment}: the lever is {stopper.cluster}")
    if not clean:
        leave(_UNCLEAN)


def _lines(r: dict[str, Any]) -> list[str]:
    evidence = [f"  {line}" for line in r["evidence"]]
    if r["lease"] is None:
        what = f"{r['experiment']}  run {r['run_id']}"
        if r["error"]:
            word = "told   " if r["clean"] else "UNCLEAN"
            return [f"{word}  {what}: {r['error']}", *([f"  type: {r['command']}"] if r["command"] else [])]
        return [f"stopped  {what}: after {r['seconds']:.2f} s", *evidence]
    what = f"{r['experiment'] or 'lease ' + r['lease']}  {r['fault']} on {listed(r['targets']) or 'unknown targets'}"
    if r["clean"]:
        return [f"stopped  {what}: clean after {r['seconds']:.2f} s, taken away by {r['taken_away_by']}", *evidence]
    return [f"UNCLEAN  {what}: the fault may be live ({r['error']})", f"  type: {r['command']}", *evidence]
