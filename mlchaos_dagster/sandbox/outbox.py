"""An outbox: records that are kept in a file, in order, until somebody else has them. Survives the death of its process."""

from __future__ import annotations

import json
import os
import uuid
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

_COMPACT_BYTES = 1_000_000


class Outbox:
    """Each record has a ``seq``, one more than the one before; ``writer`` and ``seq`` are its idempotency key.

    ``append`` blocks for a disk write; the rest is quick. One process at a time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = path.with_suffix(".mark")
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = _read_mark(self._mark)
        self.writer: str = mark.get("writer") or uuid.uuid4().hex[:12]
        self.sent: int = mark.get("sent", 0)
        """All up to this one are where they belong."""
        self.seq: int = self.sent
        """The last one taken in."""
        self._waiting: deque[dict[str, Any]] = deque()
        self._load()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._write_mark()  # the writer's name must not be lost before the first record is sent

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Take records in; on disk when this returns. Adds ``seq`` to each. Raises OSError."""
        numbered = [{**record, "seq": self.seq + place} for place, record in enumerate(records, 1)]
        os.write(self._file, "".join(json.dumps(record) + "\n" for record in numbered).encode())
        getattr(os, "fdatasync", os.fsync)(self._file)
        self.seq += len(numbered)
        self._waiting.extend(numbered)

    def head(self, most: int) -> list[dict[str, Any]]:
        """The oldest ones that wait."""
        return list(islice(self._waiting, most))

    def done(self, up_to: int) -> None:
        """Those up to this number are where they belong. (Told twice after a crash: hence the idempotency key.)"""
        while self._waiting and self._waiting[0]["seq"] <= up_to:
            self._waiting.popleft()
        self.sent = max(self.sent, up_to)
        self._write_mark()
        if not self._waiting and os.fstat(self._file).st_size > _COMPACT_BYTES:
            os.ftruncate(self._file, 0)

    def _load(self) -> None:
        try:
            content = self._path.read_bytes()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]  # a last line without an end was never taken in
        if len(whole) < len(content):
            with self._path.open("rb+") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            record = json.loads(line)
            if record["seq"] > self.seq:
                self.seq = record["seq"]
                self._waiting.append(record)

    def _write_mark(self) -> None:
        partial = self._mark.with_suffix(".partial")
        partial.write_text(json.dumps({"writer": self.writer, "sent": self.sent}))
        os.replace(partial, self._mark)


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
