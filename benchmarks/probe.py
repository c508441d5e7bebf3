"""The open-loop HTTP probe beside clients as a user would write them: rate kept, CPU, lateness.

    python benchmarks/probe.py [--seconds 2] [--repeats 3] [--rates 50,200,500,1000] [--clients probe,aiohttp]

The server is a bare asyncio protocol in its own process, so that the client is what is measured. Request k is due at
start + k / rate; lateness is sent - due. CPU counts this process and the probe's child (its start excluded). The second
table repeats one rate while another thread of this process computes in pure Python, as Dagster or a judgement would:
it is why the probe is a process. Medians of the repeats; in brackets the smallest and the largest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mlchaos_dagster.probes.http import HttpProbe, HttpProbeConfig

BODY = b'{"entity_id": 417, "score": 0.7312045516221, "model": "3fa29c1b77e0", "replica": "inference-2"}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
TIMEOUT_S = 2.0
WORKERS = 16


class Run(NamedTuple):
    """One client at one rate, once."""

    ok_per_s: float
    failed: int
    cpu_percent: float
    late_p50_ms: float
    late_p99_ms: float


class _Answer(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(ANSWER * data.count(b"\r\n\r\n"))  # type: ignore[attr-defined]


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Answer, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def _summary(late: list[float], failed: int, seconds: float, cpu_s: float) -> Run:
    late = sorted(late) or [float("nan")]
    at = [1e3 * late[int(len(late) * q)] for q in (0.5, 0.99)]
    return Run((len(late) - failed) / seconds, failed, 100 * cpu_s / seconds, at[0], at[1])


def with_probe(url: str, rate: float, seconds: float, value: str = "") -> Run:
    """The project's probe, drained every 50 ms as the watch loop does."""
    with HttpProbe(HttpProbeConfig(url, rate_per_s=rate, timeout_s=TIMEOUT_S, value=value)) as probe:
        cpu = time.process_time()
        probe.start(time.monotonic())
        end = time.monotonic() + seconds
        samples = probe.drain()
        boot_cpu_s = 0.0
        while time.monotonic() < end:
            time.sleep(0.05)
            samples += probe.drain()
            boot_cpu_s = boot_cpu_s or probe.cpu_s
        samples += probe.stop()
        cpu_s = time.process_time() - cpu + probe.cpu_s - boot_cpu_s
    samples = [sample for sample in samples if sample.due_s < probe.start_s + seconds]
    late = [sample.sent_s - sample.due_s for sample in samples]
    return _summary(late, sum(not sample.ok for sample in samples), seconds, cpu_s)


async def _tasks(send: Callable[[], object], rate: float, seconds: float) -> Run:
    late: list[float] = []
    failed = 0

    async def one(due: float) -> None:
        nonlocal failed
        late.append(time.monotonic() - due)
        try:
            await send()  # type: ignore[misc]
        except Exception:  # noqa: BLE001  (every client has its own tree of errors; here all count the same)
            failed += 1

    await asyncio.gather(*(send() for _ in range(4)))  # type: ignore[misc]  # imports and connections before the clock
    start, cpu = time.monotonic(), time.process_time()
    running: set[asyncio.Task[None]] = set()
    for k in range(int(rate * seconds)):
        pause = start + k / rate - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        task = asyncio.create_task(one(start + k / rate))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return _summary(late, failed, max(seconds, time.monotonic() - start), time.process_time() - cpu)


async def _aiohttp(url: str, rate: float, seconds: float) -> Run:
    import aiohttp

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:

        async def send() -> None:
            async with session.get(url) as response:
                await response.read()

        return await _tasks(send, rate, seconds)


async def _httpx(url: str, rate: float, seconds: float) -> Run:
    import httpx

    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:

        async def send() -> None:
            await client.get(url)

        return await _tasks(send, rate, seconds)


def with_threads(url: str, rate: float, seconds: float) -> Run:
    """http.client with a pool of threads; its timeout is per read, so it has no total deadline."""
    host = url.removeprefix("http://").rstrip("/")
    late: list[float] = []
    failures: list[OSError] = []
    count = itertools.count()
    connections = [http.client.HTTPConnection(host, timeout=TIMEOUT_S) for _ in range(WORKERS)]
    for connection in connections:
        connection.connect()
    start, cpu = time.monotonic(), time.process_time()

    def work(connection: http.client.HTTPConnection) -> None:
        while (due := start + next(count) / rate) < start + seconds:
            pause = due - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            late.append(time.monotonic() - due)
            try:
                connection.request("GET", "/")
                connection.getresponse().read()
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=[connection]) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.close()
    return _summary(late, len(failures), max(seconds, time.monotonic() - start), time.process_time() - cpu)


CLIENTS: dict[str, Callable[[str, float, float], Run]] = {
    "probe": with_probe,
    "probe reading a number": lambda *a: with_probe(*a, value="score"),
    "http.client threads": with_threads,
    "aiohttp": lambda *a: asyncio.run(_aiohttp(*a)),
    "httpx async": lambda *a: asyncio.run(_httpx(*a)),
}


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another thread of this process computes in pure Python."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(i * i for i in range(10_000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _cell(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _table(url: str, clients: list[str], rates: list[float], args: argparse.Namespace, *, owner_busy: bool) -> None:
    say = sys.stdout.write
    title = "Owner computes in another thread (CPU left out: it is the owner's)" if owner_busy else "Owner idle"
    say(f"\n{title}\n\n| client | rate asked, 1/s | answered, 1/s | failed | CPU, % of a core ")
    say("| late p50, ms | late p99, ms |\n|---|---|---|---|---|---|---|\n")
    for rate, name in itertools.product(rates, clients):
        runs: list[Run] = []
        for _ in range(args.repeats):
            with busy() if owner_busy else contextlib.nullcontext():
                runs.append(CLIENTS[name](url, rate, args.seconds))
        ok, failed, cpu, p50, p99 = ([float(x) for x in column] for column in zip(*runs, strict=True))
        used = "–" if owner_busy else _cell(cpu, 0)
        say(f"| {name} | {rate:g} | {_cell(ok, 0)} | {statistics.median(failed):.0f} | {used} ")
        say(f"| {_cell(p50, 2)} | {_cell(p99, 2)} |\n")
        sys.stdout.flush()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates", default="50,200,500,1000")
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(_serve())
        return
    clients, rates = args.clients.split(","), [float(rate) for rate in args.rates.split(",")]
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/"
        load = os.getloadavg()[0]
        sys.stdout.write(
            f"Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f} at the start; "
            f"{args.repeats} runs of {args.seconds:g} s each.\n"
        )
        _table(url, clients, rates, args, owner_busy=False)
        _table(url, clients, [min(rates, key=lambda rate: abs(rate - 200))], args, owner_busy=True)
    finally:
        server.stdin.close()
        server.wait(5)


if __name__ == "__main__":
    main()
