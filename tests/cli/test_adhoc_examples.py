"""Faults from the command line alone, with what fills in the words that were not said."""

from __future__ import annotations

import pytest

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.cli.adhoc import AdHoc, build


@pytest.mark.req("R4-06")
@pytest.mark.parametrize(
    ("words", "target", "kind", "params"),
    [
        ("pod_kill", "prediction-service", "pod_delete", {"interval_s": None, "signal": "kill"}),
        ("cpu_stress", "prediction-service", "cpu_stress", {"cores": 1.0, "load": 0.8}),
        ("network_partition", "feature-store", "network_partition", {}),
        ("memory_pressure", "prediction-service", "memory_stress", {"bytes": 500 * 2**20}),
    ],
)
def test_ready_examples(words: str, target: str, kind: str, params: dict[str, object]) -> None:
    environment = Catalog().environment("sandbox")
    experiment = build(AdHoc(words, target, duration="60"), environment)
    assert (experiment.fault.kind, experiment.fault.params()) == (kind, params)
    assert experiment.duration == 60.0 and experiment.blast_radius.count == 1


@pytest.mark.req("R3-02")
@pytest.mark.parametrize(
    ("words", "given", "params"),
    [
        ("pod-cpu-hog", {"cores": 1, "load": "100%"}, {"cores": 1.0, "load": 1.0}),
        ("pod-memory-hog", {"size": "500MB"}, {"bytes": 500_000_000}),
        ("container-kill", {}, {}),
    ],
)
def test_the_words_of_other_tools(words: str, given: dict[str, object], params: dict[str, object]) -> None:
    experiment = build(AdHoc(words, "prediction-service", params=given), Catalog().environment("sandbox"))
    assert experiment.fault.params() == params


def test_a_memory_stress_by_default_is_above_the_memory_limit() -> None:
    environment = Catalog().environment("sandbox")
    experiment = build(AdHoc("memory_stress", "prediction-service"), environment)
    assert environment.sandbox is not None
    assert experiment.fault.params()["bytes"] > environment.sandbox.memory_limit
