"""The model that the replicas serve: trained once, deterministically; its artifact is plain numbers and a card.

The artifact ``model.bin`` is 34 little-endian float64: means (2 × 8), variances (2 × 8) and priors (2) of a Gaussian
naive Bayes. Nothing in it is executed when it is loaded, and nothing in it says that it is whole: that is what the
card's checksum and golden predictions are for.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FEATURES = 8
_CLASSES = 2
_NUMBERS = _CLASSES * FEATURES * 2 + _CLASSES
_TRAINING_ROWS = 2000
_GOLDEN_ROWS = 5
_GOLDEN_TOLERANCE = 1e-9


class ModelRejected(Exception):
    """The artifact is not the model that was promised; it is not served."""


def train(directory: Path, seed: int) -> str:
    """Train, write ``model.bin`` and its card ``model.json`` atomically; return the artifact's SHA-256."""
    import numpy as np

    with _without_pandas():
        from sklearn.naive_bayes import GaussianNB

    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(_TRAINING_ROWS, FEATURES))
    labels = (rows @ rng.normal(size=FEATURES) + rng.normal(scale=0.3, size=_TRAINING_ROWS) > 0).astype(int)
    model = GaussianNB().fit(rows, labels)
    artifact = b"".join(
        numbers.astype("<f8").tobytes()
        for numbers in (model.theta_, model.var_, model.class_prior_)  # type: ignore
    )
    directory.mkdir(parents=True, exist_ok=True)
    card = card_of(artifact, rows[:_GOLDEN_ROWS].tolist())
    replace(directory / "model.bin", artifact)
    replace(directory / "model.json", json.dumps(card).encode())  # last: who sees it finds what it speaks of
    return card["sha256"]


def card_of(artifact: bytes, golden_rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What a registry knows of an artifact: version, checksum, signature, golden inputs and their scores."""
    digest = hashlib.sha256(artifact).hexdigest()
    return {
        "version": digest[:12],
        "sha256": digest,
        "bytes": len(artifact),
        "signature": {"inputs": FEATURES, "output": "score"},
        "golden_rows": [list(row) for row in golden_rows],
        "golden_scores": scores(unpack(artifact), golden_rows),
    }


def unpack(artifact: bytes) -> Any:
    """The model in an artifact.

    Raises:
        ModelRejected: it has not the size of one.
    """
    import numpy as np

    with _without_pandas():
        from sklearn.naive_bayes import GaussianNB

    if len(artifact) != _NUMBERS * 8:
        raise ModelRejected(f"the artifact has {len(artifact)} bytes, expected {_NUMBERS * 8}")
    numbers = np.frombuffer(artifact, dtype="<f8")
    half = _CLASSES * FEATURES
    model = GaussianNB()
    model.classes_ = np.arange(_CLASSES)  # type: ignore[attr-defined]
    model.n_features_in_ = FEATURES  # type: ignore[attr-defined]
    model.theta_ = numbers[:half].reshape(_CLASSES, FEATURES)  # type: ignore[attr-defined]
    model.var_ = numbers[half : 2 * half].reshape(_CLASSES, FEATURES)  # type: ignore[attr-defined]
    model.class_prior_ = numbers[2 * half :]  # type: ignore[attr-defined]
    return model


def scores(model: Any, rows: Sequence[Sequence[float]]) -> list[float]:
    """Probability of the second class, row by row; NaN where the model's numbers are nonsense."""
    import numpy as np

    with np.errstate(all="ignore"):  # a damaged model divides by zero
        return [float(score) for score in model.predict_proba(rows)[:, 1]]


def load(artifact: bytes, card: dict[str, Any], *, check: bool = True, golden: bool = True) -> Any:
    """The model in an artifact, if it is the one on its card.

    Args:
        artifact: Content of ``model.bin``.
        card: Content of ``model.json``.
        check: Compare the checksum.
        golden: Compare the golden predictions.

    Raises:
        ModelRejected: of another size or checksum, or answering otherwise than when it was trained.
    """
    digest = hashlib.sha256(artifact).hexdigest()
    if check and digest != card["sha256"]:
        raise ModelRejected(f"checksum is {digest[:12]}…, expected {card['sha256'][:12]}…")
    model = unpack(artifact)
    if golden:
        pairs = zip(scores(model, card["golden_rows"]), card["golden_scores"], strict=True)
        worst = max(abs(a - b) for a, b in pairs)
        if not worst <= _GOLDEN_TOLERANCE:  # also when it is NaN
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


def replace(path: Path, content: bytes) -> None:
    """Replace a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":
    # --sandbox DIRECTORY --name trainer SEED, as all processes of a sandbox name themselves
    from .lifeline import die_with_supervisor

    die_with_supervisor()
    sys.stdout.write(train(Path(sys.argv[2]) / "model", int(sys.argv[5])))
