"""Validation of features: the rules by themselves, the numbers of the store, and a gateway under real damage."""

from __future__ import annotations

import http.client
import json
import os
import random
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.drivers.features import FeaturesDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.sandbox.api import SandboxConfig, down, up
from mlchaos_dagster.sandbox.feature_checks import Checks, Schema, imputed
from mlchaos_dagster.sandbox.feature_store import Quality, create
from tests.sandbox.conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)

SCHEMA = Schema(mean=[0.0, 10.0, 0.0, 0.0], std=[1.0, 2.0, 1.0, 1.0])
GOOD = [0.5, 11.0, -1.0, 0.0]
CHECKS = Checks(stale_s=10.0, schema=SCHEMA)
TARGET = "features:features.sqlite"


# ---- rules


@pytest.mark.parametrize(
    ("vector", "age_s", "last", "said"),
    [
        (GOOD, None, None, ""),
        (GOOD, 10.0, GOOD, ""),
        (GOOD, 10.1, GOOD, "stale"),
        ([0.5, None, -1.0, 0.0], 1.0, GOOD, "nulls"),
        ([0.5, float("nan"), -1.0, 0.0], 1.0, GOOD, "nulls"),
        ([6.1, 11.0, -1.0, 0.0], 1.0, None, "range"),
        ([0.5, 10.0 - 12.1, -1.0, 0.0], 1.0, None, "range"),
        ([5.9, 11.0, -1.0, 0.0], 1.0, None, ""),
        (GOOD[:3], 1.0, None, "range"),
        ([3.5, 17.0, 2.0, 3.0], 1.0, GOOD, "drift"),  # 3 standard deviations each, none out of range
        ([3.5, 17.0, 2.0, 3.0], 1.0, None, ""),  # and nothing to compare with
        ([2.4, 14.8, 0.9, 1.9], 1.0, GOOD, ""),  # 1.9 each
        ([4.4, 11.0, -1.0, 0.0], 1.0, GOOD, ""),  # one feature by 3.9: as large as two of all four
    ],
)
def test_a_row_is_refused_for_what_is_wrong_with_it(
    vector: list[float | None], age_s: float | None, last: list[float] | None, said: str
) -> None:
    assert CHECKS.refuse(vector, age_s, last) == said


def test_a_row_that_was_never_validated_is_refused_while_the_whole_is_shifted() -> None:
    rng = random.Random(3)
    rows = [[rng.gauss(m, s) for m, s in zip(SCHEMA.mean, SCHEMA.std, strict=True)] for _ in range(500)]
    drifted = [[v + 3 * s for v, s in zip(row, SCHEMA.std, strict=True)] for row in rows[:250]] + rows[250:]
    nulls: list[list[float | None]] = [[None] * 4 for _ in range(250)]
    assert not SCHEMA.shifted(rows) and SCHEMA.shifted(drifted) and not SCHEMA.shifted([*nulls, *rows[250:]])
    shifted = Checks(stale_s=10.0, schema=SCHEMA, shifted=True)
    assert shifted.refuse(GOOD, 1.0, None) == "drift" and shifted.refuse(GOOD, 1.0, GOOD) == ""


def test_without_checks_a_null_becomes_a_zero() -> None:
    assert imputed([1.0, None, -2.0]) == [1.0, 0.0, -2.0]


# ---- numbers of the store


def test_quality_counts_what_is_wrong_with_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    create(path, 100, 7)
    with closing(sqlite3.connect(path)) as writer, closing(sqlite3.connect(path)) as reader:

        def now(statement: str, *values: Any) -> dict[str, float | None]:
            with writer:
                writer.execute(statement, values)
            return Quality(reader).now(True)

        quality = Quality(reader)
        healthy = quality.now(False)
        assert (healthy["rows"], healthy["null_rate"], healthy["out_of_range_rate"]) == (100, 0.0, 0.0)
        assert healthy["drift"] == pytest.approx(0.0, abs=1e-12) and healthy["age_p95_s"] is None
        nulls = now("UPDATE features SET vector = ? WHERE entity_id < 30", json.dumps([None] * 8))
        assert nulls["null_rate"] == pytest.approx(0.3)
        wild = now("UPDATE features SET vector = ?", json.dumps([9.0] + [0.0] * 7))
        assert wild["out_of_range_rate"] == pytest.approx(1 / 8) and (wild["drift"] or 0) > 8
        old = now("UPDATE features SET updated_at = updated_at - 3600 WHERE entity_id < 4")
        assert (old["age_oldest_s"] or 0) >= 3600 > 60 > (old["age_p95_s"] or 0) >= (old["age_median_s"] or 0)
        old = now("UPDATE features SET updated_at = updated_at - 3600 WHERE entity_id BETWEEN 4 AND 6")
        assert (old["age_p95_s"] or 0) >= 3600 and (old["age_median_s"] or 0) < 60
        # One that was asked before sees a change, too: but for a quarter of a second.
        eventually(lambda: quality.now(True)["drift"] == old["drift"])


