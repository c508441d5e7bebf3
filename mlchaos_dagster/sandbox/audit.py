"""The audit log of what concerns security: who, when, what, from where; append-only, each line bound to the one before.

JSON lines in ``audit.jsonl``, fsynced one by one. Each has ``n`` (1, 2, …), ``at`` (UTC, ISO 8601), ``who``, ``what``,
``where``, details, and ``prev``: the SHA-256 of the whole line before (of nothing for the first). Who changes, inserts or
removes a line must write all later ones anew; a log that was cut at its end, or written anew as a whole, still verifies by
itself, so ``verify`` takes the last line that somebody else remembers (the edge does, see its ``audit_intact``).

    python -m mlchaos_dagster.sandbox.audit FILE      verify and sum up; 0 = intact, 1 = broken
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

NAME = "audit.jsonl"
_START = hashlib.sha256(b"").hexdigest()
_TAIL = 64 * 1024
"""No line is longer."""


@dataclass(frozen=True)
class Head:
    """The last line of a log: its number and the SHA-256 of its bytes."""

    n: int
    sha256: str


def append(path: Path, who: str, what: str, where: str, **details: Any) -> Head:
    """Write one entry and wait until the disk has it. Several processes may do so at once.

    Raises:
        OSError: it could not be written.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # the number and hash of the last line must still be those when ours is there
        size = os.fstat(file).st_size
        tail = os.pread(file, _TAIL, max(0, size - _TAIL))
        last = tail.rstrip(b"\n").rpartition(b"\n")[2]
        torn = b"" if not tail or tail.endswith(b"\n") else b"\n"  # by a crash: it stays, and ``verify`` says so
        entry = {
            "n": _number(last) + 1,
            "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "who": who,
            "what": what,
            "where": where,
            **details,
            "prev": _digest(last),
        }
        line = json.dumps(entry, separators=(",", ":")).encode()
        os.write(file, torn + line + b"\n")
        os.fsync(file)
        return Head(entry["n"], _digest(line))
    finally:
        os.close(file)


async def note(path: Path, who: str, what: str, where: str, **details: Any) -> Head:
    """``append``, beside the event loop: a disk may take its time."""
    return await asyncio.to_thread(lambda: append(path, who, what, where, **details))


def verify(path: Path, known: Head | None = None) -> int | None:
    """Number of the first line that does not fit the one before it; None when all do.

    That line or the one before is not as it was written. ``known``: a line that somebody remembers and that must still be
    there; without it nobody can tell about the last line. A log that does not exist has no lines.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = [b""]
    if lines.pop():
        return len(lines) + 1  # no end of line: torn
    before = _START
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None or entry.get("n") != number or entry.get("prev") != before:
            return number
        before = _digest(line)
        if known is not None and known.n == number and known.sha256 != before:
            return number
    return None if known is None or known.n <= len(lines) else len(lines) + 1


def head(path: Path) -> Head:
    """The last line as it is now; number 0 of a log without any."""
    lines = entries(path)
    if not lines:
        return Head(0, _START)
    return Head(len(lines), _digest(path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]))


def entries(path: Path) -> list[dict[str, Any]]:
    """Every entry that can be read."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [entry for line in lines if (entry := _entry(line)) is not None]


def summary(path: Path) -> dict[str, Any]:
    """What an investigation asks first: what happened how often, who did it, and from where credentials were refused."""
    found = entries(path)
    refused: Counter[str] = Counter()
    for entry in found:
        if entry["what"] == "credential_refused":
            refused[entry["where"]] += int(entry.get("count", 1))
    broken = verify(path)
    return {
        "entries": len(found),
        "intact": broken is None,
        "first_broken_line": broken,
        "from": found[0]["at"] if found else None,
        "to": found[-1]["at"] if found else None,
        "what": dict(Counter(entry["what"] for entry in found)),
        "who": dict(Counter(entry["who"] for entry in found)),
        "refused_from": dict(refused),
    }


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"n", "at", "who", "what", "where", "prev"} <= set(entry) else None


def _number(line: bytes) -> int:
    entry = _entry(line)
    return int(entry["n"]) if entry is not None else 0


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


if __name__ == "__main__":
    said = summary(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(said, indent=2) + "\n")
    sys.exit(0 if said["intact"] else 1)
