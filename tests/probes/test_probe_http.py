"""The probe against real servers that stall, drip, refuse and die. Bounds are generous: the machine may be busy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from probe_servers import OK, Answer, RawServer, answer_ok, never_answer, wait_until

from mlchaos_dagster.domain.record import STATUS_NO_CONNECTION, STATUS_TIMEOUT, STATUS_UNSENT, RequestSample
from mlchaos_dagster.errors import ConfigError, ProbeError
from mlchaos_dagster.probes.http import HttpProbe, HttpProbeConfig

Serve = Callable[..., RawServer]
ROOT = Path(__file__).resolve().parents[2]


def run(config: HttpProbeConfig, seconds: float) -> list[RequestSample]:
    """Probe for some seconds, draining as the watch loop does; samples in the order due."""
    samples: list[RequestSample] = []
    with HttpProbe(config) as probe:
        probe.start(time.monotonic())
        end = time.monotonic() + seconds  # a busy machine takes its time to start a process
        while time.monotonic() < end:
            time.sleep(0.02)
            samples += probe.drain()
        samples += probe.stop()
    return sorted(samples)


def gone(pid: int) -> bool:
    """No such process, or only its remains."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


# -- schedule --------------------------------------------------------------------------------------------------


def test_every_request_of_the_schedule_is_accounted_for(serve: Serve) -> None:
    server = serve(answer_ok)
    zero = time.monotonic()
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=200, timeout_s=5)) as probe:
        probe.start(zero)
        assert probe.alive
        time.sleep(0.7)
        samples = sorted(probe.drain())
        stopped = time.monotonic() - zero
        samples = sorted(samples + probe.stop())
        ended = time.monotonic() - zero
        assert not probe.alive
        assert probe.cpu_s > 0
    for k, sample in enumerate(samples):
        assert sample.due_s == pytest.approx(probe.start_s + k / 200, abs=2e-6)
        assert 0 <= sample.due_s <= sample.sent_s <= sample.done_s <= ended
        assert (sample.status, sample.ok, sample.path, sample.replica) == (200, True, "model", "r1")
    assert samples[-1].due_s > stopped - 1.0
    assert len(server.requests) == len(samples)
    assert server.connections < len(samples) / 2


def test_a_stall_is_felt_by_everybody_who_was_due_in_it(serve: Serve) -> None:
    stall: list[float] = []

    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        now = time.monotonic()
        if not stall and len(server.requests) > 20:
            stall.extend((now, now + 1.0))
        if stall and now < stall[1]:
            await asyncio.sleep(stall[1] - now)
        writer.write(OK)

    server = serve(answer)
    zero = time.monotonic()
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=100, timeout_s=10)) as probe:
        probe.start(zero)
        assert wait_until(lambda: bool(stall) and time.monotonic() > stall[1] + 0.2)
        samples = probe.stop()
    begin, end = (t - zero for t in stall)
    caught = [sample for sample in samples if begin < sample.due_s < end]
    assert len(caught) in range(98, 102)
    assert all(sample.ok and sample.done_s >= end - 0.01 for sample in caught)
    # A closed loop would have had one request, or one per worker, waiting.
    assert server.most_waiting > 60


def test_a_silent_owner_does_not_hold_the_schedule(serve: Serve) -> None:
    """More samples than a pipe holds: a blocking write would make the rest overdue, and so unsent."""
    server = serve(answer_ok)
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=1500, timeout_s=0.7)) as probe:
        probe.start(time.monotonic())
        time.sleep(2.0)
        samples = probe.stop()
    assert len(samples) >= 2500
    assert sum(sample.status == STATUS_UNSENT for sample in samples) < len(samples) / 5


def test_what_the_bound_holds_back_is_counted_not_delayed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpProbeConfig, "max_in_flight", 5)
    server = serve(never_answer)
    statuses = [sample.status for sample in run(HttpProbeConfig(server.url, rate_per_s=100, timeout_s=1), 0.5)]
    assert statuses[:5] == [STATUS_TIMEOUT] * 5
    assert statuses[5:40] == [STATUS_UNSENT] * 35
    assert server.most_waiting == 5


