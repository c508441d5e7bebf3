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

    def latest(self, experiment: str, environment: str, since: float) -> tuple[RunRecord, Verdict | None] | None:
        """The newest run of an experiment in an environment that was written after `since` (Unix time); None: none was.

        Older files are not opened, and of the others only those that are asked for are parsed in full.

        Raises:
            StoreError: a record that may be the one cannot be read.
        """
        written: list[tuple[float, str]] = []
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and not entry.name.startswith("."):
                        written.append((entry.stat().st_mtime, entry.name.removesuffix(".json")))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreError(f"cannot read the records in {self.directory}: {e}") from e
        for at, run_id in sorted(written, reverse=True):
            if at < since:
                return None
            record, verdict = self._of(run_id, experiment)
            if record is not None and record.environment.name == environment:
                return record, verdict
        return None

    def _of(self, run_id: str, experiment: str) -> tuple[RunRecord | None, Verdict | None]:
        """A run, when it is one of the experiment. Raises StoreError."""
        try:
            named = json.loads(self.path(run_id).read_text())["record"]["experiment"]["name"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(f"cannot read the record {self.path(run_id)}: {str(e).splitlines()[0]}") from e
        return self.load(run_id) if named == experiment else (None, None)

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
