"""The sandbox driver's contract on a real sandbox: verbs that may come twice, late, early, or from somebody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers.sandbox import SandboxDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed
from mlchaos_dagster.sandbox import api
from tests.sandbox.conftest import eventually, shared_sandbox

pytestmark = pytest.mark.timeout(180)

STORE = "gateway->feature-store"
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pod_delete": ("inference-1", {"interval_s": None, "signal": "kill"}),
    "pod_failure": ("inference-1", {}),
    "network_latency": (STORE, {"latency_s": 0.2, "jitter_s": 0.01}),
    "network_loss": (STORE, {"fraction": 0.9}),
    "network_partition": (STORE, {}),
}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sandbox that the sandbox's own tests use; their fixture is not in sight from here."""
    with shared_sandbox(tmp_path_factory) as platform:
        yield platform.directory


@pytest.fixture
def driver(home: Path) -> SandboxDriver:
    eventually(lambda: (api.status(home) or {}).get("ready"), every_s=0.1)
    return SandboxDriver(home)


def _lease(driver: SandboxDriver, kind: str) -> Lease:
    target, params = FAULTS[kind]
    now = time.time()
    return Lease(
        id=f"mlchaos-test-{uuid.uuid4().hex[:10]}",
        run_id="run",
        experiment="test",
        environment="sandbox",
        driver="sandbox",
        kind=kind,
        targets=(target,),
        params=params,
        undo=driver.undo(kind, (target,), params),
        duration_s=180,
        opened_wall=now,
        deadline_wall=now + 180,
        owner=Owner(os.getpid(), 0.0, "", ""),
        token=time.monotonic_ns(),  # tokens only ever grow: the sandbox is shared
    )


@pytest.mark.parametrize("kind", FAULTS)
def test_inject_is_seen_and_recover_twice_is_clean(driver: SandboxDriver, kind: str) -> None:
    lease = _lease(driver, kind)
    before = driver.active(lease)
    assert not before.present and not before.effective
    driver.inject(lease)
    try:
        eventually(lambda: driver.active(lease).effective)
        seen = driver.active(lease)
        assert seen.present and seen.lines
        if kind.startswith("pod"):
            pid = lease.undo["processes"]["inference-1"]["pid"]
            assert not psutil.pid_exists(pid)
            assert any(f"pid {pid} is gone" in line for line in seen.lines)
    finally:
        driver.recover(lease)
    driver.recover(lease)
    after = driver.active(lease)
    assert not after.present and not after.effective
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)
    assert not driver.active(lease).present


@pytest.mark.parametrize("kind", ["pod_failure", "network_partition"])
def test_recover_without_inject_keeps_a_late_inject_out(driver: SandboxDriver, kind: str) -> None:
    lease = _lease(driver, kind)
    driver.recover(lease)
    with pytest.raises(InjectFailed):
        driver.inject(lease)
    assert not driver.active(lease).present


def test_recover_from_another_process(driver: SandboxDriver) -> None:
    lease = _lease(driver, "pod_failure")
    driver.inject(lease)
    code = (
        "import sys; from dataclasses import replace; from mlchaos_dagster.engine.ports import Lease, Owner\n"
        "from mlchaos_dagster.drivers.sandbox import SandboxDriver\n"
        "lease = Lease(id=sys.argv[1], run_id='', experiment='', environment='', driver='', kind='pod_failure',"
        " targets=(), params={}, undo={}, duration_s=0, opened_wall=0, deadline_wall=0, owner=Owner(0, 0, '', ''))\n"
        "SandboxDriver(sys.argv[2]).recover(lease)"
    )
    subprocess.run([sys.executable, "-c", code, lease.id, str(driver.directory)], check=True, timeout=20)
    assert not driver.active(lease).present


def test_resolves_globs_to_sorted_names(driver: SandboxDriver) -> None:
    assert driver.resolve(Target(select="inference-*")) == ("inference-1", "inference-2")
    assert driver.resolve(Target(select="gateway->*")) == (STORE, "gateway->inference-1", "gateway->inference-2")
    assert driver.resolve(Target(select="*")) == (
        "feature-store",
        "gateway",
        STORE,
        "gateway->inference-1",
        "gateway->inference-2",
        "inference-1",
        "inference-2",
    )
    assert driver.resolve(Target(select="nothing-*")) == ()


def test_a_passed_deadline_and_an_unknown_target_inject_nothing(driver: SandboxDriver) -> None:
    late = replace(_lease(driver, "pod_failure"), deadline_wall=time.time() - 1)
    with pytest.raises(InjectFailed, match="deadline"):
        driver.inject(late)
    wrong = replace(_lease(driver, "pod_failure"), targets=("inference-9",))
    with pytest.raises(InjectFailed, match="inference-9"):
        driver.inject(wrong)
    assert not driver.active(late).present and not driver.active(wrong).present


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("network_latency", "inference-1"),
        ("network_partition", "gateway->inference-9"),
        ("pod_failure", STORE),
        ("pod_delete", "inference-9"),
    ],
)
def test_a_target_that_is_not_there_or_does_not_fit_is_refused_before_the_lease(
    driver: SandboxDriver, kind: str, target: str
) -> None:
    with pytest.raises(DriverError, match=f"there is no such one: {target}") as caught:
        driver.undo(kind, (target,), {})
    assert not isinstance(caught.value, DriverUnavailable)


