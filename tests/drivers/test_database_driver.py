"""Damage to a database in use: an own SQLite file, with a second connection (a second process, where locks matter) at work.

What is damaged and what is back is read with plain sqlite3, not with the driver's own eyes.
"""

from __future__ import annotations

import errno
import os
import pickle
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers import sqlite_file
from mlchaos_dagster.drivers.database import DatabaseDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import DriverError, DriverUnavailable, Halted, InjectFailed, RecoverFailed

pytestmark = [pytest.mark.timeout(180), pytest.mark.req("R4-11")]

KIND = "database_corruption"


def _create(path: Path, journal: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"PRAGMA journal_mode = {journal}")
        database.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY, name TEXT UNIQUE, body TEXT)")
        rows = [(n, f"run-{n}", f"{n:x}" * 60) for n in range(1500)]
        database.executemany("INSERT INTO runs VALUES (?, ?, ?)", rows)


@pytest.fixture(params=["DELETE", "WAL"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A database of some hundred pages, in both ways of keeping a journal."""
    path = tmp_path / "sandbox" / "data" / "tracking-db.sqlite"
    _create(path, request.param)
    return path


@pytest.fixture
def driver(path: Path) -> DatabaseDriver:
    return DatabaseDriver(path.parent.parent)


def _lease(driver: DatabaseDriver, tmp_path: Path, fraction: float = 0.3, lease: str = "lease-1") -> Lease:
    params: dict[str, Any] = {"fraction": fraction}
    return Lease(
        id=lease,
        run_id="run",
        experiment="test",
        environment="sandbox",
        driver="database",
        kind=KIND,
        targets=("tracking-db",),
        params=params,
        undo=driver.undo(KIND, ("tracking-db",), params, backup=tmp_path / "backups" / lease),
        duration_s=30,
        opened_wall=time.time(),
        deadline_wall=time.time() + 30,
        owner=Owner(os.getpid(), 0.0, "", ""),
    )


def _integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        try:
            return database.execute("PRAGMA integrity_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            return str(error)


def _rows(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT * FROM runs ORDER BY id").fetchall()


def test_damage_is_seen_by_an_open_connection_and_is_gone_afterwards(
    driver: DatabaseDriver, path: Path, tmp_path: Path
) -> None:
    before = _rows(path)
    with closing(sqlite3.connect(path)) as service:
        assert len(service.execute("SELECT * FROM runs").fetchall()) == len(before)  # and in its cache
        lease = _lease(driver, tmp_path)
        clean = driver.active(lease)
        assert not clean.present and not clean.effective
        driver.inject(lease)
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            service.execute("SELECT * FROM runs").fetchall()
        assert _integrity(path) != "ok"
        seen = driver.active(lease)
        assert seen.present and seen.effective
        driver.recover(lease)
        assert service.execute("SELECT * FROM runs ORDER BY id").fetchall() == before
    driver.recover(lease)
    after = driver.active(lease)
    assert not after.present and not after.effective
    assert "1500 of 1500 recorded rows are in tables with the same checksum" in after.lines
    assert _integrity(path) == "ok" and _rows(path) == before
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)
    assert _integrity(path) == "ok"


def test_what_was_committed_meanwhile_is_kept(driver: DatabaseDriver, path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as service:
        service.execute("PRAGMA synchronous = OFF")  # a kill is not a power cut, and this is many commits
        lease = _lease(driver, tmp_path, fraction=0.05)
        # After the snapshot and before the damage: the pages that are kept are those of the moment.
        service.execute("INSERT INTO runs VALUES (5000, 'between', 'b')")
        driver.inject(lease)
        kept: list[int] = []
        for n in range(6000, 6150):
            try:
                service.execute("INSERT INTO runs VALUES (?, ?, ?)", (n, f"late-{n}", "x" * 300))
                kept.append(n)
            except sqlite3.DatabaseError:
                pass
        assert kept  # else this shows nothing
        driver.recover(lease)
    assert _integrity(path) == "ok"
    assert {row[0] for row in _rows(path)} == {*range(1500), 5000, *kept}


def test_recover_without_inject_keeps_a_late_inject_out(driver: DatabaseDriver, path: Path, tmp_path: Path) -> None:
    lease = _lease(driver, tmp_path)
    driver.recover(lease)
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)
    assert _integrity(path) == "ok"


def test_a_closed_lease_injects_nothing(driver: DatabaseDriver, path: Path, tmp_path: Path) -> None:
    lease = _lease(driver, tmp_path)
    backup = Path(lease.undo["databases"]["tracking-db"]["backup"])
    backup.unlink()
    with pytest.raises(InjectFailed):
        driver.inject(lease)
    assert _integrity(path) == "ok"


DYING = """
import os, pickle, sys
from mlchaos_dagster.drivers.database import DatabaseDriver

def dies(verb, directory, lease, left):
    if (child := os.fork()) == 0:
        def deadly(real):
            def call(*arguments):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), 9)
                return real(*arguments)
            return call
        for name in ("pwrite", "fsync", "replace"):
            setattr(os, name, deadly(getattr(os, name)))
        getattr(DatabaseDriver(directory), verb)(lease)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for call, directory, lease in pickle.load(sys.stdin.buffer):
    print(dies("inject", directory, lease, call), dies("recover", directory, lease, call // 3 + 1))
"""


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_killed_at_any_write_another_process_restores_it(journal: str, tmp_path: Path) -> None:
    """Both verbs are killed (SIGKILL) at their nth `pwrite`, `fsync` or `replace`; the next recover puts all back."""
    made: list[tuple[int, Path, Lease]] = []
    for call in (1, 2, 3, 5, 7, 8, 9, 20, 30, 100):
        directory = tmp_path / f"{call}"
        _create(directory / "data" / "tracking-db.sqlite", journal)
        made.append((call, directory, _lease(DatabaseDriver(directory), directory)))
    before = _rows(made[0][1] / "data" / "tracking-db.sqlite")
    content = pickle.dumps([(call, str(directory), lease) for call, directory, lease in made])
    done = subprocess.run([sys.executable, "-c", DYING], input=content, capture_output=True, timeout=25, check=True)
    codes = [tuple(map(int, line.split())) for line in done.stdout.decode().splitlines()]
    assert sum(inject == -9 for inject, _ in codes) >= 9 and sum(recover == -9 for _, recover in codes) >= 6
    for _, directory, lease in made:
        path = directory / "data" / "tracking-db.sqlite"
        DatabaseDriver(directory).recover(lease)
        assert not DatabaseDriver(directory).active(lease).present
        assert _integrity(path) == "ok" and _rows(path) == before


def test_a_stop_during_inject_leaves_what_recover_restores(driver: DatabaseDriver, path: Path, tmp_path: Path) -> None:
    before = _rows(path)
    lease = _lease(driver, tmp_path)

    def step(done: int, total: int) -> None:
        if done > total / 2 - 1:
            raise Halted("enough")

    with pytest.raises(Halted):
        driver.inject(lease, step)
    driver.recover(lease)
    assert _integrity(path) == "ok" and _rows(path) == before


def test_what_cannot_be_put_together_is_replaced_by_the_snapshot(
    driver: DatabaseDriver, path: Path, tmp_path: Path
) -> None:
    before = _rows(path)
    lease = _lease(driver, tmp_path)
    driver.inject(lease)
    noisy = sqlite_file.damaged(path, lease.id)
    with path.open("rb+") as file:  # damage upon damage, not ours
        file.seek((noisy[0] - 1) * 4096)
        file.write(b"\xfe" * 4096)
    driver.recover(lease)
    assert _integrity(path) == "ok" and _rows(path) == before
    evidence = driver.active(lease)
    assert not evidence.present
    aside = path.with_name(f"{path.name}.damaged-{lease.id}")
    assert aside.exists() and any(str(aside) in line for line in evidence.lines)


def test_without_its_kept_pages_damage_is_never_called_clean(
    driver: DatabaseDriver, path: Path, tmp_path: Path
) -> None:
    lease = _lease(driver, tmp_path)
    driver.inject(lease)
    for file in (tmp_path / "backups" / lease.id).iterdir():
        file.unlink()
    with pytest.raises(RecoverFailed):
        driver.recover(lease)
    assert driver.active(lease).present


def test_somebody_elses_lock_is_waited_for_and_told(
    driver: DatabaseDriver, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.1)
    lease = _lease(driver, tmp_path)
    with closing(sqlite3.connect(path, isolation_level=None)) as service:
        service.execute("BEGIN IMMEDIATE")
        with pytest.raises(InjectFailed, match="locked"):
            driver.inject(lease)
        service.execute("ROLLBACK")
    assert _integrity(path) == "ok"


def test_what_is_damaged_missing_or_too_small_is_refused(tmp_path: Path) -> None:
    driver = DatabaseDriver(tmp_path)
    assert driver.resolve(Target(select="*")) == ()
    with pytest.raises(DriverUnavailable, match="there is no database"):
        driver.undo(KIND, ("a",), {}, backup=tmp_path / "b0")
    _create(tmp_path / "data" / "a.sqlite", "DELETE")
    with closing(sqlite3.connect(tmp_path / "data" / "b.sqlite")) as small:
        small.execute("PRAGMA user_version = 1")
    assert driver.resolve(Target(select="a, b*")) == ("a", "b")
    with pytest.raises(DriverError, match="at least two"):
        driver.undo(KIND, ("b",), {}, backup=tmp_path / "b1")
    with (tmp_path / "data" / "a.sqlite").open("rb+") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096)
    with pytest.raises(DriverError, match="damaged already"):
        driver.undo(KIND, ("a",), {}, backup=tmp_path / "b2")


def test_a_database_that_is_gone_holds_no_damage(driver: DatabaseDriver, path: Path, tmp_path: Path) -> None:
    lease = _lease(driver, tmp_path)
    driver.inject(lease)
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    driver.recover(lease)
    assert not driver.active(lease).present
    blind = replace(lease, undo={})
    with pytest.raises(RecoverFailed):
        driver.recover(blind)


def _stub(lease: Lease) -> Lease:
    """What is left of a lease whose file cannot be read: its name."""
    return replace(lease, targets=(), undo={}, params={}, kind="", environment="")


def test_a_lease_without_its_content_is_recovered_by_its_id(driver: DatabaseDriver, path: Path, tmp_path: Path) -> None:
    before, files = _rows(path), sorted(path.parent.iterdir())
    lease = _lease(driver, tmp_path)
    driver.inject(lease)
    _create(path.with_name("other.sqlite"), "DELETE")
    assert driver.active(_stub(lease)).present
    driver.recover(_stub(lease))
    assert _integrity(path) == "ok" and _rows(path) == before
    assert not driver.active(_stub(lease)).present and not driver.active(lease).present
    path.with_name("other.sqlite").unlink()
    assert sorted(path.parent.iterdir()) == files, "nothing of ours stays beside it"
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)


def test_without_content_and_without_originals_damage_is_found_and_never_called_clean(
    driver: DatabaseDriver, path: Path, tmp_path: Path
) -> None:
    lease = _lease(driver, tmp_path)
    driver.inject(lease)
    path.with_name(f"{path.name}.backup-{lease.id}").unlink()
    with pytest.raises(RecoverFailed, match="pages hold our noise"):
        driver.recover(_stub(lease))
    assert driver.active(_stub(lease)).present
    # Nor where there is nothing to look at.
    elsewhere = DatabaseDriver(tmp_path / "elsewhere")
    with pytest.raises(RecoverFailed, match="undo data is lost"):
        elsewhere.recover(_stub(lease))
    with pytest.raises(DriverUnavailable, match="undo data is lost"):
        elsewhere.active(_stub(lease))


def test_on_a_full_disk_the_damage_goes_and_the_missing_mark_is_told(
    driver: DatabaseDriver, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, lease = _rows(path), _lease(driver, tmp_path)
    driver.inject(lease)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", full)
        with pytest.raises(RecoverFailed, match="could not be marked as recovered.*No space left"):
            driver.recover(lease)
        assert _integrity(path) == "ok" and _rows(path) == before
    driver.recover(lease)


def test_what_others_broke_is_told_and_left_as_they_wrote_it(
    driver: DatabaseDriver, path: Path, tmp_path: Path
) -> None:
    lease = _lease(driver, tmp_path)  # and never injected
    with closing(sqlite3.connect(path)) as database:
        with database:
            database.execute("CREATE TABLE mine (x)")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("rb+") as file:
        file.seek(4096 * 20)
        file.write(b"\xfe" * 4096)
    content = path.read_bytes()
    driver.recover(lease)
    assert path.read_bytes()[4096:] == content[4096:], "only the counter on the first page moves"
    assert not list(path.parent.glob("*.damaged-*"))
    evidence = driver.active(lease)
    assert not evidence.present and any("not ours, and left alone" in line for line in evidence.lines)


@pytest.mark.parametrize("content", [b"", b'{"not": "a database"}' * 1000])
def test_a_file_that_is_no_database_any_more_is_left_alone_and_can_be_closed(
    driver: DatabaseDriver, path: Path, tmp_path: Path, content: bytes
) -> None:
    lease = _lease(driver, tmp_path)
    driver.inject(lease)
    noise = path.read_bytes()
    path.write_bytes(content)
    for one in (lease, _stub(lease)):
        driver.recover(one)
        evidence = driver.active(one)
        assert not evidence.present and "no database (any more)" in evidence.lines[0]
    assert path.read_bytes() == content
    # Without its header and with our noise it is ours still.
    path.write_bytes(b"?" * 100 + noise[100:])
    assert driver.active(lease).present
    with pytest.raises(RecoverFailed):
        driver.recover(lease)
