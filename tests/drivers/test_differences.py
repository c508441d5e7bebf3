"""What is said of each backend's faults is what its tables have; docs/backends.md is that."""

from __future__ import annotations

import pytest

from mlchaos_dagster.cli import backends_doc
from mlchaos_dagster.drivers.chaos_mesh import differences as chaos_mesh
from mlchaos_dagster.drivers.chaos_mesh.faults import HANDLERS
from mlchaos_dagster.drivers.litmus import differences as litmus
from mlchaos_dagster.drivers.litmus.faults import EXPERIMENTS


def test_the_page_of_backends_is_up_to_date() -> None:
    assert backends_doc.TARGET.read_text("utf-8") == backends_doc.text(), (
        "run: python -m mlchaos_dagster.cli.backends_doc --write"
    )


def test_every_fault_of_a_backend_says_what_is_different_and_nothing_else_does() -> None:
    assert litmus.DIFFERENCES.keys() == EXPERIMENTS.keys()
    assert chaos_mesh.DIFFERENCES.keys() == HANDLERS.keys() - {"chaos_mesh_resource"}
    for one in (*litmus.DIFFERENCES.values(), *chaos_mesh.DIFFERENCES.values()):
        assert all(said.strip() for said in (one.by, one.differs, one.dead, one.sees))


@pytest.mark.parametrize("kind", sorted(EXPERIMENTS))
def test_the_experiment_of_litmus_is_the_one_that_is_run(kind: str) -> None:
    assert litmus.DIFFERENCES[kind].by == f"`{EXPERIMENTS[kind]}`"


@pytest.mark.parametrize("kind", sorted(chaos_mesh.DIFFERENCES))
def test_the_resource_of_chaos_mesh_is_the_one_that_is_made(kind: str) -> None:
    made = getattr(HANDLERS[kind], "resource_kind", "PodChaos")
    assert chaos_mesh.DIFFERENCES[kind].by.split()[0] == made
