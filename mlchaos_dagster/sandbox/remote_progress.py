"""What a trainer has done so far, told to another process that outlives it: for workers whose disk goes with them.

As ``progress``, but the numbers go to the training status service, ten times a second; what a worker did after its last
word is not known there (at most two steps of 20 a second). Training never waits for it.
"""

from __future__ import annotations

import http.client
import json
import os
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
HOLDER_HEADER = "X-Holder"
_EVERY_S = 0.1
_TAKEN = 409
_SUPERSEDED = 3
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


def become(url: str, token: str, holder: str) -> str:
    """Ask which worker this pod is; blocks until there is one to be."""
    ask, said = _Wire(url, token, holder), ""
    while True:
        try:
            return str(json.loads(ask("POST", "/slots", json.dumps({"holder": holder})))["worker"])
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            if repr(error) != said:
                sys.stderr.write(f"no worker to be yet: {error!r}\n")
            said = repr(error)
        time.sleep(_EVERY_S)


class Superseded(http.client.HTTPException):
    """Another pod is this worker now."""


class _Wire:
    """Requests to the training status service over one kept connection; from one thread."""

    def __init__(self, url: str, token: str, holder: str) -> None:
        self._netloc = urlsplit(url).netloc
        self._headers = {TOKEN_HEADER: token, HOLDER_HEADER: holder, "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None

    def __call__(self, method: str, path: str, body: str | None = None) -> bytes:
        """The answer; empty: nothing is known there. Raises OSError, HTTPException, Superseded."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._netloc, timeout=_TIMEOUT_S)
        try:
            self._connection.request(method, path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            raise
        if response.status == _TAKEN:
            raise Superseded(content.decode(errors="replace"))
        if response.status not in (200, 404):
            raise http.client.HTTPException(f"{method} {path}: HTTP {response.status}")
        return content if response.status == 200 else b""


class RemoteProgress(Progress):
    """The worker's end, in place of ``ProgressFile``.

    Args:
        url: of the training status service.
        token: of the platform.
        worker: whose progress it is.
        holder: who this process is, where workers are given out (``become``); empty: nobody asks.
    """

    def __init__(self, url: str, token: str, worker: str, holder: str = "") -> None:
        super().__init__()
        self._path, self._slot = f"/progress/{worker}", f"/slots/{worker}"
        self._ask = _Wire(url, token, holder)
        self._farewell = _Wire(url, token, holder)
        self._news, self._over = threading.Event(), threading.Event()

    def recall(self) -> None:
        """Take over what an earlier process told, and begin to tell. Blocks; gives up after ``_RECALL_S``."""
        end = time.monotonic() + _RECALL_S
        while True:
            try:
                if earlier := self._ask("GET", self._path):
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

    def leave(self) -> None:
        """Tell that this process ends: the next one need not wait for its silence. Blocks for a moment."""
        self._over.set()
        try:
            self._farewell("DELETE", self._slot)
        except (OSError, http.client.HTTPException):
            pass  # then it waits

    def _tell(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            if self._over.is_set():
                return
            try:
                self._ask("PUT", self._path, json.dumps(told(self)))
            except Superseded as error:
                sys.stderr.write(f"superseded: {error}\n")
                os._exit(_SUPERSEDED)  # two that write the same checkpoints would be worse than one that ends
            except (OSError, http.client.HTTPException):
                pass  # the next word has it all
            time.sleep(_EVERY_S)
