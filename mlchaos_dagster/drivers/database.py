"""Damaged pages in a database that is in use: SQLite files of the sandbox, changed from outside.

A file that takes the path's place by `rename` is not what the running service has open: its connections would go on with
the old inode, nothing would be hit, and what they wrote would be gone afterwards. So pages are damaged *in place*, under
SQLite's own exclusive lock, taken by a connection of ours: no transaction of the service is half done meanwhile, its
write-ahead log (if it has one) is empty, and our commit at the end makes its connections forget the pages they had cached.

The original is kept twice: `undo` writes a whole snapshot, fsynced and verified (SHA-256, integrity check), into the
lease's backup; `inject`, under the lock, keeps the pages as they are *at that moment* before it touches the first one.

`recover` puts those pages back, each one only where our noise still is. A page on which the service wrote since is its
own: it can only have written what it could read, since noise never passes as a page (see `sqlite_file.noise`), so that
transactions during the fault either kept clear of damaged pages or failed whole. What was committed meanwhile is thereby
kept, not copied. Should the integrity check fail all the same, the snapshot as a whole takes the content's place (by
SQLite's backup API, as one transaction), and the file as it was stays beside it as `<name>.damaged-<lease>`, and is told.
Only where we damaged something: what others broke, or put in the file's place, is told and left alone.

A lease whose content was lost knows neither its databases nor its backup. So `inject` leaves what `undo` found beside the
damage, as `<name>.backup-<lease>`, before it touches a page; noise that has no such file is found by the lease's id.

Killed at any moment: before the pages are kept nothing is damaged; after, each page is either original or noise, and the
next `recover` tells them apart. The damage has no deadline of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers import sqlite_file as sqlite
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed

NAME = "database"
_SUFFIX = ".sqlite"
_RECOVERED = "recovered"
"""Marker in the backup: this lease was recovered and never injects (again)."""
_ERRORS = (OSError, sqlite3.Error)


class DatabaseDriver:
    """Driver for the SQLite files in a sandbox's `data` directory, whether or not the sandbox is up."""

    name = NAME
    faults = frozenset({"database_corruption"})
    self_limiting: frozenset[str] = frozenset()

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def resolve(self, target: Target) -> tuple[str, ...]:
        """Names (file names without their ending) of the databases that match one of the globs now, sorted."""
        globs = [glob.strip() for glob in target.select.split(",")]
        names = (path.stem for path in (self.directory / "data").glob(f"*{_SUFFIX}"))
        return tuple(sorted(name for name in names if any(fnmatchcase(name, glob) for glob in globs)))

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target | None = None,
        backup: Path | None = None,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """Where each database is, a verified snapshot of it, and what is in it: {databases: {name: {…}}}.

        Raises:
            DriverUnavailable: a database is not there or locked.
            DriverError: it is damaged already, too small, or the copy cannot be relied on.
        """
        if backup is None:
            raise DriverError("damage needs a place for the backup", driver=NAME, verb="undo")
        found: dict[str, Any] = {}
        for name in targets:
            path = (self.directory / "data" / f"{name}{_SUFFIX}").resolve()
            copy = (backup / f"{name}{_SUFFIX}").resolve()
            try:
                if not path.is_file():
                    raise DriverUnavailable(f"there is no database {path}", driver=NAME, verb="undo")
                sqlite.snapshot(path, copy, step)
                if wrong := sqlite.problems(copy):
                    said = f"{path} is damaged already: {'; '.join(wrong)}"
                    raise DriverError(said, driver=NAME, verb="undo")
                with sqlite.raw(copy) as file:
                    size, pages = sqlite.shape(file)
                if pages < 2:
                    said = f"{path} has {pages} pages; damage needs at least two (the first one is left)"
                    raise DriverError(said, driver=NAME, verb="undo")
                content = sqlite.tables(copy, step=step)
            except sqlite3.OperationalError as error:
                raise DriverUnavailable(f"{path}: {error}", driver=NAME, verb="undo") from error
            except _ERRORS as error:
                raise DriverError(f"{path} cannot be kept aside: {error}", driver=NAME, verb="undo") from error
            found[name] = {
                "path": str(path),
                "backup": str(copy),
                "sha256": sqlite.sha256(copy),
                "page_size": size,
                "pages": pages,
                "tables": content,
            }
        return {"databases": found}

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Damage a fraction of the pages of each database, chosen by the lease's id.

        Raises:
            InjectFailed: recovered or closed already, without its backup, or the file could not be changed. On failure:
                some pages may be damaged, all of them kept.
        """
        for name in lease.targets:
            facts = _facts(lease, name, "inject")
            path = Path(facts["path"])
            try:
                if sqlite.sha256(Path(facts["backup"])) != facts["sha256"]:
                    raise InjectFailed(f"{facts['backup']} is not what was written", driver=NAME, verb="inject")
                with sqlite.raw(path) as file, sqlite.locked(path):
                    # Under the lock: whoever recovers marks first, and then waits for it.
                    if (Path(facts["backup"]).parent / _RECOVERED).exists():
                        said = f"lease {lease.id} was recovered; it can never inject again"
                        raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id)
                    _damage(file, facts, lease, step)
            except _ERRORS as error:
                said = f"{name}: {error}"
                raise InjectFailed(said, driver=NAME, verb="inject", lease_id=lease.id) from error

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Put back the original of every page that still holds our noise; see the module for what else may be needed.

        Raises:
            RecoverFailed: a database still has our damage or could not be looked at, or the lease could not be marked
                as recovered. All other databases are restored.
        """
        failed: list[str] = []
        for name, facts in self._known(lease, "recover"):
            try:
                failed += _restore(name, facts, lease, step)
            except _ERRORS as error:
                failed.append(f"{name}: {error}")
        if failed:
            raise RecoverFailed("; ".join(failed), driver=NAME, verb="recover", lease_id=lease.id)

    def active(self, lease: Lease) -> Evidence:
        """What the file says now: pages with our noise, the integrity check, the rows that were recorded.

        Raises:
            DriverUnavailable: a database could not be read (locked by a long transaction), or there is none to look at
                for a lease whose content was lost.
        """
        present, effective, lines = False, True, list[str]()
        for name, facts in self._known(lease, "active"):
            path = Path(facts["path"])
            if not path.exists():
                lines.append(f"{path} is gone, and the damage with it")
                effective = False
                continue
            try:
                noisy = _noisy(path, facts, lease)
                if not noisy and not sqlite.is_database(path):
                    lines.append(f"{path} is no database (any more), and no page of it holds our noise: left alone")
                    effective = False
                    continue
                wrong = sqlite.problems(path)
                if noisy or (wrong and _may_be_ours(facts)):
                    present, effective = True, effective and bool(noisy and wrong)
                    lines.append(f"{name}: {len(noisy)} of {facts.get('pages', 'unknown')} pages damaged")
                    lines.append(f"{name}: integrity check: {'; '.join(wrong) or 'ok'}")
                    continue
                effective = False
                if wrong:
                    lines.append(f"{name}: integrity check: {'; '.join(wrong)}")
                    lines.append(f"{name}: not ours, and left alone: no page was damaged by lease {lease.id}")
                else:
                    lines += [f"{name}: integrity check: ok", *_rows(path, facts)]
            except _ERRORS as error:
                raise DriverUnavailable(f"{name}: {error}", driver=NAME, verb="active", lease_id=lease.id) from error
            if (aside := _aside(path, lease)).exists():
                lines.append(f"{name} was replaced by its snapshot; what it was lies in {aside}")
        return Evidence(present=present, effective=effective, lines=tuple(lines))

    def _known(self, lease: Lease, verb: str) -> list[tuple[str, dict[str, Any]]]:
        """Each database and what the lease says of it; without that, what lies beside it; without that, only its path."""
        if lease.undo.get("databases") and lease.targets:
            return [(name, _facts(lease, name, verb)) for name in lease.targets]
        data = self.directory / "data"
        paths = {path.stem: path for path in data.glob(f"*{_SUFFIX}")}
        kept = {path.name.partition(_SUFFIX)[0]: path for path in data.glob(f"*{_SUFFIX}.backup-{lease.id}")}
        names = lease.targets or tuple(sorted({*paths, *kept}))
        if not names or not {*names} <= {*paths, *kept}:
            said = f"the lease's undo data is lost, and there is no database in {data} that could be looked at"
            error = {"recover": RecoverFailed, "active": DriverUnavailable}[verb]
            raise error(said, driver=NAME, verb=verb, lease_id=lease.id)
        return [
            (name, _told_beside(kept.get(name)) or {"path": str((data / f"{name}{_SUFFIX}").resolve())})
            for name in names
        ]


