"""`mlchaos recover`: take away what runs that are gone left behind, and prove it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from mlchaos_dagster.cli.app import common, current, leave
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.errors import SpecError, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.cli.app import App
    from mlchaos_dagster.cli.places import Places
    from mlchaos_dagster.engine.sweep import SweepResult

_UNCLEAN = 70
_HUNG_S = 5.0
"""No renewal for this long: the owner hangs. As `safety.lease_ttl` by default."""


@click.command("recover")
@click.argument("leases", nargs=-1, metavar="[LEASE]...")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option(
    "--write-off",
    metavar="REASON",
    help="Close the LEASEs without proof, because a person made sure or the target is gone for good. Logged.",
)
@common
def command(leases: tuple[str, ...], dry_run: bool, write_off: str | None) -> None:
    """Recover every open lease whose run is gone or hangs; with LEASE ids those, whoever holds them.

    Exits with 0 when nothing is left, and with 70 when a fault may still be live.
    """
    from mlchaos_dagster.cli.places import Places
    from mlchaos_dagster.engine.sweep import RenewalObserver, sweep

    app = current()
    places = Places(app)
    known = {x.id for x in places.ledger.leases()}
    known |= {stub.id for path in places.ledger.unreadable() if (stub := places.ledger.stub(path)) is not None}
    if write_off is None and set(leases) - known and places.there.exists:
        _of_the_cluster(app, places, leases, dry_run)
        return
    for lease_id in leases:
        if lease_id not in known:
            allowed = ", ".join(sorted(known)) or "none: no lease is open"
            raise SpecError(f'no open lease "{lease_id}". Allowed: {allowed}.', "LEASE")
    if write_off is not None:
        if not leases or not write_off.strip() or dry_run:
            raise SpecError("needs LEASE ids and a reason, and no --dry-run", "--write-off")
        _write_off(places, leases, write_off.strip())
        return
    found = sweep(
        places.ledger,
        places.driver,
        places.clock,
        places.incidents,
        only=leases or None,
        dry_run=dry_run,
        force=f"mlchaos recover, by {app.settings.user or 'somebody'}" if leases else "",
        observer=None if leases else RenewalObserver(places.ledger, places.clock, _HUNG_S),
        by="mlchaos recover",
    )
    _show(app, places, found, known - {r.lease.id for r in found} if not leases else set(), dry_run)


def _of_the_cluster(app: App, places: Places, leases: tuple[str, ...], dry_run: bool) -> None:
    """Leases that other machines hold in the environment's cluster. Raises SpecError: there are no such either."""
    from mlchaos_dagster.engine.sweep import sweep

    ledger = places.there.connected()
    heads = {h.id for h in ledger.heads()}
    for lease_id in leases:
        if lease_id not in heads:
            allowed = ", ".join(sorted(heads)) or "none: no lease is open"
            raise SpecError(
                f'no open lease "{lease_id}" here or in the cluster. Allowed there: {allowed}. '
                f"What a lost one left on objects is taken off by mlchaos clean -e {app.settings.environment}.",
                "LEASE",
            )
    found = sweep(
        ledger,
        lambda name, _: places.driver(name, app.settings.environment),
        places.clock,
        places.incidents,
        only=leases,
        dry_run=dry_run,
        force=f"mlchaos recover, by {app.settings.user or 'somebody'}",
        by="mlchaos recover",
    )
    _show(app, places, found, set(), dry_run)


def _show(app: App, places: Places, found: list[SweepResult], held: set[str], dry_run: bool) -> None:
    left = [r for r in found if r.action in ("failed", "left") and not r.clean]
    app.dump(
        {
            "home": str(app.settings.home.root),
            "dry_run": dry_run,
            "clean": not left and not (dry_run and found),
            "recovered": [r.to_json() for r in found],
            "held_by_live_runs": sorted(held),
        }
    )
    places.say_where()
    for r in found:
        target = f"{r.lease.kind or 'unknown fault'} on {listed(r.lease.targets) or 'unknown targets'}"
        took = f" in {r.seconds:.2f} s" if r.action == "recovered" else ""
        app.out(f"{r.action}{took}  lease {r.lease.id}: {target}; {r.why}")
        for line in (*r.evidence, *([r.error] if r.error else [])):
            app.out(f"  {line}")
        if r.command and not dry_run and r in left:
            app.out(f"  type: {r.command}")
    if held:
        app.out(f"left alone, their runs are alive: {', '.join(sorted(held))}")
    if not found:
        app.out("nothing to recover: no fault was left behind")
    if left:
        leave(_UNCLEAN)


def _write_off(places: Places, leases: tuple[str, ...], reason: str) -> None:
    """Close leases on a person's word; their backups are kept. Raises StoreError."""
    who = places.app.settings.user or "somebody"
    for lease_id in leases:
        lease = places.ledger.fence(lease_id, f"{who} by write-off")
        said = f"written off by {who}, without proof: {reason}"
        written_off = replace(lease, targets=())
        try:
            places.ledger.close(written_off, (said,))
        except (
            StoreError
        ) as e:  # its cluster does not answer, perhaps for good; if it comes back, its sweeper has the lease
            places.app.out(f"only here: {e}")
            places.ledger.local.close(written_off, (said,))
        places.incidents.write("unclean", f"lease {lease_id} {said}", lease=lease_id)
        places.app.out(f"written off  lease {lease_id}: nobody proved that its fault is gone")
    places.app.dump({"home": str(places.app.settings.home.root), "clean": False, "written_off": list(leases)})
