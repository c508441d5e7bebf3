"""The training data: shards of a binary classification, their manifest, and how they are read back. Pure, seeded."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

BUCKET = "training-data"
MANIFEST = "manifest.json"
SHARDS = 20
ROWS = 128
"""Rows of a shard: 5 KB."""
FEATURES = 8


class BadShard(ValueError):
    """A shard is not what it should be."""


def objects(seed: int) -> dict[str, bytes]:
    """Key → content of everything in the bucket: shards of (x, y), and the manifest that tells of each."""
    rng = np.random.default_rng([seed, 20])
    weights = rng.normal(size=FEATURES)
    found: dict[str, bytes] = {}
    for number in range(SHARDS):
        x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
        y = (x @ weights + rng.normal(scale=0.5, size=ROWS) > 0).astype(np.int8)
        buffer = io.BytesIO()
        np.savez(buffer, x=x, y=y)
        found[f"shards/part-{number:03d}.npz"] = buffer.getvalue()
    told = [{"key": key, "bytes": len(body), "sha256": _sha256(body)} for key, body in found.items()]
    found[MANIFEST] = json.dumps({"rows": ROWS, "features": FEATURES, "shards": told}, indent=1).encode()
    return found


def manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """Shard key → {bytes, sha256}. Raises BadShard: this is no manifest."""
    try:
        return {str(one["key"]): {"bytes": int(one["bytes"]), "sha256": str(one["sha256"])} for one in _shards(content)}
    except (ValueError, KeyError, TypeError) as error:
        raise BadShard(f"{MANIFEST}: {error}") from error


def check(content: bytes, told: Mapping[str, Any]) -> None:
    """Compare a shard with what the manifest tells. Raises BadShard."""
    if len(content) != told["bytes"]:
        raise BadShard(f"{len(content)} bytes, not {told['bytes']}")
    if _sha256(content) != told["sha256"]:
        raise BadShard("the checksum differs")


def parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a shard: rows × features, and 0 or 1 for each row. Raises BadShard: it cannot be read as one."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadShard(f"not a shard: {error}") from error
    if x.ndim != 2 or x.shape[1] != FEATURES or y.shape != x.shape[:1]:
        raise BadShard(f"x of shape {x.shape} and y of shape {y.shape} do not go together")
    return x, y


def _shards(content: bytes) -> list[Any]:
    return json.loads(content)["shards"]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
