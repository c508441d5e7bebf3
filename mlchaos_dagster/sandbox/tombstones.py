"""Leases that can never inject again, kept on disk so that a sandbox started later knows them too."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

_NAME = "tombstones.jsonl"


def read_tombstones(directory: Path) -> set[str]:
    """All buried leases; half a line from a crash is skipped."""
    buried: set[str] = set()
    try:
        lines = (directory / _NAME).read_text().splitlines()
    except OSError:
        return buried
    for line in lines:
        try:
            buried.add(str(json.loads(line)["lease_id"]))
        except (ValueError, KeyError, TypeError):
            continue
    return buried


def write_tombstone(directory: Path, lease_id: str) -> None:
    """Bury a lease.

    Raises:
        OSError: it is not on disk.
    """
    # The newline in front keeps us readable after somebody's half a line.
    line = "\n" + json.dumps({"lease_id": lease_id, "at": time.time()}) + "\n"
    file = os.open(directory / _NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
