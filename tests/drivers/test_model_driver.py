"""The model driver on real files and a real S3 API: every byte is as before, and what others wrote stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mlchaos_dagster.domain.environment import S3Location, Target
from mlchaos_dagster.drivers import model_files, s3_client, s3_evidence
from mlchaos_dagster.drivers.model import ModelDriver
from mlchaos_dagster.drivers.s3_objects import MARK
from mlchaos_dagster.engine.ports import Lease, Owner, Step
from mlchaos_dagster.errors import DriverError, Halted, InjectFailed, RecoverFailed
from mlchaos_dagster.sandbox.model import load, scores, train, unpack

pytestmark = pytest.mark.req("R3-04")


def lease_of(
    directory: Path, kind: str, targets: tuple[str, ...], params: dict[str, Any], target: Target, backups: Path
) -> Lease:
    """A lease as another process finds it: through JSON."""
    name = f"mlchaos-{uuid.uuid4().hex[:10]}"
    undo = ModelDriver(directory).undo(kind, targets, params, target=target, backup=backups / name)
    owner, now = Owner(pid=1, started=1.0, boot_id="b", host="h"), time.time()
    undo = json.loads(json.dumps(undo))
    return Lease(name, "r", "x", "e", "model", kind, targets, params, undo, 60.0, now, now + 60, owner, token=1)


# ---- files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "model.bin"
    path.parent.mkdir()
    path.write_bytes(os.urandom(300_000))
    path.chmod(0o640)
    return path


def on_file(tmp_path: Path, how: str = "random_bytes") -> Lease:
    target = Target(select="models/*.bin")
    ids = ModelDriver(tmp_path).resolve(target)
    return lease_of(tmp_path, "model_corruption", ids, {"how": how}, target, tmp_path / "backups")


@pytest.mark.parametrize("how", ["random_bytes", "truncate", "bit_flip"])
def test_a_file_is_damaged_and_comes_back_byte_by_byte(tmp_path: Path, model: Path, how: str) -> None:
    before, lease, driver = model.read_bytes(), on_file(tmp_path, how), ModelDriver(tmp_path)
    assert model.read_bytes() == before, "undo changed something"
    driver.inject(lease)
    damaged, seen = model.read_bytes(), driver.active(lease)
    assert damaged != before and seen.present and seen.effective
    assert len(damaged) == (len(before) // 2 if how == "truncate" else len(before))
    again = ModelDriver(tmp_path)
    for _ in range(2):
        again.recover(lease)
        seen = again.active(lease)
        assert not seen.present and "as before" in seen.lines[0]
    assert model.read_bytes() == before and stat.S_IMODE(model.stat().st_mode) == 0o640
    assert [p.name for p in model.parent.iterdir()] == ["model.bin"], "a partial file was left"
    with pytest.raises(InjectFailed, match="recovered already"):
        driver.inject(lease)
    assert model.read_bytes() == before


def test_what_others_wrote_is_neither_damaged_nor_restored_over(tmp_path: Path, model: Path) -> None:
    lease, driver = on_file(tmp_path), ModelDriver(tmp_path)
    model.write_bytes(b"deployed meanwhile")
    with pytest.raises(InjectFailed, match="changed by others"):
        driver.inject(lease)
    lease = on_file(tmp_path)
    driver.inject(lease)
    model.write_bytes(b"deployed later")
    driver.recover(lease)
    assert model.read_bytes() == b"deployed later"
    seen = driver.active(lease)
    assert not seen.present and "somebody else" in seen.lines[0]


def test_a_process_that_died_while_writing_leaves_nothing(tmp_path: Path, model: Path) -> None:
    before, lease = model.read_bytes(), on_file(tmp_path)
    (model.parent / f".model.bin.{lease.id}").write_bytes(b"half")
    ModelDriver(tmp_path).recover(lease)
    assert [p.name for p in model.parent.iterdir()] == ["model.bin"] and model.read_bytes() == before


def test_without_its_copy_it_is_never_called_clean(tmp_path: Path, model: Path) -> None:
    lease, driver = on_file(tmp_path), ModelDriver(tmp_path)
    driver.inject(lease)
    Path(lease.undo["files"][0]["copy"]).write_bytes(b"x" * 300_000)
    # The damage cannot be told from somebody's write by a copy that is damaged itself; so it must not be called clean.
    with pytest.raises(RecoverFailed, match="is damaged"):
        driver.recover(lease)


def test_no_copy_no_fault(tmp_path: Path, model: Path) -> None:
    (tmp_path / "backups").write_text("in the way")
    before = model.read_bytes()
    with pytest.raises(DriverError, match="no copy could be made"):
        on_file(tmp_path)
    assert model.read_bytes() == before


def test_all_that_hung_on_the_file_beside_its_content_is_on_it_again(tmp_path: Path, model: Path) -> None:
    if os.geteuid() == 0:
        os.chown(model, 4321, 8765)
        model.chmod(0o2750)
    with contextlib.suppress(OSError, AttributeError):  # not every file system keeps them
        os.setxattr(model, "user.mlchaos-test", b"kept")
    os.utime(model, ns=(1_600_000_000_123_456_789, 1_600_000_000_123_456_789))

    def hanging() -> tuple[object, ...]:
        found = model.stat()
        names = {n: os.getxattr(model, n) for n in os.listxattr(model)} if hasattr(os, "listxattr") else {}
        return found.st_uid, found.st_gid, found.st_mode, names

    before, changed, lease, driver = hanging(), model.stat().st_mtime_ns, on_file(tmp_path), ModelDriver(tmp_path)
    driver.inject(lease)
    assert hanging() == before
    driver.recover(lease)
    assert (hanging(), model.stat().st_mtime_ns) == (before, changed)


def test_a_file_that_could_not_be_given_back_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second-name"
    os.link(model, second)
    with pytest.raises(DriverError, match=r"has 2 names \(hard links\)"):
        on_file(tmp_path)
    second.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(DriverError, match=r"belongs to .*, and only root could give it back"):
        on_file(tmp_path)


def test_a_large_file_does_not_silence_the_owner(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "STEP_S", 0.0)
    model.write_bytes(os.urandom(3 * 1024**2))
    before, target, params = model.read_bytes(), Target(select="models/*.bin"), {"how": "bit_flip"}
    driver, steps = ModelDriver(tmp_path), [0]

    def step(done: int, total: int) -> None:
        steps[0] += 1

    def halt(done: int, total: int) -> None:
        raise Halted("enough")

    def undo(step: Step) -> None:
        ids = driver.resolve(target)
        driver.undo("model_corruption", ids, params, target=target, backup=tmp_path / "b", step=step)

    lease = on_file(tmp_path, "bit_flip")
    for verb in (lambda: undo(step), lambda: driver.inject(lease, step), lambda: driver.recover(lease, step)):
        steps[0] = 0
        verb()
        assert steps[0] >= 6  # each reads three chunks twice, at the least
    for stopped in (lambda: undo(halt), lambda: driver.inject(on_file(tmp_path), halt)):
        with pytest.raises(Halted):
            stopped()
    assert model.read_bytes() == before


# ---- registry


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()
    assert moto._server is not None
    moto._server.server_close()


class Registry:
    """A registry with one promoted version, in a bucket of its own."""

    def __init__(self, client: Any, url: str, tmp_path: Path) -> None:
        self.client, self.tmp_path, self.bucket = client, tmp_path, f"b-{uuid.uuid4().hex[:12]}"
        self.target = Target(
            select="current.json",
            s3=S3Location(endpoint=url, bucket=self.bucket, prefix="p/", access_key="env:S3_A", secret_key="env:S3_S"),
        )
        client.create_bucket(Bucket=self.bucket)

    def fill(self, *, versions: bool = True) -> None:
        if versions:
            self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})
        train(self.tmp_path / "model", 7)
        artifact = (self.tmp_path / "model" / "model.bin").read_bytes()
        card = json.loads((self.tmp_path / "model" / "model.json").read_text())
        self.version = card["version"]
        self.put(f"p/versions/{self.version}/model.bin", artifact)
        self.put(f"p/versions/{self.version}/card.json", json.dumps(card).encode())
        self.promote(self.version)

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def promote(self, version: str) -> None:
        self.put("p/current.json", json.dumps({"version": version, "previous": None}).encode())

    def promoted(self) -> str:
        return json.loads(self.get("p/current.json"))["version"]

    def everything(self) -> dict[str, str]:
        """Key and version id → SHA-256."""
        found: dict[str, str] = {}
        for entry in self.client.list_object_versions(Bucket=self.bucket).get("Versions", []):
            one = self.client.get_object(Bucket=self.bucket, Key=entry["Key"], VersionId=entry["VersionId"])
            found[f"{entry['Key']} {entry['VersionId']}"] = hashlib.sha256(one["Body"].read()).hexdigest()
        return found

    def lease(self) -> Lease:
        targets = ModelDriver(self.tmp_path).resolve(self.target)
        return lease_of(self.tmp_path, "bad_model", targets, {}, self.target, self.tmp_path / "backups")


@pytest.fixture
def registry(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("S3_A", "an-access-key")
    monkeypatch.setenv("S3_S", "a-very-secret-key")
    client = boto3.client(
        "s3", endpoint_url=server, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    yield Registry(client, server, tmp_path)
    client.close()


@pytest.mark.req("R2-06")
def test_a_bad_version_is_promoted_and_taken_back_to_the_very_versions(registry: Registry) -> None:
    registry.fill()
    before, lease, driver = registry.everything(), registry.lease(), ModelDriver(registry.tmp_path)
    assert registry.everything() == before, "undo wrote to the registry"
    driver.inject(lease)
    bad = registry.promoted()
    assert bad != registry.version
    artifact = registry.get(f"p/versions/{bad}/model.bin")
    card = json.loads(registry.get(f"p/versions/{bad}/card.json"))
    worse = load(artifact, card)  # well-formed: its own checksum and golden predictions are right
    good = unpack(registry.get(f"p/versions/{registry.version}/model.bin"))
    rows = card["golden_rows"]
    assert [a + b for a, b in zip(scores(worse, rows), scores(good, rows), strict=True)] == pytest.approx([1.0] * 5)
    seen = driver.active(lease)
    assert seen.present and seen.effective and bad in seen.lines[0]
    for _ in range(2):
        ModelDriver(registry.tmp_path).recover(lease)
        seen = driver.active(lease)
        assert not seen.present and "as before" in " ".join(seen.lines)
    assert registry.everything() == before
    with pytest.raises(InjectFailed, match="recovered already"):
        driver.inject(lease)
    assert registry.everything() == before
    assert "a-very-secret-key" not in json.dumps(lease.undo)


class Killed(BaseException):
    """Nothing of ours runs after it."""


def test_a_promotion_of_a_killed_run_that_comes_late_is_taken_back(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.fill()
    before, lease, driver = registry.everything(), registry.lease(), ModelDriver(registry.tmp_path)
    events, queued = s3_client._session().events, list[bytes]()

    def hold(request: Any, **_: Any) -> None:
        if request.url.endswith("/p/current.json"):
            queued.append(request.body.read())
            raise Killed

    events.register("before-send.s3.PutObject", hold)
    try:
        with pytest.raises(Killed):
            driver.inject(lease)
    finally:
        events.unregister("before-send.s3.PutObject", hold)
    notes = Path(lease.undo["backup"])
    assert (notes / "injecting").exists()
    (notes / "injected").unlink()  # the dead leave no such note
    now, slept, steps = time.time(), [0.0], [0]

    def sleep(seconds: float) -> None:
        slept[0] += seconds
        if slept[0] > 3 and queued:
            content = queued.pop()
            registry.client.put_object(
                Bucket=registry.bucket, Key="p/current.json", Body=content, Metadata={MARK: lease.id}
            )
            assert registry.promoted() == lease.undo["card"]["version"]

    def step(done: int, total: int) -> None:
        steps[0] += 1

    monkeypatch.setattr(s3_evidence, "time", SimpleNamespace(time=lambda: now + slept[0], sleep=sleep))
    ModelDriver(registry.tmp_path).recover(lease, step)
    assert not queued, "it stopped looking while the promotion could still come through"
    assert registry.everything() == before and not driver.active(lease).present
    assert steps[0] > slept[0] / 0.5


@pytest.mark.req("R2-06")
def test_a_rollback_by_the_platform_stays_and_still_counts_as_fired(registry: Registry) -> None:
    registry.fill()
    lease, driver = registry.lease(), ModelDriver(registry.tmp_path)
    driver.inject(lease)
    registry.promote(registry.version)  # what a rollout does
    rolled_back = registry.client.head_object(Bucket=registry.bucket, Key="p/current.json")["VersionId"]
    seen = driver.active(lease)
    assert seen.present and seen.effective
    driver.recover(lease)
    assert not driver.active(lease).present and registry.promoted() == registry.version
    assert registry.client.head_object(Bucket=registry.bucket, Key="p/current.json")["VersionId"] == rolled_back
    assert not [key for key in registry.everything() if lease.undo["card"]["version"] in key]


def test_a_promotion_by_somebody_else_in_between_stays(registry: Registry) -> None:
    registry.fill()
    lease, driver = registry.lease(), ModelDriver(registry.tmp_path)
    registry.promote("theirs")
    with pytest.raises(InjectFailed, match="somebody else promoted"):
        driver.inject(lease)
    driver.recover(lease)
    assert registry.promoted() == "theirs" and not driver.active(lease).present


def test_a_registry_without_versions_is_refused(registry: Registry) -> None:
    registry.fill(versions=False)
    with pytest.raises(DriverError, match="keeps no versions"):
        registry.lease()
