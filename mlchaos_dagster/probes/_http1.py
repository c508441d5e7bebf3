"""HTTP/1.1 as a probe needs it: request bytes and an incremental response reader that keeps a small body if asked to.

Owns framing (content length, chunks, until close) and nothing else: no sockets, no clock. Written by hand because it
runs once per request in the load generator, which must stay cheap and free of third-party imports; a body is thrown
away unless it was asked for, and then beyond its limit, so an endless answer costs no memory.
"""

from __future__ import annotations

MAX_HEAD_BYTES = 64 * 1024
"""Longer heads are refused: no sane server sends them, and a hostile one would eat memory."""
MAX_LINE_BYTES = 16 * 1024
"""Longest chunk-size or trailer line."""

_HEAD, _LENGTH, _CHUNKS, _UNTIL_CLOSE, _DONE = range(5)
_DIGITS = frozenset(b"0123456789")
_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.x."""


def request_bytes(method: str, target: str, host: str, headers: list[tuple[str, str]], body: bytes | None) -> bytes:
    """The whole request. Headers given by the caller win over those added here."""
    given = {name.lower() for name, _ in headers}
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in (("Host", host), ("User-Agent", "mlchaos-probe"), ("Accept", "*/*")):
        if name.lower() not in given:
            lines.append(f"{name}: {value}")
    if body is not None:
        if "content-type" not in given:
            lines.append("Content-Type: application/json")
        lines.append(f"Content-Length: {len(body)}")
    elif method in ("POST", "PUT", "PATCH"):
        lines.append("Content-Length: 0")
    lines.extend(f"{name}: {value}" for name, value in headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")


class ResponseReader:
    """Reads one response. Feed it what the socket gives until it says that the response is complete."""

    __slots__ = (
        "_buffer", "_no_body", "_remaining", "_room", "_state", "_trailers", "_wanted", "body", "found", "keep_alive",
        "status",
    )  # fmt: skip

    def __init__(self, wanted: tuple[bytes, ...], *, head_request: bool = False, keep_body: int = 0) -> None:
        """`wanted`: lower-case header names whose values are kept in `found`; `keep_body`: longest body kept, bytes."""
        self.status = 0
        self.found: dict[bytes, str] = {}
        self.keep_alive = True
        self.body = b""
        """What was kept: nothing of a body longer than `keep_body`."""
        self._room = keep_body
        self._wanted = wanted
        self._no_body = head_request
        self._buffer = b""
        self._remaining = 0
        self._trailers = False
        self._state = _HEAD

    def feed(self, data: bytes) -> bool:
        """True when the response is complete.

        Raises:
            ProtocolError: the bytes are not an HTTP/1.x response.
        """
        if self._state == _HEAD:
            data = self._buffer + data if self._buffer else data
            while self._state == _HEAD:
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    if len(data) > MAX_HEAD_BYTES:
                        raise ProtocolError("response head too long")
                    if data and not b"HTTP/1.".startswith(data[:7]) and data[:7] != b"HTTP/1.":
                        raise ProtocolError("not an HTTP/1.x response")
                    self._buffer = data
                    return False
                self._head(data[:end])
                data = data[end + 4 :]
            self._buffer = b""
        if self._state == _LENGTH:
            if self._room:
                self._keep(data[: self._remaining])
            self._remaining -= len(data)
            if self._remaining > 0:
                return False
            if self._remaining < 0:  # bytes nobody asked for: the connection cannot be trusted with another request
                self.keep_alive = False
            self._state = _DONE
        elif self._state == _CHUNKS:
            self._chunks(data)
        elif self._state == _UNTIL_CLOSE:
            if self._room:
                self._keep(data)
        elif self._state == _DONE and data:
            self.keep_alive = False
        return self._state == _DONE

    def end_of_stream(self) -> bool:
        """The peer closed. True when that is how this response says that it is complete."""
        return self._state in (_UNTIL_CLOSE, _DONE)

    def _head(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        parts = lines[0].split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or len(parts[1]) != 3 or not parts[1].isdigit():
            raise ProtocolError("not an HTTP/1.x response")
        status = int(parts[1])
        if 100 <= status < 200 and status != 101:
            return  # an interim answer: the real one follows
        self.status = status
        self.keep_alive = parts[0] != b"HTTP/1.0"
        length: int | None = None
        chunked = False
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not colon:
                continue
            name = name.lower()
            if name == b"content-length":
                value = value.strip()
                if not value or not _DIGITS.issuperset(value) or len(value) > 18:
                    raise ProtocolError("bad content length")
                if length is not None and length != int(value):
                    raise ProtocolError("two content lengths")
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = value.strip().lower().endswith(b"chunked")
            elif name == b"connection":
                tokens = value.lower()
                if b"close" in tokens:
                    self.keep_alive = False
                elif b"keep-alive" in tokens:
                    self.keep_alive = True
            elif name in self._wanted:
                self.found[name] = value.strip().decode("latin-1")
        if self._no_body or status in (204, 304):
            self._state = _DONE
        elif chunked:
            self._state = _CHUNKS
        elif length is not None:
            self._state, self._remaining = _LENGTH, length
        else:
            self._state, self.keep_alive = _UNTIL_CLOSE, False

    def _keep(self, data: bytes) -> None:
        if len(self.body) + len(data) > self._room:
            self.body, self._room = b"", 0
        else:
            self.body += data

    def _chunks(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        while True:
            if self._remaining:
                skipped = min(self._remaining, len(data))
                if self._room and self._remaining > 2:  # 2: the line end is no part of the chunk
                    self._keep(data[: min(skipped, self._remaining - 2)])
                data = data[skipped:]
                self._remaining -= skipped
                if self._remaining:
                    return
            end = data.find(b"\n")
            if end < 0:
                if len(data) > MAX_LINE_BYTES:
                    raise ProtocolError("chunk line too long")
                self._buffer = data
                return
            line, data = data[:end].strip(), data[end + 1 :]
            if self._trailers:
                if not line:
                    self._state = _DONE
                    self.keep_alive = self.keep_alive and not data
                    return
                continue
            size = line.split(b";", 1)[0].strip()
            if not size or len(size) > 15 or not _HEX_DIGITS.issuperset(size):
                raise ProtocolError("bad chunk size")
            self._remaining = int(size, 16)
            if self._remaining:
                self._remaining += 2  # the line end after the chunk
            else:
                self._trailers = True
