"""The model that the replicas serve: trained once, deterministically; loaded only if it is the one expected."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FEATURES = 8
_TRAINING_ROWS = 2000
_GOLDEN_ROWS = 5
_GOLDEN_TOLERANCE = 1e-9


class ModelRejected(Exception):
    """The file is not the model that was promised; a replica that meets this never becomes ready."""


def train(directory: Path, seed: int) -> str:
    """Train, write ``model.pkl`` and ``model.json`` (golden predictions) atomically; return the model's SHA-256."""
    import numpy as np

    with _without_pandas():
        from sklearn.naive_bayes import GaussianNB

    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(_TRAINING_ROWS, FEATURES))
    labels = (rows @ rng.normal(size=FEATURES) + rng.normal(scale=0.3, size=_TRAINING_ROWS) > 0).astype(int)
    model = GaussianNB().fit(rows, labels)
    golden = rows[:_GOLDEN_ROWS]
    directory.mkdir(parents=True, exist_ok=True)
    blob = pickle.dumps(model, protocol=5)
    digest = hashlib.sha256(blob).hexdigest()
    card = {
        "sha256": digest,
        "version": digest[:12],
        "golden_rows": golden.tolist(),
        "golden_scores": model.predict_proba(golden)[:, 1].tolist(),
    }
    _replace(directory / "model.pkl", blob)
    _replace(directory / "model.json", json.dumps(card).encode())
    return digest


def load(directory: Path, expected_sha256: str) -> Any:
    """Read the model, checking its checksum before unpickling and its golden predictions after.

    Raises:
        ModelRejected: missing, of another checksum, or answering otherwise than when it was trained.
    """
    try:
        blob = (directory / "model.pkl").read_bytes()
        card = json.loads((directory / "model.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelRejected(f"model cannot be read: {error}") from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest != expected_sha256:
        raise ModelRejected(f"checksum is {digest[:12]}…, expected {expected_sha256[:12]}…")
    with _without_pandas():
        model = pickle.loads(blob)
    scores = model.predict_proba(card["golden_rows"])[:, 1]
    worst = max(abs(float(a) - b) for a, b in zip(scores, card["golden_scores"], strict=True))
    if worst > _GOLDEN_TOLERANCE:
        raise ModelRejected(f"golden predictions differ by {worst:.3g}")
    return model


@contextmanager
def _without_pandas() -> Iterator[None]:
    """Import scikit-learn without pandas, which it takes along when it can: a quarter of a replica's time to start.

    scikit-learn asks each time whether pandas was imported, so afterwards all is as if it were not installed.
    """
    if "pandas" in sys.modules:
        yield
        return
    sys.modules["pandas"] = None  # type: ignore[assignment]  an import of it fails
    try:
        yield
    finally:
        del sys.modules["pandas"]


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":
    # --sandbox DIRECTORY --name trainer SEED, as all processes of a sandbox name themselves
    from .lifeline import die_with_supervisor

    die_with_supervisor()
    sys.stdout.write(train(Path(sys.argv[2]) / "model", int(sys.argv[5])))
