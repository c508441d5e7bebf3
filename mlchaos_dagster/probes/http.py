"""The open-loop HTTP probe: requests on a fixed arrival schedule, sent by a child process.

Owns the child's life and what it says; the schedule itself is `_loadgen.py`. Request k is due at start + k / rate
whatever the earlier ones do, so a target that stalls is seen by everybody who would have come during the stall
(coordinated omission corrected: latency is `done_s - due_s`). The child is lost when it is killed: `drain` then gives
nothing more and `alive` is false, which the watch loop treats as a gap, never as health.

Not done on purpose: redirects are not followed, proxies of the environment are not used, nothing is retried. A retry
would hide the failures that the experiment is about.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlchaos_dagster.domain.record import RequestSample
from mlchaos_dagster.errors import ConfigError, ProbeError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHILD = "import sys; sys.path.append(sys.argv[1]); from mlchaos_dagster.probes._loadgen import main; main()"


@dataclass(frozen=True)
class HttpProbeConfig:
    """What to ask, how often, and what counts as an answer.

    Raises:
        ConfigError: a value cannot work; says which one and what is allowed.
    """

    url: str
    """http or https. `{n}` becomes the request's number, `{entity}` the next of `entities`."""
    rate_per_s: float
    timeout_s: float
    """Total deadline of one request: name look-up, connecting, sending and the last byte of the answer together."""
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    header_files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Header → the file that its value came from, which is read again within half a second of being replaced."""
    bodies: tuple[Any, ...] = field(default=(), repr=False)
    """JSON bodies, taken in turn: request k carries body k modulo their number."""
    entities: tuple[str, ...] = ()
    """Values for `{entity}` in the URL, taken in turn."""
    value: str = ""
    """Dotted path of a number in the JSON answer, such as `score` or `predictions.0`; empty: answers are not read."""
    expect_status: tuple[int, ...] = ()
    """Statuses that are ok. Default: 200 to 399."""
    path_header: str = "X-Answered-By"
    replica_header: str = "X-Replica"
    reuse_idle_s: float = 1.5
    """An idle connection older than this is not used again: servers close theirs after 2 s (gunicorn) or 5 s (uvicorn),
    and a request that meets the closing would be counted as the target's failure."""
    connection_lifetime_s: float = 0.0
    """A connection older than this is not used again; 0: they live as long as they are used. A client that never connects
    anew sees neither a new certificate nor that the old one is no good any more."""
    verify_tls: bool = True
    ca_file: str = ""
    """PEM file of trusted certificates, with a list of revoked ones (CRL) if there is one; read again as `header_files`."""

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.url)
            if url.username or url.password:
                raise ConfigError("HTTP probe: the URL holds credentials. Allowed: an Authorization header")
            good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            good = False
        if not good or re.search(r"[\s\x00-\x1f\x7f-\U0010ffff]", self.url):
            raise ConfigError(f"HTTP probe: {self.url!r} is not a URL. Allowed: http(s)://host[:port]/path, ASCII")
        for name, value, most in (
            ("rate_per_s", self.rate_per_s, 10_000),
            ("timeout_s", self.timeout_s, 3600),
            ("reuse_idle_s", self.reuse_idle_s, 3600),
        ):
            if not (math.isfinite(value) and 0 < value <= most):
                raise ConfigError(f"HTTP probe: {name} is {value}. Allowed: more than 0, at most {most}")
        if not 0 <= self.connection_lifetime_s <= 3600:
            given = self.connection_lifetime_s
            raise ConfigError(f"HTTP probe: connection_lifetime_s is {given}. Allowed: 0 (no limit) to 3600")
        if unknown := sorted(set(self.header_files) - set(self.headers)):
            raise ConfigError(f"HTTP probe: header_files has {unknown[0]!r}, which is not among headers")
        if not _TOKEN.fullmatch(self.method) or self.method != self.method.upper():
            raise ConfigError(f"HTTP probe: method is {self.method!r}. Allowed: an upper-case word such as GET or POST")
        if self.bodies and self.method in ("GET", "HEAD"):
            raise ConfigError(f"HTTP probe: {self.method} carries no body. Allowed: POST, PUT, PATCH, DELETE")
        if "{entity}" in self.url and not self.entities:
            raise ConfigError("HTTP probe: the URL has {entity} but entities is empty")
        for name, value in self.headers.items():
            if not _TOKEN.fullmatch(name) or re.search(r"[\r\n\x00]|[^\x00-\xff]", value):
                raise ConfigError(f"HTTP probe: header {name!r} has characters that HTTP does not allow")
            if name.lower() in ("content-length", "transfer-encoding", "connection"):
                raise ConfigError(f"HTTP probe: header {name!r} is set by the probe itself")
        if self.value and not all(self.value.split(".")):
            raise ConfigError(f"HTTP probe: value is {self.value!r}. Allowed: names with dots between, such as score")
        for status in self.expect_status:
            if not 100 <= status <= 599:
                raise ConfigError(f"HTTP probe: expect_status has {status}. Allowed: 100 to 599")
        try:
            json.dumps([self.bodies, self.entities])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"HTTP probe: a body is not JSON: {error}") from error

    @property
    def max_in_flight(self) -> int:
        """More than can be open when every request runs into its deadline; beyond it requests are counted as unsent."""
        return math.ceil(math.ceil(self.rate_per_s * self.timeout_s) * 1.5) + 16


