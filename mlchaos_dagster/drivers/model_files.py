"""Damage to model files on this machine, and the way back: a verified copy first, whole files only, others' writes kept."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.s3_damage import damaged
from mlchaos_dagster.engine.files import sync_directory
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverError, InjectFailed, RecoverFailed

PREFIX = "file:"
_CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Original:
    """A file before the fault, and its copy."""

    path: str
    size: int
    sha256: str
    copy: str
    seed: str
    """Of the damage."""
    damaged_sha256: str
    """Known before anything is damaged: so that our damage can be told from others' writes though the copy be lost."""


def resolve(directory: Path, select: str) -> tuple[str, ...]:
    """Files that match a glob, relative to `directory` unless it is absolute: `file:/absolute/path`."""
    found = (Path(name).resolve() for name in glob.glob(str(directory / select)))
    return tuple(sorted(f"{PREFIX}{path}" for path in found if path.is_file()))


def undo(targets: Sequence[str], how: str, backup: Path) -> dict[str, Any]:
    """Copy every file to `backup`, fsynced and read back, and note what its damage will be.

    Raises:
        DriverError: a file is empty or cannot be copied; it must not be damaged then.
    """
    originals: list[Original] = []
    try:
        backup.mkdir(parents=True, exist_ok=True)
        for number, target in enumerate(targets):
            path, copy = Path(target.removeprefix(PREFIX)), backup / f"{number:05}.original"
            shutil.copy2(path, copy)
            with open(copy, "rb") as file:
                os.fsync(file.fileno())
            digest = sha256_of(copy)
            if digest != sha256_of(path):
                raise DriverError(f"{path} changes while it is copied", driver="model", verb="undo")
            size = copy.stat().st_size
            if not size:
                raise DriverError(f"{path} is empty: there is nothing to damage", driver="model", verb="undo")
            seed = uuid.uuid4().hex
            worse = _digest(damaged(_chunks(copy), size, how, seed))
            originals.append(Original(str(path), size, digest, str(copy.resolve()), seed, worse))
        (backup / "armed").write_text("")
        sync_directory(backup)
    except OSError as e:
        raise DriverError(f"no copy could be made: {e}", driver="model", verb="undo") from e
    return {"files": [asdict(o) for o in originals], "backup": str(backup.resolve())}


def inject(lease: Lease) -> None:
    """Replace each file by a damaged copy; one that changed since it was copied is left alone.

    Raises:
        InjectFailed: the lease was recovered already, a file cannot be written, or all were changed by others.
    """
    where = {"driver": "model", "verb": "inject", "lease_id": lease.id}
    written = 0
    for original in originals_of(lease):
        if not (Path(lease.undo["backup"]) / "armed").exists():
            raise InjectFailed("the lease was recovered already", **where)
        if sha256_of(Path(original.path)) != original.sha256:
            continue
        try:
            _replace(Path(original.path), _damaged(lease, original), lease.id, like=Path(original.copy))
        except OSError as e:
            raise InjectFailed(f"{original.path}: {e.strerror or e}", **where) from e
        written += 1
    if not written:
        raise InjectFailed("all files were changed by others since they were copied; none was touched", **where)


def recover(lease: Lease) -> None:
    """Put back every file that is as we left it, and read it back. Idempotent.

    Raises:
        RecoverFailed: a copy is lost or damaged, or a file cannot be written.
    """
    where = {"driver": "model", "verb": "recover", "lease_id": lease.id}
    with contextlib.suppress(OSError):
        (Path(lease.undo["backup"]) / "armed").unlink()
    for original in originals_of(lease):
        path, copy = Path(original.path), Path(original.copy)
        with contextlib.suppress(OSError):
            _partial(path, lease.id).unlink()
        if not _is_ours(original):
            continue
        try:
            if sha256_of(copy) != original.sha256:
                raise RecoverFailed(f"the copy {copy} of {path} is damaged", **where)
            _replace(path, _chunks(copy), lease.id, like=copy)
        except OSError as e:
            raise RecoverFailed(f"{path}: {e.strerror or e}", **where) from e


def active(lease: Lease) -> Evidence:
    """What the files are now, by their SHA-256."""
    ours = [o for o in originals_of(lease) if _is_ours(o)]
    lines: list[str] = []
    for original in originals_of(lease):
        now = sha256_of(Path(original.path))
        if original in ours:
            said = f"damaged ({lease.params['how']})"
        elif now == original.sha256:
            said = "as before"
        else:
            said = "written by somebody else since, left alone" if now else "gone, removed by somebody else"
        lines.append(f"{original.path}: SHA-256 {now[:12] or 'none'}…, before {original.sha256[:12]}…: {said}")
    return Evidence(present=bool(ours), effective=len(ours) == len(lease.undo["files"]), lines=tuple(lines))


def originals_of(lease: Lease) -> list[Original]:
    """The files of a lease as they were."""
    return [Original(**entry) for entry in lease.undo["files"]]


def sha256_of(path: Path) -> str:
    """Of a file's content; empty when it cannot be read."""
    try:
        return _digest(_chunks(path))
    except OSError:
        return ""


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _is_ours(original: Original) -> bool:
    """Whether the file is what the fault made of it."""
    return sha256_of(Path(original.path)) == original.damaged_sha256


def _damaged(lease: Lease, original: Original) -> Iterator[bytes]:
    return damaged(_chunks(Path(original.copy)), original.size, str(lease.params["how"]), original.seed)


def _partial(path: Path, lease_id: str) -> Path:
    return path.with_name(f".{path.name}.{lease_id}")


def _replace(path: Path, content: Iterable[bytes], lease_id: str, *, like: Path) -> None:
    partial = _partial(path, lease_id)
    with open(partial, "wb") as file:
        for chunk in content:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(like, partial)
    os.replace(partial, path)
    sync_directory(path.parent)
