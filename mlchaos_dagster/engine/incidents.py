"""The incident log: one JSON line per refusal, abort, emergency stop, fencing and unclean end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from mlchaos_dagster.engine.files import append_line
from mlchaos_dagster.engine.ports import Clock
from mlchaos_dagster.errors import StoreError

Kind = Literal[
    "refusal", "abort", "emergency_stop", "stop", "fenced", "recovered", "unclean", "watcher", "error", "action"
]


class IncidentLog:
    """Appends lines that people and machines read. A full disk loses a line, never a recovery."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock = path, clock

    def write(self, kind: Kind, what: str, **facts: Any) -> str:
        """One line; returns the text for the record. Never raises: logging must not stop a recovery."""
        try:
            append_line(self.path, {"at": round(self.clock.wall(), 3), "kind": kind, "what": what, **facts})
        except StoreError as e:
            return f"{kind}: {what} (not logged: {e})"
        return f"{kind}: {what}"

    def read(self, last: int = 100) -> list[dict[str, Any]]:
        """The newest lines, oldest first; a torn line is skipped."""
        try:
            lines = self.path.read_text(errors="replace").splitlines()[-last:]
        except OSError:
            return []
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found
