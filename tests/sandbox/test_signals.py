"""What the wiring reads of the platform: every promised signal, and a rate that is not a counter in disguise."""

from __future__ import annotations

import time

import pytest

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.record import SignalSample
from mlchaos_dagster.probes.signals import Rate
from mlchaos_dagster.settings import Home
from mlchaos_dagster.wiring import SANDBOX_SIGNALS, signal_source

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)


def test_every_signal_is_read_and_retries_show_as_a_rate(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Home, "sandbox", lambda self, environment: platform.directory)
    environment = Catalog().environment("sandbox").model_copy(update={"signals": SANDBOX_SIGNALS})
    before = platform.client.gateway_state()["retries_total"]
    source = signal_source(environment, Home(platform.directory))
    samples: list[SignalSample] = []

    def last_rate() -> float:
        platform.ask()
        samples.extend(source.drain())
        return next((s.value for s in reversed(samples) if s.name == "retry_rate"), 0.0)

    source.start(time.monotonic())
    try:
        lease = platform.inject("network_partition", "gateway->inference-1")
        eventually(lambda: last_rate() > 0)
        platform.client.remove_fault(lease)
        eventually(lambda: last_rate() == 0)  # the counter stays where it is
    finally:
        samples += source.stop()
    assert {s.name for s in samples} == set(SANDBOX_SIGNALS)
    assert platform.client.gateway_state()["retries_total"] > before


def test_a_rate_needs_its_time_and_survives_a_counter_that_begins_anew() -> None:
    rate = Rate(over_s=1.0)
    assert [rate.add(at, value) for at, value in ((0.0, 5), (0.5, 5), (1.0, 7), (1.5, 7), (2.25, 7))] == [
        None, None, 2.0, 2.0, 0.0,
    ]  # fmt: skip
    assert rate.add(2.5, 1) is None
    assert rate.add(3.5, 1) == 0.0
