"""The child's side of the bond with its supervisor: configuration in, port and readiness out, death together.

A child's standard input is a pipe that only the supervisor holds open. Its first line is the child's configuration
(not argv, which everybody can read); its end means that the supervisor is gone, however it died, and so ends the child.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1
_OPEN_FILES = 8192


class Lifeline:
    """Bond of this process with the supervisor that started it."""

    def __init__(self, config: dict[str, Any], report_fd: int) -> None:
        self.config = config
        self._report_fd = report_fd

    def report(self, **facts: Any) -> None:
        """Tell the supervisor something at once, stamped with the monotonic clock that all processes share."""
        line = json.dumps({"mono": time.monotonic(), "at": time.time(), **facts}) + "\n"
        try:
            os.write(self._report_fd, line.encode())
        except OSError:
            os._exit(0)  # nobody listens: the supervisor is gone

    def listen(self) -> socket.socket:
        """The socket this process serves on: loopback, on the port of its former life if that is still free."""
        return listen(int(self.config.get("port") or 0))

    def gauges(self) -> dict[str, Callable[[], float]]:
        """What only this process's surroundings can tell of it: metric → how to read it."""
        return {}


def attach() -> Lifeline:
    """Bind this process's life to its supervisor; call first, before slow imports."""
    _die_with_parent()  # at once; reading may block
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:  # blackholed connections pile up in gateway and proxy
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    buffer = b""
    while b"\n" not in buffer:
        chunk = os.read(0, 65536)
        if not chunk:
            os._exit(0)
        buffer += chunk
    config = json.loads(buffer.split(b"\n", 1)[0])
    die_with_supervisor()
    return Lifeline(config, int(config["report_fd"]))


def die_with_supervisor() -> None:
    """End this process when its parent ends or its standard input does."""
    _die_with_parent()
    threading.Thread(target=_watch_stdin, name="lifeline", daemon=True).start()


def _die_with_parent() -> None:
    """Have the Linux kernel kill us with our parent; it also reaches a process that is stopped (SIGSTOP)."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # the pipe is the rule, this is the belt


def _watch_stdin() -> None:
    while True:
        try:
            if not os.read(0, 4096):
                os._exit(0)
        except OSError:
            os._exit(0)


def listen(preferred_port: int = 0) -> socket.socket:
    """Bind a loopback listener, on the port of a former life if it is still free, else on any free one."""
    for port in (preferred_port, 0):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            sock.close()
            continue
        sock.listen(512)
        sock.setblocking(False)
        return sock
    raise OSError("no free loopback port")
