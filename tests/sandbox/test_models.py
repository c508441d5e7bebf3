"""What replicas serve: the registry's model if it passes, the last good one if not; and a chaotic version of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.sandbox.api import SandboxRefused, up
from mlchaos_dagster.sandbox.model import FEATURES, card_of, train
from mlchaos_dagster.sandbox.registry import BUCKET, CURRENT, artifact_key, card_key
from mlchaos_dagster.sandbox.served_model import ServedModel

from .conftest import Platform, eventually
from .test_storage import client

pytestmark = pytest.mark.timeout(180)
ON = {"model_check": True, "golden_check": True}


@pytest.fixture
def models(training: Platform) -> Platform:
    up(training.directory, parts=["models"])
    training.wait_ready()
    eventually(lambda: health(training)["source"] == "registry")
    return training


@pytest.fixture
def s3(models: Platform) -> Iterator[Any]:
    made = client(models)
    yield made
    made.close()


def health(platform: Platform) -> dict[str, Any]:
    """GET /model/health of the replica, with the status code as ``status``."""
    url = f"{platform.process('inference-1')['url']}/model/health"
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return {**json.load(response), "status": response.status}
    except urllib.error.HTTPError as error:
        with error:
            return {**json.load(error), "status": error.code}


@pytest.mark.req("R3-04", "RX-03")
def test_an_artifact_that_is_not_the_approved_one_is_rejected_and_the_last_good_one_goes_on(
    models: Platform, s3: Any
) -> None:
    before = health(models)
    assert before["status"] == 200 and before["healthy"]
    key = artifact_key(before["version"])
    assert s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(272))["VersionId"]
    try:
        sick = eventually(lambda: (h := health(models))["status"] == 503 and h)
        assert "checksum" in sick["reason"] and sick["sha256"] == before["sha256"], sick
        assert models.ask().status == 200
        assert eventually(lambda: models.client.signals()["models_unhealthy"] == 1)
        assert models.client.signals()["artifact_mismatch"] == 0
    finally:
        newest = s3.list_object_versions(Bucket=BUCKET, Prefix=key)["Versions"][0]
        s3.delete_object(Bucket=BUCKET, Key=key, VersionId=newest["VersionId"])
    assert eventually(lambda: health(models)["status"] == 200)


@pytest.mark.req("R2-06")
def test_a_version_that_answers_otherwise_is_rolled_back_and_a_better_one_rolled_out(models: Platform, s3: Any) -> None:
    def promote(artifact: bytes, rows: list[list[float]]) -> str:
        card = card_of(artifact, rows)
        s3.put_object(Bucket=BUCKET, Key=artifact_key(card["version"]), Body=artifact)
        s3.put_object(Bucket=BUCKET, Key=card_key(card["version"]), Body=json.dumps(card).encode())
        s3.put_object(Bucket=BUCKET, Key=CURRENT, Body=json.dumps({"version": card["version"]}).encode())
        return card["version"]

    def promoted() -> str:
        return json.loads(s3.get_object(Bucket=BUCKET, Key=CURRENT)["Body"].read())["version"]

    first = health(models)["version"]
    good = s3.get_object(Bucket=BUCKET, Key=artifact_key(first))["Body"].read()
    rows = json.loads(s3.get_object(Bucket=BUCKET, Key=card_key(first))["Body"].read())["golden_rows"]
    half = FEATURES * 8
    promote(good[half : 2 * half] + good[:half] + good[2 * half :], rows)  # the classes' means exchanged
    assert eventually(lambda: promoted() == first) and health(models)["version"] == first
    assert eventually(lambda: models.client.signals()["model_rollbacks"] >= 1)
    noise = bytearray(good)
    noise[0] ^= 1  # the last bit of one mean
    slightly = promote(bytes(noise), rows)
    assert eventually(lambda: health(models)["version"] == slightly)
    promote(good, rows)
    assert eventually(lambda: health(models)["version"] == first)


@pytest.mark.req("R2-05")
def test_a_chaotic_replica_fails_now_and_then_and_is_calm_again_at_its_deadline(models: Platform) -> None:
    lease = models.inject("model_chaos", "inference-1", exceptions=0.6, wrong=0.4, seed=1)
    answers = [models.ask(entity).status for entity in range(8)]
    fault = next(f for f in models.client.faults() if f["lease_id"] == lease)
    assert fault["effective"] and fault["counters"]["exceptions"] > 0, fault
    assert 200 in answers
    models.client.remove_fault(lease)
    models.inject("model_chaos", "inference-1", deadline_s=0.5, exceptions=0.6, wrong=0.4, seed=1)
    eventually(lambda: not models.client.faults())
    calm = json.loads(urllib.request.urlopen(f"{models.process('inference-1')['url']}/state", timeout=2).read())
    assert calm["chaos"] is None


def test_a_chaotic_version_survives_the_restart_of_its_replica_until_it_is_removed(models: Platform) -> None:
    lease = models.inject("model_chaos", "inference-1", exceptions=1.0)
    other = models.inject("container_kill", "inference-1")
    models.client.remove_fault(other)
    models.wait_ready()

    def chaotic() -> bool:
        return any("is chaotic" in line for f in models.client.faults() for line in f["evidence"])

    assert eventually(chaotic)
    models.client.remove_fault(lease)
    assert not models.client.faults()
    eventually(lambda: models.ask().status == 200)  # the gateway's ejection of the replica ends


@pytest.mark.parametrize("wrong", [{}, {"exceptions": 0.9, "wrong": 0.2}, {"exceptions": "many"}, {"rate": 1}])
def test_a_chaotic_version_needs_sensible_shares(models: Platform, wrong: dict[str, Any]) -> None:
    with pytest.raises(SandboxRefused) as told:
        models.inject("model_chaos", "inference-1", **wrong)
    assert told.value.status == 400 and not models.client.faults()


def test_the_checks_are_what_keeps_a_damaged_file_out(tmp_path: Path) -> None:
    promised = train(tmp_path, 7)
    served = ServedModel(ON, promised)
    served.take_file(tmp_path)
    assert served.health()["healthy"] and served.health()["sha256"] == promised
    artifact = bytearray((tmp_path / "model.bin").read_bytes())
    artifact[70] ^= 0x40
    (tmp_path / "model.bin").write_bytes(artifact)
    assert served.file_changed(tmp_path / "model.bin")
    served.take_file(tmp_path)
    assert not served.health()["healthy"] and served.health()["sha256"] == promised and served.rejected_total == 1
    only_golden = ServedModel({"model_check": False, "golden_check": True}, promised)
    only_golden.take_file(tmp_path)
    assert only_golden.now is None and "golden predictions" in only_golden.reason
    unchecked = ServedModel({"model_check": False, "golden_check": False}, promised)
    unchecked.take_file(tmp_path)
    assert unchecked.now is not None and unchecked.health()["healthy"] and unchecked.now.sha256 != promised
