"""What orchestration needs from the rooms below, as one seam that tests replace.

`Platform` is a Dagster resource (key `platform`); the real one is `platform.RealPlatform`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import GuardResult, RunRecord, Samples, Span, Verdict
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.ports import Budget, Lease, StopSource
from mlchaos_dagster.engine.store import RecordStore
from mlchaos_dagster.kube.remote import RemoteLedger
from mlchaos_dagster.settings import Settings

Progress = Callable[[str, dict[str, Any]], None]


class LiveRun(Protocol):
    """`engine.run.Run`, as the ops use it: methods in this order, one process, the main thread."""

    @property
    def may_inject(self) -> bool:
        """Every guard passed and nothing has stopped the run."""
        ...

    @property
    def samples(self) -> Samples:
        """What was measured so far."""
        ...

    @property
    def stopped_late(self) -> str:
        """Somebody's word that came when the fault was gone; empty when there was none."""
        ...

    @property
    def stop_reason(self) -> str:
        """Why the run was stopped early."""
        ...

    def check_guards(self) -> tuple[GuardResult, ...]:
        """Ask every guard."""
        ...

    def measure_baseline(self) -> Span | None:
        """Start the probes; None when refused or stopped."""
        ...

    def steady_before(self) -> tuple[bool, str]:
        """Whether the steady state holds now, and why not."""
        ...

    def fault_window(self) -> None:
        """Inject, watch, recover, prove clean, sample the recovery."""
        ...

    def finish(self) -> RunRecord:
        """Stop the probes and save. Idempotent."""
        ...


@dataclass(frozen=True)
class Published:
    """Where a judged run can be read."""

    record_path: Path | None
    report_path: Path | None
    problems: tuple[str, ...] = ()
    """What could not be written; a report that fails never hides a verdict."""


@dataclass(frozen=True)
class Finding:
    """One line of the preflight."""

    what: str
    ok: bool
    saw: str
    needs: str = ""


class Platform(Protocol):
    """Everything below Dagster."""

    settings: Settings

    def now(self) -> datetime:
        """Aware UTC time of day."""
        ...

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
        """A run, not begun. Raises MlChaosError; nothing was touched."""
        ...

    def judge(self, record: RunRecord, samples: Samples) -> Verdict:
        """Pure."""
        ...

    def publish(self, record: RunRecord, samples: Samples, verdict: Verdict) -> Published:
        """Verdict beside the record, report beside both. Never raises for a report."""
        ...

    def markdown(self, record: RunRecord, samples: Samples, verdict: Verdict) -> str:
        """The report for the Dagster UI, without its picture."""
        ...

    def picture(self, record: RunRecord, samples: Samples, verdict: Verdict) -> bytes | None:
        """The picture as PNG."""
        ...

    def store(self) -> RecordStore:
        """Records of all runs."""
        ...

    def budget(self, environment: Environment) -> Budget | None:
        """Error budget left; None when none is declared. Raises when the source cannot be read."""
        ...

    def preflight(self, environment: Environment, experiments: Sequence[Experiment]) -> list[Finding]:
        """What would keep these experiments from running, read-only."""
        ...

    def leases(self) -> tuple[Lease, ...]:
        """Open leases: faults that may be live."""
        ...

    def running(self) -> tuple[str, ...]:
        """Ids of runs, of any process, that have begun and not ended. Raises StoreError."""
        ...

    def request_stop(self, run_ids: Sequence[str], reason: str) -> None:
        """Ask runs, of any process, to stop."""
        ...

    def pull_lever(self, reason: str) -> None:
        """Stop everything and keep new runs out until released."""
        ...

    def lever(self) -> str | None:
        """The reason while the lever is pulled."""
        ...

    def release_lever(self) -> bool:
        """Let runs in again; False when it was not pulled."""
        ...

    def cluster(self, environment: Environment) -> RemoteLedger | None:
        """Leases of all machines and the lever in the cluster of an environment; None where it has none."""
        ...

    def sweep(self) -> list[str]:
        """Take away the faults of owners that are gone; what was done, in words."""
        ...

    def recover(self, run_ids: Sequence[str]) -> list[str]:
        """Take faults away whoever holds them (empty: all); what was done, in words."""
        ...

    def incident(self, kind: str, what: str, **facts: Any) -> None:
        """One line in the incident log. Never raises."""
        ...
