"""A service's signals on its /metrics, under the very names that environments use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class _Signals(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float | None]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._read().items():
            if value is not None:
                yield GaugeMetricFamily(name, f"Signal {name}", value=float(value))


def export(registry: CollectorRegistry, read: Callable[[], Mapping[str, float | None]]) -> None:
    """Show what ``read`` gives at each scrape; what is None then is left out: no value is not the value 0."""
    registry.register(_Signals(read))
