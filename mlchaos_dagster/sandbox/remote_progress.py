"""What a trainer has done so far, told to another process that outlives it: for workers whose disk goes with them.

As ``progress``, but the numbers go to the training status service, ten times a second; what a worker did after its last
word is not known there (at most two steps of 20 a second). Training never waits for it.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from .progress import Progress

TOKEN_HEADER = "X-Sandbox-Token"
"""As in ``service``, which would bring a web server along."""
_EVERY_S = 0.1
_TIMEOUT_S = 1.0
_RECALL_S = 5.0
_MOMENTS = ("checkpoint_at", "started_at", "updated_at")
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    field.name: int if isinstance(field.default, int) else float for field in fields(Progress)
}


def told(progress: Progress) -> dict[str, float]:
    """As it is sent: moments as seconds ago, for the clocks of two machines have different zeros. -1 = never."""
    now = time.monotonic()
    return {
        name: (now - value if value else -1.0) if name in _MOMENTS else value
        for name, value in ((name, getattr(progress, name)) for name in _NUMBERS)
    }


def heard(content: Mapping[str, Any]) -> Progress:
    """What was told, on this machine's clock. Raises KeyError, TypeError, ValueError: it is not that."""
    now = time.monotonic()
    numbers: dict[str, Any] = {name: make(content[name]) for name, make in _NUMBERS.items()}
    for name in _MOMENTS:
        numbers[name] = now - numbers[name] if numbers[name] >= 0 else 0.0
    return Progress(**numbers)


class RemoteProgress(Progress):
    """The worker's end, in place of ``ProgressFile``."""

    def __init__(self, url: str, token: str, worker: str) -> None:
        super().__init__()
        self._netloc, self._path = urlsplit(url).netloc, f"/progress/{worker}"
        self._headers = {TOKEN_HEADER: token, "Content-Type": "application/json"}
        self._news = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def recall(self) -> None:
        """Take over what an earlier process told, and begin to tell. Blocks; gives up after ``_RECALL_S``."""
        end = time.monotonic() + _RECALL_S
        while True:
            try:
                if earlier := self._ask("GET"):
                    for name, value in vars(heard(json.loads(earlier))).items():
                        setattr(self, name, value)
                break
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                if time.monotonic() > end:
                    sys.stderr.write(f"what the worker before did is not known: {error!r}\n")
                    break
                time.sleep(_EVERY_S)
        self.pid = 0
        threading.Thread(target=self._tell, name="progress", daemon=True).start()

    def write(self) -> None:
        """Make it known, soon; nothing before this process has resumed."""
        if self.pid:
            self._news.set()

    def _tell(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            try:
                self._ask("PUT", json.dumps(told(self)))
            except (OSError, http.client.HTTPException):
                pass  # the next word has it all
            time.sleep(_EVERY_S)

    def _ask(self, method: str, body: str | None = None) -> bytes:
        """The answer; empty: nothing is known there. Raises OSError, HTTPException."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._netloc, timeout=_TIMEOUT_S)
        try:
            self._connection.request(method, self._path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            raise
        if response.status not in (200, 404):
            raise http.client.HTTPException(f"{method} {self._path}: HTTP {response.status}")
        return content if response.status == 200 else b""
