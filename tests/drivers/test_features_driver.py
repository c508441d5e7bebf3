"""The driver of feature faults on real database files. What a running store serves is in tests/sandbox/test_features.py.

The platform's own code makes the file and refreshes it; here no process runs, and this one stands for the supervisor.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.drivers import features
from mlchaos_dagster.drivers.features import FeaturesDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import DriverError, DriverUnavailable, Halted, InjectFailed, RecoverFailed
from mlchaos_dagster.sandbox.feature_store import create
from mlchaos_dagster.sandbox.feature_writer import refresh

TARGET = "features:features.sqlite"
PARAMS: dict[str, dict[str, Any]] = {
    "feature_drift": {"fraction": 0.5, "shift": 3.0},
    "feature_nulls": {"fraction": 0.3},
    "feature_stale": {"fraction": 0.5, "age_s": 3600.0},
}
ROWS = 40
Vectors = dict[int, str]


class Store:
    """A feature store's file, written and read without the driver."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "data" / "features.sqlite"
        create(self.path, ROWS, 7)
        self.up()

    def up(self, ports: dict[str, int] | None = None) -> None:
        me = {"pid": os.getpid(), "create_time": psutil.Process().create_time(), "control_url": "", "token": ""}
        (self.directory / "state.json").write_text(json.dumps({**me, "parts": ["features"], "ports": ports or {}}))

    def down(self) -> None:
        (self.directory / "state.json").unlink()

    def sql(self, statement: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self.path, timeout=1)) as database, database:
            return database.execute(statement, values).fetchall()

    def refresh(self) -> None:
        with closing(sqlite3.connect(self.path)) as database:
            refresh(database)

    def vectors(self, table: str) -> Vectors:
        return dict(self.sql(f"SELECT entity_id, vector FROM {table}"))

    def stamps(self) -> dict[int, float]:
        return dict(self.sql("SELECT entity_id, updated_at FROM features"))

    def objects(self) -> list[Any]:
        return sorted(self.sql("SELECT name, sql FROM sqlite_master"), key=str)


