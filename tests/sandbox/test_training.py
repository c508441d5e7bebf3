"""Training: workers that resume, notice bad data and outlive their store; and the pieces they are made of."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlchaos_dagster.sandbox import training_data
from mlchaos_dagster.sandbox.api import up
from mlchaos_dagster.sandbox.checkpoints import BUCKET, KEEP, BadCheckpoint, Shelf, decode, encode
from mlchaos_dagster.sandbox.learner import Learner
from mlchaos_dagster.sandbox.progress import ProgressFile, read
from mlchaos_dagster.sandbox.s3 import S3Error, S3Unavailable
from mlchaos_dagster.sandbox.shard_reader import ShardReader
from mlchaos_dagster.sandbox.training_data import BadShard

from .conftest import Platform, eventually
from .test_storage import client

pytestmark = pytest.mark.timeout(180)

LINK = "trainer->object-store"


@pytest.fixture
def trainers(training: Platform) -> Platform:
    up(training.directory, parts=["training"])
    training.wait_ready()
    eventually(lambda: training.client.signals().get("training_step_rate", 0) > 30)
    return training


@pytest.fixture
def s3(training: Platform) -> Iterator[Any]:
    made = client(training)
    yield made
    made.close()


def state(platform: Platform, name: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", platform.process(name)["port"], timeout=2)
    try:
        connection.request("GET", "/state")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@pytest.mark.e2e
@pytest.mark.req("R0-02")
def test_a_killed_worker_resumes_from_its_last_valid_checkpoint_and_catches_up(trainers: Platform, s3: Any) -> None:
    def pointed() -> dict[str, Any]:
        return json.loads(s3.get_object(Bucket="checkpoints", Key="trainer-1/latest.json")["Body"].read())

    pid = trainers.process("trainer-1")["pid"]
    eventually(lambda: state(trainers, "trainer-1")["checkpoints"] >= 2)
    os.kill(pid, signal.SIGSTOP)  # so that no newer checkpoint comes while we damage this one
    try:
        latest = pointed()
        s3.put_object(Bucket="checkpoints", Key=latest["key"], Body=b"noise")
        keys = [o["Key"] for o in s3.list_objects_v2(Bucket="checkpoints", Prefix="trainer-1/step-")["Contents"]]
        assert 2 <= len(keys) <= KEEP
        before = trainers.client.signals()
    finally:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: trainers.process("trainer-1")["pid"] not in (None, pid))
    eventually(lambda: trainers.process("trainer-1")["ready"])
    seen = state(trainers, "trainer-1")
    previous = keys[keys.index(latest["key"]) - 1]
    assert f"trainer-1/step-{seen['resumed_from_step']:08d}.npz" == previous
    assert seen["checkpoints_skipped"] == 1
    assert seen["lost_steps"] >= latest["step"] - seen["resumed_from_step"] > 0
    assert trainers.client.signals()["lost_steps"] == seen["lost_steps"]
    eventually(lambda: trainers.client.signals()["steps_behind"] == 0)
    assert trainers.client.signals()["training_step"] > before["training_step"]


@pytest.mark.e2e
@pytest.mark.req("R0-03")
def test_a_corrupted_shard_is_set_aside_until_it_is_good_again(trainers: Platform, s3: Any) -> None:
    key = "shards/part-004.npz"
    bad = s3.put_object(Bucket="training-data", Key=key, Body=os.urandom(4714))["VersionId"]
    try:
        eventually(lambda: trainers.client.signals()["bad_shards"] == 1)
        assert trainers.client.signals()["training_step_rate"] > 25
        assert trainers.client.signals()["training_loss"] < 0.6
    finally:
        s3.delete_object(Bucket="training-data", Key=key, VersionId=bad)
    eventually(lambda: trainers.client.signals()["bad_shards"] == 0)


@pytest.mark.e2e
def test_training_goes_on_while_its_store_is_away_and_the_age_of_checkpoints_tells(trainers: Platform) -> None:
    eventually(lambda: trainers.client.signals()["checkpoint_age"] < 2.5)
    pids = {name: trainers.process(name)["pid"] for name in ("trainer-1", "trainer-2")}
    lease = trainers.inject("s3_unavailable", LINK)
    eventually(lambda: trainers.client.signals()["checkpoint_age"] > 4)
    seen = trainers.client.signals()
    assert seen["training_step_rate"] > 25 and seen["training_workers_ready"] == 2
    trainers.client.remove_fault(lease)
    eventually(lambda: trainers.client.signals()["checkpoint_age"] < 2.5)
    assert pids == {name: trainers.process(name)["pid"] for name in pids}


# -- pure pieces ------------------------------------------------------------------------------------------------------


class Store:
    """The client's verbs on a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.puts: list[str] = []
        self.failure: Exception | None = None
        self.gets_left = 0
        """Before the failure."""

    def get(self, bucket: str, key: str) -> bytes:
        self.gets_left -= 1
        if self.failure is not None and self.gets_left < 0:
            raise self.failure
        if (bucket, key) not in self.objects:
            raise S3Error(404, "NoSuchKey", key)
        return self.objects[bucket, key]

    def put(self, bucket: str, key: str, body: bytes) -> str:
        self.objects[bucket, key] = body
        self.puts.append(key)
        return str(len(self.puts))

    def delete(self, bucket: str, key: str, version: str = "") -> str:
        if not version:
            self.objects.pop((bucket, key), None)
        return "marker"

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        return sorted(key for found, key in self.objects if found == bucket and key.startswith(prefix))


