"""What is said of the models that replicas serve, and when nothing may be said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlchaos_dagster.sandbox.parts import View, part

pytestmark = pytest.mark.req("R3-04")


def gauges(states: dict[str, Any], *others: str, starting: tuple[str, ...] = ()) -> dict[str, float]:
    """As read while replicas 1 and 2 run, beside `others`."""
    slots: dict[str, Any] = {f"inference-{n}": SimpleNamespace(role="inference", port=1) for n in (1, 2)}
    slots |= {name: SimpleNamespace(role=name, port=1) for name in others}
    for name in starting:
        slots[name].port = None
    read = part("model_health").read
    assert read is not None
    return read(View(slots, states, Path()))


def replica(sha256: str, promised: str = "approved") -> dict[str, Any]:
    model = {"sha256": sha256, "promised_sha256": promised, "rejected_total": 1, "healthy": True, "version": sha256}
    return {"model": model}


def test_a_replica_is_held_against_what_the_rollout_approved() -> None:
    states = {"inference-1": replica("approved"), "inference-2": replica("bad", promised="bad")}
    seen = gauges({**states, "rollout": {"stable_sha256": "approved"}}, "rollout")
    assert seen == {"models_rejected": 2, "models_unhealthy": 0, "model_versions": 2, "artifact_mismatch": 1}


@pytest.mark.parametrize("rollout", [{}, {"rollout": {"stable_sha256": None}}])
def test_without_the_word_of_the_rollout_nobody_is_taken_at_their_own(rollout: dict[str, Any]) -> None:
    states = {"inference-1": replica("bad", promised="bad"), "inference-2": replica("bad", promised="bad")}
    seen = gauges({**states, **rollout}, "rollout")
    assert "artifact_mismatch" not in seen
    assert seen["model_versions"] == 1
    assert gauges(states)["artifact_mismatch"] == 0, "where nothing is rolled out, the card is what was promised"


def test_while_a_replica_hangs_nothing_is_said_and_one_that_starts_does_not_count() -> None:
    states = {"inference-1": replica("approved")}
    assert gauges(states) == {}
    assert gauges(states, starting=("inference-2",))["models_rejected"] == 1
    assert gauges({}, starting=("inference-1", "inference-2")) == {}
