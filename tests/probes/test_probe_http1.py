"""The response reader against answers as servers really send them, cut at every byte."""

from __future__ import annotations

import pytest

from mlchaos_dagster.probes._http1 import ProtocolError, ResponseReader, request_bytes

WANTED = (b"x-answered-by",)
COMPLETE = {
    "length": (b"HTTP/1.1 200 OK\r\nX-Answered-By: cache\r\nContent-Length: 5\r\n\r\nhello", 200, True),
    "empty": (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length:0\r\n\r\n", 503, True),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, True),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, True),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 1\r\n\r\nx", 201, True),
    "close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", 200, False),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, False),
    "1.0 kept": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx", 200, True),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA;x=y\r\n0123456789\r\n0\r\nT: 1\r\n\r\n",
        200,
        True,
    ),
    "chunks beat length": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n0\r\n\r\n",
        200,
        True,
    ),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_at_the_last_byte_wherever_it_is_cut(name: str) -> None:
    data, status, keep_alive = COMPLETE[name]
    for cut in range(len(data) + 1):
        reader = ResponseReader(WANTED)
        first = reader.feed(data[:cut])
        assert first == (cut == len(data))
        assert first or reader.feed(data[cut:])
        assert (reader.status, reader.keep_alive) == (status, keep_alive)
    reader = ResponseReader(WANTED)
    assert [reader.feed(data[i : i + 1]) for i in range(len(data))] == [False] * (len(data) - 1) + [True]


BODIES = {"length": b"hello", "chunks": b"hello0123456789", "chunks beat length": b"\n", "interim": b"x", "empty": b""}


@pytest.mark.req("RX-03")
@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_asked_for_is_kept_wherever_it_is_cut(name: str) -> None:
    data = COMPLETE[name][0]
    for cut in range(len(data) + 1):
        reader = ResponseReader(WANTED, keep_body=15)
        assert reader.feed(data[:cut]) or reader.feed(data[cut:])
        assert reader.body == BODIES[name]
    byte_by_byte, short = ResponseReader(WANTED, keep_body=15), ResponseReader(WANTED, keep_body=4)
    for i in range(len(data)):
        byte_by_byte.feed(data[i : i + 1])
        short.feed(data[i : i + 1])
    assert byte_by_byte.body == BODIES[name]
    assert short.body == (BODIES[name] if len(BODIES[name]) <= 4 else b"")


def test_a_body_until_close_and_bytes_beyond_the_length() -> None:
    reader = ResponseReader(WANTED, keep_body=100)
    for part in (b"HTTP/1.1 200 OK\r\n\r\nso", b"me"):
        reader.feed(part)
    assert reader.end_of_stream() and reader.body == b"some"
    beyond = ResponseReader(WANTED, keep_body=100)
    assert beyond.feed(COMPLETE["length"][0] + b" and more") and beyond.body == b"hello"


def test_wanted_header() -> None:
    reader = ResponseReader(WANTED)
    reader.feed(COMPLETE["length"][0])
    assert reader.found == {b"x-answered-by": "cache"}


def test_without_length_it_ends_when_the_peer_closes() -> None:
    reader = ResponseReader(WANTED)
    assert not reader.feed(b"HTTP/1.1 200 OK\r\n\r\nsome")
    assert reader.end_of_stream()
    assert not reader.keep_alive


@pytest.mark.parametrize("name", ["length", "chunks"])
def test_a_close_in_the_middle_is_not_an_end(name: str) -> None:
    data = COMPLETE[name][0]
    for cut in range(len(data)):
        reader = ResponseReader(WANTED)
        reader.feed(data[:cut])
        assert not reader.end_of_stream()


def test_an_answer_to_head_has_no_body() -> None:
    assert ResponseReader(WANTED, head_request=True).feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")


def test_bytes_nobody_asked_for_end_the_reuse() -> None:
    reader = ResponseReader(WANTED)
    assert reader.feed(COMPLETE["length"][0] + b"HTTP/1.1 200 OK\r\n")
    assert not reader.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseReader(WANTED).feed(data)


def test_request() -> None:
    assert request_bytes("GET", "/x", "h:1", [("user-agent", "me")], None) == (
        b"GET /x HTTP/1.1\r\nHost: h:1\r\nAccept: */*\r\nuser-agent: me\r\n\r\n"
    )
    assert request_bytes("POST", "/", "h", [], b"{}").endswith(
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert b"Content-Length: 0\r\n" in request_bytes("POST", "/", "h", [], None)
