"""Ingestion of features, and what the feature store's rows are like: nulls, age, range, drift."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from . import Part, Process, View

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.supervisor import Supervisor

_STORE = "feature-store"
_SIGNALS = {
    "feature_null_rate": "null_rate",
    "feature_age": "age_p95_s",
    "feature_out_of_range": "out_of_range_rate",
    "feature_drift": "drift",
}
_EVERY_S = 0.25


async def _watch(supervisor: Supervisor) -> None:
    """Ask the store, which is there without this part too, what its rows are like."""
    import aiohttp

    slot = supervisor.slots[_STORE]
    while True:
        if slot.running and slot.port is not None:
            try:
                status, quality = await supervisor.call(slot, "GET", "/quality", None, 0.5)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
                status, quality = 0, {}
            if status == 200:
                supervisor.states[_STORE] = (time.monotonic(), quality)
        await asyncio.sleep(_EVERY_S)


def _read(view: View) -> dict[str, float]:
    quality = view.states.get(_STORE, {})
    return {signal: value for signal, name in _SIGNALS.items() if (value := quality.get(name)) is not None}


PART = Part(
    name="features",
    describe="Ingestion of features: every row is refreshed from the source each 2 s; freshness counts from then on",
    processes=(Process("feature-writer", "feature_writer"),),
    # An address for the store to know that rows are refreshed here, so that their age means something.
    peers={_STORE: {"ingestion": "feature-writer"}},
    signals=tuple(_SIGNALS),
    read=_read,
    task=_watch,
)