@contextmanager
def _serving(store: Store, age_s: float | None = None) -> Iterator[None]:
    """A server on the file; with `age_s` one that says this of every row."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            entity = int(self.path.rpartition("/")[2])
            ((vector, stamp),) = store.sql("SELECT vector, updated_at FROM features WHERE entity_id = ?", entity)
            age = time.time() - stamp if age_s is None else age_s
            body = json.dumps({"entity_id": entity, "features": json.loads(vector), "age_s": age}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        store.up({"feature-store": server.server_port})
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            store.up()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def driver(store: Store) -> FeaturesDriver:
    return FeaturesDriver(store.directory)


def _lease(driver: FeaturesDriver, kind: str, **params: Any) -> Lease:
    lease_id, params = f"mlchaos-test-{uuid.uuid4().hex[:10]}", {**PARAMS[kind], **params}
    undo = driver.undo(kind, (TARGET,), params, backup=driver.directory / lease_id)
    now = time.time()
    return Lease(
        id=lease_id,
        run_id="run",
        experiment="test",
        environment="sandbox",
        driver="features",
        kind=kind,
        targets=(TARGET,),
        params=params,
        undo=json.loads(json.dumps(undo)),  # as it comes back from the ledger
        duration_s=30,
        opened_wall=now,
        deadline_wall=now + 30,
        owner=Owner(os.getpid(), 0.0, "", ""),
        token=1,
    )


def _touched(lease: Lease) -> set[int]:
    return {entity for entity, _ in lease.undo["files"][TARGET]["rows"]}


@pytest.mark.req("RX-03")
@pytest.mark.parametrize("kind", PARAMS)
def test_the_fault_outlasts_ingestion_and_recover_leaves_the_file_as_it_was(
    store: Store, driver: FeaturesDriver, kind: str
) -> None:
    before, objects = store.vectors("source"), store.objects()
    lease = _lease(driver, kind)
    assert not driver.active(lease).present
    driver.inject(lease)
    store.refresh()
    assert driver.active(lease).present
    changed = {entity for entity, vector in store.vectors("features").items() if vector != before[entity]}
    frozen = {entity for entity, stamp in store.stamps().items() if stamp < time.time() - 3500}
    assert (frozen if kind == "feature_stale" else changed) == _touched(lease)
    assert len(_touched(lease)) == round(ROWS * PARAMS[kind]["fraction"])

    driver.recover(lease)
    driver.recover(lease)
    assert store.vectors("source") == store.vectors("features") == before
    assert store.objects() == objects
    evidence = driver.active(lease)
    assert not evidence.present and not evidence.effective
    assert any("as before the fault" in line for line in evidence.lines)
    store.refresh()
    assert min(store.stamps().values()) > time.time() - 60
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)
    assert store.vectors("source") == before and not driver.active(lease).present


@pytest.mark.parametrize("kind", PARAMS)
def test_effective_is_what_the_store_serves(store: Store, driver: FeaturesDriver, kind: str) -> None:
    lease = _lease(driver, kind)
    with _serving(store):
        driver.inject(lease)
        assert driver.active(lease).effective
    silent = driver.active(lease)
    assert silent.present and not silent.effective and "the store is silent" in silent.lines[0]
    with _serving(store, age_s=4000.0):  # nobody ingests any more: not our doing
        driver.recover(lease)
        after = driver.active(lease)
        assert not after.present and not after.effective


def test_drift_is_in_standard_deviations_and_nulls_are_null(store: Store, driver: FeaturesDriver) -> None:
    before = {entity: json.loads(vector) for entity, vector in store.vectors("source").items()}
    std = [value for (value,) in store.sql("SELECT std FROM schema ORDER BY feature")]
    drift = _lease(driver, "feature_drift")
    driver.inject(drift)
    for entity in _touched(drift):
        now = json.loads(store.vectors("features")[entity])
        assert now == pytest.approx([v + 3.0 * s for v, s in zip(before[entity], std, strict=True)])
    driver.recover(drift)
    nulls = _lease(driver, "feature_nulls")
    driver.inject(nulls)
    assert {json.dumps([None] * 8)} == {store.vectors("features")[entity] for entity in _touched(nulls)}


def test_frozen_rows_take_no_update_and_the_others_do(store: Store, driver: FeaturesDriver) -> None:
    lease = _lease(driver, "feature_stale")
    driver.inject(lease)
    store.sql("UPDATE source SET vector = '[0]'")
    store.refresh()
    assert {e for e, vector in store.vectors("features").items() if vector == "[0]"} == set(range(ROWS)) - _touched(
        lease
    )
    driver.recover(lease)
    store.refresh()
    assert set(store.vectors("features").values()) == {"[0]"}


@pytest.mark.parametrize("kind", ["feature_drift", "feature_nulls"])
def test_what_others_wrote_meanwhile_is_kept(store: Store, driver: FeaturesDriver, kind: str) -> None:
    lease = _lease(driver, kind)
    early, late = sorted(_touched(lease))[:2]
    store.sql("UPDATE source SET vector = '[1]' WHERE entity_id = ?", early)  # between lease and fault
    store.refresh()
    driver.inject(lease)
    store.sql("UPDATE source SET vector = '[2]' WHERE entity_id = ?", late)  # under the fault, not yet ingested
    driver.recover(lease)
    found = store.vectors("source")
    assert (found[early], found[late]) == ("[1]", "[2]")
    assert store.vectors("features") == found
    evidence = driver.active(lease)
    assert not evidence.present
    assert any("before the fault it was" in line and "were written by others" in line for line in evidence.lines)


@pytest.mark.parametrize("kind", PARAMS)
def test_another_process_recovers_without_undo_data(store: Store, driver: FeaturesDriver, kind: str) -> None:
    before, lease = store.vectors("source"), _lease(driver, kind)
    driver.inject(lease)
    code = (
        "import sys; from mlchaos_dagster.engine.ports import Lease, Owner\n"
        "from mlchaos_dagster.drivers.features import FeaturesDriver\n"
        "lease = Lease(id=sys.argv[1], run_id='', experiment='', environment='', driver='features', kind='',"
        " targets=(), params={}, undo={}, duration_s=0, opened_wall=0, deadline_wall=0, owner=Owner(0, 0, '', ''))\n"
        "driver = FeaturesDriver(sys.argv[2])\n"
        "assert driver.active(lease).present\n"
        "driver.recover(lease)\n"
        "assert not driver.active(lease).present"
    )
    subprocess.run([sys.executable, "-c", code, lease.id, str(store.directory)], check=True, timeout=20)
    assert not driver.active(lease).present
    store.refresh()
    assert store.vectors("features") == before


def test_the_undo_data_suffices_where_the_marks_are_gone(store: Store, driver: FeaturesDriver) -> None:
    before, lease = store.vectors("source"), _lease(driver, "feature_drift")
    driver.inject(lease)
    store.sql(f'DROP TABLE "mlchaos:{lease.id}"')
    assert driver.active(lease).present
    driver.recover(lease)
    assert store.vectors("features") == store.vectors("source") == before and not driver.active(lease).present


def test_killed_in_the_middle_of_inject_nothing_is_there(store: Store, driver: FeaturesDriver) -> None:
    before, objects, lease = store.vectors("source"), store.objects(), _lease(driver, "feature_nulls")
    code = (
        "import json, sys, time; from mlchaos_dagster.drivers import features as f\n"
        "from mlchaos_dagster.engine.ports import Lease, Owner\n"
        "damage = f.damage\n"
        "def halfway(*args):\n"
        "    damage(*args); print('damaged', flush=True); time.sleep(60)\n"
        "f.damage = halfway\n"
        "given = json.load(sys.stdin); given['targets'] = tuple(given['targets'])\n"
        "f.FeaturesDriver(sys.argv[1]).inject(Lease(**{**given, 'owner': Owner(0, 0, '', '')}))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(store.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        child.stdin.write(json.dumps({**vars(lease), "owner": None}).encode())
        child.stdin.close()
        assert child.stdout.readline() == b"damaged\n"
        child.send_signal(signal.SIGKILL)
        child.wait(5)
    assert not driver.active(lease).present
    assert store.vectors("source") == store.vectors("features") == before and store.objects() == objects
    driver.inject(lease)  # and nothing is in the way
    assert driver.active(lease).present
    driver.inject(lease)
    driver.recover(lease)
    assert store.vectors("features") == before


def test_the_fault_stays_in_the_file_when_the_platform_goes_and_comes_back(
    store: Store, driver: FeaturesDriver
) -> None:
    before, lease = store.vectors("source"), _lease(driver, "feature_drift")
    driver.inject(lease)
    store.down()
    create(store.path, ROWS, 7)  # what a start does
    assert driver.active(lease).present and not driver.active(lease).effective
    driver.recover(lease)
    assert store.vectors("features") == before and not driver.active(lease).present
    for file in store.path.parent.iterdir():
        file.unlink()
    store.path.touch()  # somebody else's file under the same name
    driver.recover(lease)
    assert not driver.active(lease).present
    store.path.unlink()
    driver.recover(lease)
    gone = driver.active(lease)
    assert not gone.present and "the file is gone" in gone.lines[0]


def test_a_stop_halfway_leaves_nothing(store: Store, driver: FeaturesDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_STEP_ROWS", 5)
    before, objects, lease = store.vectors("features"), store.objects(), _lease(driver, "feature_drift")

    def step(done: int, total: int) -> None:
        if done >= total // 2:
            raise Halted("a person said stop")

    with pytest.raises(Halted):
        driver.inject(lease, step)
    assert store.vectors("features") == before and store.objects() == objects and not driver.active(lease).present


def test_recover_without_inject_keeps_a_late_inject_out(store: Store, driver: FeaturesDriver) -> None:
    before, lease = store.vectors("features"), _lease(driver, "feature_stale")
    driver.recover(lease)
    with pytest.raises(InjectFailed, match="never inject again"):
        driver.inject(lease)
    with pytest.raises(InjectFailed, match="deadline"):
        driver.inject(replace(lease, id="mlchaos-other", deadline_wall=time.time() - 1))
    assert store.vectors("features") == before and not driver.active(lease).present


def test_what_cannot_be_undone_is_refused_before_the_lease(store: Store, driver: FeaturesDriver) -> None:
    lease = _lease(driver, "feature_nulls")
    driver.inject(lease)
    with pytest.raises(DriverError, match=f"still has the fault of {lease.id}"):
        _lease(driver, "feature_drift")
    driver.recover(lease)
    with pytest.raises(DriverError, match="no target of mine"):
        driver.undo("feature_drift", ("features:../other.sqlite",), PARAMS["feature_drift"])
    with closing(sqlite3.connect(store.path.parent / "other.sqlite")) as other:
        other.execute("CREATE TABLE t (x)")
    assert driver.resolve(Target(select="*.sqlite")) == (TARGET, "features:other.sqlite")
    with pytest.raises(DriverError, match="is no feature store"):
        driver.undo("feature_drift", ("features:other.sqlite",), PARAMS["feature_drift"])
    store.down()
    for ask in (lambda: driver.resolve(Target(select="*")), lambda: _lease(driver, "feature_drift")):
        with pytest.raises(DriverUnavailable, match="no sandbox"):
            ask()


def test_a_file_that_somebody_else_holds_is_said_and_not_touched(
    store: Store, driver: FeaturesDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_BUSY_S", 0.05)
    before, lease = store.vectors("features"), _lease(driver, "feature_drift")
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DriverUnavailable, match="locked"):
            driver.inject(lease)
        with pytest.raises(RecoverFailed, match="locked"):
            driver.recover(lease)
        assert not driver.active(lease).present
    assert store.vectors("features") == before


def test_a_lease_without_its_content_is_never_clean_where_there_is_nothing_to_look_at(
    store: Store, driver: FeaturesDriver, tmp_path: Path
) -> None:
    lease = _lease(driver, "feature_drift")
    driver.inject(lease)
    stub = replace(lease, targets=(), undo={}, params={}, kind="", environment="")
    elsewhere = FeaturesDriver(tmp_path / "elsewhere")
    with pytest.raises(RecoverFailed, match="undo data is lost"):
        elsewhere.recover(stub)
    with pytest.raises(DriverUnavailable, match="undo data is lost"):
        elsewhere.active(stub)
    # Other databases are none to look at.
    (tmp_path / "elsewhere" / "data").mkdir(parents=True)
    with closing(sqlite3.connect(tmp_path / "elsewhere" / "data" / "other.sqlite")) as other:
        other.execute("CREATE TABLE t (x)")
    with pytest.raises(DriverUnavailable, match="no feature store"):
        elsewhere.active(stub)
    assert driver.active(stub).present


def test_on_a_full_disk_the_fault_goes_and_the_missing_tombstone_is_told(
    store: Store, driver: FeaturesDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, lease = store.vectors("features"), _lease(driver, "feature_nulls")
    driver.inject(lease)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(features.api, "bury", full)
        with pytest.raises(RecoverFailed, match="could not be buried.*No space left"):
            driver.recover(lease)
    assert store.vectors("features") == before and not driver.active(lease).present


def test_one_locked_file_does_not_keep_the_fault_in_the_others(
    store: Store, driver: FeaturesDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_BUSY_S", 0.05)
    before, lease = store.vectors("features"), _lease(driver, "feature_nulls")
    driver.inject(lease)
    create(store.path.parent / "another.sqlite", ROWS, 7)
    both = replace(lease, targets=("features:another.sqlite", TARGET))
    with closing(sqlite3.connect(store.path.parent / "another.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RecoverFailed, match=r"another\.sqlite: database is locked"):
            driver.recover(both)
    assert store.vectors("features") == before


def test_a_file_that_is_no_database_any_more_is_left_alone(store: Store, driver: FeaturesDriver) -> None:
    lease = _lease(driver, "feature_nulls")
    driver.inject(lease)
    for file in store.path.parent.iterdir():
        file.unlink()
    store.path.write_bytes(b"somebody's notes")
    driver.recover(lease)
    evidence = driver.active(lease)
    assert not evidence.present and "no database any more" in evidence.lines[0]
    assert store.path.read_bytes() == b"somebody's notes"