class HttpProbe:
    """One probe run: `start` once, `drain` often, `stop` once. Not for use by several threads at a time."""

    def __init__(self, config: HttpProbeConfig) -> None:
        self.config = config
        self.start_s = math.nan
        """When request 0 was due, in seconds after the caller's zero."""
        self.cpu_s = 0.0
        """CPU seconds that the child has used, as of the newest sample."""
        self.last_words = ""
        """What the child wrote to standard error, once it has ended."""
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._ended = False

    def start(self, zero: float, *, within_s: float = 10.0) -> None:
        """Start the child; its schedule begins before this returns.

        Args:
            zero: the caller's zero on `time.monotonic()`.
            within_s: longest wait for the child; it takes 0.05 s on a quiet machine.

        Raises:
            ProbeError: the child did not start. Nothing is left running.
        """
        if self._child is not None:
            raise ProbeError("HTTP probe: already started")
        root = Path(__file__).resolve().parents[2]
        # Isolated and without site: neither the caller's PYTHON* variables nor start-up hooks of installed packages
        # may slow or change the measurer. The root goes last, so nothing beside us shadows the standard library.
        command = [sys.executable, "-I", "-S", "-c", _CHILD, str(root)]
        message = {
            **asdict(self.config),
            "max_in_flight": self.config.max_in_flight,
            "zero": zero,
            "owner_pid": os.getpid(),
        }
        try:
            # A session of its own: a Ctrl-C at the terminal must not take the measurement away while we recover.
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise ProbeError(f"HTTP probe: cannot start a process: {error}") from error
        self._child = child
        assert child.stdin is not None and child.stdout is not None
        try:
            _write_all(child.stdin.fileno(), json.dumps(message).encode() + b"\n")
            os.set_blocking(child.stdout.fileno(), False)
            line = self._first_line(time.monotonic() + within_s)
            self.start_s = float(json.loads(line)["start_s"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._kill()
            words = f": {self.last_words}" if self.last_words else ""
            raise ProbeError(f"HTTP probe: the load generator did not start{words}") from error

    @property
    def alive(self) -> bool:
        """The child runs. False after `stop`, and after its death, which makes a gap."""
        return self._child is not None and not self._ended and self._child.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the child; 0 before `start`."""
        return self._child.pid if self._child is not None else 0

    def drain(self) -> list[RequestSample]:
        """Requests that ended since the last call, in the order in which they ended. Never blocks, never raises."""
        self._read_available()
        return self._parse()

    def stop(self) -> list[RequestSample]:
        """Send no more, wait for what is in flight (at most the timeout), and give the rest. Harmless when repeated."""
        child = self._child
        if child is None or self._ended:
            return self._parse()
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(OSError):  # dead already: what it wrote before is still read
            _write_all(child.stdin.fileno(), b"stop\n")
        give_up = time.monotonic() + self.config.timeout_s + 2.0
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not self._ended and (left := give_up - time.monotonic()) > 0:
                selector.select(left)
                self._read_available()
        self._kill()
        return self._parse()

    def __enter__(self) -> HttpProbe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._kill()

    def _first_line(self, give_up: float) -> bytes:
        child = self._child
        assert child is not None and child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = give_up - time.monotonic()
                if left <= 0 or self._ended:
                    raise ValueError("no first line")
                selector.select(left)
                self._read_available(close=False)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _read_available(self, *, close: bool = True) -> None:
        child = self._child
        if child is None or self._ended:
            return
        assert child.stdout is not None
        parts = [self._buffer]
        try:
            while data := os.read(child.stdout.fileno(), 1 << 18):
                parts.append(data)
            self._ended = True
        except BlockingIOError:
            pass
        except OSError:
            self._ended = True
        self._buffer = b"".join(parts)
        if self._ended and close:
            self._kill()

    def _parse(self) -> list[RequestSample]:
        *lines, self._buffer = self._buffer.split(b"\n")
        samples: list[RequestSample] = []
        for line in lines:
            try:
                self.cpu_s, batch = json.loads(line)
                samples.extend(RequestSample(*row) for row in batch)
            except (ValueError, TypeError):  # torn by a death in the middle of a write
                continue
        return samples

    def _kill(self) -> None:
        """End and reap the child, and keep what it complained about."""
        child = self._child
        if child is None:
            return
        self._ended = True
        with contextlib.suppress(OSError):
            child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is None or stream.closed:
                continue
            if stream is child.stderr:
                with contextlib.suppress(OSError):
                    os.set_blocking(stream.fileno(), False)
                    said = os.read(stream.fileno(), 65536) or b""
                    self.last_words = said.decode("utf-8", "replace").strip()[-2000:]
            stream.close()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