def test_what_a_stopped_measurer_missed_is_not_sent_in_a_burst(serve: Serve) -> None:
    server = serve(answer_ok)
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=100, timeout_s=0.2)) as probe:
        probe.start(time.monotonic())
        assert wait_until(lambda: len(server.requests) > 5)
        os.kill(probe.pid, signal.SIGSTOP)
        time.sleep(0.8)
        os.kill(probe.pid, signal.SIGCONT)
        time.sleep(0.3)
        samples = sorted(probe.stop())
    assert sum(sample.status == STATUS_UNSENT for sample in samples) >= 40
    assert {sample.sent_s - sample.due_s > 0.2 for sample in samples if sample.status == STATUS_UNSENT} == {True}
    assert [round((sample.due_s - probe.start_s) * 100) for sample in samples] == list(range(len(samples)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit is Linux")
def test_our_own_limits_are_not_the_targets_failures(serve: Serve) -> None:
    import resource

    server = serve(never_answer)
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=100, timeout_s=0.6)) as probe:
        probe.start(time.monotonic())
        resource.prlimit(probe.pid, resource.RLIMIT_NOFILE, (20, 20))
        time.sleep(0.5)
        statuses = Counter(sample.status for sample in probe.stop())
    assert statuses[STATUS_UNSENT] > 10
    assert set(statuses) <= {STATUS_UNSENT, STATUS_TIMEOUT}


# -- failures --------------------------------------------------------------------------------------------------


def dripping(head: bytes, drop: bytes) -> Answer:
    async def answer(server: RawServer, request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(0.02)

    return answer


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(never_answer, id="silence"),
        pytest.param(dripping(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"), id="head"),
        pytest.param(dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b"x"), id="body"),
        pytest.param(dripping(CHUNKED, b"1\r\nx\r\n"), id="chunks"),
        pytest.param(dripping(b"HTTP/1.1 200 OK\r\n\r\n", b"x"), id="until-close"),
        pytest.param(dripping(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), id="interim"),
    ],
)
def test_the_deadline_is_total(serve: Serve, answer: Answer) -> None:
    samples = run(HttpProbeConfig(serve(answer).url, rate_per_s=50, timeout_s=0.2), 0.2)
    assert len(samples) >= 5
    for sample in samples:
        assert (sample.status, sample.ok, sample.path) == (STATUS_TIMEOUT, False, "error")
        assert 0.19 < sample.done_s - sample.sent_s < 2.0


def test_a_server_that_does_not_accept_is_a_timeout() -> None:
    with socket.socket() as full, contextlib.ExitStack() as callers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # fill the queue: what comes then waits for its handshake
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        samples = run(HttpProbeConfig(f"http://127.0.0.1:{full.getsockname()[1]}/", 20, timeout_s=0.2), 0.2)
    assert samples
    assert {sample.status for sample in samples} == {STATUS_TIMEOUT}


def test_refused_connections_are_failures() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        samples = run(HttpProbeConfig(url, rate_per_s=50, timeout_s=1), 0.3)
    assert samples
    assert {(sample.status, sample.ok, sample.path) for sample in samples} == {(STATUS_NO_CONNECTION, False, "error")}


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"220 mail ready\r\n"])
def test_broken_answers_are_failures(serve: Serve, sent: bytes) -> None:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    samples = run(HttpProbeConfig(serve(answer).url, rate_per_s=50, timeout_s=2), 0.2)
    assert {(sample.status, sample.ok) for sample in samples} == {(STATUS_NO_CONNECTION, False)}


def test_error_answers_keep_their_status_and_path(serve: Serve) -> None:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 No\r\nX-Answered-By: breaker\r\nContent-Length: 0\r\n\r\n")

    server = serve(answer)
    refused = run(HttpProbeConfig(server.url, rate_per_s=50, timeout_s=2), 0.2)
    wanted = run(HttpProbeConfig(server.url, rate_per_s=50, timeout_s=2, expect_status=(503,)), 0.2)
    assert {(sample.status, sample.ok, sample.path) for sample in refused} == {(503, False, "breaker")}
    assert {(sample.status, sample.ok) for sample in wanted} == {(503, True)}


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    ],
)
def test_a_server_that_closes_after_each_answer_is_healthy(serve: Serve, sent: bytes) -> None:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    samples = run(HttpProbeConfig(serve(answer).url, rate_per_s=50, timeout_s=5), 0.3)
    assert {sample.status for sample in samples} == {200}


