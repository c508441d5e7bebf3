"""What the native driver says of all kinds without importing one, held to what their handlers say."""

from __future__ import annotations

from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.drivers.kubernetes.faults import PLACES, handler


def test_the_kinds_that_end_by_themselves_are_those_of_the_handlers() -> None:
    assert KubernetesDriver.self_limiting == {kind for kind in PLACES if handler(kind).self_limiting}
