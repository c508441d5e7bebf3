"""Whole runs through Litmus, from the command line: judged, and killed in their window."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import litmus_operator, litmus_place
from tests.cluster.conftest import deploy, eventually, objects, pods
from tests.cluster.litmus_operator import Script
from tests.cluster.litmus_place import DATA
from tests.cluster.surroundings import CommandLine, environment
from tests.cluster.test_litmus import crds, litmus, nothing_left  # noqa: F401  fixtures
from tests.cluster.test_litmus_deaths import BROUGHT, FAILED
from tests.cluster.test_sweeper import grant, open_leases, sweeper  # noqa: F401  a fixture

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout (../shared/data/litmus)"),
    pytest.mark.timeout(300),
]
HELD, DEVIATED = 0, 1
Lines = Callable[..., CommandLine]


@pytest.fixture
def line(
    litmus: litmus_operator.Litmus,  # noqa: F811
    sweeper: str,  # noqa: F811
    context: str,
    kubeconfig: str,
    tmp_path: Path,
) -> Lines:
    """`mlchaos` on an environment whose faults Litmus makes."""
    deploy(sweeper, replicas=3)
    grant(sweeper, "litmus")
    address = objects("services", sweeper)[0]["spec"]["clusterIP"]

    def of(fault: dict[str, Any], **changes: Any) -> CommandLine:
        written = environment(
            sweeper,
            context,
            kubeconfig,
            backends={"litmus": ["pod_delete", "network_isolation", "litmus_engine"]},
            probe={"url": f"http://{address}/", "rate": 10, "timeout": "1s"},
            kubernetes={"litmus": litmus_place.options(sweeper), "sweeper_ttl": "60s"},
            sampling={"baseline": "3s", "min_samples": 10},
            safety={"recover_timeout": "60s", "confirm_within": "15s", "lease_ttl": "20s"},  # also on a busy machine
        )
        written["backends"].pop("kubernetes", None)
        experiment = {
            "schema": "mlchaos/v1",
            "name": "through-litmus",
            "title": "Litmus makes the fault",
            "hypothesis": "It keeps answering.",
            "area": "serving",
            "owner": "ml-platform@example.com",
            "target": "web",
            "fault": fault,
            "blast_radius": {"count": 1},
            "duration": "5s",
            "steady_state": [{"sli": "availability", "at_least": "1%"}],
            "recovery": {"within": "60s"},
            **changes,
        }
        return CommandLine(tmp_path, written, experiment)

    return of


@pytest.mark.req("R1-01", "R0-01")
def test_a_run_through_litmus_is_held(line: Lines, sweeper: str) -> None:  # noqa: F811
    code, out, err = line({"kind": "pod_delete"})("run", "through-litmus", timeout=200)
    said = " ".join((out + err).split())
    assert code == HELD and "HELD" in said, said[-2500:]
    assert nothing_left(sweeper) and not open_leases(sweeper)


@pytest.mark.req("R3-01")
def test_a_failed_probe_of_a_brought_engine_makes_the_run_deviate(
    line: Lines,
    litmus: litmus_operator.Litmus,  # noqa: F811
    sweeper: str,  # noqa: F811
) -> None:
    litmus.script = Script(probes=FAILED)
    code, out, err = line({"kind": "litmus_engine", "engine": BROUGHT})("run", "through-litmus", timeout=250)
    said = " ".join((out + err).split())
    assert code == DEVIATED and "litmus probe teapot" in said and "418" in said, said[-2500:]
    assert nothing_left(sweeper) and not open_leases(sweeper)


@pytest.mark.req("R2-02")
def test_a_run_that_is_killed_in_its_window_leaves_nothing(line: Lines, sweeper: str) -> None:  # noqa: F811
    """By the signal that nobody hears: its watchdog takes the fault away."""
    one = line({"kind": "network_isolation"}, duration="60s")
    process = one.start("run", "through-litmus")
    try:
        eventually(lambda: objects("networkpolicies", sweeper), 90)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        started = time.monotonic()
        eventually(lambda: not open_leases(sweeper), 90)
        print(f"proven clean {time.monotonic() - started:.1f} s after the kill")  # noqa: T201
    finally:
        process.kill()
    assert nothing_left(sweeper)
    labels = [p["metadata"]["labels"] for p in pods(sweeper, "app=web")]
    assert not any("mlchaos.dev/fault" in found for found in labels)
