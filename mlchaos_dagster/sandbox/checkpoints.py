"""A worker's checkpoints in the object store: written whole, pointed at last, verified before they are believed.

Each object carries the digest of its own content and whose and which step it is, so that one that was damaged, cut or
exchanged is known as such even when the pointer, which holds its SHA-256, is damaged too.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .s3 import S3, S3Error

BUCKET = "checkpoints"
KEEP = 5
_EXPIRE_AFTER = 100
"""Versions of pruned checkpoints and old pointers are kept for so many further ones, as a lifecycle rule would do."""


class BadCheckpoint(ValueError):
    """It is not what was written."""


@dataclass(frozen=True)
class Found:
    """What a worker resumes from."""

    step: int
    state: Mapping[str, np.ndarray]


def encode(worker: str, step: int, state: Mapping[str, np.ndarray]) -> bytes:
    """A checkpoint as the bytes of an npz file."""
    buffer = io.BytesIO()
    digest = np.frombuffer(_digest(worker, step, state), dtype=np.uint8)
    arrays: dict[str, Any] = {"worker": np.array(worker), "step": np.array(step), "digest": digest, **state}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def decode(content: bytes, worker: str, step: int) -> dict[str, np.ndarray]:
    """The state in a checkpoint of this worker at this step. Raises BadCheckpoint."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        told = (str(found.pop("worker")), int(found.pop("step")))
        digest = found.pop("digest").tobytes()
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadCheckpoint(f"not a checkpoint: {error}") from error
    if told != (worker, step):
        raise BadCheckpoint(f"it is {told[0]}'s of step {told[1]}")
    if digest != _digest(worker, step, found):
        raise BadCheckpoint("its digest differs")
    return found


class Shelf:
    """The checkpoints of one worker. Blocking; one thread at a time."""

    def __init__(self, s3: S3, worker: str) -> None:
        self._s3 = s3
        self._worker = worker
        self._keys: list[str] = []
        self._old: deque[tuple[str, str]] = deque()
        self._pointer_version = ""
        self.skipped = 0
        """Checkpoints that turned out to be damaged when the last one was looked for."""

    @property
    def _pointer(self) -> str:
        return f"{self._worker}/latest.json"

    def save(self, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Write a checkpoint, then the pointer to it; then forget all but the last five.

        Raises:
            S3Error, S3Unavailable: the last one that was pointed at is still the last one.
        """
        key, content = f"{self._worker}/step-{step:08d}.npz", encode(self._worker, step, state)
        version = self._s3.put(BUCKET, key, content)
        told = {"key": key, "step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        pointer = self._s3.put(BUCKET, self._pointer, json.dumps(told).encode())
        if key not in self._keys:
            self._keys.append(key)
        self._old.append((key, version))
        if self._pointer_version:
            self._old.append((self._pointer, self._pointer_version))
        self._pointer_version = pointer
        while len(self._keys) > KEEP:
            gone = self._keys.pop(0)
            self._old.append((gone, self._s3.delete(BUCKET, gone)))
        while len(self._old) > 3 * _EXPIRE_AFTER:
            self._s3.delete(BUCKET, *self._old.popleft())

    def latest(self) -> Found | None:
        """The last valid checkpoint; None when there is none. Damaged ones are skipped and counted.

        Raises:
            S3Error, S3Unavailable: nobody knows.
        """
        self.skipped = 0
        self._keys = self._s3.keys(BUCKET, f"{self._worker}/step-")
        pointed, sha256 = self._pointed()
        others = [key for key in reversed(self._keys) if key != pointed]
        for key in [pointed, *others] if pointed else others:
            try:
                content = self._s3.get(BUCKET, key)
                if key == pointed and hashlib.sha256(content).hexdigest() != sha256:
                    raise BadCheckpoint("it is not what the pointer tells")
                step = _step_of(key)
                return Found(step, decode(content, self._worker, step))
            except BadCheckpoint:
                self.skipped += 1
            except S3Error as error:
                if error.status != 404:
                    raise
        return None

    def _pointed(self) -> tuple[str, str]:
        """(key, SHA-256) that the pointer tells; empty when there is none or it makes no sense."""
        try:
            told: Any = json.loads(self._s3.get(BUCKET, self._pointer))
            key, sha256 = str(told["key"]), str(told["sha256"])
        except (ValueError, KeyError, TypeError):
            return "", ""
        except S3Error as error:
            if error.status != 404:
                raise
            return "", ""
        return (key, sha256) if key.startswith(f"{self._worker}/step-") else ("", "")


def _step_of(key: str) -> int:
    try:
        return int(key.rpartition("/step-")[2].removesuffix(".npz"))
    except ValueError:
        raise BadCheckpoint(f"{key} is no checkpoint's name") from None


def _digest(worker: str, step: int, state: Mapping[str, np.ndarray]) -> bytes:
    found = hashlib.sha256(f"{worker}/{step}".encode())
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        found.update(f"/{name}/{array.dtype.str}/{array.shape}/".encode() + array.tobytes())
    return found.digest()