def test_idle_connections_are_left_before_the_server_closes_them(serve: Serve) -> None:
    """The server is just closing a connection that was idle for 0.1 s when a careless client uses it again."""
    answered: dict[asyncio.StreamWriter, float] = {}

    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        now = time.monotonic()
        if now - answered.get(writer, now) > 0.1:
            writer.transport.abort()
        answered[writer] = now
        writer.write(OK)

    config = HttpProbeConfig(serve(answer).url, rate_per_s=5, timeout_s=5, reuse_idle_s=0.05)
    assert {sample.status for sample in run(config, 1.0)} == {200}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl binary to make a certificate with")
def test_tls_is_verified_unless_told_otherwise(serve: Serve, tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    url = f"https://127.0.0.1:{serve(answer_ok, context).port}/"
    unknown = run(HttpProbeConfig(url, rate_per_s=20, timeout_s=5), 0.2)
    known = run(HttpProbeConfig(url, rate_per_s=20, timeout_s=5, ca_file=str(tmp_path / "cert.pem")), 0.2)
    anyone = run(HttpProbeConfig(url, rate_per_s=20, timeout_s=5, verify_tls=False), 0.2)
    assert [{sample.status for sample in samples} for samples in (unknown, known, anyone)] == [{0}, {200}, {200}]
    with pytest.raises(ProbeError, match=r"start: ca_file .*No such file"):
        run(HttpProbeConfig(url, rate_per_s=20, timeout_s=5, ca_file="/nonexistent/cert.pem"), 0.1)


# -- what is asked ---------------------------------------------------------------------------------------------


def test_bodies_entities_and_headers_go_round(serve: Serve) -> None:
    server = serve(answer_ok)
    config = HttpProbeConfig(
        f"{server.url}/predict/{{entity}}?n={{n}}",
        rate_per_s=50,
        timeout_s=5,
        method="POST",
        headers={"Authorization": "Bearer secret"},
        bodies=({"id": 0}, {"id": 1}, {"id": "é"}),
        entities=("a", "b/c"),
    )
    assert "secret" not in repr(config)
    samples = run(config, 0.4)
    by_number = {int(request.split(b"?n=")[1].split(b" ")[0]): request for request in server.requests}
    assert sorted(by_number) == list(range(len(samples)))
    for number, request in by_number.items():
        assert request.startswith(f"POST /predict/{('a', 'b%2Fc')[number % 2]}?n={number} HTTP/1.1\r\n".encode())
        assert request.endswith((b'{"id":0}', b'{"id":1}', b'{"id":"\\u00e9"}')[number % 3])
        assert b"Authorization: Bearer secret\r\n" in request
        assert f"Host: 127.0.0.1:{server.port}\r\n".encode() in request


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"url": "ftp://x/"}, "http"),
        ({"url": "http://"}, "http"),
        ({"url": "http://x:99999/"}, "http"),
        ({"url": "http://x/a b"}, "http"),
        ({"url": "http://x/\r\nX: y"}, "http"),
        ({"url": "http://me:secret@x/"}, "credentials"),
        ({"url": "http://x/{entity}"}, "entities"),
        ({"rate_per_s": 0}, "rate_per_s"),
        ({"rate_per_s": float("nan")}, "rate_per_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"method": "get"}, "method"),
        ({"bodies": ({},)}, "body"),
        ({"method": "POST", "bodies": (object(),)}, "JSON"),
        ({"value": "scores..0"}, "value"),
        ({"headers": {"X": "a\r\nY: b"}}, "header"),
        ({"headers": {"Content-Length": "5"}}, "itself"),
        ({"expect_status": (700,)}, "expect_status"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as refused:
        HttpProbeConfig(**{"url": "http://x/", "rate_per_s": 1, "timeout_s": 1, **change})  # pyright: ignore
    assert "secret" not in str(refused.value)


# -- life and death --------------------------------------------------------------------------------------------


def test_stop_waits_for_what_is_in_flight(serve: Serve) -> None:
    async def answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        writer.write(OK)

    server = serve(answer)
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=50, timeout_s=10)) as probe:
        probe.start(time.monotonic())
        assert wait_until(lambda: len(server.requests) > 5)
        samples = probe.stop()
        assert probe.stop() == []
        assert probe.drain() == []
    assert len(samples) == len(server.requests)
    assert {sample.status for sample in samples} == {200}


