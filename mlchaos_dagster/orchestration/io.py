"""An IO manager that keeps every run: `<base>/<asset key>/run_id=<run>.parquet`, local or on S3.

Dagster's own file and S3 managers overwrite; a chaos result that was overwritten is a result that never was.
"""

from __future__ import annotations

from typing import Any

import dagster as dg
from pydantic import Field


class ResultsIOManager(dg.ConfigurableIOManager):
    """Rows (or a DataFrame) in, one Parquet file per asset and run."""

    base: str = Field(description="Directory, or a URL that fsspec knows, such as s3://bucket/prefix.")
    storage_options: dict[str, str] = Field(
        default={}, description="For fsspec, such as {endpoint_url: http://127.0.0.1:5000} for S3."
    )

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write one file; an earlier run's file is never touched."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = (
            pa.Table.from_pandas(obj, preserve_index=False) if hasattr(obj, "iloc") else pa.Table.from_pylist(list(obj))
        )
        path = self._path(context.asset_key, context.run_id)
        filesystem, location = self._open(path)
        filesystem.makedirs(location.rsplit("/", 1)[0], exist_ok=True)
        # Written beside and moved: a reader never sees half a file. (On S3 a put is atomic by itself.)
        temporary = f"{location}.writing" if "://" not in path else location
        with filesystem.open(temporary, "wb") as f:
            pq.write_table(rows, f)
        if temporary != location:
            filesystem.mv(temporary, location)
        context.add_output_metadata({"path": dg.MetadataValue.path(path), "rows": rows.num_rows})

    def load_input(self, context: dg.InputContext) -> Any:
        """The same run's file if it wrote one, else the latest materialisation's. A DataFrame unless rows are asked for."""
        import pyarrow.parquet as pq

        path = self._path(context.asset_key, context.step_context.run_id)
        filesystem, location = self._open(path)
        if not filesystem.exists(location):
            path = self._latest(context)
            filesystem, location = self._open(path)
        with filesystem.open(location, "rb") as f:
            rows = pq.read_table(f)
        wanted = context.dagster_type.typing_type
        return rows.to_pylist() if getattr(wanted, "__origin__", wanted) is list else rows.to_pandas()

    def _latest(self, context: dg.InputContext) -> str:
        event = context.instance.get_latest_materialization_event(context.asset_key)
        stored = event.asset_materialization.metadata.get("path") if event and event.asset_materialization else None
        if stored is None:
            raise dg.Failure(f"{context.asset_key.to_user_string()} was never measured", allow_retries=False)
        return str(stored.value)

    def _path(self, key: dg.AssetKey, run_id: str) -> str:
        return "/".join((self.base.rstrip("/"), *key.path, f"run_id={run_id}.parquet"))

    def _open(self, path: str) -> tuple[Any, str]:
        import fsspec

        return fsspec.core.url_to_fs(path, **(self.storage_options if "://" in path else {}))
