"""Two cells of the teeth matrix, another experiment every day: `make teeth` runs them all."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from benchmarks.teeth import cells, run_cell

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]


def todays() -> str:
    """The experiment whose turn it is."""
    names = sorted({e.name for e, _ in cells()})
    return names[datetime.datetime.now(datetime.timezone.utc).date().toordinal() % len(names)]


@pytest.mark.req("R0-04", "R0-10", "R1-01", "R1-02", "R1-03", "R2-02", "R2-03")
@pytest.mark.parametrize("off", [False, True], ids=["as it is", "mechanism off"])
def test_an_experiment_bites_only_where_its_mechanism_is_missing(off: bool, tmp_path: Path) -> None:
    experiment = next(e for e, o in cells([todays()]) if o is off)
    cell = run_cell(experiment, off, tmp_path)
    assert cell.bites, f"{cell.experiment} without {cell.off}: {cell.outcome.value}, {cell.reasons}"


def test_every_experiment_of_the_library_names_its_mechanism() -> None:
    from mlchaos_dagster.catalog import Catalog
    from mlchaos_dagster.domain.spec import Experiment

    # Their mechanisms are parts of a cluster (budgets, zones, replicas): taken away by overlays of manifests/platform.
    clusters_only = {"node-drain-serving", "zone-failure-serving", "feature-store-scale-to-zero", "dns-failure-gateway"}
    clusters_only |= {"canary-bad-model"}  # manifests/rollouts/teeth
    last = {e.name if isinstance(e, Experiment) else e.stage_names[-1] for e in Catalog().written()}
    assert last - {"gpu-memory-hog"} - clusters_only == {e.name for e, _ in cells()}
