"""Damage to a database in use: an own SQLite file, with a second connection (a second process, where locks matter) at work.

What is damaged and what is back is read with plain sqlite3, not with the driver's own eyes.
"""

from __future__ import annotations

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

pytestmark = [pytest.mark.timeout(30), pytest.mark.req("R4-11")]

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