@pytest.mark.parametrize("kind", ["model_chaos", "memory_stress", "queue_overflow"])
def test_a_kind_that_is_meant_for_others_is_refused_before_the_lease(driver: SandboxDriver, kind: str) -> None:
    with pytest.raises(DriverError, match=f"{kind} cannot be put on gateway. Allowed: ") as caught:
        driver.undo(kind, ("gateway",), {})
    assert not isinstance(caught.value, DriverUnavailable)


def test_a_lease_on_a_link_that_is_gone_closes_clean(driver: SandboxDriver) -> None:
    lease = replace(_lease(driver, "network_partition"), targets=("gateway->inference-9", "inference-1"))
    driver.recover(lease)
    evidence = driver.active(lease)
    assert not evidence.present and not evidence.effective
    assert "there is no link gateway->inference-9: no fault can be there" in evidence.lines


@pytest.mark.parametrize("kind", ["pod_failure", "pod_delete", "network_partition", "network_latency"])
def test_what_was_down_before_is_not_our_fault(driver: SandboxDriver, kind: str) -> None:
    lease = _lease(driver, kind)
    other = _lease(driver, "network_partition" if kind.startswith("network") else "pod_failure")
    driver.inject(other)
    try:
        with pytest.raises(DriverUnavailable, match=f"{lease.targets[0]} is down already"):
            _lease(driver, kind)
    finally:
        driver.recover(other)


@pytest.mark.parametrize("kind", ["pod_failure", "network_partition", "network_latency"])
def test_nothing_is_confirmed_without_a_look_from_before(driver: SandboxDriver, kind: str) -> None:
    lease = _lease(driver, kind)
    driver.inject(lease)
    try:
        eventually(lambda: driver.active(lease).effective)
        blind = driver.active(replace(lease, undo={"directory": lease.undo["directory"]}))
        assert blind.present and not blind.effective
    finally:
        driver.recover(lease)


def test_who_takes_the_place_of_what_is_held_down_ends_the_effect(
    driver: SandboxDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = _lease(driver, "pod_failure")
    driver.inject(lease)
    try:
        eventually(lambda: driver.active(lease).effective)
        state = api.read_state(driver.directory) or {}
        somebody = {"pid": os.getpid(), "create_time": psutil.Process().create_time()}
        children = {**state["children"], "inference-1": somebody}
        with monkeypatch.context() as patched:
            patched.setattr(api, "read_state", lambda _: {**state, "children": children})
            seen = driver.active(lease)
        assert seen.present and not seen.effective
    finally:
        driver.recover(lease)


def test_a_link_that_breaks_in_another_way_is_not_slow(driver: SandboxDriver) -> None:
    link = "gateway->inference-2"
    lease = _lease(driver, "network_latency")
    lease = replace(lease, targets=(link,), undo=driver.undo("network_latency", (link,), {}))
    driver.inject(lease)
    eventually(lambda: driver.active(lease).effective)
    held = replace(_lease(driver, "pod_failure"), targets=("inference-2",))
    driver.inject(held)
    try:
        seen = driver.active(lease)
        assert seen.present and not seen.effective
    finally:
        driver.recover(held)
        driver.recover(lease)


def test_a_repeated_kill_stays_present_while_kills_are_scheduled(driver: SandboxDriver) -> None:
    lease = replace(_lease(driver, "pod_delete"), params={"interval_s": 0.5, "signal": "kill"})
    driver.inject(lease)
    try:
        eventually(lambda: len(api.SandboxClient(driver.directory).faults()[0]["killed_pids"]) > 1)
        seen = driver.active(lease)
        assert seen.present and seen.effective
    finally:
        driver.recover(lease)
    assert not driver.active(lease).present


def test_a_dead_sandbox_is_clean_and_says_so(tmp_path: Path) -> None:
    try:
        supervisor = api.up(tmp_path, api.SandboxConfig(replicas=1))["supervisor"]["pid"]
        driver = SandboxDriver(tmp_path)
        lease = _lease(driver, "network_partition")
        driver.inject(lease)

        os.kill(supervisor, signal.SIGSTOP)  # alive, but nobody answers: unknown is not clean
        with pytest.raises(DriverUnavailable, match="alive"):
            driver.active(lease)
        with pytest.raises(RecoverFailed, match="alive"):
            driver.recover(lease)

        os.kill(supervisor, signal.SIGKILL)
        driver.recover(lease)
        driver.recover(lease)
        evidence = driver.active(lease)
        assert not evidence.present and not evidence.effective
        assert str(supervisor) in evidence.lines[0] and "gone" in evidence.lines[0]
        with pytest.raises(DriverUnavailable):
            driver.inject(lease)
        with pytest.raises(DriverUnavailable):
            driver.resolve(Target(select="*"))

        api.up(tmp_path)  # a new life in the same place still refuses it
        with pytest.raises(InjectFailed, match="never inject again"):
            driver.inject(lease)
    finally:
        assert api.down(tmp_path)["clean"]