def shelf(store: Any, worker: str = "trainer-1") -> Shelf:
    return Shelf(store, worker)


def saved(store: Store, steps: int = 3) -> Shelf:
    found = shelf(store)
    for step in range(10, 10 * steps + 1, 10):
        found.save(step, {"weights": np.full(3, float(step))})
    return found


def test_the_pointer_is_written_last_and_five_checkpoints_are_kept() -> None:
    store = Store()
    saved(store, 7)
    assert store.puts[:2] == ["trainer-1/step-00000010.npz", "trainer-1/latest.json"]
    assert [int(key[-12:-4]) for key in store.keys(BUCKET, "trainer-1/step-")] == [30, 40, 50, 60, 70]
    found = shelf(store).latest()
    assert found is not None and found.step == 70 and found.state["weights"].tolist() == [70.0] * 3


@pytest.mark.parametrize("how", ["noise", "cut", "flipped", "exchanged", "gone"])
@pytest.mark.parametrize("pointer", ["good", "damaged", "gone"])
def test_the_last_valid_checkpoint_is_found_whatever_happened_to_the_others(how: str, pointer: str) -> None:
    store = Store()
    saved(store)
    last, before = (BUCKET, "trainer-1/step-00000030.npz"), (BUCKET, "trainer-1/step-00000010.npz")
    content = store.objects[last]
    middle = content.index(np.full(3, 30.0).tobytes())  # in the weights themselves
    store.objects[last] = {
        "noise": os.urandom(len(content)),
        "cut": content[: len(content) // 2],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "exchanged": store.objects[before],
        "gone": b"",
    }[how]
    if how == "gone":
        del store.objects[last]
    if pointer == "damaged":
        store.objects[BUCKET, "trainer-1/latest.json"] = b"{noise"
    elif pointer == "gone":
        del store.objects[BUCKET, "trainer-1/latest.json"]
    looking = shelf(store)
    found = looking.latest()
    assert found is not None and found.step == 20
    assert looking.skipped == (0 if how == "gone" else 1)


@pytest.mark.parametrize("failure", [S3Unavailable("down"), S3Error(503, "SlowDown", "")])
@pytest.mark.parametrize("gets", [0, 1])  # the pointer, and what it points at
def test_a_store_that_does_not_answer_is_not_an_empty_one(failure: Exception, gets: int) -> None:
    store = Store()
    saved(store)
    store.failure, store.gets_left = failure, gets
    with pytest.raises(type(failure)):
        shelf(store).latest()
    assert shelf(Store()).latest() is None


def test_a_checkpoint_belongs_to_its_worker_and_step() -> None:
    content = encode("trainer-1", 5, {"weights": np.ones(2)})
    assert decode(content, "trainer-1", 5)["weights"].tolist() == [1.0, 1.0]
    for worker, step in (("trainer-2", 5), ("trainer-1", 6)):
        with pytest.raises(BadCheckpoint):
            decode(content, worker, step)
    # Well-formed to the last bit, and yet not what was written: no checksum of the file format would tell.
    with np.load(io.BytesIO(content)) as arrays:
        changed = {**arrays, "weights": np.zeros(2)}
    forged = io.BytesIO()
    np.savez(forged, **changed)
    with pytest.raises(BadCheckpoint, match="digest"):
        decode(forged.getvalue(), "trainer-1", 5)


def reader(store: Store, validate: bool = True) -> ShardReader:
    made: Any = store
    return ShardReader(made, 0, 2, validate)


def data() -> Store:
    store = Store()
    for key, body in training_data.objects(7).items():
        store.put(training_data.BUCKET, key, body)
    return store


def test_bad_shards_are_set_aside_and_come_back_and_half_must_be_good() -> None:
    store, half = data(), training_data.SHARDS // 2
    found = reader(store)
    found.read()
    assert (len(found.shards), found.bad, found.usable) == (half, {}, True)
    good = dict(store.objects)
    mine = sorted(found.shards)
    for number, key in enumerate(mine[: half // 2 + 1], 1):
        store.put(training_data.BUCKET, key, b"noise")
        found.read()
        assert len(found.bad) == number and key not in found.shards
        assert found.usable is (number <= half / 2)
    store.objects = good
    found.read()
    assert (len(found.shards), found.bad, found.usable) == (half, {}, True)


def test_a_damaged_manifest_or_a_silent_store_leaves_the_data_of_before() -> None:
    store = data()
    found = reader(store)
    found.read()
    store.put(training_data.BUCKET, "manifest.json", b"noise")
    found.read()
    store.failure, store.gets_left = S3Unavailable("down"), 0
    with pytest.raises(S3Unavailable):
        found.read()
    assert len(found.shards) == training_data.SHARDS // 2 and not found.bad


def test_without_validation_noise_is_read_as_data() -> None:
    store = data()
    found = reader(store, validate=False)
    found.read()
    store.put(training_data.BUCKET, sorted(found.shards)[0], b"noise")
    with pytest.raises(BadShard, match=r"part-000\.npz"):
        found.read()


def test_the_loss_falls_and_a_resumed_run_is_the_run_that_was_not_interrupted() -> None:
    shards = [training_data.parse(b) for k, b in training_data.objects(7).items() if k.endswith("npz")]
    whole, first, second = (Learner(7, 0) for _ in range(3))
    for _ in range(400):
        whole.step(shards)
    assert whole.loss < 0.3 < np.log(2)
    for _ in range(250):
        first.step(shards)
    second.restore(decode(encode("w", 250, first.state()), "w", 250))
    for _ in range(150):
        second.step(shards)
    assert second.weights.tolist() == whole.weights.tolist() and second.loss == whole.loss


def test_garbage_shows_in_the_loss_as_a_number() -> None:
    learner = Learner(7, 0)
    x = np.full((8, training_data.FEATURES), np.nan, dtype=np.float32)
    learner.step([(x, np.zeros(8))])
    assert learner.loss == 1e6


def test_progress_survives_its_writer_and_no_other_sandbox_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "training" / "w.progress"
    pid = os.fork()
    if pid == 0:  # killed, as a worker is: nothing is flushed or closed
        mine = ProgressFile(path, 1)
        mine.pid, mine.step, mine.best, mine.loss = 7, 41, 43, 0.25
        mine.write()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    seen = read(path)
    assert seen is not None and (seen.pid, seen.step, seen.best, seen.loss) == (7, 41, 43, 0.25)
    again = ProgressFile(path, 1)
    assert (again.step, again.best) == (41, 43)
    assert (read(path) or seen).pid == 0  # a new process that has not resumed yet
    other = ProgressFile(path, 2)
    assert (other.step, other.best) == (0, 0)
    assert read(tmp_path / "nothing") is None
