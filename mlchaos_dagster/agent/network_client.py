"""Talking to the agent of a lease from another process of its pod. Small: it is started for every look."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

REACHED_S = 12.0
"""Longest wait for an agent that starts up; in a pod with a tenth of a CPU it takes seconds."""
ANSWER_S = 4.0
"""Longest wait for its answer."""


def address(lease: str) -> str:
    """Of the control socket: abstract, so it belongs to the pod's network namespace."""
    return f"\0mlchaos/{lease}"


def ask(lease: str, word: str, reached_s: float = 0.0, answer_s: float = ANSWER_S) -> dict[str, Any]:
    """One word to the agent of a lease. Raises OSError: none is there (within `reached_s`), or it does not answer."""
    end = time.monotonic() + reached_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(answer_s)
            try:
                s.connect(address(lease))
            except ConnectionRefusedError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.05)  # there is no event for a socket that is not bound yet
                continue
            s.sendall(word.encode() + b"\n")
            return json.loads(b"".join(iter(lambda: s.recv(65536), b"")))
