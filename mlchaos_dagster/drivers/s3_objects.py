"""One object of a bucket: record what it is, overwrite or damage it, take that back, look at it.

Functions over a boto3 client, without state; for every fault on objects. The rules, the same for all of them:

- What is overwritten is what was recorded: same version, same ETag, checked by reading just before and by `If-Match`.
  What somebody else wrote meanwhile is never overwritten.
- What is written carries the lease id as metadata (`MARK`). Only what carries it is ever taken away, by version id.
- In a bucket that keeps versions the recorded version becomes current again by itself, with its own id. In any other the
  content is put back from the backup, over what is still ours only.

Failures of the store come out as botocore raises them (`s3_client.told` makes errors of ours of them).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlencode

from mlchaos_dagster.drivers.s3_client import client_errors, code_of
from mlchaos_dagster.drivers.s3_damage import damaged
from mlchaos_dagster.errors import DriverError

MARK = "mlchaos-lease"
"""Metadata that says whose a version is."""
MAX_SIZE = 5 * 1024**3
"""Bytes that one PUT can carry."""
_CHUNK = 256 * 1024
_IN_MEMORY = 4 * 1024**2
"""Bytes of a body kept in memory, per request in flight; the rest goes to a temporary file."""
_KEPT = (
    "CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "Metadata",
    "WebsiteRedirectLocation", "StorageClass", "ServerSideEncryption", "SSEKMSKeyId", "BucketKeyEnabled",
)  # fmt: skip
_WRONG_PROBE = '"00000000000000000000000000000000"'
_ANOTHER = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
_ABSENT = frozenset({"NoSuchKey", "NoSuchVersion", "NoSuchBucket", "404", "MethodNotAllowed", "405"})
"""405: what is current is a delete marker."""


@dataclass(frozen=True)
class Original:
    """An object before the fault: all that is needed to know it again, and to have it back."""

    key: str
    version: str
    """Empty where the bucket keeps no versions: then `backup` has the content."""
    etag: str
    size: int
    sha256: str
    modified: str = ""
    """ISO 8601, whole seconds, by the store's clock."""
    backup: str = ""
    headers: dict[str, Any] = field(default_factory=dict[str, Any])
    """What to put back beside the content, where there is no version that has it."""

    def to_json(self) -> dict[str, Any]:
        """As a lease stores it; without what is empty."""
        return {name: value for name, value in asdict(self).items() if value or name == "version"}


@dataclass(frozen=True)
class Look:
    """What is at an object's key now."""

    state: Literal["same", "ours", "theirs", "gone"]
    """`same`: as recorded. `ours`: damaged. `theirs`: written by somebody else since. `gone`: deleted by somebody else."""
    sha256: str = ""
    """Of the current content, where it was read."""
    version: str = ""
    """Of what is current; empty where there is none."""
    below: tuple[str, ...] = ()
    """Versions of ours that are not current."""

    @property
    def present(self) -> bool:
        """Whether anything of ours is left."""
        return self.state == "ours" or bool(self.below)


# ---- before


def record(client: Any, bucket: str, key: str, *, versioned: bool, backup: Path | None = None) -> Original:
    """Read one object whole and keep what identifies it; of a bucket without versions also its content.

    `versioned` is whether the bucket keeps versions now (enabled, not suspended). If not, the content goes to the file
    `backup`, is fsynced and read back.

    Raises:
        DriverError: it has no version and no backup could be made, or it is too large to be overwritten in one request.
    """
    reply = client.get_object(Bucket=bucket, Key=key)
    size, version = int(reply["ContentLength"]), str(reply.get("VersionId") or "null")
    digest = hashlib.sha256()
    with contextlib.closing(reply["Body"]) as body:
        if size > MAX_SIZE:
            raise DriverError(f"{key} has {size:,} bytes; at most {MAX_SIZE:,} can be overwritten in one request")
        if versioned:
            for chunk in body.iter_chunks(_CHUNK):
                digest.update(chunk)
        elif backup is None:
            raise DriverError(f"{key} has no version id, and there is no backup")
        elif version != "null":
            raise DriverError(
                f"versioning is suspended, and {key} has a version from before: overwriting would leave one more"
                " that no restore takes away; enable versioning"
            )
        else:
            _back_up(body.iter_chunks(_CHUNK), digest, backup, key)
    headers = {}
    if not versioned:
        headers = {name: reply[name] for name in _KEPT if reply.get(name)}
        if reply.get("TagCount"):
            tags = client.get_object_tagging(Bucket=bucket, Key=key)["TagSet"]
            headers["Tags"] = [[tag["Key"], tag["Value"]] for tag in tags]
    return Original(
        key=key,
        version=version if versioned else "",
        etag=reply["ETag"],
        size=size,
        sha256=digest.hexdigest(),
        modified=_seconds(reply["LastModified"]),
        backup="" if versioned else str(backup),
        headers=headers,
    )


# ---- the fault


