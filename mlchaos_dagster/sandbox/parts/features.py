"""Ingestion of features, and what the feature store's rows are like: nulls, age, range, drift."""

from __future__ import annotations

from . import Part, Process, View

_STORE = "feature-store"
_SIGNALS = {
    "feature_null_rate": "null_rate",
    "feature_age": "age_p95_s",
    "feature_out_of_range": "out_of_range_rate",
    "feature_drift": "drift",
}


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
    watches=(_STORE,),
)
