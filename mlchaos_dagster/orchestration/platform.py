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
from mlchaos_dagster.engine.active import ActiveRuns
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.paired import PairedLedger
from mlchaos_dagster.engine.ports import Budget, Lease, StopSource, SystemClock
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.kube.remote import RemoteLedger
from mlchaos_dagster.orchestration.keys import outcome_word
from mlchaos_dagster.orchestration.ports import Finding, LiveRun, Progress, Published
from mlchaos_dagster.settings import Settings

HUNG_S = 5.0
"""No renewal for this long: the owner hangs. As `safety.lease_ttl` by default."""


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
        problems: list[str] = []
        record_path: Path | None = self.store().path(record.run_id)
        report_path: Path | None = None
        try:
            self.store().save_verdict(record, verdict)
        except MlChaosError as e:
            problems.append(f"the verdict could not be saved: {e}")
            record_path = None
        try:
            from mlchaos_dagster.evidence.report import write_report

            path = self.settings.home.reports / f"{record.run_id}.html"
            report_path = write_report(path, record, samples, verdict, self._history(record))
        except Exception as e:  # noqa: BLE001 - a report that fails never hides a verdict
            problems.append(f"the report could not be written: {type(e).__name__}: {e}")
        return Published(record_path, report_path, tuple(problems))

    def _history(self, record: RunRecord, last: int = 20) -> list[tuple[str, str, float]]:
        """Earlier runs of the same experiment, oldest first."""
        found: list[tuple[str, str, float]] = []
        for earlier, verdict in self.store().all():
            same = earlier.experiment.name == record.experiment.name
            same = same and earlier.environment.name == record.environment.name
            if same and verdict is not None and earlier.run_id != record.run_id:
                found.append((earlier.run_id, outcome_word(earlier, verdict), earlier.zero_wall))
            if len(found) == last:
                break
        return found[::-1]

    def markdown(self, record: RunRecord, samples: Samples, verdict: Verdict) -> str:
        """The report for the Dagster UI, without its picture; empty when it cannot be rendered."""
        try:
            from mlchaos_dagster.evidence.report import render_markdown

            return render_markdown(record, samples, verdict, picture=False)
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
        return self._ledger().leases()

    def _ledger(self) -> PairedLedger:
        from mlchaos_dagster import wiring

        return wiring.ledger(self.settings.home)

    def running(self) -> tuple[str, ...]:
        """Active runs, of any process."""
        return tuple(r.run_id for r in ActiveRuns(self.settings.home.active, SystemClock()).running())

    def request_stop(self, run_ids: Sequence[str], reason: str) -> None:
        """Stop files, for runs of any process."""
        for run_id in run_ids:
            StopFiles(self.settings.home).request(run_id, reason)

    def pull_lever(self, reason: str) -> None:
        """Stop everything and keep new runs out."""
        StopFiles(self.settings.home).pull_lever(reason)

    def lever(self) -> str | None:
        """The reason while the lever is pulled."""
        return StopFiles(self.settings.home).lever()

    def release_lever(self) -> bool:
        """Let runs in again; False when it was not pulled."""
        return StopFiles(self.settings.home).release_lever()

    def cluster(self, environment: Environment) -> RemoteLedger | None:
        """Leases of all machines and the lever in the cluster of an environment; None where it has none."""
        if environment.kubernetes is None:
            return None
        from mlchaos_dagster import wiring

        return RemoteLedger(lambda: wiring.cluster_of(environment, self.settings), self.settings.user)

    def sweep(self) -> list[str]:
        """Take away the faults of owners that are gone or hang."""
        from mlchaos_dagster.engine.sweep import RenewalObserver

        ledger = self._ledger()
        return self._sweep(observer=RenewalObserver(ledger, SystemClock(), HUNG_S), by="Dagster's sweeper")

    def recover(self, run_ids: Sequence[str]) -> list[str]:
        """Take faults away whoever holds them."""
        only = [lease.id for lease in self.leases() if not run_ids or lease.run_id in run_ids]
        return self._sweep(only=only if run_ids else None, force="emergency stop", by="Dagster's emergency stop")

    def _sweep(self, **options: Any) -> list[str]:
        from mlchaos_dagster import wiring
        from mlchaos_dagster.engine.sweep import sweep

        clock, home = SystemClock(), self.settings.home
        found = sweep(
            self._ledger(),
            lambda name, environment: wiring.driver(name, home, environment),
            clock,
            IncidentLog(home.incidents, clock),
            **options,
        )
        return [
            f"{r.action}: {r.lease.kind or 'unknown fault'} on {', '.join(r.lease.targets) or 'unknown targets'} "
            f"({r.why}), {'clean' if r.clean else 'NOT CLEAN, type: ' + r.command} after {r.seconds:.2f} s"
            for r in found
        ]

    def incident(self, kind: str, what: str, **facts: Any) -> None:
        """One line in the incident log."""
        with contextlib.suppress(Exception):
            IncidentLog(self.settings.home.incidents, SystemClock()).write(kind, what, **facts)  # type: ignore[arg-type]
