"""The S3 driver against a real S3 API: moto's server, or the one that MLCHAOS_TEST_S3 names.

MLCHAOS_TEST_S3=http://127.0.0.1:7070 MLCHAOS_TEST_S3_KEYS=access:secret python -m pytest tests/drivers/test_s3_driver.py
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from mlchaos_dagster.domain.environment import S3Location, Target
from mlchaos_dagster.drivers import s3, s3_client, s3_evidence, s3_objects
from mlchaos_dagster.drivers.s3 import S3Driver
from mlchaos_dagster.drivers.s3_damage import damaged
from mlchaos_dagster.engine.ports import Lease, Owner, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, Halted, InjectFailed, RecoverFailed

pytestmark = pytest.mark.req("R0-03")
KIND = "s3_object_corruption"
OTHER = os.environ.get("MLCHAOS_TEST_S3", "")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str, str]]:
    """URL, access key, secret key."""
    if OTHER:
        access, _, secret = os.environ.get("MLCHAOS_TEST_S3_KEYS", "access:secret").partition(":")
        yield OTHER, access, secret
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}", "an-access-key", "a-very-secret-key"
    moto.stop()
    assert moto._server is not None
    moto._server.server_close()


@dataclass
class Store:
    """A bucket of its own, a second client on it (the others), and leases for the driver."""

    url: str
    client: Any
    tmp: Path
    bucket: str = field(default_factory=lambda: f"b-{uuid.uuid4().hex[:12]}")

    def create(self, versioning: str | None = "Enabled", **more: Any) -> None:
        self.client.create_bucket(Bucket=self.bucket, **more)
        if versioning:
            self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": versioning})

    def put(self, key: str, body: bytes, **more: Any) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body, **more)

    def fill(self, count: int = 8, prefix: str = "data/") -> None:
        rng = random.Random(7)
        for i in range(count):
            self.put(f"{prefix}part-{i:03}", rng.randbytes(1500 + i), ContentType="text/csv", Metadata={"who": "team"})

    def snapshot(self) -> dict[str, tuple[str, str]]:
        """Key → (version id, SHA-256) of what is current."""
        found: dict[str, tuple[str, str]] = {}
        for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", []):
            reply = self.client.get_object(Bucket=self.bucket, Key=entry["Key"])
            found[entry["Key"]] = (reply.get("VersionId", ""), hashlib.sha256(reply["Body"].read()).hexdigest())
        return found

    def contents(self) -> dict[str, str]:
        return {key: sha for key, (_, sha) in self.snapshot().items()}

    def versions(self) -> int:
        return len(self.client.list_object_versions(Bucket=self.bucket).get("Versions", []))

    def target(self, **more: Any) -> Target:
        location = S3Location(
            endpoint=self.url,
            bucket=self.bucket,
            prefix="data/",
            access_key="env:S3_ACCESS",
            secret_key="env:S3_SECRET",
        )
        return Target(select=more.pop("select", "*"), s3=location.model_copy(update=more))

    def lease(self, how: str = "random_bytes", fraction: float = 0.75, prefix: str = "", **more: Any) -> Lease:
        params = {"fraction": fraction, "prefix": prefix, "how": how}
        lease_id = f"mlchaos-{uuid.uuid4().hex[:10]}"
        targets = (f"s3://{self.bucket}",)
        backup = self.tmp / "backups" / lease_id
        undo = self.driver().undo(KIND, targets, params, target=self.target(**more), backup=backup)
        now = time.time()
        owner = Owner(pid=1, started=1.0, boot_id="b", host="h")
        lease = Lease(
            lease_id, "run", "exp", "env", "s3", KIND, targets, params, undo, 60.0, now, now + 60.0, owner, token=1
        )
        # As another process finds it: through JSON.
        return replace(lease, undo=json.loads(json.dumps(undo)))

    def driver(self) -> S3Driver:
        return S3Driver(self.tmp / "sandbox")


@pytest.fixture
def store(server: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    url, access, secret = server
    monkeypatch.setenv("S3_ACCESS", access)
    monkeypatch.setenv("S3_SECRET", secret)
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=access, aws_secret_access_key=secret,
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )  # fmt: skip
    yield Store(url, client, tmp_path)
    unhook()
    client.close()


_hooks: list[tuple[str, Callable[..., Any]]] = []


def hook(event: str, handler: Callable[..., None]) -> None:
    """Have the clients that the driver opens from now on call `handler`; until `unhook`, or the test's end."""
    _hooks.append((event, handler))
    s3_client._session().events.register(event, handler)