def knows_if_match(client: Any, bucket: str, original: Original, lease_id: str, body: IO[bytes]) -> bool:
    """Whether the store honours `If-Match` on writes, asked by writing `body` over the object under a wrong ETag.

    A store that does not honour it has then written what was to be written there anyway; so ask only with a body and an
    object of the fault.
    """
    current = _unchanged(client, bucket, original)
    if current is None:
        return True
    try:
        _put(client, bucket, original.key, body, _marked(current, lease_id), if_match=_WRONG_PROBE)
    except client_errors()[0] as e:
        if code_of(e) in _ANOTHER:
            return True
        if code_of(e) in ("NotImplemented", "501"):
            return False
        raise
    return False


def overwrite(
    client: Any, bucket: str, original: Original, lease_id: str, body: IO[bytes], *, conditional: bool = True
) -> bool:
    """Write `body` (seekable) over the object, marked with the lease, its other metadata kept.

    Not `conditional`, for stores that do not know `If-Match`: then only the look just before protects others.

    Returns:
        False when the object is neither the recorded one nor ours already: nothing was written.
    """
    current = _unchanged(client, bucket, original)
    if current is None:
        return look(client, bucket, original, lease_id).state == "ours"
    headers = _marked(current, lease_id)
    try:
        _put(client, bucket, original.key, body, headers, if_match=original.etag if conditional else None)
    except client_errors()[0] as e:
        if code_of(e) in _ANOTHER | _ABSENT:
            # The first try may have been written and its answer lost: then it is ours that no longer matches.
            return look(client, bucket, original, lease_id).state == "ours"
        raise
    return True


def damage(
    client: Any,
    bucket: str,
    original: Original,
    lease_id: str,
    how: str,
    *,
    partner: Original | None = None,
    conditional: bool = True,
) -> bool:
    """Overwrite the object with a damaged copy of itself; for `swap` with the content of `partner`.

    Memory is bounded whatever the size; large copies go through a temporary file.

    Returns:
        False when the object is no longer the recorded one: nothing was written.
    """
    with damaged_copy(client, bucket, original, lease_id, how, partner=partner) as body:
        return body is not None and overwrite(client, bucket, original, lease_id, body, conditional=conditional)


@contextlib.contextmanager
def damaged_copy(
    client: Any, bucket: str, original: Original, lease_id: str, how: str, *, partner: Original | None = None
) -> Generator[IO[bytes] | None, None, None]:
    """The damaged content as a file; None when what should be copied is no longer what was recorded."""
    source = partner or original
    size = source.size
    with tempfile.TemporaryFile() if size > _IN_MEMORY else io.BytesIO() as file:
        try:
            with _content(client, bucket, source) as chunks:
                for chunk in damaged(chunks, size, how, f"{lease_id}:{original.key}"):
                    file.write(chunk)
        except client_errors()[0] as e:
            if code_of(e) not in _ANOTHER | _ABSENT:
                raise
            yield None
            return
        file.seek(0)
        yield file


# ---- back


def restore(client: Any, bucket: str, original: Original, lease_id: str) -> int:
    """Take away every version of ours; without versions, put the backup back over what is still ours.

    Idempotent. What others wrote stays: above ours, it stays current.

    Returns:
        How many versions of ours were there.

    Raises:
        DriverError: the backup is gone or damaged, so the content cannot be put back.
    """
    removed = 0
    for _ in range(10):  # a request that was sent twice may have been written twice
        found = look(client, bucket, original, lease_id)
        if not found.present:
            break
        if original.version:
            for version in (found.version,) if found.state == "ours" else found.below:
                client.delete_object(Bucket=bucket, Key=original.key, VersionId=version)
                removed += 1
        else:
            removed += _put_back(client, bucket, original, lease_id)
    return removed


def look(client: Any, bucket: str, original: Original, lease_id: str, *, read: bool = False) -> Look:
    """What is at the key now, by metadata, version id and ETag; with `read` also by the SHA-256 of the content.

    Where something else than the recorded version is current, the versions above the recorded one are looked through:
    ours may be below somebody else's.
    """
    head = _head(client, bucket, original.key)
    if head is None:
        return Look("gone", below=_below(client, bucket, original, lease_id))
    ours, version = _is_ours(head, lease_id), str(head.get("VersionId") or "null")
    sha256 = ""
    if read or not (ours or original.version or head["ETag"] == original.etag):
        # Without versions, an object put back from its backup may have another ETag than one uploaded in parts.
        sha256 = _sha256(client, bucket, original.key, head)
    if ours:
        return Look("ours", sha256, version)
    if original.version:
        same = version == original.version
    else:
        same = sha256 == original.sha256 if sha256 else head["ETag"] == original.etag
    return (
        Look("same", sha256, version)
        if same
        else Look("theirs", sha256, version, _below(client, bucket, original, lease_id))
    )


# ---- inside


