"""The object store: an S3 API as boto3 sees it, its door, and the small client of the sandbox's own processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.sandbox import training_data
from mlchaos_dagster.sandbox.api import SandboxConfig, read_state
from mlchaos_dagster.sandbox.config import SandboxConfigError
from mlchaos_dagster.sandbox.object_backends import Endpoint, Unreachable, build, seed
from mlchaos_dagster.sandbox.s3 import S3, S3Error, S3Unavailable
from mlchaos_dagster.sandbox.sigv4 import credentials, refusal, sign

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def connect(training: Platform) -> Iterator[Callable[..., Any]]:
    """boto3 clients with the credentials of the state file; closed at the end, since nobody else does it."""
    made: list[Any] = []

    def new(**changed: str) -> Any:
        made.append(client(training, **changed))
        return made[-1]

    yield new
    for one in made:
        one.close()


def told(training: Platform) -> dict[str, str]:
    """What the state file tells of the store."""
    return (read_state(training.directory) or {})["object_store"]


def client(training: Platform, **changed: str) -> Any:
    import boto3
    from botocore.config import Config

    keys = told(training) | changed
    return boto3.client(
        "s3",
        endpoint_url=keys["url"],
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret_key"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )


def code(error: Any) -> str:
    return error.value.response["Error"]["Code"]


def test_the_buckets_are_versioned_and_the_manifest_is_true_of_every_shard(connect: Callable[..., Any]) -> None:
    s3 = connect()
    for bucket in ("training-data", "checkpoints", "models"):
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    shards = json.loads(s3.get_object(Bucket="training-data", Key="manifest.json")["Body"].read())["shards"]
    keys = [one["Key"] for one in s3.list_objects_v2(Bucket="training-data", Prefix="shards/")["Contents"]]
    assert sorted(one["key"] for one in shards) == keys and len(keys) == training_data.SHARDS
    for one in shards:
        body = s3.get_object(Bucket="training-data", Key=one["key"])["Body"].read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (one["bytes"], one["sha256"])


def test_content_comes_back_byte_for_byte_whatever_the_key_and_the_form_of_the_upload(
    connect: Callable[..., Any],
) -> None:
    import io

    s3, key = connect(), "a b/ü+%?&=~.bin"
    first = s3.put_object(Bucket="checkpoints", Key=key, Body=b"first")["VersionId"]
    second = s3.put_object(Bucket="checkpoints", Key=key, Body=b"second")["VersionId"]
    assert s3.get_object(Bucket="checkpoints", Key=key)["Body"].read() == b"second"
    assert s3.get_object(Bucket="checkpoints", Key=key, VersionId=first)["Body"].read() == b"first"
    s3.delete_object(Bucket="checkpoints", Key=key, VersionId=second)
    assert s3.head_object(Bucket="checkpoints", Key=key)["ContentLength"] == 5
    big = os.urandom(9_000_000)  # in parts
    s3.upload_fileobj(io.BytesIO(big), "checkpoints", "big")
    assert s3.get_object(Bucket="checkpoints", Key="big")["Body"].read() == big


def test_only_the_holder_of_the_keys_is_let_in(training: Platform, connect: Callable[..., Any]) -> None:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as error:
        connect(access_key="SBSOMEBODYELSE").list_buckets()
    assert code(error) == "InvalidAccessKeyId"
    with pytest.raises(ClientError) as error:
        connect(secret_key="guessed").list_buckets()
    assert code(error) == "SignatureDoesNotMatch"
    anonymous = S3(lambda: told(training)["url"], "another token", tries=1)
    with pytest.raises(S3Error, match="InvalidAccessKeyId"):
        anonymous.get("training-data", "manifest.json")
    anonymous.close()


def test_a_store_that_died_comes_back_with_what_was_seeded_and_nothing_else(
    training: Platform, connect: Callable[..., Any]
) -> None:
    from botocore.exceptions import ClientError

    connect().put_object(Bucket="models", Key="ours", Body=b"x")
    os.kill(training.process("object-store")["pid"], signal.SIGKILL)
    eventually(lambda: not training.process("object-store")["ready"])
    training.wait_ready()
    with pytest.raises(ClientError) as error:
        connect().get_object(Bucket="models", Key="ours")
    assert code(error) == "NoSuchKey"
    assert connect().list_objects_v2(Bucket="training-data", Prefix="shards/")["KeyCount"] == training_data.SHARDS


def test_any_s3_endpoint_can_stand_behind_the_door(
    training: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The embedded store is the endpoint here: it lets nobody in who does not sign with its keys."""
    keys = told(training)
    (tmp_path / "secret").write_text(keys["secret_key"] + "\n")
    monkeypatch.setenv("STORE_ACCESS_KEY", keys["access_key"])
    config = {"endpoint": keys["url"], "access_key": "env:STORE_ACCESS_KEY", "secret_key": f"file:{tmp_path}/secret"}
    endpoint = build({"object_store": config})
    assert isinstance(endpoint, Endpoint)
    try:
        assert seed(endpoint, 8) == 0  # what is there stays as it is
        said = [("Content-Type", "text/plain"), ("x-amz-meta-step", "5"), ("Authorization", "ours"), ("Host", "door")]
        assert endpoint.call("PUT", "/models/a%20b?x-id=PutObject", said, b"content")[0] == 200
        status, headers, body = endpoint.call("GET", "/models/a%20b", [("Range", "bytes=0-2")], b"")
        assert (status, body, {k.lower(): v for k, v in headers}["x-amz-meta-step"]) == (206, b"con", "5")
    finally:
        endpoint.close()
    monkeypatch.delenv("STORE_ACCESS_KEY")
    with pytest.raises(Unreachable, match="env:STORE_ACCESS_KEY"):
        build({"object_store": config})
    nobody = Endpoint("http://127.0.0.1:9", "a", "b", "us-east-1")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        nobody.call("GET", "/models/x", [], b"")


