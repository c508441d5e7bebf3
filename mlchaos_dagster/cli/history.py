"""`mlchaos history`."""

from __future__ import annotations

from datetime import datetime, timezone

import click

from mlchaos_dagster.cli.app import Names, common, current, table


@click.command("history")
@click.argument("experiment", required=False, type=Names("experiment"))
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="The newest N.")
@common
def command(experiment: str | None, last: int) -> None:
    """List past runs, newest first, with outcome and decisive reason."""
    from itertools import islice

    from mlchaos_dagster.engine.store import RecordStore

    app = current()
    store = RecordStore(app.settings.home.records)
    names = {experiment, *app.catalog.expand(experiment)} if experiment else set[str | None]()
    wanted = (pair for pair in store.all() if not names or pair[0].experiment.name in names)
    runs = list(islice(wanted, last))
    rows: list[dict[str, str | None]] = []
    for record, verdict in runs:
        shadow = "SHADOW-" if record.shadow else ""
        rows.append(
            {
                "run_id": record.run_id,
                "started_at": datetime.fromtimestamp(record.zero_wall, timezone.utc).isoformat(timespec="seconds"),
                "experiment": record.experiment.name,
                "environment": record.environment.name,
                "outcome": shadow + verdict.outcome.value if verdict else None,
                "reason": verdict.reasons[0] if verdict and verdict.reasons else record.error,
            }
        )
    app.dump(rows)
    if not rows:
        app.out("no runs yet" if experiment is None else f"no runs of {experiment} yet")
        return
    shown = [
        (
            str(r["run_id"])[:8],
            str(r["started_at"]).replace("T", " ").removesuffix("+00:00"),
            str(r["experiment"]),
            str(r["environment"]),
            str(r["outcome"] or "not judged"),
            " ".join(str(r["reason"] or "").split()),
        )
        for r in rows
    ]
    app.out(table(("RUN", "STARTED (UTC)", "EXPERIMENT", "ENVIRONMENT", "OUTCOME", "WHY"), shown, app.width))
