"""Polled signals: what is no finite number is no reading."""

from __future__ import annotations

import math
import threading
import time

from mlchaos_dagster.probes.signals import PolledSignals


def test_what_is_no_finite_number_is_a_gap() -> None:
    again = threading.Event()
    reads: list[int] = []

    def read() -> dict[str, float]:
        reads.append(1)
        if len(reads) > 1:
            again.set()
        return {"none": math.nan, "endless": -math.inf, "fine": 2}

    source = PolledSignals([(read, 0.01)], ["none", "endless", "fine"])
    source.start(time.monotonic())
    assert again.wait(5)
    assert {(s.name, s.value) for s in source.stop()} == {("fine", 2.0)}
