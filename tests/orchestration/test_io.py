"""Results of every run are kept, and read back: the same run's first, else the latest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mlchaos_dagster.orchestration.io import ResultsIOManager


def build(base: str, value: int) -> dg.Definitions:
    @dg.asset(key_prefix=["env"], io_manager_key="results_io")
    def measured() -> list[dict[str, Any]]:
        return [{"sli": "availability", "value": value}]

    @dg.asset(io_manager_key="results_io", ins={"measured": dg.AssetIn(key=["env", "measured"])})
    def reader(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"read": measured[0]["value"]}]

    @dg.asset(ins={"measured": dg.AssetIn(key=["env", "measured"])})
    def frame(measured: Any) -> dg.MaterializeResult[Any]:
        return dg.MaterializeResult(metadata={"rows": len(measured), "mean": float(measured["value"].mean())})

    return dg.Definitions([measured, reader, frame], resources={"results_io": ResultsIOManager(base=base)})


def execute(base: str, value: int, instance: dg.DagsterInstance, keys: list[list[str]] | None = None) -> Any:
    job = build(base, value).resolve_implicit_global_asset_job_def()
    selection = [dg.AssetKey(k) for k in keys] if keys else None
    return job.execute_in_process(instance=instance, asset_selection=selection)


def test_two_runs_two_files(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ids = [execute(str(tmp_path), n, instance).run_id for n in (1, 2)]
        files = {p.name for p in (tmp_path / "env" / "measured").iterdir()}
        assert files == {f"run_id={i}.parquet" for i in ids}
        event = instance.get_latest_materialization_event(dg.AssetKey(["env", "measured"]))
        assert event is not None and event.asset_materialization is not None
        path = str(event.asset_materialization.metadata["path"].value)
        assert path == str(tmp_path / "env" / "measured" / f"run_id={ids[1]}.parquet")


def test_reading_in_another_run_takes_the_latest(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        execute(str(tmp_path), 7, instance)
        later = execute(str(tmp_path), 0, instance, keys=[["reader"]])
        assert later.output_for_node("reader") == [{"read": 7}]


def test_reading_what_was_never_measured_says_so(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(dg.Failure, match="never measured"):
        execute(str(tmp_path), 0, instance, keys=[["reader"]])


def test_a_url_that_fsspec_knows() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ids = [execute("memory://results", n, instance).run_id for n in (1, 2)]
    import fsspec

    found = fsspec.filesystem("memory").ls("/results/env/measured", detail=False)
    assert {f.rsplit("/", 1)[1] for f in found} == {f"run_id={i}.parquet" for i in ids}
