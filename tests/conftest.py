"""Tests that share what is expensive to start run in one worker of `pytest -n`, so that it is started once."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

SHARED = {
    "sandbox": (
        "sandbox/test_faults",
        "sandbox/test_lifecycle",
        "sandbox/test_platform",
        "drivers/test_sandbox_driver",
    ),
    "sandbox that trains": (
        "sandbox/test_links",
        "sandbox/test_models",
        "sandbox/test_storage",
        "sandbox/test_training",
    ),
    "sandbox with jobs": ("sandbox/test_edge", "sandbox/test_queue", "sandbox/test_tracking"),
    "sandbox with features": ("sandbox/test_features",),
    "sandbox under stress": ("sandbox/test_stress",),
    "Prometheus": ("probes/test_probe_prometheus",),
    "S3": ("drivers/test_s3_driver", "drivers/test_model_driver"),
    "a library of the GPU": ("drivers/test_gpu_driver",),
    "reports": ("evidence/test_report",),
    "definitions": ("orchestration/test_definitions",),
    "platform of the cluster": ("cluster/test_platform", "cluster/test_pipeline"),
    "Chaos Mesh": (
        "cluster/test_chaos_mesh",
        "cluster/test_chaos_mesh_run",
        "cluster/test_clean_backends",
        "cluster/test_doctor_backends",
        "cluster/test_documents",
    ),
    "Rollouts": ("cluster/test_rollouts",),
    "Litmus": ("cluster/test_litmus", "cluster/test_litmus_deaths"),
}
"""What is started or made, and the files whose tests use it."""
GROUP = {f"tests/{file}.py": what for what, files in SHARED.items() for file in files}


class Together(LoadScopeScheduling):
    """Each of those groups as one, every other test by itself."""

    def _split_scope(self, nodeid: str) -> str:
        return GROUP.get(nodeid.partition("::")[0], nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together | None:
    return Together(config, log) if config.getvalue("dist") == "load" else None
