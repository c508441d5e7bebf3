"""Where the requests of an HTTP/1.1 client begin and end in its byte stream; enough to answer one in the server's place.

Only the client's side is read: request line, the headers that tell how long the body is, and the body's length. Clients
that send a request before the last one was answered (pipelining; no S3 client does) get their answers in disorder when
some are answered here. Bytes that are not HTTP pass untouched for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_HEAD_LIMIT = 64 * 1024
SLOW_DOWN = "<Code>SlowDown</Code><Message>Please reduce your request rate.</Message>"


@dataclass(frozen=True)
class Piece:
    """A run of bytes that belongs to one request."""

    content: bytes
    head: bool
    """It is the whole head of a request: a request begins here."""
    last: bool
    """The request is complete with it."""
    method: str = ""
    expects_continue: bool = False
    """Of a head: the client sends the body only when it is told to."""


class Requests:
    """Cuts a client's byte stream into pieces of requests."""

    def __init__(self) -> None:
        self._buffer = b""
        self._state = "head"
        self._left = 0
        self._chunked = False

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """The pieces that are complete with this chunk; a head is kept back until it is whole."""
        self._buffer += chunk
        while self._buffer:
            piece = {"head": self._head, "body": self._body, "size": self._size, "trailer": self._trailer}.get(
                self._state, self._rest
            )()
            if piece is None:
                return
            yield piece

    def rest(self) -> bytes:
        """What was kept back, for when the stream ends."""
        kept, self._buffer = self._buffer, b""
        return kept

    def _rest(self) -> Piece:
        return Piece(self.rest(), head=False, last=False)

    def _take(self, size: int) -> bytes:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _head(self) -> Piece | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 and len(self._buffer) <= _HEAD_LIMIT:
            return None
        lines = self._buffer[: max(end, 0)].split(b"\r\n")
        words = lines[0].split()
        if end < 0 or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            self._state = "opaque"
            return self._rest()
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        length = headers.get(b"content-length", b"0")
        if headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked"):
            self._state = "size"
        elif length.isdigit():
            self._left = int(length)
            self._state = "body" if self._left else "head"
        else:
            self._state = "opaque"
        expects = headers.get(b"expect", b"").lower() == b"100-continue"
        return Piece(self._take(end + 4), True, self._state == "head", words[0].decode("latin-1"), expects)

    def _body(self) -> Piece:
        taken = self._take(self._left)
        self._left -= len(taken)
        if self._left:
            return Piece(taken, head=False, last=False)
        # Of a chunk, the line that ends it was counted in; another size follows.
        self._state = "size" if self._chunked else "head"
        return Piece(taken, head=False, last=not self._chunked)

    def _size(self) -> Piece | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        try:
            size = int(self._buffer[:end].split(b";")[0], 16)
        except ValueError:
            self._state = "opaque"
            return self._rest()
        self._chunked = size > 0
        self._left = size + 2
        self._state = "body" if size else "trailer"
        return Piece(self._take(end + 2), head=False, last=False)

    def _trailer(self) -> Piece | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        self._state = "trailer" if end else "head"
        return Piece(self._take(end + 2), head=False, last=end == 0)


def slow_down(method: str, *, close: bool) -> bytes:
    """S3's answer to a client that asks too often: 503 with the error SlowDown."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{SLOW_DOWN}</Error>'.encode()
    head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    head += "Connection: close\r\n\r\n" if close else "\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
