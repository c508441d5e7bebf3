"""The truth log: what really happened to which process and when, so that other people's measurements can be checked."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class TruthLog:
    """Append-only JSON lines, flushed one by one.

    Each line has ``at`` (wall clock, seconds), ``mono`` (monotonic clock of the machine, seconds), ``what``, ``who``,
    ``pid`` and ``lease`` (null where they do not apply) and details.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(
        self,
        what: str,
        who: str | None = None,
        pid: int | None = None,
        lease: str | None = None,
        *,
        at: float | None = None,
        mono: float | None = None,
        **details: Any,
    ) -> None:
        """Write one line; ``at`` and ``mono`` default to now. A full disk loses the line, not the sandbox."""
        line = {
            "at": time.time() if at is None else at,
            "mono": time.monotonic() if mono is None else mono,
            "what": what,
            "who": who,
            "pid": pid,
            "lease": lease,
            **details,
        }
        try:
            os.write(self._file, (json.dumps(line) + "\n").encode())
        except OSError:
            pass

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