# -- pure pieces ------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_bytes() -> None:
    assert training_data.objects(7) == training_data.objects(7) != training_data.objects(8)


def test_a_damaged_shard_is_told_from_a_good_one() -> None:
    contents = training_data.objects(7)
    told = training_data.manifest(contents["manifest.json"])
    key = "shards/part-003.npz"
    good = contents[key]
    training_data.check(good, told[key])
    assert training_data.parse(good)[0].shape == (training_data.ROWS, training_data.FEATURES)
    flipped = good[:900] + bytes([good[900] ^ 1]) + good[901:]
    for bad in (flipped, good[:-1], b"", contents["shards/part-004.npz"]):
        with pytest.raises(training_data.BadShard):
            training_data.check(bad, told[key])
    for bad in (good[: len(good) // 2], os.urandom(len(good)), b""):
        with pytest.raises(training_data.BadShard):
            training_data.parse(bad)


@pytest.mark.parametrize("header", ["Host", "x-amz-date", "x-amz-content-sha256", "x-amz-meta-step"])
def test_a_signature_covers_what_was_signed(header: str) -> None:
    access, secret = credentials("token")
    headers = {"Host": "127.0.0.1:1", "x-amz-meta-step": "5"}
    headers |= sign("PUT", "/b/k%20y", "list-type=2&prefix=a%2Fb", headers, "ab" * 32, access, secret)
    sent = {name.lower(): value for name, value in headers.items()}
    good = ("PUT", "/b/k%20y", "list-type=2&prefix=a%2Fb", sent, access, secret)
    assert refusal(*good) is None
    changed = {**sent, header.lower(): "other"}
    assert (refusal("PUT", "/b/k%20y", "list-type=2&prefix=a%2Fb", changed, access, secret) or "")[0] == (
        "SignatureDoesNotMatch"
    )
    assert refusal("GET", *good[1:]) and refusal("PUT", "/b/other", *good[2:])


def test_a_client_tries_as_often_as_it_was_told_and_waits_in_between() -> None:
    waits: list[float] = []
    s3 = S3(lambda: "", "token", tries=3, wait=waits.append)
    with pytest.raises(S3Unavailable):
        s3.get("b", "k")
    assert s3.failures == 3 and len(waits) == 2 and all(0 < wait <= 0.5 for wait in waits)


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ({"endpoint": "http://s3:9000"}, "access_key is missing"),
        ({"endpoint": "s3:9000", "access_key": "env:A", "secret_key": "env:B"}, "endpoint must be"),
        ({"endpoint": "http://s3", "access_key": "env:A", "secret_key": "hunter2"}, "secret_key must be a reference"),
        ({"endpoint": "http://s3", "access_key": "env:A", "secret_key": "env:B", "bucket": "x"}, "object_store.bucket"),
    ],
)
def test_an_endpoint_that_cannot_be_is_told_before_anything_starts(store: dict[str, str], said: str) -> None:
    with pytest.raises(SandboxConfigError, match=said) as error:
        SandboxConfig(object_store=store)
    assert "hunter2" not in str(error.value)