def unhook() -> None:
    while _hooks:
        s3_client._session().events.unregister(*_hooks.pop())


def touched(lease: Lease) -> list[str]:
    return [entry["key"] for entry in lease.undo["objects"]]


# ---- the fault and the way back


@pytest.mark.parametrize("how", ["random_bytes", "truncate", "bit_flip", "swap"])
def test_damage_is_real_and_goes_with_its_version(store: Store, how: str) -> None:
    store.create()
    store.fill()
    store.put("elsewhere/x", b"bystander")
    before = store.snapshot()
    driver, lease = store.driver(), store.lease(how)
    assert store.snapshot() == before, "undo changes nothing"
    assert len(touched(lease)) == 6

    driver.inject(lease)
    during = store.snapshot()
    assert {key for key in before if during[key][1] != before[key][1]} == set(touched(lease))
    reply = store.client.get_object(Bucket=store.bucket, Key=touched(lease)[0])
    assert reply["ContentType"] == "text/csv"
    assert reply["Metadata"] == {"who": "team", s3_objects.MARK: lease.id}
    size = len(reply["Body"].read())
    assert size == lease.undo["objects"][0]["size"] // 2 if how == "truncate" else size > 1400
    seen = driver.active(lease)
    assert (seen.present, seen.effective) == (True, True)
    assert seen.lines[0] == f"6 of 8 objects under s3://{store.bucket}/data/ are damaged ({how})"

    fresh = store.driver()
    fresh.recover(lease)
    assert store.snapshot() == before
    assert store.versions() == 9, "nothing of ours is left among the older versions"
    seen = fresh.active(lease)
    assert (seen.present, seen.effective) == (False, False)
    assert seen.lines == ("6 of 6 objects: version id as before; SHA-256 of 6 read: as before",)
    fresh.recover(lease)
    assert store.snapshot() == before
    with pytest.raises(InjectFailed, match="recovered already"):
        driver.inject(lease)
    assert store.snapshot() == before


def test_recover_before_any_injection(store: Store) -> None:
    store.create()
    store.fill(10)
    before, lease = store.snapshot(), store.lease()
    seen = store.driver().active(lease)
    assert (seen.present, seen.effective) == (False, False)
    store.driver().recover(lease)
    assert store.snapshot() == before


def test_what_others_write_or_delete_meanwhile_stays(store: Store) -> None:
    store.create()
    store.fill()
    before = store.snapshot()
    bodies = {key: store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read() for key in before}
    lease = store.lease()
    store.driver().inject(lease)
    overwritten, mended, deleted = touched(lease)[:3]
    store.put(overwritten, b"newer, by somebody else")
    store.put(mended, bodies[mended])
    store.client.delete_object(Bucket=store.bucket, Key=deleted)
    theirs = store.snapshot()

    seen = store.driver().active(lease)
    assert seen.present
    assert "3 objects have a damaged version below what others wrote" in seen.lines
    store.driver().recover(lease)
    after = store.snapshot()
    assert after.pop(overwritten) == theirs[overwritten]
    assert after.pop(mended) == theirs[mended]
    assert after == {key: it for key, it in before.items() if key not in (overwritten, mended, deleted)}
    assert store.versions() == 10, "8 originals, two of theirs, none of ours"
    seen = store.driver().active(lease)
    assert not seen.present
    assert seen.lines[0].startswith("3 of 6 objects: version id as before")
    assert seen.lines[1:] == ("2 written by others meanwhile, kept", "1 deleted by others meanwhile")


