"""The real `Platform`: wiring, judgement, evidence, engine; each imported when it is first needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import RunRecord, Samples, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.ports import Budget, Lease, StopSource, SystemClock
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.orchestration.ports import Finding, LiveRun, Progress, Published
from mlchaos_dagster.settings import Settings


class RealPlatform:
    """See `ports.Platform`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def now(self) -> datetime:
        """Aware UTC time of day."""
        return datetime.now(timezone.utc)

    def build_run(
        self,
        experiment: Experiment,
        environment: Environment,
        *,
        run_id: str,
        shadow: bool,
        seed: int | None,
        started_by: str,
        progress: Progress | None,
        stops: Sequence[StopSource],
    ) -> LiveRun:
        """A run, not begun."""
        from mlchaos_dagster import wiring

        return wiring.build_run(
            experiment,
            environment,
            self.settings,
            run_id=run_id,
            shadow=shadow,
            seed=seed,
            started_by=started_by or self.settings.user,
            progress=progress,
            stops=stops,
        )

    def judge(self, record: RunRecord, samples: Samples) -> Verdict:
        """Pure."""
        from mlchaos_dagster.judgement.verdict import judge

        return judge(record, samples)

    def store(self) -> RecordStore:
        """Records of all runs."""
        return RecordStore(self.settings.home.records)

    def publish(self, record: RunRecord, samples: Samples, verdict: Verdict) -> Published:
        """Verdict beside the record, report beside both."""
        from mlchaos_dagster.engine.files import write_atomic

        problems: list[str] = []
        record_path: Path | None = self.store().path(record.run_id)
        report_path: Path | None = self.settings.home.reports / f"{record.run_id}.html"
        try:
            self.store().save_verdict(record, verdict)
        except MlChaosError as e:
            problems.append(f"the verdict could not be saved: {e}")
            record_path = None
        try:
            from mlchaos_dagster.evidence.report import render_html

            assert report_path is not None
            history = self._history(record)
            write_atomic(report_path, render_html(record, samples, verdict, history).encode())
        except Exception as e:  # noqa: BLE001 - a report that fails never hides a verdict
            problems.append(f"the report could not be written: {type(e).__name__}: {e}")
            report_path = None
        return Published(record_path, report_path, tuple(problems))

    def _history(self, record: RunRecord, last: int = 20) -> list[tuple[RunRecord, Verdict | None]]:
        found: list[tuple[RunRecord, Verdict | None]] = []
        for earlier, verdict in self.store().all():
            same = earlier.experiment.name == record.experiment.name
            if same and earlier.environment.name == record.environment.name and earlier.run_id != record.run_id:
                found.append((earlier, verdict))
            if len(found) == last:
                break
        return found

    def markdown(self, record: RunRecord, samples: Samples, verdict: Verdict) -> str:
        """The report for the Dagster UI, picture inline; empty when it cannot be rendered."""
        try:
            from mlchaos_dagster.evidence.report import render_markdown

            return render_markdown(record, samples, verdict, picture=True)
        except Exception:  # noqa: BLE001 - as above
            return ""

    def picture(self, record: RunRecord, samples: Samples, verdict: Verdict) -> bytes | None:
        """The picture as PNG, as wide as the UI's metadata dialog."""
        from mlchaos_dagster.evidence.plots import picture_png

        return picture_png(record, samples, verdict, 900)

    def budget(self, environment: Environment) -> Budget | None:
        """Error budget left."""
        from mlchaos_dagster import wiring

        read = wiring.budget_reader(environment, self.settings)
        return read() if read else None

    def preflight(self, environment: Environment, experiments: Sequence[Experiment]) -> list[Finding]:
        """What would keep these experiments from running, read-only."""
        from mlchaos_dagster.orchestration.preflight import preflight

        return preflight(self, environment, experiments)

    def leases(self) -> tuple[Lease, ...]:
        """Open leases."""
        from mlchaos_dagster import wiring

        return wiring.ledger(self.settings).leases()

    def request_stop(self, run_ids: Sequence[str], reason: str) -> None:
        """Stop files, for runs of any process."""
        from mlchaos_dagster.engine.stops import StopFiles

        files = StopFiles(self.settings.home)
        for run_id in run_ids:
            files.request(run_id, reason)

    def pull_lever(self, reason: str) -> None:
        """Stop everything and keep new runs out."""
        from mlchaos_dagster.engine.stops import StopFiles

        StopFiles(self.settings.home).pull_lever(reason)

    def sweep(self) -> list[str]:
        """Take away the faults of owners that are gone."""
        from mlchaos_dagster import wiring

        return [str(line) for line in wiring.sweep(self.settings)]

    def recover(self, run_ids: Sequence[str]) -> list[str]:
        """Take faults away whoever holds them."""
        from mlchaos_dagster import wiring

        return [str(line) for line in wiring.recover(self.settings, run_ids)]

    def incident(self, kind: str, what: str, **facts: Any) -> None:
        """One line in the incident log."""
        from mlchaos_dagster.engine.incidents import IncidentLog

        with contextlib.suppress(Exception):
            IncidentLog(self.settings.home.incidents, SystemClock()).write(kind, what, **facts)  # type: ignore[arg-type]
