"""An autoscaler: inference replicas are added while their CPU is busy, and taken away when it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Part, View

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.supervisor import Supervisor

_STATE = "autoscaler"


async def _run(supervisor: Supervisor) -> None:
    from mlchaos_dagster.sandbox.autoscaler import run

    await run(supervisor)


def _read(view: View) -> dict[str, float]:
    state = view.states.get(_STATE, {})
    return {name: float(state[name]) for name in PART.signals if name in state}


PART = Part(
    name="scaling",
    describe="Autoscaler of the inference replicas, on their CPU use",
    signals=("cpu_usage", "desired_replicas"),
    read=_read,
    task=_run,
)
