from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sim_platform import SimPlatform, environment, experiment

from mlchaos_dagster.orchestration.assets import build_assets
from mlchaos_dagster.orchestration.definitions import resources
from mlchaos_dagster.orchestration.keys import run_tags


@pytest.fixture
def platform(tmp_path: Path) -> SimPlatform:
    return SimPlatform(tmp_path / "home")


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """Real SQLite storage, made once: creating its tables takes longer than a simulated run."""
    with dg.instance_for_test(temp_dir=str(tmp_path_factory.mktemp("dagster"))) as found:
        yield found


@pytest.fixture
def run(platform: SimPlatform, instance: dg.DagsterInstance) -> Callable[..., Any]:
    """Run experiments in one Dagster run, through the real ops, in the simulated world."""

    def execute(*experiments: Any, tags: dict[str, str] | None = None, env: Any = None, **options: Any) -> Any:
        env = env or environment()
        pairs = [(e, env) for e in experiments or (experiment(),)]
        definitions = dg.Definitions(
            assets=build_assets(pairs), resources=resources(platform), executor=dg.in_process_executor
        )
        job = definitions.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=instance,
            raise_on_error=False,
            tags={**run_tags(*pairs[0]), **(tags or {})},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            **options,
        )

    return execute
