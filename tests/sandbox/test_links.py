"""Faults on the links to a store: a stopped server, a slow one, one that throttles; and the framing behind the last."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import time
import uuid
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers.sandbox import SandboxDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import InjectFailed
from mlchaos_dagster.sandbox.api import SandboxRefused
from mlchaos_dagster.sandbox.http_framing import Requests, slow_down

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)

LINK = "inference->object-store"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def _port(platform: Platform) -> int:
    return platform.client.status()["links"][LINK]["port"]


def _ask(connection: socket.socket, request: bytes = HEALTH) -> bytes:
    connection.sendall(request)
    return connection.recv(4096)


@pytest.mark.parametrize("kind", ["s3_unavailable", "database_unavailable"])
def test_a_stopped_store_ends_old_connections_and_refuses_new_ones_at_once(training: Platform, kind: str) -> None:
    with socket.create_connection(("127.0.0.1", _port(training)), timeout=2) as old:
        assert b" 200 " in _ask(old)
        lease = training.inject(kind, LINK)
        with pytest.raises(ConnectionResetError):
            old.recv(1)
    began = time.monotonic()
    assert training.client.link_status(LINK, 20.0) is None
    assert time.monotonic() - began < 10  # told, not waited for
    (fault,) = training.client.faults()
    assert fault["effective"] and fault["counters"]["resets"] == 1 and fault["counters"]["refused"] >= 1
    training.client.remove_fault(lease)
    assert training.client.link_status(LINK) == 200


def test_a_throttled_request_is_answered_by_the_proxy_and_its_connection_stays(training: Platform) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", _port(training), timeout=2)
    try:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        first = connection.sock
        lease = training.inject("s3_throttled", LINK, fraction=1.0)
        for body in (None, b"x" * 100_000):
            connection.request("PUT" if body else "GET", "/healthz", body)
            response = connection.getresponse()
            assert (response.status, b"<Code>SlowDown</Code>" in response.read()) == (503, True)
        training.client.remove_fault(lease)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        assert connection.sock is first
    finally:
        connection.close()


def test_throttling_takes_its_share_of_the_requests(training: Platform) -> None:
    training.inject("s3_throttled", LINK, fraction=0.5)
    seen = [training.client.link_status(LINK) for _ in range(60)]
    assert set(seen) == {200, 503}
    assert 10 < seen.count(503) < 50  # one in ten million falls outside
    (fault,) = training.client.faults()
    assert fault["counters"]["throttled"] == seen.count(503)


def test_a_put_that_waits_for_100_continue_is_throttled_without_its_body(training: Platform) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    from .test_storage import told

    keys = told(training)
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{_port(training)}",
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret_key"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )
    try:
        lease = training.inject("s3_throttled", LINK, fraction=1.0)
        with pytest.raises(ClientError, match="SlowDown"):
            s3.put_object(Bucket="models", Key="throttled", Body=b"x" * 2_000_000)
        with pytest.raises(ClientError, match="503"):
            s3.head_object(Bucket="models", Key="throttled")
        training.client.remove_fault(lease)
        with pytest.raises(ClientError, match="404"):
            s3.head_object(Bucket="models", Key="throttled")
        s3.put_object(Bucket="models", Key="throttled", Body=b"x" * 2_000_000)
        assert s3.head_object(Bucket="models", Key="throttled")["ContentLength"] == 2_000_000
    finally:
        s3.close()


def test_a_restarted_proxy_gets_the_rule_back_until_its_deadline(training: Platform) -> None:
    training.inject("s3_throttled", LINK, deadline_s=8.0, fraction=1.0)
    pid = training.process("proxy-object-store")["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: (training.process("proxy-object-store")["pid"] or pid) != pid)
    eventually(lambda: training.client.link_status(LINK) == 503 and training.client.faults()[0]["effective"])
    eventually(lambda: training.client.faults() == [])
    assert training.client.link_status(LINK) == 200


@pytest.mark.parametrize(("kind", "params"), [("s3_unavailable", {}), ("s3_slow", {"latency_ms": 300})])
def test_they_expire_by_themselves(training: Platform, kind: str, params: dict[str, Any]) -> None:
    training.inject(kind, LINK, deadline_s=2.0, **params)
    assert (training.client.link_round_trip(LINK) or 9) > 0.28
    eventually(lambda: training.client.faults() == [])
    eventually(lambda: (training.client.link_round_trip(LINK) or 9) < 0.2)


def test_s3_kinds_are_only_for_links_to_a_store(training: Platform) -> None:
    for kind, params in (("s3_unavailable", {}), ("s3_slow", {"latency_ms": 9}), ("s3_throttled", {"fraction": 1})):
        with pytest.raises(SandboxRefused, match=r"allowed: inference->object-store, trainer->object-store"):
            training.inject(kind, "gateway->feature-store", **params)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("s3_unavailable", {}),
        ("s3_throttled", {"fraction": 0.5}),
        ("s3_slow", {"latency_s": 0.2, "jitter_s": 0.05}),
        ("database_unavailable", {}),
    ],
)
def test_the_driver_sees_the_fault_by_a_look_of_its_own(training: Platform, kind: str, params: dict[str, Any]) -> None:
    driver, now = SandboxDriver(training.directory), time.time()
    assert driver.resolve(Target(select="inference->*")) == (LINK,)
    assert driver.resolve(Target(select="inference-*")) == ("inference-1",)  # and no link, though it begins so, too
    undo = driver.undo(kind, (LINK,), params)
    assert 0 < undo["links"][LINK] < 2
    lease = Lease(
        id=f"mlchaos-test-{uuid.uuid4().hex[:10]}",
        run_id="run",
        experiment="test",
        environment="sandbox",
        driver="sandbox",
        kind=kind,
        targets=(LINK,),
        params=params,
        undo=undo,
        duration_s=30,
        opened_wall=now,
        deadline_wall=now + 30,
        owner=Owner(os.getpid(), 0.0, "", ""),
        token=time.monotonic_ns(),
    )
    before = driver.active(lease)
    assert not before.present and not before.effective
    driver.inject(lease)
    try:
        eventually(lambda: driver.active(lease).effective)
    finally:
        driver.recover(lease)
    driver.recover(lease)
    after = driver.active(lease)
    assert not after.present and not after.effective
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)


# -- framing ----------------------------------------------------------------------------------------------------------

STREAM = (
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
    b"PUT /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    b"PUT /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4;a=b\r\nGET \r\n2\r\n\r\n\r\n0\r\nx-t: 1\r\n\r\n"
    b"PUT /d HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
    b"HEAD /e HTTP/1.1\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, len(STREAM)])
def test_requests_are_told_apart_however_their_bytes_arrive(size: int) -> None:
    requests = Requests()
    pieces = [p for start in range(0, len(STREAM), size) for p in requests.feed(STREAM[start : start + size])]
    assert b"".join(piece.content for piece in pieces) == STREAM
    heads = [piece for piece in pieces if piece.head]
    assert [piece.method for piece in heads] == ["GET", "PUT", "PUT", "PUT", "HEAD"]
    assert [piece.expects_continue for piece in heads] == [False, False, False, True, False]
    whole = b"".join(piece.content + (b"|" if piece.last else b"") for piece in pieces)
    assert whole.count(b"|") == 5 and whole.endswith(b"|")
    assert whole.split(b"|")[2].startswith(b"PUT /c") and whole.split(b"|")[2].endswith(b"x-t: 1\r\n\r\n")


@pytest.mark.parametrize(
    "content", [b"\x00\x01\r\n\r\nPUT / HTTP/1.1\r\n\r\n", b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\nx"]
)
def test_what_is_not_http_passes_as_it_is(content: bytes) -> None:
    requests = Requests()
    pieces = list(requests.feed(content))
    assert b"".join(piece.content for piece in pieces) + requests.rest() == content
    assert not any(piece.last for piece in pieces)


def test_the_answer_to_head_has_no_body() -> None:
    assert slow_down("HEAD", close=False).endswith(b"\r\n\r\n")
    assert b"Connection: close" in slow_down("PUT", close=True)
