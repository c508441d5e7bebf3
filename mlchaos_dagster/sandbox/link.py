"""One faulty wire: a user-space TCP forwarder whose traffic rules can delay, lose or stop. Data plane only.

What a rule means here, where there are byte streams and no packets:

- **latency**: every chunk waits ``latency_ms / 2`` (± ``jitter_ms / 2``, uniform) in each direction, so that a round
  trip gains ``latency_ms`` ± ``jitter_ms``. Order is kept. The TCP handshake with the proxy itself is not delayed.
- **loss**: bytes inside TCP are never lost to the application, they are late. A chunk is "lost" with
  probability ``fraction`` and then waits a retransmission time-out of 200 ms, doubled for every further loss of the
  same chunk; after the fourth loss in a row the connection is reset. All that follows waits behind it (head of line).
- **partition**: no byte passes, on old and on new connections (they are accepted by the kernel, then hear nothing).
  When the partition ends, every connection that lost bytes or never reached its upstream is reset.
- **refusal** (``s3_unavailable``, ``database_unavailable``, ``network_isolation``): what a stopped server does.
  Connections that are open are reset when the rule comes, new ones as soon as they are made.
- **slow** (``s3_slow``): as latency.
- **throttling** (``s3_throttled``): a ``fraction`` of the HTTP requests is answered ``503 Slow Down`` here and never
  reaches the upstream, on kept connections, too; only on links to an object store.

Rules act on connections that were open before. When the last delaying rule goes, delayed bytes are passed on at once.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections import deque

from .http_framing import Requests, slow_down
from .rule import REFUSING, SLOW, Rule

_RTO_S = 0.2
_MAX_LOSSES = 4
_QUEUE_BYTES = 4 * 1024 * 1024


class Link:
    """A listening port, its upstream, the connections between them and the rules they obey."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.upstream: tuple[str, int] | None = None
        self.rules: list[Rule] = []
        self.connections: set[Connection] = set()
        self.rng = rng
        self.port = 0
        self.bytes_total = 0
        self.connections_total = 0

    @property
    def partition(self) -> Rule | None:
        """The rule that stops all traffic, if there is one."""
        return next((rule for rule in self.rules if rule.kind == "network_partition"), None)

    @property
    def refusal(self) -> Rule | None:
        """The rule that refuses connections, if there is one."""
        return next((rule for rule in self.rules if rule.kind in REFUSING), None)

    @property
    def carries_http_to_a_store(self) -> bool:
        """Requests can be told apart here."""
        return self.name.endswith("->object-store")

    def throttled(self) -> bool:
        """Whether the next request is answered here instead of by the upstream."""
        for rule in self.rules:
            if rule.kind == "s3_throttled" and self.rng.random() < rule.params["fraction"]:
                rule.count("throttled")
                return True
        return False

    def added(self, rule: Rule) -> None:
        """Let the connections act on a rule that has come."""
        self.rules.append(rule)
        if rule.kind in REFUSING:
            for connection in list(self.connections):
                rule.count("resets")
                connection.abort()

    def delay(self) -> float | None:
        """Seconds the next chunk has to wait (0 = none), None when its connection is to be reset instead."""
        total = 0.0
        for rule in self.rules:
            if rule.kind in SLOW:
                half, spread = rule.params["latency_ms"] / 2000, rule.params["jitter_ms"] / 2000
                total += max(0.0, half + self.rng.uniform(-spread, spread))
                rule.count("delayed")
            elif rule.kind == "network_loss":
                losses = 0
                while losses < _MAX_LOSSES and self.rng.random() < rule.params["fraction"]:
                    total += _RTO_S * 2**losses
                    losses += 1
                    rule.count("lost")
                if losses == _MAX_LOSSES:
                    rule.count("resets")
                    return None
        return total

    def changed(self) -> None:
        """Let the connections act on rules that were removed."""
        if self.partition is None:
            for connection in list(self.connections):
                if connection.blackholed:
                    connection.abort()
        if not any(rule.kind in (*SLOW, "network_loss") for rule in self.rules):
            for connection in list(self.connections):
                connection.to_upstream.flush()
                connection.to_client.flush()