def _facts(lease: Lease, name: str, verb: str) -> dict[str, Any]:
    try:
        return lease.undo["databases"][name]
    except KeyError:
        said = f"the lease does not say where {name} is; its file was damaged"
        error = {"inject": InjectFailed, "recover": RecoverFailed, "active": DriverUnavailable}[verb]
        raise error(said, driver=NAME, verb=verb, lease_id=lease.id) from None


def _told_beside(path: Path | None) -> dict[str, Any] | None:
    """What `inject` left; None for half a file: it died before the first page."""
    try:
        return json.loads(path.read_text()) if path is not None else None
    except (OSError, ValueError):
        return None


def _restore(name: str, facts: dict[str, Any], lease: Lease, step: Step) -> list[str]:
    """What is still wrong afterwards and may be ours. Raises OSError, sqlite3.Error."""
    path, failed = Path(facts["path"]), _mark_recovered(facts)
    if path.exists() and (_noisy(path, facts, lease) or sqlite.is_database(path)):
        if "backup" in facts:
            with sqlite.raw(path) as file, sqlite.locked(path):
                _put_back(file, facts, lease, step)
            if sqlite.problems(path) and _kept(facts)[1].exists():
                _replace(path, facts, lease)
        if noisy := _noisy(path, facts, lease):
            failed.append(
                f"{path}: {len(noisy)} pages hold our noise, and the pages that were kept are not to be found"
            )
        elif _may_be_ours(facts) and (wrong := sqlite.problems(path)):
            failed.append(f"{path}: integrity check: {'; '.join(wrong)}")
    if not failed:
        _beside(path, lease).unlink(missing_ok=True)
    return failed