def test_a_dead_child_is_a_gap(serve: Serve) -> None:
    with HttpProbe(HttpProbeConfig(serve(answer_ok).url, rate_per_s=100, timeout_s=1)) as probe:
        probe.start(time.monotonic())
        time.sleep(0.2)
        os.kill(probe.pid, signal.SIGKILL)
        assert wait_until(lambda: not probe.alive)
        assert all(sample.ok for sample in probe.drain())
        assert probe.drain() == []
        assert probe.stop() == []


def test_ctrl_c_at_the_terminal_does_not_reach_the_child(serve: Serve) -> None:
    with HttpProbe(HttpProbeConfig(serve(answer_ok).url, rate_per_s=50, timeout_s=1)) as probe:
        probe.start(time.monotonic())
        assert os.getpgid(probe.pid) != os.getpgid(0)
        os.kill(probe.pid, signal.SIGINT)
        time.sleep(0.2)
        assert probe.alive


@pytest.mark.parametrize("program", ["/nonexistent/python", "/bin/false", "/bin/cat"])
def test_a_child_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "executable", program)
    probe = HttpProbe(HttpProbeConfig("http://127.0.0.1:1/", rate_per_s=1, timeout_s=1))
    with pytest.raises(ProbeError):
        probe.start(time.monotonic(), within_s=1.0)
    assert not probe.alive
    assert probe.stop() == []


OWNER = """
import os, sys, time
from mlchaos_dagster.probes.http import HttpProbe, HttpProbeConfig
probe = HttpProbe(HttpProbeConfig(sys.argv[1], rate_per_s=50, timeout_s=1))
probe.start(time.monotonic())
fork = os.fork() if sys.argv[2] == "fork" else 1
if fork == 0:
    time.sleep(30)  # holds copies of the pipes, as a forked worker would
print(probe.pid, fork, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_the_child_ends_when_its_owner_is_killed(serve: Serve, how: str) -> None:
    server = serve(answer_ok)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, server.url, how], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None
    child, fork = map(int, owner.stdout.readline().split())
    try:
        assert wait_until(lambda: len(server.requests) > 5)
        assert not gone(child)
        owner.kill()
        owner.wait()
        assert wait_until(lambda: gone(child), 5.0)
        time.sleep(0.1)
        sent = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == sent
    finally:
        for pid in {child, fork} - {1}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        owner.stdout.close()


def test_the_child_does_without_the_callers_environment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('hooked')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run(HttpProbeConfig(serve(answer_ok).url, rate_per_s=50, timeout_s=1), 0.2)


def test_a_busy_owner_does_not_make_the_child_late(serve: Serve) -> None:
    """The whole point of the process: here the interpreter lock is held for 0.5 s at a time."""
    server = serve(answer_ok)
    with HttpProbe(HttpProbeConfig(server.url, rate_per_s=100, timeout_s=10)) as probe:
        probe.start(time.monotonic())
        old = sys.getswitchinterval()
        sys.setswitchinterval(0.5)
        try:
            end = time.monotonic() + 1.0
            spinner = threading.Thread(target=lambda: [None for _ in iter(lambda: time.monotonic() < end, False)])
            spinner.start()
            spinner.join()
        finally:
            sys.setswitchinterval(old)
        samples = probe.stop()
    late = sorted(sample.sent_s - sample.due_s for sample in samples)
    assert late[len(late) // 2] < 0.25
