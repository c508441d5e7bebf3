"""What one replica serves, and why not something else: the last good model stays until a better one passed its checks.

Candidates come from a file that changed, or from the model registry. Checks are the mechanisms ``model_check``
(checksum) and ``golden_check`` (golden predictions); a candidate that fails one is rejected, counted and told.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .model import ModelRejected, load, scores


@dataclass(frozen=True)
class Served:
    """A model that takes traffic."""

    model: Any
    version: str
    """Of the card it came with."""
    sha256: str
    """Of the very bytes that were loaded."""
    source: str
    """``file`` or ``registry``."""


class ServedModel:
    """The one model of a replica. Not thread-safe: one caller loads, readers take ``now`` whole."""

    def __init__(self, mechanisms: dict[str, bool], promised_sha256: str) -> None:
        self.now: Served | None = None
        self.promised_sha256 = self._first_sha256 = promised_sha256
        """Checksum on the card of what should be served: of the file at start, then of the registry's version."""
        self.rejected_total = 0
        self.reasons: dict[str, str] = {}
        """Source → why what it has is not fit to be served; empty when all is well."""
        self._check, self._golden = mechanisms["model_check"], mechanisms["golden_check"]
        self._file: tuple[int, ...] | None = None

    @property
    def reason(self) -> str:
        """Why not all is well; empty when it is."""
        return "; ".join(f"{source}: {reason}" for source, reason in self.reasons.items())

    def file_changed(self, path: Path) -> bool:
        """Whether a file is another than at the last look: inode, size or modification time."""
        try:
            found = path.stat()
            seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            seen = (0,)
        changed, self._file = seen != self._file, seen
        return changed

    def take_file(self, directory: Path) -> None:
        """Make the model in ``directory`` the one that is served, if it passes.

        Where the registry's is served already, the file is what the next start falls back to: it is checked only.
        """
        try:
            artifact = (directory / "model.bin").read_bytes()
            card = json.loads((directory / "model.json").read_text())
        except (OSError, ValueError) as error:
            self.reject("file", f"model cannot be read: {error}")
            return
        if self._check and card.get("sha256") != self._first_sha256:
            said = f"the card promises {str(card.get('sha256'))[:12]}…, expected {self._first_sha256[:12]}…"
            self.reject("file", said)
            return
        self.take(artifact, card, "file")

    def take(self, artifact: bytes, card: dict[str, Any], source: str) -> bool:
        """Serve these bytes from now on if they pass; else what was served before goes on."""
        try:
            model = load(artifact, card, check=self._check, golden=self._golden)
        except ModelRejected as error:
            self.reject(source, str(error))
            return False
        except (KeyError, TypeError, ValueError) as error:
            self.reject(source, f"the model's card is damaged: {error!r}")
            return False
        self.reasons.pop(source, None)
        if source == "file" and self.now is not None and self.now.source == "registry":
            return True
        self.promised_sha256 = str(card["sha256"])
        self.now = Served(model, str(card["version"]), hashlib.sha256(artifact).hexdigest(), source)
        return True

    def reject(self, source: str, reason: str) -> None:
        """Note that what a source has is not fit to be served."""
        self.rejected_total += 1
        self.reasons[source] = f"model rejected: {reason}"

    def try_out(self, artifact: bytes, card: dict[str, Any], rows: list[list[float]]) -> list[float]:
        """A candidate's answers to ``rows``; it does not take traffic.

        Raises:
            ModelRejected: it did not even pass the checks of a replica.
        """
        return scores(load(artifact, card, check=self._check, golden=self._golden), rows)

    def health(self) -> dict[str, Any]:
        """What GET /model/health says: healthy when what is served is what should be."""
        now = self.now
        return {
            "healthy": now is not None and not self.reasons,
            "reason": self.reason,
            "version": now.version if now else None,
            "sha256": now.sha256 if now else None,
            "promised_sha256": self.promised_sha256,
            "source": now.source if now else None,
            "rejected_total": self.rejected_total,
            "at": time.time(),
        }