class Pipe:
    """One direction of a connection: an ordered queue of chunks with the time at which each may go on."""

    def __init__(self, connection: Connection) -> None:
        self.link = connection.link
        self._connection = connection
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._queued = 0
        self._timer: asyncio.TimerHandle | None = None
        self._paused: set[str] = set()

    @property
    def waiting(self) -> bool:
        """True while chunks wait here."""
        return bool(self._queue)

    def put(self, chunk: bytes | None) -> None:
        """Take a chunk (None = end of stream) and pass it on when the rules allow."""
        delay = self.link.delay() if chunk is not None and self.link.rules else 0.0
        now = time.monotonic()
        if delay is None:
            # The sender would learn of the dead connection only after its retransmissions: not at once.
            asyncio.get_running_loop().call_later(_RTO_S * (2**_MAX_LOSSES - 1), self._connection.abort)
            self._pause("lost", True)
            return
        if not delay and not self._queue and self.sink is not None:
            self._pass(chunk)
            return
        due = max(now + delay, self._queue[-1][0] if self._queue else 0.0)
        self._queue.append((due, chunk))
        self._queued += len(chunk or b"")
        self._pause("queue", self._queued > _QUEUE_BYTES)
        self._arm()

    def flush(self) -> None:
        """Pass on everything that waits; when there is nowhere to pass it yet, it stays."""
        while self._queue and self.sink is not None:
            self._pop()
        self._arm()

    def drop(self) -> None:
        """Forget everything that waits."""
        self._queue.clear()
        self._queued = 0
        self._arm()

    def hold(self, held: bool) -> None:
        """Stop reading while the other side's buffer is full."""
        self._pause("sink", held)

    def _pop(self) -> None:
        chunk = self._queue.popleft()[1]
        self._queued -= len(chunk or b"")
        self._pass(chunk)
        self._pause("queue", self._queued > _QUEUE_BYTES)

    def _pass(self, chunk: bytes | None) -> None:
        rule = self.link.partition
        if rule is not None:  # it waited here when the partition came
            rule.count("dropped")
            self._connection.blackholed = True
            return
        sink = self.sink
        if sink is None or sink.is_closing():
            return
        if chunk is None:
            try:
                sink.write_eof()
            except OSError:
                pass  # reset by its peer a moment ago; ``connection_lost`` is on its way
            self._connection.ended()
            return
        self.link.bytes_total += len(chunk)
        sink.write(chunk)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue and self.sink is not None:
            wait = max(0.0, self._queue[0][0] - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self.due)

    def due(self) -> None:
        """Pass on what has waited long enough."""
        self._timer = None
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now + 0.0005:
            self._pop()
        self._arm()

    def _pause(self, why: str, paused: bool) -> None:
        before = bool(self._paused)
        if paused:
            self._paused.add(why)
        else:
            self._paused.discard(why)
        if self.source is None or self.source.is_closing() or before == bool(self._paused):
            return
        if self._paused:
            self.source.pause_reading()
        else:
            self.source.resume_reading()


