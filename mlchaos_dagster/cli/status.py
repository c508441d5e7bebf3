"""`mlchaos status`: what is going on now, read from ledger, stop files and the platform itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlchaos_dagster.cli.app import App, Names, common, current, table
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.errors import MlChaosError, SpecError

if TYPE_CHECKING:
    from mlchaos_dagster.cli.places import Places


@click.command("status")
@click.argument("run", required=False, metavar="[RUN]", type=Names("experiment"))
@common
def command(run: str | None) -> None:
    """Show open leases, active runs, the lever, health and error budget; or one RUN, by id or experiment name."""
    from mlchaos_dagster.cli.places import Places

    app = current()
    places = Places(app)
    if run is None:
        _everything(app, places)
    else:
        _one(app, places, run)


def _everything(app: App, places: Places) -> None:
    from mlchaos_dagster import wiring
    from mlchaos_dagster.cli.places import lease_json, runs_json

    environment = app.environment
    active = places.active.running()
    leases = [lease_json(x, places.clock.wall()) for x in places.ledger.leases()]
    unreadable = list(places.ledger.unreadable())
    health, why_health = _ask(lambda: wiring.health_reader(environment, app.settings)().score)
    read_budget = wiring.budget_reader(environment, app.settings)
    budget, why_budget = _ask(lambda: read_budget().remaining) if read_budget else (None, "none declared")
    lever = places.stops.lever()
    runs = runs_json(active, leases)
    cluster = places.there.state() if environment.kubernetes is not None else None
    app.dump(
        {
            "home": str(app.settings.home.root),
            "environment": environment.name,
            "open_leases": leases,
            "unreadable_leases": unreadable,
            "active_runs": runs,
            "lever": lever,
            "health_score": health,
            "health_detail": why_health,
            "error_budget_remaining": budget,
            "error_budget_detail": why_budget,
            "cluster": cluster,
        }
    )
    app.out(places.never_used or f"state         {app.settings.home.root}")
    app.out(f"environment   {environment.name}")
    app.out(f"health        {f'{health:.2f}' if health is not None else f'unknown: {why_health}'}")
    app.out(f"error budget  {f'{budget:.0%} left' if budget is not None else f'unknown: {why_budget}'}")
    app.out(f"lever         {'released' if lever is None else f'PULLED, no run may start: {lever}'}")
    app.out(f"active runs   {len(runs) or 'none'}")
    for r in runs:
        app.out(f"  {_run_line(r)}")
    none = "none: no fault of ours is there" if cluster is None else "none of this machine"
    app.out(f"open leases   {len(leases) or none}")
    if leases:
        app.out()
        app.out(_lease_table(leases))
        if any(not x["owner"]["alive"] for x in leases):
            app.out("\na run is gone and its fault may be live; type: mlchaos recover")
    for path in unreadable:
        app.out(f"unreadable lease: {path}; type: mlchaos recover")
    if cluster is not None:
        _cluster(app, cluster, {x["id"] for x in leases})


def _cluster(app: App, cluster: dict[str, Any], here: set[str]) -> None:
    """What other machines do in the environment's cluster."""
    if cluster["error"]:
        app.out(f"cluster       unknown: {cluster['error']}")
        return
    lever, leases = cluster["lever"], [x for x in cluster["open_leases"] if x["id"] not in here]
    app.out(
        f"cluster       sweeper {cluster['sweeper'].partition('/')[0] or 'NONE: kubectl apply -k manifests/kubernetes'}"
    )
    if lever is not None:
        app.out(f"  lever       PULLED, no run may start: {lever}")
    for x in leases:
        app.out(f"  {x['id']}  {x['experiment']}  {x['fault']} on {listed(x['targets'])}  {x['owner']['host']}")
    if not leases:
        app.out("  no lease of another machine")
    for path in cluster["unreadable_leases"]:
        app.out(f"  unreadable lease: {path}; type: mlchaos clean -e {app.settings.environment}")


def _run_line(run: dict[str, Any]) -> str:
    since = f"  since {run['started_at'].replace('T', ' ').removesuffix('+00:00')} UTC" if run["started_at"] else ""
    return f"{run['run_id']}  {run['experiment']}  {run['phase']}  pid {run['pid']}{since}"


def _lease_table(leases: list[dict[str, Any]]) -> str:
    rows = [
        (
            x["id"],
            x["experiment"],
            x["fault"],
            listed(x["targets"]),
            f"{x['age_s']:.0f} s",
            f"pid {x['owner']['pid']}, {'alive' if x['owner']['alive'] else 'GONE'}",
        )
        for x in leases
    ]
    return table(("LEASE", "EXPERIMENT", "FAULT", "TARGETS", "AGE", "OWNER"), rows)


def _ask(read: Callable[[], float]) -> tuple[float | None, str]:
    """A figure, or why there is none; the platform may be down and status must still answer."""
    try:
        return round(read(), 4), ""
    except (MlChaosError, OSError) as e:
        return None, " ".join(str(e).split())


def _one(app: App, places: Places, run: str) -> None:
    from mlchaos_dagster.cli.places import lease_json, matching, runs_json

    home = str(app.settings.home.root)
    if places.never_used:
        raise SpecError(places.never_used, "status")
    active, open_leases = places.active.running(), places.ledger.leases()
    ids = matching(run, active, open_leases)
    if ids:
        leases = [lease_json(x, places.clock.wall()) for x in open_leases if x.run_id in ids]
        runs = runs_json([r for r in active if r.run_id in ids], leases)
        state = "running" if runs else "gone, its fault may be live"
        run_id = min(ids) if not runs else runs[0]["run_id"]
        places.say_where()
        app.dump({"home": home, "run_id": run_id, "state": state, "open_leases": leases, "active_runs": runs})
        for r in runs:
            app.out(f"running  {_run_line(r)}")
        if not runs:
            app.out(f"{leases[0]['experiment']}  run {run_id}  {state}")
        app.out(f"\n{_lease_table(leases)}" if leases else "no fault is active")
        return
    record, verdict = places.store.load(places.store.find(run))
    outcome = verdict.outcome.value if verdict else "not judged"
    clean = record.clean.proven if record.clean else True
    reasons = list(verdict.reasons) if verdict else []
    app.dump(
        {
            "home": home,
            "run_id": record.run_id,
            "experiment": record.experiment.name,
            "environment": record.environment.name,
            "state": "finished",
            "outcome": outcome,
            "reasons": reasons,
            "clean": clean,
            "open_leases": [],
            "active_runs": [],
        }
    )
    places.say_where()
    app.out(f"{record.experiment.name}  run {record.run_id}  finished  {outcome}")
    for reason in reasons:
        app.out(f"  {reason}")
    app.out(f"  {'nothing left behind' if clean else 'NOT PROVEN CLEAN'}; mlchaos report {record.run_id[:8]}")
