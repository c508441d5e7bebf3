"""The teeth matrix: with its mechanism an experiment HELDs, without it the same experiment deviates or aborts.

    python -m benchmarks.teeth [EXPERIMENT …]

Every cell runs on a sandbox of its own, started for it with the mechanism on or off by configuration.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.environment import Environment, SandboxOptions
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.run import run_experiment
from mlchaos_dagster.judgement.verdict import judge
from mlchaos_dagster.sandbox import api
from mlchaos_dagster.settings import Home, Settings
from mlchaos_dagster.wiring import build_run


@dataclass(frozen=True)
class Cell:
    """One experiment, its mechanism on or off."""

    experiment: str
    off: tuple[str, ...]
    outcome: Outcome
    reasons: tuple[str, ...]
    advice: str
    seconds: float
    bites: bool
    """It came out as it must: HELD with the mechanism, a named deviation without."""


def cells(names: list[str] | None = None) -> list[tuple[Experiment, bool]]:
    """All cells of the shipped library that a sandbox can have: (experiment, mechanism off?). Of an experiment in stages: its widest, the last.

    `names` may say either, the experiment in stages or the stage.
    """
    found: list[Experiment] = []
    sandbox = Catalog().environment("sandbox")
    for spec in Catalog().written():
        one = spec if isinstance(spec, Experiment) else spec.experiments()[-1]
        if (
            one.target in sandbox.targets
            and one.teeth is not None
            and (not names or spec.name in names or one.name in names)
        ):
            # A cell is about the mechanism, on a platform where nothing ever ran: what has to hold before is left out
            # here (that an experiment waits for it has tests of its own).
            found.append(one.model_copy(update={"depends_on": None}))
    return [(e, off) for e in sorted(found, key=lambda e: e.name) for off in (False, True)]


def run_cell(experiment: Experiment, off: bool, directory: Path) -> Cell:
    """Run one cell on a fresh sandbox under `directory`; the sandbox is gone afterwards."""
    assert experiment.teeth is not None
    teeth = experiment.teeth
    missing = (teeth.mechanism, *teeth.also_off) if off else ()
    environment: Environment = Catalog().environment("sandbox")
    replicas = environment.sandbox.replicas if environment.sandbox else 3
    environment = environment.model_copy(
        update={"sandbox": SandboxOptions(replicas=replicas, mechanisms=dict.fromkeys(missing, False))}
    )
    settings = Settings(home=Home(directory), environment="sandbox", library=(), color=False, user="teeth")
    begun = time.monotonic()
    try:
        run = build_run(experiment, environment, settings, run_id=uuid.uuid4().hex)
        record = run_experiment(run)
        verdict = judge(record, run.samples)
    finally:
        api.down(settings.home.sandbox(environment.name))
    if off:
        named = teeth.breaks in " ".join(verdict.reasons)
        bites = verdict.outcome in (Outcome.DEVIATED, Outcome.ABORTED) and named
    else:
        bites = verdict.outcome is Outcome.HELD
    clean = record.clean is None or record.clean.proven
    return Cell(
        experiment.name,
        missing,
        verdict.outcome,
        verdict.reasons,
        verdict.advice,
        time.monotonic() - begun,
        bites and clean,
    )


def row(cell: Cell) -> str:
    """One line of the matrix."""
    without = f"without {', '.join(cell.off)}" if cell.off else "as it is"
    mark = "as it must" if cell.bites else "WRONG"
    return (
        f"| {cell.experiment} | {without} | {cell.outcome.value} | {mark} | {cell.reasons[0] if cell.reasons else ''} |"
    )


def main() -> int:
    """Run the matrix; exit 1 when a cell came out wrong."""
    print("| experiment | platform | outcome | | reason |\n|---|---|---|---|---|", flush=True)
    wrong = 0
    for experiment, off in cells(sys.argv[1:]):
        directory = Path(tempfile.mkdtemp(prefix="mlchaos-teeth-"))
        try:
            cell = run_cell(experiment, off, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        wrong += not cell.bites
        print(row(cell), flush=True)
        if not cell.bites:
            for reason in cell.reasons[1:]:
                print(f"    {reason}", file=sys.stderr)
    print(f"\n{wrong} cells wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
