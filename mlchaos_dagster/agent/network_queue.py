"""Packets that the kernel hands over, held for a while and passed on: the `NFQUEUE` target of iptables.

A client of nfnetlink_queue in plain Python. The formats are those of the kernel's headers `linux/netlink.h`,
`linux/netfilter/nfnetlink.h` and `linux/netfilter/nfnetlink_queue.h`, the order of the set-up that of libnetfilter_queue.
Only headers of packets are asked for (`NFQNL_COPY_META`): what is in a packet never leaves the kernel.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable

NETLINK_NETFILTER = 12
SOL_NETLINK, NETLINK_NO_ENOBUFS = 270, 5
SO_RCVBUFFORCE = 33
NLMSG_ERROR = 2
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NFNL_SUBSYS_QUEUE = 3
MSG_PACKET, MSG_VERDICT, MSG_CONFIG, MSG_VERDICT_BATCH = ((NFNL_SUBSYS_QUEUE << 8) | n for n in range(4))
NFQA_PACKET_HDR, NFQA_VERDICT_HDR = 1, 2
NFQA_CFG_CMD, NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN, NFQA_CFG_MASK, NFQA_CFG_FLAGS = 1, 2, 3, 4, 5
CMD_BIND = 1
COPY_META = 1
FAIL_OPEN, GSO = 1, 4
"""Flags: a full queue lets packets pass instead of dropping them; large segments come whole, not cut up."""
NF_ACCEPT = 1

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("!BBH")
_ATTRIBUTE = struct.Struct("=HH")
_ID = struct.Struct("!I")
_FIRST = _HEADER.size + _GENERIC.size
_BUFFER = 8 << 20
"""Bytes of the socket's buffer: some 10,000 packets that came while the process did not run."""


def message(
    kind: int, queue: int, *attributes: tuple[int, bytes], flags: int = NLM_F_REQUEST, number: int = 0
) -> bytes:
    """One netlink message to a queue."""
    body = _GENERIC.pack(socket.AF_UNSPEC, 0, queue)
    for name, value in attributes:
        length = _ATTRIBUTE.size + len(value)
        body += _ATTRIBUTE.pack(length, name) + value + bytes(-length % 4)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, number, 0) + body


def attributes(datagram: bytes, offset: int = _FIRST) -> dict[int, bytes]:
    """The attributes of a message, by number."""
    found: dict[int, bytes] = {}
    end = len(datagram)
    while offset + _ATTRIBUTE.size <= end:
        length, name = _ATTRIBUTE.unpack_from(datagram, offset)
        if length < _ATTRIBUTE.size:
            break
        found[name & 0x3FFF] = datagram[offset + _ATTRIBUTE.size : offset + length]
        offset += length + (-length % 4)
    return found


def packet_id(datagram: bytes) -> int | None:
    """Number of the packet that a message announces; None: it announces none."""
    if len(datagram) < _FIRST or _HEADER.unpack_from(datagram)[1] != MSG_PACKET:
        return None
    header = attributes(datagram).get(NFQA_PACKET_HDR)
    return _ID.unpack_from(header)[0] if header else None


def refusal(datagram: bytes) -> int | None:
    """Error number that a message carries (0: it is an acknowledgement); None: it is another message."""
    if len(datagram) < _HEADER.size + 4 or _HEADER.unpack_from(datagram)[1] != NLMSG_ERROR:
        return None
    return -struct.unpack_from("=i", datagram, _HEADER.size)[0]


class Queue:
    """One queue of this network namespace, bound to this process. Needs CAP_NET_ADMIN.

    When the process dies the kernel drops what it held and, by `--queue-bypass`, lets everything else pass.

    Raises:
        OSError: not allowed, or another process has the queue.
    """

    def __init__(self, number: int, most: int = 65536) -> None:
        self.number = number
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, 0))
            flags = FAIL_OPEN | GSO
            self._configure((NFQA_CFG_CMD, struct.pack("!BBH", CMD_BIND, 0, socket.AF_UNSPEC)))
            self._configure((NFQA_CFG_PARAMS, struct.pack("!IB", 0, COPY_META)))
            self._configure((NFQA_CFG_QUEUE_MAXLEN, _ID.pack(most)))
            self._configure((NFQA_CFG_FLAGS, _ID.pack(flags)), (NFQA_CFG_MASK, _ID.pack(flags)))
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def _configure(self, *settings: tuple[int, bytes]) -> None:
        self._socket.send(message(MSG_CONFIG, self.number, *settings, flags=NLM_F_REQUEST | NLM_F_ACK))
        while (said := refusal(self._socket.recv(65536))) is None:
            pass  # a packet of a rule that stands already: nobody waits for it yet
        if said:
            raise OSError(said, f"queue {self.number}: {os.strerror(said)}")

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def read(self, most: int = 512) -> list[int]:
        """Numbers of the packets that came since, in their order; at most `most`. Never waits."""
        found: list[int] = []
        receive = self._socket.recv
        for _ in range(most):
            try:
                number = packet_id_fast(receive(4096))
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                continue
            if number is not None:
                found.append(number)
        return found

    def accept(self, last: int) -> None:
        """Let all packets up to this number pass, in their order."""
        verdict = struct.pack("!II", NF_ACCEPT, last)
        self._socket.send(message(MSG_VERDICT_BATCH, self.number, (NFQA_VERDICT_HDR, verdict)))

    def close(self) -> None:
        """Leave the queue."""
        self._socket.close()