def _head(client: Any, bucket: str, key: str, **more: str) -> dict[str, Any] | None:
    try:
        return client.head_object(Bucket=bucket, Key=key, **more)
    except client_errors()[0] as e:
        if code_of(e) in _ABSENT:
            return None
        raise


def _is_ours(head: dict[str, Any], lease_id: str) -> bool:
    return head.get("Metadata", {}).get(MARK) == lease_id


def _unchanged(client: Any, bucket: str, original: Original) -> dict[str, Any] | None:
    """The reply to HEAD while the object is the recorded one."""
    head = _head(client, bucket, original.key)
    if head is None or head["ETag"] != original.etag:
        return None
    same = not original.version or (head.get("VersionId") or "null") == original.version
    return head if same else None


def _marked(head: dict[str, Any], lease_id: str) -> dict[str, Any]:
    headers = {name: head[name] for name in _KEPT if head.get(name)}
    return {**headers, "Metadata": {**head.get("Metadata", {}), MARK: lease_id}}


def _put(
    client: Any, bucket: str, key: str, body: IO[bytes], headers: dict[str, Any], *, if_match: str | None = None
) -> None:
    body.seek(0)
    more = {"IfMatch": if_match} if if_match else {}
    client.put_object(Bucket=bucket, Key=key, Body=body, **headers, **more)


@contextlib.contextmanager
def _content(client: Any, bucket: str, original: Original) -> Generator[Iterator[bytes], None, None]:
    """The recorded content: from the backup, or the recorded version."""
    if original.backup:
        with open(original.backup, "rb") as file:
            yield iter(lambda: file.read(_CHUNK), b"")
        return
    version = {"VersionId": original.version} if original.version else {}
    reply = client.get_object(Bucket=bucket, Key=original.key, IfMatch=original.etag, **version)
    with contextlib.closing(reply["Body"]) as body:
        yield body.iter_chunks(_CHUNK)


def _sha256(client: Any, bucket: str, key: str, head: dict[str, Any]) -> str:
    """Of the content that `head` spoke of; of the current one where there are no versions."""
    version = {"VersionId": head["VersionId"]} if head.get("VersionId") else {}
    try:
        reply = client.get_object(Bucket=bucket, Key=key, **version)
    except client_errors()[0] as e:
        if code_of(e) in _ABSENT:
            return ""
        raise
    digest = hashlib.sha256()
    with contextlib.closing(reply["Body"]) as body:
        for chunk in body.iter_chunks(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _below(client: Any, bucket: str, original: Original, lease_id: str) -> tuple[str, ...]:
    """Versions of ours among those of the key that are not older than the recorded one."""
    if not original.version:
        return ()
    found: list[str] = []
    try:
        for version in _versions(client, bucket, original.key):
            if version["VersionId"] == original.version or _seconds(version["LastModified"]) < original.modified:
                continue
            head = _head(client, bucket, original.key, VersionId=version["VersionId"])
            if head is not None and _is_ours(head, lease_id):
                found.append(version["VersionId"])
    except client_errors()[0] as e:
        if code_of(e) not in _ABSENT:
            raise
    return tuple(found)


def _versions(client: Any, bucket: str, key: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=key):
        versions = page.get("Versions", [])
        yield from (version for version in versions if version["Key"] == key)
        # The key itself sorts before all that it is a prefix of.
        if any(entry["Key"] != key for entry in (*versions, *page.get("DeleteMarkers", []))):
            return


def _put_back(client: Any, bucket: str, original: Original, lease_id: str) -> int:
    """The backup over what is still ours; 0 when it is not (any more)."""
    try:
        with open(original.backup, "rb") as file:
            if _digest(iter(lambda: file.read(_CHUNK), b"")) != original.sha256:
                raise DriverError(f"the backup {original.backup} of {original.key} is damaged")
            head = _head(client, bucket, original.key)
            if head is None or not _is_ours(head, lease_id):
                return 0
            headers = dict(original.headers)
            if tags := headers.pop("Tags", None):
                headers["Tagging"] = urlencode(tags)
            try:
                _put(client, bucket, original.key, file, headers, if_match=head["ETag"])
            except client_errors()[0] as e:
                if code_of(e) in _ANOTHER | _ABSENT:
                    return 0
                if code_of(e) not in ("NotImplemented", "501"):
                    raise
                _put(client, bucket, original.key, file, headers)
    except OSError as e:
        raise DriverError(f"the backup {original.backup} of {original.key} cannot be read: {e.strerror or e}") from e
    return 1


def _back_up(chunks: Iterable[bytes], digest: Any, path: Path, key: str) -> None:
    """Write, fsync, read back. Raises DriverError."""
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        with open(path, "rb") as file:
            found = _digest(iter(lambda: file.read(_CHUNK), b""))
    except OSError as e:
        raise DriverError(f"the backup of {key} cannot be written: {e.strerror or e}") from e
    if found != digest.hexdigest():
        raise DriverError(f"the backup of {key} does not read back as written")


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _seconds(moment: datetime) -> str:
    return moment.replace(microsecond=0).isoformat()
