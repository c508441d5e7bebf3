"""Records on disk: `<run_id>.json` (facts and verdict) and `<run_id>.samples.json.gz` (raw samples)."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.record import RunRecord, Samples, Verdict
from mlchaos_dagster.engine.files import write_atomic
from mlchaos_dagster.errors import SpecError, StoreError


class RecordStore:
    """One directory of records. Nothing is ever overwritten but a verdict by a newer judgement."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, run_id: str) -> Path:
        """Where a run's record lies."""
        return self.directory / f"{run_id}.json"

    def save(self, record: RunRecord, samples: Samples) -> RunRecord:
        """Samples first, then the record that names them and their checksum.

        Raises:
            StoreError: not written; an earlier state is untouched.
        """
        packed = gzip.compress(json.dumps(samples.to_columns(), separators=(",", ":")).encode(), 6, mtime=0)
        name = f"{record.run_id}.samples.json.gz"
        write_atomic(self.directory / name, packed)
        record = record.model_copy(update={"samples_file": name, "samples_sha256": hashlib.sha256(packed).hexdigest()})
        self._write(record, None)
        return record

    def save_verdict(self, record: RunRecord, verdict: Verdict) -> None:
        """Put the judgement beside the facts; a run judged again stays as old as it is. Raises StoreError."""
        path = self.path(record.run_id)
        try:
            age = path.stat()
        except OSError:
            age = None
        self._write(record, verdict)
        if age is not None:
            os.utime(path, ns=(age.st_atime_ns, age.st_mtime_ns))

    def _write(self, record: RunRecord, verdict: Verdict | None) -> None:
        body: dict[str, Any] = {"record": record.model_dump(mode="json", by_alias=True)}
        body["verdict"] = verdict.model_dump(mode="json") if verdict else None
        write_atomic(self.path(record.run_id), json.dumps(body, ensure_ascii=False, indent=1).encode())

    def load(self, run_id: str) -> tuple[RunRecord, Verdict | None]:
        """The facts and, when it was judged, the verdict.

        Raises:
            StoreError: it is missing or cannot be read.
        """
        path = self.path(run_id)
        try:
            body = json.loads(path.read_text())
            verdict = body.get("verdict")
            return RunRecord.model_validate(body["record"]), Verdict.model_validate(verdict) if verdict else None
        except (OSError, ValueError, KeyError) as e:
            raise StoreError(f"cannot read the record {path}: {str(e).splitlines()[0]}") from e

    def samples(self, record: RunRecord) -> Samples:
        """The raw samples, verified by checksum. Raises StoreError."""
        path = self.directory / record.samples_file
        try:
            packed = path.read_bytes()
            if hashlib.sha256(packed).hexdigest() != record.samples_sha256:
                raise StoreError(f"{path} does not match the checksum in its record")
            return Samples.from_columns(json.loads(gzip.decompress(packed)))
        except (OSError, EOFError, ValueError, KeyError) as e:
            raise StoreError(f"cannot read {path}: {e}") from e

    def ids(self) -> list[str]:
        """Run ids, oldest first (by time of writing)."""
        try:
            paths = [p for p in self.directory.glob("*.json") if not p.name.startswith(".")]
            return [p.stem for p in sorted(paths, key=lambda p: p.stat().st_mtime)]
        except OSError:
            return []

    def all(self) -> Iterator[tuple[RunRecord, Verdict | None]]:
        """Every readable record, newest first; unreadable ones are skipped (`mlchaos history` counts them)."""
        for run_id in reversed(self.ids()):
            try:
                yield self.load(run_id)
            except StoreError:
                continue

    def find(self, run: str) -> str:
        """The run id that `run` means: an id, a unique prefix of at least four characters, or an
        experiment's name (its newest run).

        Raises:
            SpecError: nothing, or more than one, fits.
        """
        ids = self.ids()
        if run in ids:
            return run
        matches = [i for i in ids if i.startswith(run)] if len(run) >= 4 else []
        if len(matches) == 1:
            return matches[0]
        if len(matches) > 1:
            raise SpecError(f'"{run}" fits {len(matches)} runs: {", ".join(m[:12] for m in matches[:5])}', "RUN")
        for record, _ in self.all():
            if record.experiment.name == run:
                return record.run_id
        raise SpecError(f'no run "{run}". `mlchaos history` lists the runs', "RUN")
