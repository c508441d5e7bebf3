"""Files that are never half-written: temp file, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mlchaos_dagster.errors import StoreError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, durably, or leave it as it was.

    Raises:
        StoreError: it could not be written (full disk, no permission); nothing changed.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as e:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise StoreError(f"cannot write {path}: {e.strerror or e}") from e


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of JSON. Raises StoreError."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace"))


def sync_directory(path: Path) -> None:
    """Make a rename in `path` durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line in a single write, so that lines of several processes never mix.

    Raises:
        StoreError: it could not be written.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as e:
        raise StoreError(f"cannot write {path}: {e.strerror or e}") from e
