"""Damage to model files on this machine, and the way back: a verified copy first, whole files only, others' writes kept."""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import math
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.s3_client import STEP_S, beside
from mlchaos_dagster.drivers.s3_damage import damaged
from mlchaos_dagster.engine.files import sync_directory
from mlchaos_dagster.engine.ports import Lease, Step, no_step
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
    uid: int
    gid: int
    mode: int
    mtime_ns: int
    xattrs: dict[str, str] = field(default_factory=dict[str, str])
    """Extended attributes (access lists among them), in Base64."""


def resolve(directory: Path, select: str) -> tuple[str, ...]:
    """Files that match a glob, relative to `directory` unless it is absolute: `file:/absolute/path`."""
    found = (Path(name).resolve() for name in glob.glob(str(directory / select)))
    return tuple(sorted(f"{PREFIX}{path}" for path in found if path.is_file()))


def undo(targets: Sequence[str], how: str, backup: Path, step: Step = no_step) -> dict[str, Any]:
    """Copy every file to `backup`, fsynced and read back, and note what its damage will be.

    Raises:
        DriverError: a file is empty or cannot be copied, has a second name, or belongs to somebody we cannot give it back
            to; it must not be damaged then.
    """
    originals: list[Original] = []
    try:
        backup.mkdir(parents=True, exist_ok=True)
        for number, target in enumerate(targets):
            path, copy = Path(target.removeprefix(PREFIX)), backup / f"{number:05}.original"
            before = path.stat()
            _refuse_unfit(path, before)
            _write(copy, _chunks(path, step), step)
            digest = _digest(_chunks(copy, step))
            if digest != sha256_of(path, step):
                raise DriverError(f"{path} changes while it is copied", driver="model", verb="undo")
            size, seed = copy.stat().st_size, uuid.uuid4().hex
            worse = _digest(damaged(_chunks(copy, step), size, how, seed))
            originals.append(
                Original(
                    path=str(path),
                    size=size,
                    sha256=digest,
                    copy=str(copy.resolve()),
                    seed=seed,
                    damaged_sha256=worse,
                    uid=before.st_uid,
                    gid=before.st_gid,
                    mode=stat.S_IMODE(before.st_mode),
                    mtime_ns=before.st_mtime_ns,
                    xattrs=_xattrs(path),
                )
            )
        (backup / "armed").write_text("")
        sync_directory(backup)
    except OSError as e:
        raise DriverError(f"no copy could be made: {e}", driver="model", verb="undo") from e
    return {"files": [asdict(o) for o in originals], "backup": str(backup.resolve())}


def inject(lease: Lease, step: Step = no_step) -> None:
    """Replace each file by a damaged copy; one that changed since it was copied is left alone.

    Raises:
        InjectFailed: the lease was recovered already, a file cannot be written, or all were changed by others.
    """
    where = {"driver": "model", "verb": "inject", "lease_id": lease.id}
    written = 0
    for original in originals_of(lease):
        if not (Path(lease.undo["backup"]) / "armed").exists():
            raise InjectFailed("the lease was recovered already", **where)
        if sha256_of(Path(original.path), step) != original.sha256:
            continue
        try:
            _replace(original, _damaged(lease, original, step), lease.id, step)
        except OSError as e:
            raise InjectFailed(f"{original.path}: {e.strerror or e}", **where) from e
        written += 1
    if not written:
        raise InjectFailed("all files were changed by others since they were copied; none was touched", **where)


def recover(lease: Lease, step: Step = no_step) -> None:
    """Put back every file that is as we left it, with owner, mode, attributes and time of change. Idempotent.

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
        if sha256_of(path, step) != original.damaged_sha256:
            continue
        try:
            if sha256_of(copy, step) != original.sha256:
                raise RecoverFailed(f"the copy {copy} of {path} is damaged", **where)
            _replace(original, _chunks(copy, step), lease.id, step, mtime_ns=original.mtime_ns)
        except OSError as e:
            raise RecoverFailed(f"{path}: {e.strerror or e}", **where) from e


def active(lease: Lease) -> Evidence:
    """What the files are now, by their SHA-256."""
    ours, lines = 0, list[str]()
    for original in originals_of(lease):
        now = sha256_of(Path(original.path))
        if now == original.damaged_sha256:
            ours += 1
            said = f"damaged ({lease.params['how']})"
        elif now == original.sha256:
            said = "as before"
        else:
            said = "written by somebody else since, left alone" if now else "gone, removed by somebody else"
        lines.append(f"{original.path}: SHA-256 {now[:12] or 'none'}…, before {original.sha256[:12]}…: {said}")
    return Evidence(present=ours > 0, effective=ours == len(lease.undo["files"]), lines=tuple(lines))


def originals_of(lease: Lease) -> list[Original]:
    """The files of a lease as they were."""
    return [Original(**entry) for entry in lease.undo["files"]]


def sha256_of(path: Path, step: Step = no_step) -> str:
    """Of a file's content; empty when it cannot be read."""
    try:
        return _digest(_chunks(path, step))
    except OSError:
        return ""


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path, step: Step = no_step) -> Iterator[bytes]:
    """`step` between them, at least every `STEP_S` seconds."""
    stepped = -math.inf
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            if time.monotonic() - stepped >= STEP_S:
                step(0, 0)
                stepped = time.monotonic()
            yield chunk


def _damaged(lease: Lease, original: Original, step: Step) -> Iterator[bytes]:
    return damaged(_chunks(Path(original.copy), step), original.size, str(lease.params["how"]), original.seed)


def _partial(path: Path, lease_id: str) -> Path:
    return path.with_name(f".{path.name}.{lease_id}")


def _refuse_unfit(path: Path, found: os.stat_result) -> None:
    """A file is replaced, never written into: what hangs on the old one beside its content must be put on the new one."""
    said = ""
    if found.st_nlink > 1:
        said = f"has {found.st_nlink} names (hard links): the others would keep the old content"
    elif os.geteuid() != 0:
        groups = {os.getegid(), *os.getgroups()}
        if found.st_uid != os.geteuid() or found.st_gid not in groups:
            said = f"belongs to {found.st_uid}:{found.st_gid}, and only root could give it back to them"
    if not found.st_size:
        said = "is empty: there is nothing to damage"
    if said:
        raise DriverError(f"{path} {said}", driver="model", verb="undo")


def _xattrs(path: Path) -> dict[str, str]:
    if not hasattr(os, "listxattr"):
        return {}
    return {name: base64.b64encode(os.getxattr(path, name)).decode() for name in os.listxattr(path)}


def _write(path: Path, content: Iterable[bytes], step: Step) -> None:
    with open(path, "wb") as file:
        for chunk in content:
            file.write(chunk)
        file.flush()
        beside(lambda: os.fsync(file.fileno()), step)


def _replace(
    original: Original, content: Iterable[bytes], lease_id: str, step: Step, *, mtime_ns: int | None = None
) -> None:
    """Another file under the same name, with all that hung on the old one. Raises OSError: the old one is there still."""
    path = Path(original.path)
    partial = _partial(path, lease_id)
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    _write(partial, content, step)
    os.chown(partial, original.uid, original.gid)
    os.chmod(partial, original.mode)  # after the owner: a change of owner takes bits away
    for name, value in original.xattrs.items():
        os.setxattr(partial, name, base64.b64decode(value))
    if mtime_ns is not None:
        os.utime(partial, ns=(time.time_ns(), mtime_ns))
    os.replace(partial, path)
    sync_directory(path.parent)
