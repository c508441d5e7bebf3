"""The open-loop load generator: a child process that keeps a fixed arrival schedule whatever its owner does.

Owns the schedule, the connections and the clock readings. It knows nothing of experiments and imports only the
standard library. It is a process, not a thread, because a thread shares the interpreter lock with an owner that runs
Dagster and numpy; `benchmarks/probe.py` has the figures. `time.monotonic()` is one clock for all processes of a machine
(Linux, macOS), so the readings need no translation.

Protocol: standard input carries the configuration as one JSON line, later `stop`; its end means that the owner died,
and ends this process at once. Standard output carries one JSON line `{"start_s": …}` and then batches
`[cpu_s, [[due_s, sent_s, done_s, status, ok, path, replica, item], …]]`, a row with the answer's number at its end
where one was asked for and found.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import json
import math
import os
import signal
import time
from typing import Any, cast
from urllib.parse import quote, urlsplit

from mlchaos_dagster.probes._http1 import ProtocolError, ResponseReader, request_bytes
from mlchaos_dagster.probes._machine import (
    PreciseSelector,
    Watched,
    leave,
    raise_file_limit,
    say,
    tls_context,
    trusting,
)

CONNECTION_ERROR, TIMED_OUT, UNSENT = 0, -1, -2

FLUSH_EVERY_S = 0.02
"""Longest time a finished sample waits for company; the watch loop decides on every sample, so it is short."""
OWNER_CHECK_EVERY_S = 0.5
"""A fork of the owner can hold our standard input open after the owner died; the parent's pid tells the truth."""
REREAD_EVERY_S = 0.5
"""Files of secrets and of trusted certificates are looked at this often: clients read their mounted ones again, too."""
MAX_BACKLOG_BYTES = 64 * 2**20
"""Samples kept for an owner that does not read (about 12 minutes at 1,000/s). More means that nobody listens."""
MAX_LABEL_CHARS = 64
MAX_VALUE_BODY_BYTES = 64 * 1024
"""Longer answers are not read for their number: parsing them would make the measurer late."""

# Failures of this machine, not of the target: calling them connection errors would blame the target.
_OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


class _Request:
    __slots__ = ("connecting", "connection", "due", "k", "sent")

    def __init__(self, k: int, due: float, sent: float) -> None:
        self.k, self.due, self.sent = k, due, sent
        self.connection: _Connection | None = None
        self.connecting: asyncio.Task[None] | None = None


