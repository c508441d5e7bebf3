"""Each fault: seen from outside while it is there, gone after removal, gone by its own deadline; leases and fencing."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import Any

import psutil
import pytest

from mlchaos_dagster.sandbox.api import SandboxRefused

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)

STORE = "gateway->feature-store"


def _round_trip(platform: Platform, link: str = STORE) -> float | None:
    return platform.client.link_round_trip(link, timeout_s=0.5)


def _soon_below(platform: Platform, seconds: float) -> float:
    """A round trip below that. A busy machine makes some slow; a delay makes all of them slow."""
    return eventually(lambda: took if (took := _round_trip(platform)) is not None and took < seconds else None)


# -- network ----------------------------------------------------------------------------------------------------------


def test_latency_adds_to_the_round_trip_and_goes(platform: Platform) -> None:
    lease = platform.inject("network_latency", STORE, latency_ms=250, jitter_ms=20)
    assert _soon_below(platform, 0.45) > 0.22
    (fault,) = platform.client.faults()
    assert fault["effective"] and fault["counters"]["delayed"] >= 2
    assert platform.client.remove_fault(lease)["removed"][0]["kind"] == "network_latency"
    assert _soon_below(platform, 0.1)
    assert platform.client.faults() == []


def test_latency_hits_connections_that_were_open_before(platform: Platform) -> None:
    port = platform.client.status()["links"][STORE]["port"]
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        eventually(lambda: _keep_alive(connection) < 0.1)
        lease = platform.inject("network_latency", STORE, latency_ms=200)
        assert _keep_alive(connection) > 0.19
        platform.client.remove_fault(lease)
        eventually(lambda: _keep_alive(connection) < 0.1)


def test_removal_releases_bytes_that_are_still_waiting(platform: Platform) -> None:
    port = platform.client.status()["links"][STORE]["port"]
    lease = platform.inject("network_latency", STORE, latency_ms=20_000)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: platform.client.faults()[0]["effective"])
        platform.client.remove_fault(lease)
        assert b"200 OK" in connection.recv(4096)


def test_loss_shows_as_retransmission_delays(platform: Platform) -> None:
    lease = platform.inject("network_loss", STORE, fraction=1.0)
    assert _round_trip(platform) is None
    assert platform.client.faults()[0]["counters"]["lost"] >= 4
    platform.client.remove_fault(lease)
    assert _soon_below(platform, 0.1)


def test_partition_passes_no_bytes_and_resets_what_it_swallowed(platform: Platform) -> None:
    port = platform.client.status()["links"][STORE]["port"]
    with socket.create_connection(("127.0.0.1", port), timeout=2) as old:
        _keep_alive(old)
        lease = platform.inject("network_partition", STORE)
        old.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        old.settimeout(0.3)
        with pytest.raises(TimeoutError):
            old.recv(1)
        assert _round_trip(platform) is None
        (fault,) = platform.client.faults()
        assert fault["effective"] and fault["counters"]["dropped"] >= 2
        platform.client.remove_fault(lease)
        old.settimeout(2)
        with pytest.raises(ConnectionResetError):
            old.recv(1)
    assert _soon_below(platform, 0.1)


def test_gateway_answers_from_cache_behind_an_open_breaker(platform: Platform) -> None:
    lease = platform.inject("network_partition", STORE)
    answers = [platform.ask(entity) for entity in range(8)]
    assert {answer.status for answer in answers} == {200}
    assert {answer.path for answer in answers} == {"cache"}
    state = platform.client.gateway_state()
    assert state["breaker"] in ("open", "half_open") and state["breaker_open_total"] >= 1
    platform.client.remove_fault(lease)
    eventually(lambda: platform.ask().path == "model")
    assert platform.client.gateway_state()["breaker"] == "closed"


@pytest.mark.parametrize(
    ("kind", "params"),
    [("network_latency", {"latency_ms": 300}), ("network_loss", {"fraction": 1.0}), ("network_partition", {})],
)
def test_network_faults_expire_by_themselves(platform: Platform, kind: str, params: dict[str, Any]) -> None:
    lease = platform.inject(kind, STORE, deadline_s=0.5, **params)
    eventually(lambda: platform.client.faults() == [])
    assert _soon_below(platform, 0.1)
    added, expired = (
        next(line for line in reversed(platform.truth()) if line["lease"] == lease and line["what"] == what)
        for what in ("fault_added", "fault_expired")
    )
    assert 0.4 < expired["mono"] - added["mono"] < 5.0


def test_proxy_keeps_its_deadline_while_the_supervisor_hangs(platform: Platform) -> None:
    supervisor = platform.client.status()["supervisor"]["pid"]
    platform.inject("network_partition", STORE, deadline_s=3.0)
    assert _round_trip(platform) is None
    os.kill(supervisor, signal.SIGSTOP)
    try:
        eventually(lambda: _round_trip(platform) is not None)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    eventually(lambda: platform.client.faults() == [])


def test_a_restarted_proxy_gets_valid_rules_back(platform: Platform) -> None:
    lease = platform.inject("network_latency", STORE, latency_ms=200)
    os.kill(platform.process("proxy-feature-store")["pid"], signal.SIGKILL)
    eventually(lambda: (_round_trip(platform) or 0) > 0.19)
    platform.client.remove_fault(lease)
    assert _soon_below(platform, 0.1)


def test_a_hung_proxy_is_killed_rather_than_left_with_a_rule(platform: Platform) -> None:
    lease = platform.inject("network_latency", STORE, latency_ms=200)
    pid = platform.process("proxy-feature-store")["pid"]
    os.kill(pid, signal.SIGSTOP)
    platform.client.remove_fault(lease)
    assert not psutil.pid_exists(pid)
    platform.wait_ready()
    assert _soon_below(platform, 0.1)
    assert platform.client.faults() == []


# -- processes --------------------------------------------------------------------------------------------------------


def test_pod_delete_kills_once_and_the_supervisor_restarts(platform: Platform) -> None:
    pid = platform.process("inference-1")["pid"]
    lease = platform.inject("pod_delete", "inference-1")
    assert not psutil.pid_exists(pid)
    (fault,) = platform.client.faults()
    assert fault["effective"] and f"pid {pid} is gone" in fault["evidence"][0]
    platform.wait_ready()
    born_again = platform.process("inference-1")["pid"]
    assert born_again != pid
    platform.client.remove_fault(lease)
    assert platform.client.faults() == []
    assert psutil.pid_exists(born_again)
    events = [line["what"] for line in platform.truth() if line["who"] == "inference-1" and line["lease"] == lease]
    assert [what for what in events if what in ("killed", "exited")] == ["killed", "exited"]
    moments = {line["what"]: line["mono"] for line in platform.truth() if line["who"] == "inference-1"}
    assert moments["killed"] < moments["exited"] < moments["started"] < moments["ready"]


def test_pod_delete_repeats_until_removed(platform: Platform) -> None:
    lease = platform.inject("pod_delete", "feature-store", interval_s=0.1)
    eventually(lambda: len(platform.client.faults()[0]["killed_pids"]) >= 2)
    platform.client.remove_fault(lease)
    killed = platform.truth()
    platform.wait_ready()
    pid = platform.process("feature-store")["pid"]
    assert sum(line["what"] == "killed" for line in platform.truth()) == sum(
        line["what"] == "killed" for line in killed
    )
    assert psutil.pid_exists(pid)


def test_pod_failure_holds_the_slot_down_until_removed(platform: Platform) -> None:
    pid = platform.process("inference-2")["pid"]
    lease = platform.inject("pod_failure", "inference-2")
    assert not psutil.pid_exists(pid)
    assert platform.process("inference-2")["held_by"] == [lease]
    assert {platform.ask(entity).replica for entity in range(4)} == {"inference-1"}
    time.sleep(0.5)  # longer than the back-off: it would be back if it were not held
    assert platform.process("inference-2")["pid"] is None
    assert platform.client.faults()[0]["effective"]
    platform.client.remove_fault(lease)
    eventually(lambda: platform.process("inference-2")["pid"])
    platform.wait_ready()


def test_pod_failure_expires_by_itself(platform: Platform) -> None:
    lease = platform.inject("pod_failure", "inference-2", deadline_s=0.4)
    eventually(lambda: platform.client.faults() == [])
    eventually(lambda: platform.process("inference-2")["pid"])
    mine = [line for line in platform.truth() if line["who"] == "inference-2" and line["lease"] == lease]
    assert "killed" in [line["what"] for line in mine]
    killed = next(line["mono"] for line in mine if line["what"] == "killed")
    back = [line for line in platform.truth() if line["who"] == "inference-2" and line["what"] == "started"]
    assert back[-1]["mono"] - killed > 0.35, "it came back, and not before its deadline"


# -- leases -----------------------------------------------------------------------------------------------------------


def test_a_removed_lease_never_injects_again(platform: Platform) -> None:
    platform.client.remove_fault("never-seen")
    platform.client.remove_fault("never-seen")
    for kind, target, params in (
        ("pod_failure", "inference-1", {}),
        ("network_latency", STORE, {"latency_ms": 100}),
    ):
        with pytest.raises(SandboxRefused, match="never-seen") as refused:
            platform.client.add_fault(
                lease_id="never-seen", token=9, kind=kind, target=target, params=params, deadline_s=9
            )
        assert refused.value.status == 409
    assert platform.client.faults() == []


def test_the_same_request_twice_is_one_fault(platform: Platform) -> None:
    token = time.monotonic_ns()
    for _ in range(2):
        platform.client.add_fault(
            lease_id="twice", token=token, kind="pod_failure", target="inference-1", deadline_s=30
        )
    (fault,) = platform.client.faults()
    assert len(fault["killed_pids"]) == 1


def test_an_older_token_is_fenced(platform: Platform) -> None:
    link, base = "gateway->inference-2", time.monotonic_ns()

    def inject(lease: str, token: int) -> None:
        platform.client.add_fault(
            lease_id=lease,
            token=base + token,
            kind="network_latency",
            target=link,
            params={"latency_ms": 1},
            deadline_s=30,
        )

    inject("new-owner", 0)
    platform.client.remove_fault("new-owner")
    inject("newer-owner", 5)
    with pytest.raises(SandboxRefused, match="fenced"):
        inject("late-owner", 4)
    platform.client.remove_fault("newer-owner")
    with pytest.raises(SandboxRefused, match="fenced"):
        inject("later-owner", 4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "meteor"}, "unknown kind"),
        ({"target": "inference-9"}, "inference-1"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": None}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"token": "1"}, "token"),
        ({"lease_id": ""}, "lease_id"),
        ({"params": {"interval_s": -1}}, "interval_s"),
        ({"params": {"speed": 1}}, "speed"),
        ({"params": {"signal": "SIGSEGV"}}, "SIGTERM"),
        ({"kind": "network_latency", "target": STORE}, "latency_ms"),
        ({"kind": "network_loss", "target": STORE, "params": {"fraction": 1.1}}, "fraction"),
        ({"kind": "network_loss", "target": "inference-1", "params": {"fraction": 0.1}}, "gateway->"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(platform: Platform, change: dict[str, Any], word: str) -> None:
    good: dict[str, Any] = {
        "lease_id": "bad",
        "token": 1,
        "kind": "pod_delete",
        "target": "inference-1",
        "deadline_s": 1,
    }
    pid = platform.process("inference-1")["pid"]
    with pytest.raises(SandboxRefused, match=word) as refused:
        platform.client.add_fault(**(good | change))
    assert refused.value.status == 400
    assert platform.client.faults() == []
    assert platform.process("inference-1")["pid"] == pid


def _keep_alive(connection: socket.socket) -> float:
    """Seconds for one request on an open connection."""
    began = time.perf_counter()
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        chunk = connection.recv(4096)
        assert chunk, "closed"
        answer += chunk
    assert json.loads(answer.split(b"\r\n\r\n")[1])["alive"]
    return time.perf_counter() - began