def _mark_recovered(facts: dict[str, Any]) -> list[str]:
    """Keep a late inject out. What stands in the way is told last: the damage goes first, on a full disk, too."""
    backup = Path(facts["backup"]).parent if "backup" in facts else None
    try:
        if backup is not None and backup.is_dir():
            (backup / _RECOVERED).touch()
            sqlite.sync(backup / _RECOVERED)
    except OSError as error:
        return [f"the lease could not be marked as recovered: {error}"]
    return []


def _noisy(path: Path, facts: dict[str, Any], lease: Lease) -> list[int]:
    return sqlite.damaged(path, lease.id, facts.get("page_size"))


def _may_be_ours(facts: dict[str, Any]) -> bool:
    """Whether we damaged a page, or nobody can tell since the backup is gone. Noise is ours in any case."""
    return "backup" in facts and (_kept(facts)[1].exists() or not Path(facts["backup"]).exists())


def _damage(file: int, facts: dict[str, Any], lease: Lease, step: Step) -> None:
    size, count = sqlite.shape(file)
    pages = sqlite.content_pages(size, count)
    number = min(len(pages), max(1, round(lease.params["fraction"] * len(pages))))
    chosen = sorted(random.Random(lease.id).sample(pages, number))
    kept, index = _kept(facts)
    if index.exists():  # the same request again
        chosen = json.loads(index.read_text())["pages"]
    else:
        digest = sqlite.keep_pages(file, chosen, size, kept, step)
        beside = _beside(Path(facts["path"]), lease)
        beside.write_text(json.dumps(facts))
        sqlite.sync(beside)
        partial = index.with_suffix(".partial")
        partial.write_text(json.dumps({"pages": chosen, "page_size": size, "sha256": digest}))
        sqlite.sync(partial)
        os.replace(partial, index)
        sqlite.sync(index)
    for done, page in enumerate(chosen):
        os.pwrite(file, sqlite.noise(lease.id, page, size), (page - 1) * size)
        if done % 500 == 0:
            step(len(chosen) + done, 2 * len(chosen))
    os.fsync(file)


