"""Burners, memory limits and the autoscaler: seen by pid, by /proc and in the truth log, not by the sandbox's word."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest

from mlchaos_dagster.sandbox.api import SandboxConfig, SandboxRefused, down, up
from mlchaos_dagster.sandbox.autoscaler import STABILISE_S, Stabiliser, desired

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)
MIB = 2**20
LIMIT = 300 * MIB


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One replica with a limit of 300 MiB, and the autoscaler."""
    directory = tmp_path_factory.mktemp("stress")
    try:
        up(directory, SandboxConfig(replicas=1, memory_limit_bytes=LIMIT), parts=["scaling"], timeout_s=150)
        yield Platform(directory)
    finally:
        evidence = down(directory)
    assert evidence["clean"], evidence


@pytest.fixture
def stressed(small: Platform) -> Iterator[Platform]:
    """The same, without faults after the test."""
    eventually(lambda: small.client.signals()["ready_replicas"] >= 1)
    yield small
    for fault in small.client.faults():
        small.client.remove_fault(fault["lease_id"])


def burners(platform: Platform) -> list[psutil.Process]:
    """Burner processes of this sandbox, by their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "burner" in words and str(platform.directory) in words:
            found.append(process)
    return found


def events(platform: Platform, what: str) -> list[dict]:
    """Lines of the truth log."""
    return [line for line in platform.truth() if line["what"] == what]


@pytest.mark.req("R1-05")
def test_too_much_memory_is_an_oom_kill_and_one_clean_restart(stressed: Platform) -> None:
    before = stressed.process("inference-1")
    lease = stressed.inject("memory_stress", "inference-1", bytes=400 * MIB)
    (burner,) = burners(stressed)
    eventually(lambda: not psutil.pid_exists(before["pid"]))
    eventually(lambda: not psutil.pid_exists(burner.pid))  # what is in the group dies with it
    eventually(lambda: stressed.process("inference-1")["ready"], every_s=0.1)
    after = stressed.process("inference-1")
    assert (after["restarts"], after["oom_kills"]) == (before["restarts"] + 1, 1)
    (kill,) = events(stressed, "oom_killed")
    assert kill["who"] == "inference-1" and kill["pid"] == before["pid"] and kill["lease"] == lease
    assert kill["usage_bytes"] > kill["limit_bytes"] == LIMIT
    assert {one["pid"] for one in kill["killed"].values()} == {before["pid"], burner.pid}
    assert kill["largest"].startswith("burner-") and kill["enforced_by"] == "supervisor"
    (fault,) = stressed.client.faults()
    assert fault["effective"] and "OOM-killed" in fault["evidence"][0]
    assert burners(stressed) == [], "once for each fault"
    assert stressed.ask().status == 200


def test_memory_below_the_limit_is_held_until_it_is_taken_away(stressed: Platform) -> None:
    kills, pid = len(events(stressed, "oom_killed")), stressed.process("inference-1")["pid"]
    lease = stressed.inject("memory_stress", "inference-1", bytes=80 * MIB)
    (burner,) = burners(stressed)
    eventually(lambda: burner.memory_info().rss >= 80 * MIB)
    eventually(lambda: stressed.client.faults()[0]["effective"])
    stressed.client.remove_fault(lease)
    assert not burner.is_running()
    (gone,) = (line for line in events(stressed, "burners_gone") if line["lease"] == lease)
    assert gone["burners"][0]["pid"] == burner.pid and gone["usage_bytes"] < 200 * MIB
    assert len(events(stressed, "oom_killed")) == kills and stressed.process("inference-1")["pid"] == pid


@pytest.mark.req("R1-04", "R3-02")
def test_busy_cpu_scales_up_and_the_first_core_is_left_alone(stressed: Platform) -> None:
    lease = stressed.inject("cpu_stress", "inference-1", cores=1, load=1.0)
    (burner,) = burners(stressed)
    eventually(lambda: stressed.client.signals()["running_replicas"] >= 2)
    eventually(lambda: sum(burner.cpu_times()[:2]) > 0.1)
    if hasattr(os, "sched_getaffinity") and len(allowed := os.sched_getaffinity(0)) > 1:
        assert set(burner.cpu_affinity()) == allowed - {min(allowed)}
    assert stressed.client.signals()["desired_replicas"] >= 2
    scaled = events(stressed, "scaled")[-1]
    assert (scaled["by"], scaled["before"]) == ("autoscaler", 1) and scaled["cpu_usage"] > 0.5
    burner.kill()
    eventually(lambda: not stressed.client.faults()[0]["effective"])
    assert "is gone" in stressed.client.faults()[0]["evidence"][0]
    stressed.client.remove_fault(lease)
    assert burners(stressed) == []


def test_a_burner_ends_at_its_deadline_though_the_supervisor_hangs(stressed: Platform) -> None:
    stressed.inject("cpu_stress", "gateway", deadline_s=0.8, load=0.2)
    supervisor = psutil.Process(stressed.client.status()["supervisor"]["pid"])
    (burner,) = burners(stressed)
    supervisor.suspend()
    try:
        eventually(lambda: not burner.is_running() or burner.status() == psutil.STATUS_ZOMBIE)
    finally:
        supervisor.resume()


@pytest.mark.parametrize(
    ("kind", "target", "params", "status", "said"),
    [
        ("memory_stress", "inference-1", {"bytes": 2**45}, 503, "more than half of"),
        ("cpu_stress", "inference-1", {"cores": 200}, 503, "one of them for the measurement"),
        ("memory_stress", "gateway", {"bytes": MIB}, 400, "allowed: inference-1"),
        ("cpu_stress", "inference-1", {"load": 2}, 400, "load must be a number"),
        ("memory_stress", "inference-1", {}, 400, "needs bytes"),
    ],
)
def test_refused(stressed: Platform, kind: str, target: str, params: dict, status: int, said: str) -> None:
    with pytest.raises(SandboxRefused, match=said) as refused:
        stressed.inject(kind, target, **params)
    assert refused.value.status == status
    assert stressed.client.faults() == [] and burners(stressed) == []


@pytest.mark.parametrize(
    ("replicas", "uses", "wanted"),
    [
        (3, [0.5, 0.5, 0.5], 3),
        (3, [0.54, 0.54, 0.54], 3),  # within the tolerance
        (3, [1.0, 0.5, 0.5], 4),
        (3, [9.0, 9.0, 9.0], 5),  # the most
        (5, [0.1] * 5, 3),  # the least
        (5, [0.4] * 5, 4),
        (4, [0.6, 0.6, 0.6, None], 4),  # idle on the way up: 0.45 would turn round
        (4, [1.5, 1.5, 1.5, None], 5),
        (5, [0.3, 0.3, 0.3, None, None], 4),  # busy on the way down
        (4, [None] * 4, 4),
        (4, [], 4),
    ],
)
def test_desired_replicas(replicas: int, uses: list[float | None], wanted: int) -> None:
    assert desired(replicas, uses, 3, 5) == wanted


def test_up_at_once_and_down_only_after_the_window() -> None:
    stabiliser = Stabiliser()
    assert stabiliser.goal(0.0, 3, 5) == 5
    assert stabiliser.goal(1.0, 5, 4) == 5
    assert stabiliser.goal(STABILISE_S, 5, 3) == 5
    assert stabiliser.goal(STABILISE_S + 0.5, 5, 3) == 4, "the wish of second 1 still stands"
    assert stabiliser.goal(STABILISE_S + 1.5, 4, 3) == 3
    assert stabiliser.goal(STABILISE_S + 2.0, 3, 4) == 4


def test_the_watch_of_memory_costs_next_to_nothing() -> None:
    from mlchaos_dagster.sandbox.limits import _WATCH_S, resident

    begun = time.process_time()
    for _ in range(600):
        assert resident(os.getpid()) > MIB
    each_s = (time.process_time() - begun) / 600
    assert 5 * each_s / _WATCH_S < 0.01, f"five processes, {each_s * 1e6:.0f} µs each"
