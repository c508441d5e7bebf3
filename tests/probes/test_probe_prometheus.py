"""The Prometheus probe against a real Prometheus that scrapes a real exporter, and against impostors."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from probe_servers import PROMETHEUS, Answer, RawServer, RealPrometheus, free_port, never_answer, wait_until

from mlchaos_dagster.errors import ConfigError, ProbeError
from mlchaos_dagster.probes.prometheus import PrometheusConfig, PrometheusProbe

Serve = Callable[[Answer], RawServer]
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus binary: apt-get install prometheus")


@pytest.fixture(scope="module")
def real(prometheus_process: RealPrometheus | None) -> RealPrometheus:
    """A Prometheus that has scraped the exporter at least twice."""
    assert prometheus_process is not None
    with PrometheusProbe(PrometheusConfig(prometheus_process.url, timeout_s=5)) as probe:

        def scraped() -> bool:
            with contextlib.suppress(ProbeError):
                seen = probe.instant('count_over_time(ready_replicas{zone="a"}[1m])')
                return seen is not None and seen.value >= 2
            return False

        assert wait_until(scraped, 20), prometheus_process.log.read_text()[-2000:]
    return prometheus_process


@pytest.fixture
def probe(real: RealPrometheus) -> Iterator[PrometheusProbe]:
    with PrometheusProbe(PrometheusConfig(real.url, timeout_s=5)) as made:
        yield made


@needs_prometheus
def test_instant(probe: PrometheusProbe) -> None:
    before = time.time()
    reading = probe.instant("sum(ready_replicas)")
    assert reading is not None
    assert reading.value == 7
    assert before - 1 < reading.wall_s < time.time() + 1
    scalar = probe.instant('scalar(ready_replicas{zone="b"})')
    assert scalar is not None
    assert scalar.value == 4
    earlier = probe.instant("vector(5)", at_wall_s=1_700_000_000.25)
    assert earlier == (1_700_000_000.25, 5.0)


@needs_prometheus
def test_nan_is_a_gap_and_infinity_is_not(probe: PrometheusProbe) -> None:
    assert probe.instant("unmeasured") is None
    assert probe.instant("scalar(nothing_of_that_name)") is None
    boundless = probe.instant("boundless")
    assert boundless is not None
    assert boundless.value == math.inf


@needs_prometheus
def test_exactly_one_series(probe: PrometheusProbe) -> None:
    with pytest.raises(ProbeError, match=r'2 series, exactly one is needed: .*zone="a".*zone="b".*sum\(\)'):
        probe.instant("ready_replicas")
    with pytest.raises(ProbeError, match="redy_replicas: no series"):
        probe.instant("redy_replicas")
    now = time.time()
    with pytest.raises(ProbeError, match="2 series"):
        probe.range("ready_replicas", now - 1, now, 0.5)
    with pytest.raises(ProbeError, match="no series"):
        probe.range("redy_replicas", now - 1, now, 0.5)


@needs_prometheus
def test_what_prometheus_refuses_is_told_in_its_words(probe: PrometheusProbe) -> None:
    with pytest.raises(ProbeError, match="parse error"):
        probe.instant("sum(ready_replicas")
    with pytest.raises(ProbeError, match="11,000"):
        probe.range("vector(1)", 0, 1e6, 1)
    with pytest.raises(ProbeError, match="cannot ask"):
        probe.range("vector(1)", 10, 5, 1)


@needs_prometheus
def test_range_keeps_fractions_of_seconds_and_leaves_gaps_out(probe: PrometheusProbe) -> None:
    assert [reading.wall_s for reading in probe.range("vector(1)", 1000.25, 1001.25, 0.5)] == [
        1000.25,
        1000.75,
        1001.25,
    ]
    now = time.time()
    readings = probe.range("sum(ready_replicas)", now - 120, now, 0.2)
    assert {reading.value for reading in readings} == {7.0}
    assert 0 < len(readings) < 600  # nothing was known two minutes ago
    assert probe.range("unmeasured", now - 1, now, 0.2) == []


@needs_prometheus
def threads(pid: int) -> list[Path]:
    """The state of each thread of a process."""
    return list(Path(f"/proc/{pid}/task").glob("*/stat"))


def test_a_fraction_of_a_second_is_a_time_limit_like_any_other(real: RealPrometheus) -> None:
    with PrometheusProbe(PrometheusConfig(real.url, timeout_s=20.75)) as probe:
        assert probe.instant("vector(1)")


def test_a_hung_prometheus_costs_one_deadline(real: RealPrometheus) -> None:
    with PrometheusProbe(PrometheusConfig(real.url, timeout_s=0.3)) as probe:
        os.kill(real.pid, signal.SIGSTOP)
        try:
            # Its threads stop one by one; the last may still answer.
            until = time.monotonic() + 30
            while not all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads(real.pid)):
                assert time.monotonic() < until
                time.sleep(0.001)
            begin = time.monotonic()
            with pytest.raises(ProbeError, match=r"no answer within 0\.3 s"):
                probe.instant("vector(1)")
            assert time.monotonic() - begin < 10
        finally:
            os.kill(real.pid, signal.SIGCONT)
    with PrometheusProbe(PrometheusConfig(real.url, timeout_s=30)) as probe:
        assert probe.instant("vector(1)")


def test_nobody_there() -> None:
    with (
        PrometheusProbe(PrometheusConfig(f"http://127.0.0.1:{free_port()}", timeout_s=2)) as probe,
        pytest.raises(ProbeError, match="cannot be reached"),
    ):
        probe.instant("up")


def saying(body: bytes) -> Answer:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    return answer


@pytest.mark.parametrize(
    "body",
    [
        b"<html>log in</html>",
        b"{}",
        b"[]",
        b'{"data": {"result": 5}}',
        b'{"data": {"result": [5]}}',
        b'{"data": {"result": [{"metric": {}}]}}',
        b'{"data": {"result": [{"metric": {}, "value": [1, "x"]}]}}',
        b"\xff\xfe",
    ],
)
def test_who_does_not_answer_like_prometheus_is_an_error(serve: Serve, body: bytes) -> None:
    with PrometheusProbe(PrometheusConfig(serve(saying(body)).url, timeout_s=5)) as probe:
        with pytest.raises(ProbeError):
            probe.instant("up")
        with pytest.raises(ProbeError):
            probe.range("up", 0, 10, 1)


def test_an_answer_that_drips_costs_one_deadline_and_few_threads(serve: Serve) -> None:
    async def drip(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    server = serve(drip)
    with PrometheusProbe(PrometheusConfig(server.url, timeout_s=1.0)) as probe:
        for _ in range(3):
            begin = time.monotonic()
            with pytest.raises(ProbeError, match="no answer within"):
                probe.instant("up")
            assert time.monotonic() - begin < 10  # the server drips for ever
        with pytest.raises(ProbeError, match="3 earlier queries still hang"):
            probe.instant("up")
    assert len(server.requests) == 3


def test_silence_is_not_retried(serve: Serve) -> None:
    server = serve(never_answer)
    with PrometheusProbe(PrometheusConfig(server.url, timeout_s=0.3)) as probe:
        with pytest.raises(ProbeError):
            probe.instant("up")
        time.sleep(0.3)
    assert len(server.requests) == 1


def test_every_error_of_the_client_is_mapped() -> None:
    import requests.exceptions
    import urllib3.exceptions
    from prometheus_api_client import PrometheusApiClientException

    kinds = [
        kind
        for module in (requests.exceptions, urllib3.exceptions)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning)
    ]
    assert len(kinds) > 30
    probe = PrometheusProbe(PrometheusConfig("http://127.0.0.1:1"))
    for kind in [PrometheusApiClientException, *kinds]:
        with pytest.raises(ProbeError):
            probe._raise("up", kind.__new__(kind))  # pyright: ignore[reportPrivateUsage]


def test_the_client_is_imported_at_the_first_query_only() -> None:
    code = (
        "import sys, mlchaos_dagster.probes.prometheus\n"
        "print([name for name in ('prometheus_api_client', 'requests', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("url", ["", "prometheus:9090", "ftp://x", "http://", "http://x:0", "http://u:p@x"])
def test_urls_that_cannot_work_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PrometheusConfig(url)
    assert "u:p" not in str(refused.value)


def test_secrets_are_not_shown() -> None:
    assert "token" not in repr(PrometheusConfig("http://x", headers={"Authorization": "Bearer token"}))
