"""`mlchaos report RUN`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlchaos_dagster.cli.app import Names, common, current
from mlchaos_dagster.errors import StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.domain.record import RunRecord, Verdict
    from mlchaos_dagster.engine.store import RecordStore


@click.command("report")
@click.argument("run", metavar="RUN", type=Names("experiment"))
@click.option("--again", is_flag=True, help="Judge the record again, by the rules of this version.")
@common
def command(run: str, again: bool) -> None:
    """Show the result of a RUN (id, start of an id, or experiment name: its newest) and where its report lies."""
    from mlchaos_dagster.engine.store import RecordStore

    app = current()
    home = app.settings.home
    store = RecordStore(home.records)
    record, verdict = store.load(store.find(run))
    path = home.reports / f"{record.run_id}.html"
    if again or verdict is None or not path.is_file():
        verdict = _render(store, record, verdict, path, again)
    if app.json:
        from mlchaos_dagster.evidence.json_output import run_json

        app.dump(run_json(record, verdict, str(store.path(record.run_id)), str(path) if path.is_file() else None))
        return
    from mlchaos_dagster.evidence.terminal import end_block

    width = min(140, shutil.get_terminal_size((100, 24)).columns)
    shown = str(path) if path.is_file() else ""
    app.out(end_block(record, verdict, color=app.color, width=width, report_path=shown))


def _render(store: RecordStore, record: RunRecord, verdict: Verdict | None, path: Path, again: bool) -> Verdict:
    """Judge (again) and write the report, from the raw samples on disk. Nothing is injected."""
    from mlchaos_dagster.domain.record import Samples
    from mlchaos_dagster.engine.files import write_atomic
    from mlchaos_dagster.evidence.report import render_html
    from mlchaos_dagster.judgement.verdict import judge

    samples = store.samples(record) if record.samples_file else Samples()
    if again or verdict is None:
        verdict = judge(record, samples)
        store.save_verdict(record, verdict)
    try:
        write_atomic(path, render_html(record, samples, verdict, []).encode())
    except StoreError as e:
        click.echo(f"the report could not be written: {e}", err=True)
    return verdict