def _put_back(file: int, facts: dict[str, Any], lease: Lease, step: Step) -> None:
    kept, index = _kept(facts)
    if not index.exists():
        return  # killed before the first page, or never injected: what noise there is would be seen by `active`
    told = json.loads(index.read_text())
    size, pages = told["page_size"], told["pages"]
    if sqlite.sha256(kept) != told["sha256"]:
        raise OSError(f"{kept} is not what was written")
    with kept.open("rb") as originals:
        for done, page in enumerate(pages):
            original = originals.read(size)
            if os.pread(file, size, (page - 1) * size) == sqlite.noise(lease.id, page, size):
                os.pwrite(file, original, (page - 1) * size)
            if done % 500 == 0:
                step(done, len(pages))
    os.fsync(file)


def _replace(path: Path, facts: dict[str, Any], lease: Lease) -> None:
    """The snapshot as a whole, as one transaction; what was there is kept beside it."""
    copy, aside = Path(facts["backup"]), _aside(path, lease)
    if not copy.exists() or sqlite.sha256(copy) != facts["sha256"]:
        raise OSError(f"{copy} is gone or is not what was written")
    if not aside.exists():
        partial = aside.with_name(f".{aside.name}.partial")
        with sqlite.raw(path) as file, sqlite.locked(path), partial.open("wb") as out:
            offset = 0
            while chunk := os.pread(file, 1 << 20, offset):
                out.write(chunk)
                offset += len(chunk)
        sqlite.sync(partial)
        os.replace(partial, aside)
    with contextlib.closing(sqlite.connect(copy)) as source, contextlib.closing(sqlite.connect(path)) as target:
        source.backup(target)


def _rows(path: Path, facts: dict[str, Any]) -> list[str]:
    recorded = facts.get("tables", {})
    now = sqlite.tables(path, {name: t["last"] for name, t in recorded.items() if t["last"] is not None})
    same = sum(table["rows"] for name, table in recorded.items() if _same(now.get(name), table))
    every = sum(table["rows"] for table in recorded.values())
    lines = (
        [f"{same} of {every} recorded rows are in tables with the same checksum"] if same == every and recorded else []
    )
    for name, table in recorded.items():
        if not _same(now.get(name), table):
            rows = now.get(name, {}).get("rows", 0)
            lines.append(f"table {name}: {rows} rows where {table['rows']} were recorded; its users changed it since")
    return lines


def _same(now: dict[str, Any] | None, then: dict[str, Any]) -> bool:
    return now is not None and (now["rows"], now["digest"]) == (then["rows"], then["digest"])


def _kept(facts: dict[str, Any]) -> tuple[Path, Path]:
    copy = Path(facts["backup"])
    return copy.with_suffix(".pages"), copy.with_suffix(".json")


def _beside(path: Path, lease: Lease) -> Path:
    return path.with_name(f"{path.name}.backup-{lease.id}")


def _aside(path: Path, lease: Lease) -> Path:
    return path.with_name(f"{path.name}.damaged-{lease.id}")