def packet_id_fast(datagram: bytes) -> int | None:
    """As `packet_id`; the kernel puts the packet's header first, and this runs for every packet."""
    if len(datagram) >= 31 and datagram[4:6] == _PACKET and datagram[22:24] == _PACKET_HEADER:
        return int.from_bytes(datagram[24:28], "big")
    return packet_id(datagram)


_PACKET = struct.pack("=H", MSG_PACKET)
_PACKET_HEADER = struct.pack("=H", NFQA_PACKET_HDR)


class Wander:
    """A delay that wanders within `mean` ± `jitter` and never lets a later packet overtake an earlier one.

    A draw for each packet would turn the order of packets round, and TCP takes that for loss; keeping their order by
    waiting for the slowest pushes the mean up to mean + jitter on a busy link. So values are drawn at knots 2.5 jitter
    apart and the delay moves from one to the next in a straight line: it falls by at most 0.8 s a second.
    """

    def __init__(self, mean_s: float, jitter_s: float, seed: int | None = None) -> None:
        self.mean_s, self.jitter_s = mean_s, jitter_s
        self._random = random.Random(seed)
        self._step = 2.5 * jitter_s
        self._from = (0.0, 0.0)
        self._to = (float("-inf"), 0.0)

    def at(self, now: float) -> float:
        """Seconds of delay for a packet that comes now. `now` never goes back."""
        if not self.jitter_s:
            return self.mean_s
        if now >= self._to[0] + self._step:  # nothing came for longer than a step
            self._from, self._to = (now, self._draw()), (now + self._step, self._draw())
        elif now >= self._to[0]:
            self._from, self._to = self._to, (self._to[0] + self._step, self._draw())
        (t0, d0), (t1, d1) = self._from, self._to
        return d0 + (d1 - d0) * (now - t0) / (t1 - t0)

    def _draw(self) -> float:
        return self.mean_s + self._random.uniform(-self.jitter_s, self.jitter_s)


class Delayer:
    """Holds each packet of a queue for its delay. First in, first out."""

    def __init__(self, queue: Queue, delay: Callable[[float], float]) -> None:
        self.queue, self.delay = queue, delay
        self.packets = 0
        self.late_s = 0.0
        """Largest lateness of a release so far."""
        self._held: deque[tuple[float, int]] = deque()
        self._held_s = 0.0
        self._released = 0
        self._came: deque[float] = deque()

    def run(self, control: socket.socket) -> None:
        """Until `control` says so or is closed at its other end; then everything that is held passes.

        A byte `s` on it is answered by a line of figures, any other byte is the end.
        """
        while True:
            wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            readable, _, _ = select.select([self.queue, control], [], [], wait)
            if self.queue in readable:
                self._take()
            self._release()
            if control in readable:
                word = control.recv(1)
                if word != b"s":
                    break
                control.send(self.figures().encode() + b"\n")
        self._take()
        if self._held:
            self.queue.accept(self._held[-1][1])
        self.queue.close()

    def figures(self) -> str:
        """`packets held mean_held_s largest_lateness_s`."""
        mean = self._held_s / self._released if self._released else 0.0
        return f"{self.packets} {len(self._held)} {mean:.6f} {self.late_s:.6f}"

    def _take(self) -> None:
        for number in self.queue.read():
            now = time.monotonic()
            due = now + self.delay(now)
            if self._held and due < self._held[-1][0]:
                due = self._held[-1][0]
            self._held.append((due, number))
            self._came.append(now)
            self.packets += 1

    def _release(self) -> None:
        held, last = self._held, None
        now = time.monotonic()
        while held and held[0][0] <= now:
            due, last = held.popleft()
            self._held_s += now - self._came.popleft()
            self._released += 1
            self.late_s = max(self.late_s, now - due)
        if last is not None:
            self.queue.accept(last)