def test_what_changed_before_the_fault_is_left_alone(store: Store) -> None:
    store.create()
    store.fill()
    lease = store.lease()
    raced, early, gone = touched(lease)[1:4]
    store.put(early, b"newer")
    store.client.delete_object(Bucket=store.bucket, Key=gone)
    once = [raced]

    def write_first(params: dict[str, Any], **_: Any) -> None:
        if once and params["url_path"].endswith(raced):
            store.put(once.pop(), b"between the look and the write")

    hook("before-call.s3.PutObject", write_first)
    store.driver().inject(lease)
    assert not once
    during = store.contents()
    assert during[early] == hashlib.sha256(b"newer").hexdigest()
    assert during[raced] == hashlib.sha256(b"between the look and the write").hexdigest()
    assert gone not in during
    seen = store.driver().active(lease)
    assert seen.lines[0].startswith("3 of 8 objects")
    assert "3 had been changed by others before the fault and were left alone" in seen.lines
    store.driver().recover(lease)
    assert store.versions() == 10


def test_a_store_that_ignores_if_match(store: Store) -> None:
    store.create()
    store.fill()
    lease = store.lease()

    def forget(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-Match", None)

    hook("before-call.s3.PutObject", forget)
    early = touched(lease)[2]
    store.put(early, b"newer")
    before = store.snapshot()
    store.driver().inject(lease)
    seen = store.driver().active(lease)
    assert seen.lines[0].startswith("5 of 8 objects")
    assert "this store ignores If-Match: each object was looked at just before it was written instead" in seen.lines
    assert store.snapshot()[early] == before[early]
    store.driver().recover(lease)
    assert store.snapshot() == before


def test_all_objects_changed_is_no_fault(store: Store) -> None:
    store.create()
    store.fill(3)
    lease = store.lease(fraction=1.0)
    for key in touched(lease):
        store.put(key, b"newer")
    with pytest.raises(InjectFailed, match="all 3 objects were changed by others"):
        store.driver().inject(lease)


# ---- buckets without versions


@pytest.mark.parametrize("how", ["truncate", "swap"])
def test_without_versions_the_backup_is_put_back(store: Store, how: str) -> None:
    store.create(versioning=None)
    store.fill(6)
    for i in range(6):
        store.client.put_object_tagging(
            Bucket=store.bucket, Key=f"data/part-{i:03}", Tagging={"TagSet": [{"Key": "a b", "Value": f"c+{i}"}]}
        )
    before = store.contents()
    lease = store.lease(how, fraction=0.6)
    store.driver().inject(lease)
    assert sum(sha != before[key] for key, sha in store.contents().items()) == 4
    assert store.driver().active(lease).effective
    taken = touched(lease)[0]
    store.put(taken, b"newer, by somebody else")

    store.driver().recover(lease)
    after = store.contents()
    assert after.pop(taken) == hashlib.sha256(b"newer, by somebody else").hexdigest()
    assert after == {key: sha for key, sha in before.items() if key != taken}
    head = store.client.head_object(Bucket=store.bucket, Key=touched(lease)[1])
    assert (head["ContentType"], head["Metadata"]) == ("text/csv", {"who": "team"})
    tags = store.client.get_object_tagging(Bucket=store.bucket, Key=touched(lease)[1])["TagSet"]
    assert tags[0]["Key"] == "a b"
    seen = store.driver().active(lease)
    assert not seen.present
    assert seen.lines[0].startswith("3 of 4 objects: content as before")
    store.driver().recover(lease)


@dataclass
class Full:
    free: int


def test_without_versions_and_without_room_for_a_backup_it_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create(versioning=None)
    store.fill(5)
    (store.tmp / "backups").write_text("a file where the directory should be")
    with pytest.raises(DriverError, match="cannot write in"):
        store.lease()
    (store.tmp / "backups").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: Full(free=0))
    with pytest.raises(DriverError, match="no room for a backup"):
        store.lease()


