"""`mlchaos clean`: nothing of ours stays in a cluster."""

from __future__ import annotations

from dataclasses import asdict

import click

from mlchaos_dagster.cli.app import common, current, leave
from mlchaos_dagster.errors import SpecError

_UNCLEAN = 70


@click.command("clean")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--force", is_flag=True, help="Also what live runs hold: their faults are taken away under them.")
@click.option("--installation", is_flag=True, help="Also the sweeper, its permissions and the control namespace.")
@click.option(
    "--namespace", "namespaces", multiple=True, metavar="NAME", help="Only there; may be given several times."
)
@common
def command(dry_run: bool, force: bool, installation: bool, namespaces: tuple[str, ...]) -> None:
    """Remove everything that experiments made in the environment's cluster, found by label and mark; faults first.

    Needs no state directory of the runs that made it. Exits with 0 when nothing is left, and with 70 when a fault may be live.
    """
    from mlchaos_dagster.drivers.kubernetes.cleaning import Cleaner
    from mlchaos_dagster.engine.incidents import IncidentLog
    from mlchaos_dagster.engine.ports import SystemClock
    from mlchaos_dagster.errors import ConfigError, DriverError
    from mlchaos_dagster.kube.address import remember
    from mlchaos_dagster.kube.client import Site

    app = current()
    options = app.environment.kubernetes
    if options is None:
        raise SpecError(
            f"environment {app.environment.name} has no cluster. Allowed: one with kubernetes: (for the sandbox: mlchaos sandbox down)",
            "--environment",
        )
    clock = SystemClock()
    home = app.settings.home
    try:
        cluster = remember(home.cluster(app.environment.name), options, app.settings.kubeconfig)
        cleaner = Cleaner(
            Site(cluster, options),
            clock,
            IncidentLog(home.incidents, clock),
            force=f"mlchaos clean --force, by {app.settings.user or 'somebody'}" if force else "",
            dry_run=dry_run,
            installation=installation,
            namespaces=namespaces,
        )
        rows = []
        for row in cleaner.rows():
            rows.append(row)
            app.out(f"{row.action:<13}{row.what}{': ' + row.why if row.why else ''}")
    except DriverError as e:
        raise ConfigError(f"the cluster of environment {app.environment.name}: {e}") from e
    left = [r for r in rows if r.action in ("failed", "left")]
    app.dump({"dry_run": dry_run, "clean": not left and not (dry_run and rows), "rows": [asdict(r) for r in rows]})
    if not rows:
        where = f"namespace {', '.join(namespaces)}" if namespaces else "the cluster"
        app.out(f"nothing to clean: nothing of any experiment is in {where}")
    if left:
        leave(_UNCLEAN)
