"""Up and down: one sandbox per directory however often it is asked for, and nothing that outlives it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlchaos_dagster.sandbox import api
from mlchaos_dagster.sandbox.api import (
    SandboxClient,
    SandboxConfig,
    SandboxConfigError,
    SandboxRefused,
    SandboxUnavailable,
)

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)

ONE = SandboxConfig(replicas=1)


def _members(directory: Path) -> list[int]:
    """Live processes whose command line names the directory; read without the sandbox's own code."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if str(directory) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_two_ups_at_once_make_one_sandbox_and_down_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import json, sys; from mlchaos_dagster.sandbox.api import up, SandboxConfig; "
        "print(json.dumps(up(sys.argv[1], SandboxConfig(replicas=1))))"
    )
    callers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        answers = [json.loads(caller.communicate(timeout=50)[0]) for caller in callers]
        assert answers[0]["supervisor"]["pid"] == answers[1]["supervisor"]["pid"]
        assert len(_members(tmp_path)) == 6  # supervisor, gateway, store, two proxies, one replica
        # Detached: the callers are gone, it is not, and it is in a session of its own.
        supervisor = answers[0]["supervisor"]["pid"]
        assert os.getsid(supervisor) == supervisor
        with pytest.raises(SandboxRefused, match="another configuration"):
            api.up(tmp_path, SandboxConfig(replicas=2))
        assert api.up(tmp_path)["supervisor"]["pid"] == supervisor
    finally:
        evidence = api.down(tmp_path)
    assert evidence["clean"] and evidence["was_up"]
    assert len(evidence["processes"]) == 6
    assert _members(tmp_path) == []
    assert api.status(tmp_path) is None
    assert api.down(tmp_path) == {"clean": True, "was_up": False, "processes": []}


def test_side_by_side_and_a_killed_supervisor_takes_its_children(tmp_path: Path, platform: Platform) -> None:
    try:
        first = api.up(tmp_path, ONE)
        assert first["gateway_url"] != platform.client.status()["gateway_url"]
        lease = {"lease_id": "x", "token": 1, "deadline_s": 30.0}
        SandboxClient(tmp_path).add_fault(kind="pod_failure", target="inference-1", **lease)
        assert platform.client.faults() == []
        assert platform.ask().status == 200

        stopped = Platform(tmp_path).process("gateway")["pid"]
        os.kill(stopped, signal.SIGSTOP)  # one that cannot hear its pipe close (the kernel's death signal reaches it)
        os.kill(first["supervisor"]["pid"], signal.SIGKILL)
        if not sys.platform.startswith("linux"):
            os.kill(stopped, signal.SIGCONT)
        eventually(lambda: _members(tmp_path) == [])
        assert api.status(tmp_path) is None
        assert platform.ask().status == 200

        again = api.up(tmp_path, ONE)  # over the remains of the killed one
        assert again["ready"] and again["faults"] == []
        with pytest.raises(SandboxRefused):  # what was removed stays removed across lives
            SandboxClient(tmp_path).remove_fault("gone")
            SandboxClient(tmp_path).add_fault(
                lease_id="gone", token=1, deadline_s=9, kind="pod_failure", target="gateway"
            )
        os.kill(again["supervisor"]["pid"], signal.SIGSTOP)  # one that is asked to go and does not listen
    finally:
        evidence = api.down(tmp_path, timeout_s=6)
    assert evidence["clean"] and evidence["was_up"]
    assert _members(tmp_path) == []
    assert platform.ask().status == 200


def test_down_finds_a_sandbox_whose_directory_was_deleted(tmp_path: Path) -> None:
    home = tmp_path / "state"
    supervisor = api.up(home, ONE)["supervisor"]["pid"]
    try:
        shutil.rmtree(home)
        with pytest.raises(SandboxUnavailable, match=rf"pid {supervisor}\b.*`mlchaos sandbox down`"):
            api.status(home)
    finally:
        evidence = api.down(home)
    assert evidence["clean"] and evidence["was_up"] and len(evidence["processes"]) == 6
    assert _members(home) == []
    assert api.down(home) == {"clean": True, "was_up": False, "processes": []}


def test_a_broken_sandbox_is_taken_as_it_is(platform: Platform) -> None:
    lease = platform.inject("pod_failure", "inference-1")
    began = time.monotonic()
    age = time.time() - platform.client.status()["supervisor"]["started_at"]
    try:
        found = api.up(platform.directory)
    finally:
        platform.client.remove_fault(lease)
    assert not found["ready"]
    # Only one that was started a moment ago may still be starting.
    assert time.monotonic() - began < max(0.0, 30 - age) + 5


def test_without_any_mechanism_every_fault_hurts(tmp_path: Path) -> None:
    config = SandboxConfig(replicas=2, mechanisms=dict.fromkeys(api.MECHANISMS, False))
    try:
        api.up(tmp_path, config)
        platform = Platform(tmp_path)
        assert [platform.ask(entity).status for entity in range(4)] == [200] * 4

        lease = platform.inject("network_latency", "gateway->feature-store", latency_ms=400)
        slow = [platform.ask(entity) for entity in range(7)]
        # No fallback: an error each time. No breaker: waiting for the full time-out each time.
        assert {(answer.status, answer.path) for answer in slow} == {(503, "error")}
        assert all(answer.seconds > 0.19 for answer in slow)
        state = platform.client.gateway_state()
        assert (state["breaker"], state["breaker_open_total"], state["retries_total"]) == ("closed", 0, 0)
        assert platform.client.requests(60)["bad"] == 7
        platform.client.remove_fault(lease)

        # No restart: it stays away. No readiness: it still gets its share. No retries: that share fails.
        lease = platform.inject("pod_delete", "inference-1")
        eventually(lambda: platform.client.gateway_state()["ready_replicas"] == 1)
        assert platform.client.gateway_state()["in_rotation"] == 2
        assert {platform.ask(entity).status for entity in range(6)} == {200, 503}
        assert platform.process("inference-1")["pid"] is None
        platform.client.remove_fault(lease)
        assert platform.process("inference-1")["pid"] is None

        # Undoing a fault is no mechanism: what pod_failure took down comes back.
        lease = platform.inject("pod_failure", "inference-2")
        platform.client.remove_fault(lease)
        eventually(lambda: platform.process("inference-2")["ready"])
    finally:
        assert api.down(tmp_path)["clean"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": True}, "replicas"),
        ({"replica": 3}, "unknown sandbox field 'replica'"),
        ({"mechanisms": {"luck": True}}, "unknown mechanism 'luck'"),
        ({"mechanisms": {"retries": "off"}}, "mechanisms.retries"),
        ({"mechanisms": ["retries"]}, "mechanisms"),
        ({"deadline_s": -1}, "deadline_s"),
    ],
)
def test_bad_configurations_say_what_is_wrong(data: dict[str, object], word: str) -> None:
    with pytest.raises(SandboxConfigError, match=word):
        SandboxConfig.from_dict(data)


def test_configuration_survives_a_round_trip() -> None:
    config = SandboxConfig.from_dict({"replicas": 2, "mechanisms": {"retries": False}})
    assert config.mechanisms["restart"] and not config.mechanisms["retries"]
    assert SandboxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
