"""The number in the answer: read from real servers, however they frame it and whatever they say instead."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable

import pytest
from probe_servers import RawServer, wait_until

from mlchaos_dagster.domain.record import RequestSample
from mlchaos_dagster.probes._loadgen import MAX_VALUE_BODY_BYTES, number_in
from mlchaos_dagster.probes.http import HttpProbe, HttpProbeConfig

pytestmark = pytest.mark.req("RX-03")
Serve = Callable[..., RawServer]


def framed(body: bytes, how: str = "length") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nX-Answered-By: model\r\n"
    if how == "chunks":
        parts = [b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:5], body[5:6], body[6:]) if p]
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(parts) + b"0\r\n\r\n"
    if how == "close":
        return head + b"Connection: close\r\n\r\n" + body
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


HUGE = json.dumps({"pad": "x" * MAX_VALUE_BODY_BYTES, "score": 0.5}).encode()
ANSWERS: list[tuple[bytes, float]] = [
    (framed(b'{"score": 0.25, "model": "v1"}'), 0.25),
    (framed(b'{"score": 0.1, "model": "v1"}', "chunks"), 0.1),
    (framed(b'{"score": 3}', "close"), 3.0),
    (framed(HUGE), math.nan),
    (framed(HUGE, "chunks"), math.nan),
    (framed(b'{"score": '), math.nan),
    (framed(b"<html>sorry</html>"), math.nan),
    (framed(b'{"score": "0.25"}'), math.nan),
    (framed(b'{"score": true}'), math.nan),
    (framed(b'{"score": NaN}'), math.nan),
    (framed(b'{"score": 1e999}'), math.nan),
    (framed(b'{"score": ' + b"9" * 5000 + b"}"), math.nan),
    (framed(b"[" * 30000), math.nan),
    (framed(b"\xff\xfe\x00"), math.nan),
    (framed(b""), math.nan),
    (b"HTTP/1.1 503 Unavailable\r\nContent-Length: 14\r\n\r\n{\"score\": 0.9}", math.nan),
    (framed(b'{"score": -1.5e-3}'), -0.0015),
]  # fmt: skip


def test_every_answer_gives_its_number_or_none_and_the_generator_lives_on(serve: Serve) -> None:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        sent = ANSWERS[json.loads(head.rpartition(b"\r\n\r\n")[2])["id"]][0]
        for start in range(0, len(sent), 20_000):  # cut where the network might cut
            writer.write(sent[start : start + 20_000])
            await writer.drain()
        if b"Connection: close" in sent:
            writer.close()

    server = serve(answer)
    config = HttpProbeConfig(
        server.url,
        rate_per_s=100,
        timeout_s=5,
        method="POST",
        bodies=tuple({"id": i} for i in range(len(ANSWERS))),
        value="score",
    )
    samples: list[RequestSample] = []
    with HttpProbe(config) as probe:
        probe.start(time.monotonic())

        def enough() -> bool:
            samples.extend(probe.drain())
            return len(samples) >= 2 * len(ANSWERS)

        assert wait_until(enough), probe.last_words
        samples += probe.stop()
    assert not probe.last_words
    for k, sample in enumerate(sorted(samples)):
        assert sample.item == k % len(ANSWERS)
        value = ANSWERS[sample.item][1]
        assert sample.value == value or (math.isnan(value) and math.isnan(sample.value)), ANSWERS[sample.item][0][:80]
        assert sample.ok == (sample.status == 200)


def test_answers_are_not_read_unless_asked_for(serve: Serve) -> None:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(framed(b'{"score": 0.25}'))

    with HttpProbe(HttpProbeConfig(serve(answer).url, rate_per_s=50, timeout_s=5)) as probe:
        probe.start(time.monotonic())
        samples: list[RequestSample] = []
        assert wait_until(lambda: bool(samples.extend(probe.drain()) or len(samples) >= 3))
    assert {(s.item, math.isnan(s.value), s.ok) for s in samples} == {(-1, True, True)}


@pytest.mark.parametrize(
    ("path", "body", "number"),
    [
        ("score", b'{"score": 1}', 1.0),
        ("outputs.0.data.1", b'{"outputs": [{"data": [0.1, 0.2]}]}', 0.2),
        ("0", b"[0.5]", 0.5),
        ("a.b", b'{"a": 1}', None),
        ("predictions.3", b'{"predictions": [1]}', None),
        ("predictions.x", b'{"predictions": [1]}', None),
        ("x", b"null", None),
    ],
)
def test_a_path_of_names_and_positions(path: str, body: bytes, number: float | None) -> None:
    assert number_in(body, tuple(path.split("."))) == number
