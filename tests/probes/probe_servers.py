"""Real servers on loopback, raw on purpose: they misbehave in ways that a framework would not allow."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

Answer = Callable[["RawServer", bytes, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nX-Answered-By: model\r\nX-Replica: r1\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class RawServer:
    """One listening socket in a thread of its own; `answer` decides what happens to each request."""

    answer: Answer
    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    waiting: int = 0
    most_waiting: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        head += await reader.readexactly(int(line.split(b":")[1]))
                self.requests.append(head)
                self.waiting += 1
                self.most_waiting = max(self.most_waiting, self.waiting)
                try:
                    await self.answer(self, head, writer)
                finally:
                    self.waiting -= 1
        writer.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    """`serve(answer)` gives a running server; all end with the test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening: list[asyncio.Server] = []

    def make(answer: Answer, tls: ssl.SSLContext | None = None) -> RawServer:
        server = RawServer(answer)

        async def listen() -> None:
            listening.append(await asyncio.start_server(server.handle, "127.0.0.1", 0, backlog=2048, ssl=tls))
            server.port = listening[-1].sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), loop).result(5)
        return server

    yield make

    async def end() -> None:
        for server in listening:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn

    asyncio.run_coroutine_threadsafe(end(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


async def answer_ok(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


async def never_answer(server: RawServer, head: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def wait_until(true: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Poll; the bound is generous, because the machine may be busy."""
    give_up = time.monotonic() + within_s
    while not true():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True


PROMETHEUS = shutil.which("prometheus")


@dataclass
class RealPrometheus:
    """A real server and its process."""

    url: str
    pid: int
    log: Path


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def prometheus_process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealPrometheus | None]:
    """Started before the first test: it scrapes nothing in its first 5 s, which then pass while other tests run."""
    if PROMETHEUS is None or not any("prometheus" in item.nodeid for item in request.session.items):
        yield None
        return
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry = CollectorRegistry()
    replicas = Gauge("ready_replicas", "by zone", ["zone"], registry=registry)
    replicas.labels("a").set(3)
    replicas.labels("b").set(4)
    Gauge("unmeasured", "NaN", registry=registry).set(math.nan)
    Gauge("boundless", "infinite", registry=registry).set(math.inf)
    exporter, thread = start_http_server(0, "127.0.0.1", registry)
    home = tmp_path_factory.mktemp("prometheus")
    (home / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs:\n- job_name: exporter\n"
        f"  static_configs: [{{targets: ['127.0.0.1:{exporter.server_port}']}}]\n"
    )
    port = free_port()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={home / 'prometheus.yml'}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    yield RealPrometheus(f"http://127.0.0.1:{port}", process.pid, home / "log")
    process.kill()
    process.wait()
    exporter.shutdown()
    exporter.server_close()
    thread.join()