class _Connection(asyncio.Protocol):
    """One keep-alive connection; carries one request at a time."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.transport: asyncio.Transport | None = None
        self.request: _Request | None = None
        self.reader: ResponseReader | None = None
        self.made_at = self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made_at = time.monotonic()
        self.transport = cast("asyncio.Transport", transport)

    def send(self, request: _Request, data: bytes) -> None:
        assert self.transport is not None
        self.request, request.connection = request, self
        self.reader = self.generator.new_reader()
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        request, reader = self.request, self.reader
        if request is None or reader is None:
            self.abort()  # an answer nobody asked for
            return
        try:
            complete = reader.feed(data)
        except ProtocolError:
            self.abort()
            self.generator.finish(request, CONNECTION_ERROR)
            return
        if complete:
            self._complete(request, reader)

    def connection_lost(self, exc: Exception | None) -> None:
        request, reader = self.request, self.reader
        self.request = self.reader = None
        if request is None or reader is None:
            self.generator.forget(self)
        elif exc is None and reader.end_of_stream():
            self.generator.finish(request, reader.status, reader)
        else:
            self.generator.finish(request, CONNECTION_ERROR)

    def abort(self) -> None:
        self.request = self.reader = None
        if self.transport is not None:
            self.transport.abort()

    def _complete(self, request: _Request, reader: ResponseReader) -> None:
        self.request = self.reader = None
        self.generator.finish(request, reader.status, reader)
        if reader.keep_alive and self.transport is not None and not self.transport.is_closing():
            self.generator.release(self)
        else:
            self.abort()


class Generator:
    """The schedule and everything in flight. One instance per process, driven by one event loop."""

    def __init__(self, config: dict[str, Any], loop: asyncio.AbstractEventLoop, stdin_rest: bytes = b"") -> None:
        self.loop = loop
        self.rate_per_s: float = config["rate_per_s"]
        self.timeout_s: float = config["timeout_s"]
        self.reuse_idle_s: float = config["reuse_idle_s"]
        self.lifetime_s: float = config["connection_lifetime_s"] or math.inf
        self.max_in_flight: int = config["max_in_flight"]
        self.zero: float = config["zero"]
        self.owner_pid: int = config["owner_pid"]
        self.expect_status = frozenset(config["expect_status"])
        self.path_header = config["path_header"].lower().encode("latin-1")
        self.replica_header = config["replica_header"].lower().encode("latin-1")
        self.wanted = (self.path_header, self.replica_header)
        self.head_request = config["method"] == "HEAD"
        self.value_path: tuple[str, ...] = tuple(config["value"].split(".")) if config["value"] else ()
        self.keep_body = MAX_VALUE_BODY_BYTES if self.value_path else 0
        self.items = len(config["bodies"])

        self._config = config
        url = urlsplit(config["url"])
        self.host = url.hostname or ""
        self.port = url.port or (443 if url.scheme == "https" else 80)
        self.tls = tls_context(config) if url.scheme == "https" else None
        self._headers: dict[str, str] = dict(config["headers"])
        self._secrets = {name: Watched(path) for name, path in config["header_files"].items()}
        trusted = config["ca_file"] if self.tls is not None and config["verify_tls"] else ""
        self._trusted = Watched(trusted) if trusted else None
        self.race_s = None if _is_address(self.host) else 0.25  # names may give a dead IPv6 address first
        self._host_header = url.netloc.rpartition("@")[2]
        self._target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self._bodies: list[bytes | None] = [_json_bytes(body) for body in config["bodies"]] or [None]
        self._entities = [quote(str(entity), safe="") for entity in config["entities"]] or [""]
        self._built: dict[tuple[int, int], bytes] = {}

        self.start = 0.0
        self.next_k = 0
        # In the order sent, which is also the order of deadlines, because one timeout holds for all.
        self.in_flight: dict[int, _Request] = {}
        self.idle: list[_Connection] = []
        self.samples: list[list[Any]] = []
        self.out = bytearray()
        self.stopping = False
        self._commands = stdin_rest
        self._schedule: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._flushing = False

    # -- schedule ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        os.set_blocking(0, False)
        os.set_blocking(1, False)
        self.loop.add_reader(0, self._on_stdin)
        self._watch_owner()
        if self._secrets or self._trusted is not None:
            self._reread()
        self.start = time.monotonic()
        self.out += json.dumps({"start_s": round(self.start - self.zero, 6)}).encode() + b"\n"
        self._flush()
        self._tick()
        if self._commands:
            self._obey(b"")

    def _tick(self) -> None:
        if self.stopping:
            return
        while True:
            due = self.start + self.next_k / self.rate_per_s  # from k, never summed up: no drift
            now = time.monotonic()
            if due > now:
                self._schedule = self.loop.call_at(due, self._tick)
                return
            self._send(_Request(self.next_k, due, now))
            self.next_k += 1

    def _send(self, request: _Request) -> None:
        # After a stop of this very process, what is a whole timeout overdue says nothing about the target any more,
        # and sending it in one burst would hurt it.
        if len(self.in_flight) >= self.max_in_flight or request.sent - request.due > self.timeout_s:
            self._record(request, request.sent, UNSENT)
            return
        self.in_flight[request.k] = request
        if self._deadline is None:
            self._deadline = self.loop.call_at(request.sent + self.timeout_s, self._expire)
        connection = self._acquire(request.sent)
        if connection is not None:
            connection.send(request, self._bytes(request.k))
        else:
            request.connecting = self.loop.create_task(self._connect(request))

    def _expire(self) -> None:
        """End every request whose total deadline has passed, however busily its bytes still drip in."""
        self._deadline = None
        now = time.monotonic()
        while self.in_flight:
            request = next(iter(self.in_flight.values()))
            if request.sent + self.timeout_s > now:
                self._deadline = self.loop.call_at(request.sent + self.timeout_s, self._expire)
                return
            connection, connecting = request.connection, request.connecting
            self.finish(request, TIMED_OUT)
            if connection is not None:
                connection.abort()
            elif connecting is not None:
                connecting.cancel()

    # -- connections ------------------------------------------------------------------------------------------

    async def _connect(self, request: _Request) -> None:
        made: list[_Connection] = []

        def make() -> _Connection:
            made.append(_Connection(self))
            return made[-1]

        try:
            _, connection = await self.loop.create_connection(
                make, self.host, self.port, ssl=self.tls, happy_eyeballs_delay=self.race_s
            )
        except asyncio.CancelledError:  # the deadline, perhaps in the moment between connected and told so
            for connection in made:
                connection.abort()
            raise
        except (OSError, UnicodeError) as error:
            own = isinstance(error, OSError) and error.errno in _OWN_LIMITS
            self.finish(request, UNSENT if own else CONNECTION_ERROR)
            return
        request.connecting = None
        if request.k not in self.in_flight:
            connection.abort()
        elif connection.transport is None or connection.transport.is_closing():
            self.finish(request, CONNECTION_ERROR)
        else:
            connection.send(request, self._bytes(request.k))

    def _acquire(self, now: float) -> _Connection | None:
        # Last in, first out: few connections stay warm, and the surplus ages. A connection idle for longer than a
        # server may keep it is not used: losing that race would be recorded as the target's failure.
        while self.idle:
            connection = self.idle.pop()
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            if now - connection.idle_since <= self.reuse_idle_s and now - connection.made_at <= self.lifetime_s:
                return connection
            connection.abort()
        return None

    def release(self, connection: _Connection) -> None:
        if self.stopping:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self.idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def _reread(self) -> None:
        """Take secrets and trusted certificates that were replaced. What cannot be read or sent is not taken."""
        for name, file in self._secrets.items():
            if file.changed():
                try:
                    with open(file.path, encoding="latin-1") as f:
                        value = f.read(65536).strip()
                except OSError:
                    continue
                if value and value.isprintable():
                    self._headers[name] = value
                    self._built.clear()
        if self._trusted is not None and self._trusted.changed():
            try:
                self.tls = trusting(self._trusted.path)
            except OSError as error:
                say(f"ca_file {self._trusted.path!r}: {error}")
        self.loop.call_later(REREAD_EVERY_S, self._reread)

    def new_reader(self) -> ResponseReader:
        return ResponseReader(self.wanted, head_request=self.head_request, keep_body=self.keep_body)

    def _bytes(self, k: int) -> bytes:
        of_body, of_entity = k % len(self._bodies), k % len(self._entities)
        built = self._built.get((of_body, of_entity))
        if built is None:
            target = self._target.replace("{entity}", self._entities[of_entity]).replace("{n}", str(k))
            headers = list(self._headers.items())
            built = request_bytes(self._config["method"], target, self._host_header, headers, self._bodies[of_body])
            if "{n}" not in self._target and len(self._built) < 4096:
                self._built[of_body, of_entity] = built
        return built

    # -- samples ----------------------------------------------------------------------------------------------

    def finish(self, request: _Request, status: int, reader: ResponseReader | None = None) -> None:
        if self.in_flight.pop(request.k, None) is None:
            return  # already ended by its deadline
        done = time.monotonic()
        if status >= CONNECTION_ERROR and done - request.sent > self.timeout_s:
            status, reader = TIMED_OUT, None
        self._record(request, done, status, reader)
        if self.stopping and not self.in_flight:
            self._end()

    def _record(self, request: _Request, done: float, status: int, reader: ResponseReader | None = None) -> None:
        zero = self.zero
        if reader is None:
            ok, path, replica = False, "error", ""
        else:
            ok = status in self.expect_status if self.expect_status else 200 <= status < 400
            path = reader.found.get(self.path_header, "")[:MAX_LABEL_CHARS]
            replica = reader.found.get(self.replica_header, "")[:MAX_LABEL_CHARS]
        times = [round(request.due - zero, 6), round(request.sent - zero, 6), round(done - zero, 6)]
        row: list[Any] = [*times, status, ok, path, replica, request.k % self.items if self.items else -1]
        # Read after the clock was: what it costs is not the target's latency.
        if (
            ok
            and self.value_path
            and reader is not None
            and (found := number_in(reader.body, self.value_path)) is not None
        ):
            row.append(found)
        self.samples.append(row)
        if not self._flushing:
            self._flushing = True
            self.loop.call_later(FLUSH_EVERY_S, self._flush)

    def _flush(self) -> None:
        self._pack()
        self._flushing = False
        try:
            if self.out:
                del self.out[: os.write(1, self.out)]
        except BlockingIOError:
            pass
        except OSError:
            leave("the owner reads no more")
        if self.out:
            if len(self.out) > MAX_BACKLOG_BYTES:
                leave("the owner does not read")
            self._flushing = True
            self.loop.call_later(FLUSH_EVERY_S, self._flush)

    def _pack(self) -> None:
        if self.samples:
            batch = [round(time.process_time(), 4), self.samples]
            self.out += json.dumps(batch, separators=(",", ":")).encode() + b"\n"
            self.samples = []

    # -- owner ------------------------------------------------------------------------------------------------

    def _on_stdin(self) -> None:
        try:
            data = os.read(0, 4096)
        except BlockingIOError:
            return
        if not data:
            leave("the owner is gone")
        self._obey(data)

    def _obey(self, data: bytes) -> None:
        *lines, self._commands = (self._commands + data).split(b"\n")
        if b"stop" in lines and not self.stopping:
            self.stopping = True
            if self._schedule is not None:
                self._schedule.cancel()
            if not self.in_flight:
                self._end()

    def _watch_owner(self) -> None:
        if os.getppid() != self.owner_pid:
            leave("the owner is gone")
        self.loop.call_later(OWNER_CHECK_EVERY_S, self._watch_owner)

    def _end(self) -> None:
        self._pack()
        os.set_blocking(1, True)
        try:
            while self.out:
                del self.out[: os.write(1, self.out)]
        except OSError:
            pass
        leave("")


def _json_bytes(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def number_in(body: bytes, path: tuple[str, ...]) -> float | None:
    """The finite number at a path of names and list positions in a JSON body; None when there is none.

    Never raises: whatever a target answers, the schedule goes on.
    """
    try:
        found: Any = json.loads(body)
        for step in path:
            found = found[int(step)] if isinstance(found, list) else found[step]
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return None
        number = float(found)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return None
    return number if math.isfinite(number) else None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _read_config() -> tuple[dict[str, Any], bytes]:
    data = b""
    while b"\n" not in data:
        more = os.read(0, 65536)
        if not more:
            leave("no configuration")
        data += more
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def main() -> None:
    """Run until told to stop or until the owner is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which still needs samples to recover by
    config, rest = _read_config()
    spare = 64
    allowed = raise_file_limit(config["max_in_flight"] + spare)
    config["max_in_flight"] = max(1, min(config["max_in_flight"], allowed - spare))
    loop = asyncio.SelectorEventLoop(PreciseSelector())
    complaints = 0

    def complain(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Bounded: nobody reads standard error while we run, and a full pipe would stop the schedule.
        nonlocal complaints
        complaints += 1
        if complaints <= 10:
            say(f"{context.get('message')}: {context.get('exception')!r}")

    loop.set_exception_handler(complain)
    generator = Generator(config, loop, rest)
    gc.collect()
    gc.freeze()  # what exists now lives for good; collections then look only at what requests leave behind
    loop.call_soon(generator.begin)
    loop.run_forever()


if __name__ == "__main__":
    main()