def test_without_versions_a_write_just_before_the_backup_is_put_back_stays(store: Store) -> None:
    store.create(versioning=None)
    store.fill(2)
    lease = store.lease(fraction=0.5)
    store.driver().inject(lease)
    (key,), looks = touched(lease), itertools.count(1)

    def write_first(**_: Any) -> None:
        if next(looks) == 2:
            store.put(key, b"newer, by somebody else")

    hook("before-call.s3.HeadObject", write_first)
    store.driver().recover(lease)
    assert store.contents()[key] == hashlib.sha256(b"newer, by somebody else").hexdigest()


def test_a_damaged_backup_is_not_put_back(store: Store) -> None:
    store.create(versioning=None)
    store.fill(5)
    lease = store.lease(fraction=0.4)
    store.driver().inject(lease)
    Path(lease.undo["objects"][0]["backup"]).write_bytes(b"rotten")
    with pytest.raises(RecoverFailed, match=r"1 of 2 objects: .*the backup .* is damaged"):
        store.driver().recover(lease)
    assert store.driver().active(lease).present


# ---- stopped, killed, late


def test_halted_halfway_nothing_is_under_way_any_more(store: Store) -> None:
    store.create()
    store.fill(24)
    before, lease = store.snapshot(), store.lease(fraction=1.0)
    sent: list[float] = []
    hook("before-send.s3.PutObject", lambda **_: sent.append(time.monotonic()))

    def step(done: int, total: int) -> None:
        if len(sent) > 10:
            raise Halted("somebody wants out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_client, "STEP_S", 0.0)
        with pytest.raises(Halted):
            store.driver().inject(lease, step)
    ended = time.monotonic()
    during = store.versions()
    assert 24 < during < 48
    assert max(sent) < ended
    store.driver().recover(lease)
    assert store.snapshot() == before
    assert store.versions() == 24


class Killed(BaseException):
    """Nothing of ours runs after it."""


@pytest.mark.parametrize("versioning", ["Enabled", None])
@pytest.mark.parametrize("verb", ["inject", "recover"])
def test_killed_at_any_request_another_process_restores_everything(
    store: Store, verb: str, versioning: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_evidence, "LATE_S", 0.05)  # no request of the dead is under way here
    store.create(versioning)
    store.fill(5)
    before = store.snapshot()
    for at in random.Random(f"{verb} {versioning}").sample(range(1, 12), 2):
        lease, requests = store.lease(fraction=1.0), itertools.count()

        def die(at: int = at, requests: Iterator[int] = requests, **_: Any) -> None:
            if next(requests) >= at:
                raise Killed

        if verb == "recover":
            store.driver().inject(lease)
        hook("before-send.s3", die)
        with pytest.raises(Killed):
            getattr(store.driver(), verb)(lease)
        unhook()
        with contextlib.suppress(FileNotFoundError):  # the dead leave no such note
            (Path(lease.undo["backup"]) / "injected").unlink()
        store.driver().recover(lease)
        assert not store.driver().active(lease).present
        assert store.contents() == {key: sha for key, (_, sha) in before.items()}
        if versioning:
            assert store.snapshot() == before
            assert store.versions() == 5


class Clock:
    """Time as whoever waits for late requests sees it; what is due at a moment happens then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = time.time(), 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []
        patch.setattr(s3_evidence, "time", self)

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += seconds
        for moment, what in [d for d in self.due if d[0] <= self.slept]:
            self.due.remove((moment, what))
            what()


def test_a_request_of_the_dead_that_comes_late_is_taken_back_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create()
    store.fill(5)
    before, lease = store.snapshot(), store.lease(fraction=1.0)
    store.driver().inject(lease)
    (Path(lease.undo["backup"]) / "injected").unlink()
    key, clock, stepped = touched(lease)[-1], Clock(monkeypatch), list[float]()

    def late() -> None:
        store.put(key, b"noise", Metadata={s3_objects.MARK: lease.id})

    clock.due = [(0.5, late), (3.0, late), (9.5, late)]
    store.driver().recover(lease, lambda done, total: stepped.append(clock.now))
    assert not clock.due, "it stopped looking while the store could still carry a request out"
    assert store.snapshot() == before
    assert store.versions() == 5
    assert max(b - a for a, b in itertools.pairwise(stepped)) <= 0.25
    waited = clock.slept
    store.driver().recover(lease)
    assert waited == clock.slept, "the time since the injection last sent is over"


def test_after_an_orderly_end_nothing_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create()
    store.fill(3)
    clock, lease = Clock(monkeypatch), store.lease()
    store.driver().inject(lease)
    store.driver().recover(lease)
    assert not clock.slept


def test_a_request_that_was_sent_again_is_still_waited_for(store: Store) -> None:
    store.create()
    store.fill(3)
    lease, lost = store.lease(fraction=1.0), [1]
    from botocore.exceptions import ReadTimeoutError

    def lose(**_: Any) -> None:
        if lost:
            lost.pop()
            raise ReadTimeoutError(endpoint_url=store.url)

    hook("before-send.s3.PutObject", lose)
    store.driver().inject(lease)
    assert not lost
    assert store.driver().active(lease).effective
    assert not (Path(lease.undo["backup"]) / "injected").exists()


def test_a_request_without_an_answer_fails_the_injection_and_keeps_the_injection_open(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    store.create()
    store.fill(5)
    before, lease = store.snapshot(), store.lease(fraction=1.0)
    from botocore.exceptions import ReadTimeoutError

    def lost(**_: Any) -> None:
        raise ReadTimeoutError(endpoint_url=store.url)

    hook("after-call.s3.PutObject", lost)
    with pytest.raises(InjectFailed, match="Read timeout"):
        store.driver().inject(lease)
    assert not (Path(lease.undo["backup"]) / "injected").exists()
    unhook()
    store.driver().recover(lease)
    assert store.snapshot() == before


@pytest.mark.parametrize("versioning", ["Enabled", None])
def test_many_clean_objects_are_looked_at_in_lists_and_what_is_not_clean_is_found(
    store: Store, versioning: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "SAMPLE", 3)
    store.create(versioning)
    store.fill(20)
    lease, heads = store.lease(fraction=1.0), list[str]()
    hook("before-send.s3.HeadObject", lambda request, **_: heads.append(request.url))
    seen = store.driver().active(lease)
    assert seen.lines[0].startswith("20 of 20 objects")
    assert not heads, "twenty requests where one tells as much"
    store.driver().inject(lease)
    ours, theirs = touched(lease)[1], touched(lease)[2]  # neither is in the sample
    for entry in lease.undo["objects"]:
        if entry["key"] != ours:
            s3_objects.restore(store.client, store.bucket, s3_objects.Original(**entry), lease.id)
    store.put(theirs, b"newer, by somebody else")
    seen = store.driver().active(lease)
    assert seen.present
    assert seen.lines[0].startswith("1 of 20 objects")
    assert "1 written by others meanwhile, kept" in seen.lines
    store.driver().recover(lease)
    assert not store.driver().active(lease).present


# ---- choosing and refusing


def test_which_objects_are_chosen(store: Store) -> None:
    store.create()
    store.fill(21)
    store.fill(5, "data/other/")
    store.put("data/empty", b"")
    lease = store.lease(fraction=0.1, prefix="other/")
    assert len(touched(lease)) == 1
    assert touched(lease)[0].startswith("data/other/")
    lease = store.lease(fraction=0.1, select="part-01*, part-02*")
    assert len(touched(lease)) == 2
    assert all(key.startswith(("data/part-01", "data/part-02")) for key in touched(lease))
    assert touched(store.lease(fraction=0.1, select="part-01*, part-02*")) == touched(lease)
    assert len(touched(store.lease(fraction=1.0))) == 26, "an empty object cannot be damaged"
    for wrong in ({"prefix": "nothing/"}, {"select": "empty"}):
        with pytest.raises(DriverError, match=r"(no object|only empty objects) under s3://"):
            store.lease(**wrong)


def test_swap_of_one_takes_the_content_of_another(store: Store) -> None:
    store.create(versioning=None)
    store.fill(5)
    before, lease = store.contents(), store.lease("swap", fraction=0.2)
    store.driver().inject(lease)
    (key,) = touched(lease)
    assert store.contents()[key] in {sha for other, sha in before.items() if other != key}
    store.driver().recover(lease)
    assert store.contents() == before
    for i in range(5):
        store.put(f"data/part-{i:03}", b"alike")
    with pytest.raises(DriverError, match="same content"):
        store.lease("swap")


@pytest.mark.skipif(bool(OTHER), reason="not every store offers it")
def test_buckets_in_which_it_could_not_be_undone_are_refused(store: Store) -> None:
    store.create(ObjectLockEnabledForBucket=True)
    store.client.put_object_lock_configuration(
        Bucket=store.bucket,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
        },
    )  # fmt: skip
    with pytest.raises(DriverError, match="locks every new version"):
        store.lease()
    store.bucket += "2"
    store.create()
    store.fill(3)
    store.client.put_bucket_versioning(Bucket=store.bucket, VersioningConfiguration={"Status": "Suspended"})
    with pytest.raises(DriverError, match="versioning is suspended"):
        store.lease()


@pytest.mark.skipif(bool(OTHER), reason="not every store offers it")
def test_without_versions_an_expiry_comes_back_and_an_acl_that_would_not_is_refused(store: Store) -> None:
    store.create(versioning=None)
    expires = datetime(2031, 5, 6, 7, 8, 9, tzinfo=timezone.utc)
    store.put("data/part-000", b"cached", Expires=expires)
    lease = store.lease(fraction=1.0)
    store.driver().inject(lease)
    store.driver().recover(lease)
    reply = store.client.get_object(Bucket=store.bucket, Key="data/part-000")
    assert (reply["Body"].read(), reply["Expires"]) == (b"cached", expires)

    store.put("data/part-000", b"public", ACL="public-read")
    with pytest.raises(DriverError, match="has an ACL of its own"):
        store.lease(fraction=1.0)


@pytest.mark.skipif(bool(OTHER), reason="not every store offers it")
def test_a_bucket_that_is_copied_elsewhere_is_refused(store: Store) -> None:
    store.create()
    store.fill(2)

    def replicate(status: str) -> None:
        rule = {
            "ID": "all", "Status": status, "Priority": 1, "Filter": {"Prefix": ""},
            "DeleteMarkerReplication": {"Status": "Disabled"},
            "Destination": {"Bucket": f"arn:aws:s3:::{store.bucket}"},
        }  # fmt: skip
        store.client.put_bucket_replication(
            Bucket=store.bucket,
            ReplicationConfiguration={"Role": "arn:aws:iam::123456789012:role/copy", "Rules": [rule]},
        )

    replicate("Enabled")
    with pytest.raises(DriverError, match="is replicated"):
        store.lease()
    replicate("Disabled")
    assert store.lease()


def test_credentials_are_referenced_only(store: Store, server: tuple[str, str, str]) -> None:
    store.create()
    store.fill(3)
    stored = json.dumps(store.lease().undo)
    assert "env:S3_SECRET" in stored
    assert server[1] not in stored
    assert server[2] not in stored
    with pytest.raises(DriverError, match=r"s3\.secret_key must be a reference"):
        store.driver().resolve(store.target(secret_key="written-out"))
    with pytest.raises(DriverUnavailable, match="env:NOT_SET: the variable is not set") as e:
        store.driver().resolve(store.target(secret_key="env:NOT_SET"))
    assert "\n" not in str(e.value)


def test_wrong_bucket_or_endpoint_is_one_clear_line(store: Store) -> None:
    with pytest.raises(DriverUnavailable) as e:
        store.driver().resolve(store.target())
    assert str(e.value) == f"s3.resolve: s3://{store.bucket} at {store.url}: there is no such bucket or object"
    store.create()
    store.fill(2)
    assert store.driver().resolve(store.target()) == (f"s3://{store.bucket}",)
    lease = store.lease()
    nowhere = "http://127.0.0.1:9"
    place = {**lease.undo["place"], "endpoint": nowhere}
    lost = replace(lease, undo={**lease.undo, "place": place})
    for call, kind in (
        (lambda: store.driver().resolve(store.target(endpoint=nowhere)), DriverUnavailable),
        (lambda: store.driver().inject(lost), DriverUnavailable),
        (lambda: store.driver().active(lost), DriverUnavailable),
        (lambda: store.driver().recover(lost), RecoverFailed),
    ):
        with pytest.raises(kind, match="Could not connect to the endpoint") as e:
            call()
        assert "\n" not in str(e.value)
    with pytest.raises(RecoverFailed, match="undo data is lost"):
        store.driver().recover(replace(lease, undo={}))
    with pytest.raises(DriverError, match="names no|has no s3"):
        store.driver().resolve(Target(select="*"))


# ---- the sandbox's own store


def test_the_sandbox_takes_its_objects_with_it(store: Store, server: tuple[str, str, str]) -> None:
    store.create()
    store.fill(5)
    home = store.tmp / "sandbox"
    home.mkdir()
    own = {"endpoint": "{object_store}", "access_key": "", "secret_key": ""}
    with pytest.raises(DriverUnavailable, match="no sandbox is up"):
        store.driver().resolve(store.target(**own))

    def up() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "60"])
        state = {
            "control_url": "http://127.0.0.1:9", "token": "t", "pid": process.pid,
            "create_time": psutil.Process(process.pid).create_time(),
            "object_store": {"url": server[0], "access_key": server[1], "secret_key": server[2]},
        }  # fmt: skip
        (home / "state.json").write_text(json.dumps(state))
        return process

    def down(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    first = up()
    try:
        before, lease = store.snapshot(), store.lease(**own)
        assert server[2] not in json.dumps(lease.undo)
        store.driver().inject(lease)
        assert store.driver().active(lease).effective
    finally:
        down(first)
    seen = store.driver().active(lease)
    assert not seen.present
    assert "its objects were in memory, no fault can be there" in seen.lines[0]
    store.driver().recover(lease)
    second = up()
    try:
        # Another sandbox with the objects of the first is not what happens; but what is found is taken away.
        assert store.driver().active(lease).present
        with pytest.raises(DriverUnavailable, match="another one"):
            store.driver().inject(lease)
        store.driver().recover(lease)
        assert store.snapshot() == before
        assert store.driver().active(lease).lines == (
            "another sandbox than then is up: its store has nothing of the lease",
        )
    finally:
        down(second)


def test_a_sandbox_with_a_store_of_somebody_else_does_not_take_its_objects_with_it(
    store: Store, server: tuple[str, str, str]
) -> None:
    store.create()
    store.fill(5)
    home = store.tmp / "sandbox"
    home.mkdir()
    process = subprocess.Popen(["sleep", "60"])
    config = {"endpoint": server[0], "access_key": "env:S3_ACCESS", "secret_key": "env:S3_SECRET"}
    state = {
        "control_url": "http://127.0.0.1:9", "token": "t", "pid": process.pid,
        "create_time": psutil.Process(process.pid).create_time(), "config": {"object_store": config},
        "object_store": {"url": server[0], "access_key": server[1], "secret_key": server[2]},
    }  # fmt: skip
    (home / "state.json").write_text(json.dumps(state))
    try:
        before = store.snapshot()
        lease = store.lease(endpoint="{object_store}", access_key="", secret_key="")
        assert server[2] not in json.dumps(lease.undo)
        store.driver().inject(lease)
    finally:
        process.kill()
        process.wait()
    assert store.driver().active(lease).effective, "the objects outlive the sandbox, and so does the damage"
    store.driver().recover(lease)
    assert store.snapshot() == before
    assert not store.driver().active(lease).present


# ---- parts


def test_who_waits_for_a_store_that_hangs_after_a_stop_still_steps_and_sends_nothing_more(store: Store) -> None:
    store.create()
    calls, sent, hung, released = itertools.count(1), list[str](), threading.Event(), threading.Event()
    hook("before-send.s3", lambda event_name, **_: sent.append(event_name))
    answers: list[bool] = []

    def work(item: int) -> None:
        client.head_bucket(Bucket=store.bucket)
        hung.set()
        answers.append(released.wait(5))  # the store takes its time
        client.list_objects_v2(Bucket=store.bucket)

    def step(done: int, total: int) -> None:
        if not hung.is_set():
            return
        if next(calls) > 3:
            released.set()
        raise Halted("somebody wants out")

    place = {**store.target().s3.model_dump()}  # type: ignore[union-attr]
    with s3_client.opened(place) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_client, "STEP_S", 0.02)
        with pytest.raises(Halted):
            s3_client.in_parallel(work, range(1), 1, step)
    assert answers == [True], "nobody renewed while the store hung"
    assert sent == ["before-send.s3.HeadBucket"]


def test_steps_go_on_while_one_request_is_slow() -> None:
    stepped = threading.Event()

    def slow(item: int) -> int:
        assert item or stepped.wait(10)
        return item

    def step(done: int, total: int) -> None:
        if (done, total) == (4, 5):
            stepped.set()

    assert sorted(s3_client.in_parallel(slow, range(5), 5, step)) == [0, 1, 2, 3, 4]


def test_what_is_in_flight_ends_before_an_error_comes_out() -> None:
    started, ended = threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            started.set()
            time.sleep(0.05)
            ended.set()
        else:
            assert started.wait(10)
            raise Killed

    with pytest.raises(Killed):
        s3_client.in_parallel(work, range(2), 2, no_step)
    assert ended.is_set()


@pytest.mark.parametrize("hangs", ["GetBucketVersioning", "HeadBucket"])
def test_a_store_that_hangs_at_the_first_request_does_not_silence_the_owner(
    store: Store, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "STEP_S", 0.02)
    store.create()
    store.fill(2)
    lease, calls, released, in_time = store.lease(), itertools.count(1), threading.Event(), list[bool]()
    hook(f"before-send.s3.{hangs}", lambda **_: in_time.append(released.wait(5)))

    def step(done: int, total: int) -> None:
        if next(calls) > 3:
            released.set()

    if hangs == "HeadBucket":
        store.driver().inject(lease, step)
    else:
        backup = store.tmp / "another"
        store.driver().undo(KIND, lease.targets, lease.params, target=store.target(), backup=backup, step=step)
    assert in_time == [True]


@pytest.mark.parametrize("how", ["random_bytes", "truncate", "bit_flip"])
@pytest.mark.parametrize("size", [1, 5, 1250, 300_000])
def test_damage_always_changes_the_content(how: str, size: int) -> None:
    content = random.Random(size).randbytes(size)
    chunks = [content[i : i + 100_000] for i in range(0, size, 100_000)]
    for seed in range(20):
        found = b"".join(damaged(chunks, size, how, str(seed)))
        assert found != content
        assert len(found) == (size // 2 if how == "truncate" else size)
        if how == "bit_flip":
            flipped = sum(bin(a ^ b).count("1") for a, b in zip(found, content, strict=True)) if size < 2000 else 240
            assert abs(flipped - max(1, size * 8 // 10_000)) <= 1