# ---- a gateway under damage


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A sandbox of its own with ingestion; what its store said before there was any is in ``ages_before``."""
    directory = tmp_path_factory.mktemp("features")
    try:
        config = SandboxConfig(replicas=1, entities=60, feature_cache_limit_s=4.0, backoff_initial_s=0.05)
        up(directory, config, timeout_s=150)
        platform = Platform(directory)
        platform.ages_before = _get(platform, "/features")["ages_s"].values()  # type: ignore[attr-defined]
        up(directory, config, parts=["features"], timeout_s=150)
        yield platform
    finally:
        evidence = down(directory)
    assert evidence["clean"], evidence


def _get(platform: Platform, path: str, name: str = "feature-store") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", platform.process(name)["port"], timeout=3)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@contextmanager
def _fault(platform: Platform, kind: str, **params: Any) -> Iterator[tuple[set[int], FeaturesDriver, Lease]]:
    driver, lease_id, now = FeaturesDriver(platform.directory), f"mlchaos-{uuid.uuid4().hex}", time.time()
    undo = driver.undo(kind, (TARGET,), params)
    who = Owner(os.getpid(), 0.0, "", "")
    lease = Lease(lease_id, "", "", "", "features", kind, (TARGET,), params, undo, 60, now, now + 60, who)
    try:
        driver.inject(lease)
        yield {entity for entity, _ in undo["files"][TARGET]["rows"]}, driver, lease
    finally:
        driver.recover(lease)
    assert not driver.active(lease).present


def _score(platform: Platform, entity: int) -> tuple[int, str, float | None]:
    connection = http.client.HTTPConnection("127.0.0.1", platform.process("gateway")["port"], timeout=3)
    try:
        connection.request("GET", f"/predict?entity_id={entity}")
        response = connection.getresponse()
        answer = json.loads(response.read())
        return response.status, response.headers["X-Answered-By"], answer.get("score")
    finally:
        connection.close()


@pytest.mark.req("RX-03")
def test_freshness_counts_from_when_somebody_ingests(store: Platform) -> None:
    assert set(store.ages_before) == {None}  # type: ignore[attr-defined]
    ages = _get(store, "/features")["ages_s"].values()
    assert 0 <= min(ages) <= max(ages) < 4.0


@pytest.mark.req("RX-03")
def test_drifted_rows_are_answered_from_what_was_validated_before(store: Platform) -> None:
    before = {entity: _score(store, entity) for entity in range(20)}
    assert {(status, path) for status, path, _ in before.values()} == {(200, "model")}
    with _fault(store, "feature_drift", fraction=0.5, shift=3.0) as (touched, driver, lease):
        eventually(lambda: driver.active(lease).effective)
        for entity, (_, _, score) in before.items():
            assert _score(store, entity) == (200, "cache" if entity in touched else "model", score)
        eventually(lambda: store.client.signals().get("feature_drift", 0.0) > 1.0)
        assert store.client.signals()["feature_out_of_range"] < 0.05
        # A gateway that comes up now has nothing to compare with: what it cannot trust it does not answer.
        store.inject("pod_delete", "gateway")
        eventually(lambda: store.process("gateway")["restarts"] and store.process("gateway")["ready"], every_s=0.1)
        assert {_score(store, entity)[0] for entity in touched} == {503}
    eventually(lambda: [_score(store, entity) for entity in before] == list(before.values()), every_s=0.2)


@pytest.mark.req("RX-03")
def test_stale_rows_are_answered_from_the_cache_until_that_is_stale_too(store: Platform) -> None:
    _, _, score = _score(store, 7)
    with _fault(store, "feature_stale", fraction=1.0, age_s=3600.0) as (_, driver, lease):
        assert _score(store, 7) == (200, "cache", score)
        eventually(lambda: driver.active(lease).effective)
        eventually(lambda: store.client.signals().get("feature_age", 0.0) >= 3600)
        eventually(lambda: _score(store, 7)[0] == 503, every_s=0.1)
    eventually(lambda: _score(store, 7) == (200, "model", score), every_s=0.1)
