"""The file by which others find a sandbox; it also tells ``down`` whom to kill when the supervisor is dead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_NAME = "state.json"


class StateFile:
    """Written whole or not at all, and only when something changed; for its owner's eyes (it holds the token)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written = ""

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file. A full disk leaves the old one whole; the next call tries again."""
        content = json.dumps(state, indent=1)
        if content == self._written:
            return
        partial = self._directory / f".{_NAME}.partial"
        try:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(file, "w") as stream:
                stream.write(content)
            os.replace(partial, self._directory / _NAME)
        except OSError:
            return
        self._written = content

    def remove(self) -> None:
        """There is no sandbox any more."""
        (self._directory / _NAME).unlink(missing_ok=True)