class Connection:
    """A client's connection and the one to the upstream that belongs to it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.blackholed = False
        self.to_upstream = Pipe(self)
        self.to_client = Pipe(self)
        self._ends = 0
        self._upstream_lost = False
        self._requests = Requests() if link.carries_http_to_a_store else None
        self._swallowing = ""
        """The method of a request that is answered here, while its bytes are still coming in."""
        self._finished = False
        link.connections.add(self)
        link.connections_total += 1

    def open(self, client: asyncio.Transport) -> None:
        """The client is there: connect to the upstream, unless a partition keeps them apart."""
        self.to_upstream.source = self.to_client.sink = client
        if (refusal := self.link.refusal) is not None:
            refusal.count("refused")
            self.abort()
            return
        rule = self.link.partition
        if rule is not None:
            rule.count("dropped")
            self.blackholed = True
            return
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        upstream = self.link.upstream
        try:
            if upstream is None:
                raise ConnectionRefusedError("no upstream yet")
            await asyncio.get_running_loop().create_connection(lambda: _End(self, False), *upstream)
        except OSError:
            if self.link.partition is not None:
                self.blackholed = True
            else:
                self.abort()

    def connected(self, upstream: asyncio.Transport) -> None:
        """The upstream is there: pass on what the client has sent meanwhile."""
        if self not in self.link.connections:
            upstream.abort()
            return
        self.to_upstream.sink = self.to_client.source = upstream
        self.to_upstream.due()

    def received(self, chunk: bytes | None, from_client: bool) -> None:
        """A chunk (None = end of stream) came in from one side."""
        rule = self.link.partition
        if rule is not None or self.blackholed:
            if rule is not None:
                rule.count("dropped")
            self.blackholed = True
            if chunk is None and from_client:
                self.abort()  # the client gave up; keeping its socket would only fill our table
            return
        if not from_client:
            self.to_client.put(chunk)
        elif self._requests is None:
            self.to_upstream.put(chunk)
        else:
            self._request_bytes(self._requests, chunk)

    def _request_bytes(self, requests: Requests, chunk: bytes | None) -> None:
        """Pass on the requests in a client's chunk but those that are throttled."""
        passed = bytearray()
        for piece in requests.feed(chunk or b""):
            if self._finished:
                continue
            if piece.head and self.link.throttled():
                self._swallowing = piece.method
            if not self._swallowing:
                passed += piece.content
            elif piece.last or piece.expects_continue:
                # Who asked whether to send its body gets its answer now; whether the body follows all the same cannot be
                # known, and so this connection has seen its last request.
                self._finished = piece.expects_continue and not piece.last
                self.to_client.put(slow_down(self._swallowing, close=self._finished))
                self._swallowing = ""
                if self._finished:
                    self.to_client.put(None)
        if chunk is None and not self._swallowing and not self._finished:
            passed += requests.rest()
        if passed:
            self.to_upstream.put(bytes(passed))
        if chunk is None:
            self.to_upstream.put(None)

    def lost(self, from_client: bool) -> None:
        """One side's connection is gone; a partition keeps that from the client."""
        if from_client:
            self.abort()
        elif self.link.partition is not None or self.blackholed:
            self.blackholed = True
        else:
            self._upstream_lost = True
            if self.to_client.waiting:
                self.to_client.put(None)
            else:
                self.close()

    def ended(self) -> None:
        """One direction has passed its end of stream on."""
        self._ends += 1
        if self._ends >= 2 or self._upstream_lost:
            self.close()

    def close(self) -> None:
        """Close both sides after what they still have to send."""
        self.link.connections.discard(self)
        for end in (self.to_upstream.source, self.to_upstream.sink):
            if end is not None:
                end.close()

    def abort(self) -> None:
        """Reset both sides at once."""
        self.link.connections.discard(self)
        self.to_upstream.drop()
        self.to_client.drop()
        for end in (self.to_upstream.source, self.to_upstream.sink):
            if end is not None and not end.is_closing():
                # Without this the kernel says goodbye politely (FIN) instead of resetting.
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.abort()


class _End(asyncio.Protocol):
    """One socket of a connection, as asyncio sees it."""

    def __init__(self, connection: Connection, is_client: bool) -> None:
        self._connection = connection
        self._is_client = is_client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._is_client:
            self._connection.open(transport)
        else:
            self._connection.connected(transport)

    def data_received(self, data: bytes) -> None:
        self._connection.received(data, self._is_client)

    def eof_received(self) -> bool:
        self._connection.received(None, self._is_client)
        return True  # half-closed connections stay open until the other side is done

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lost(self._is_client)

    def pause_writing(self) -> None:
        (self._connection.to_client if self._is_client else self._connection.to_upstream).hold(True)

    def resume_writing(self) -> None:
        (self._connection.to_client if self._is_client else self._connection.to_upstream).hold(False)


def client_side(link: Link) -> asyncio.Protocol:
    """Protocol factory for a link's listening socket."""
    return _End(Connection(link), True)
