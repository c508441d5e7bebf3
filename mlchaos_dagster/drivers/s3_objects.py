"""One object of a bucket: record what it is, overwrite it, look at it, take back what was written over it.

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
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlencode

from mlchaos_dagster.drivers.s3_client import client_errors, code_of, go_on
from mlchaos_dagster.errors import DriverError

MARK = "mlchaos-lease"
"""Metadata that says whose a version is."""
MAX_SIZE = 5 * 1024**3
"""Bytes that one PUT can carry."""
CHUNK = 256 * 1024
KEPT = (
    "CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "Metadata",
    "WebsiteRedirectLocation", "StorageClass", "ServerSideEncryption", "SSEKMSKeyId", "BucketKeyEnabled", "Expires",
)  # fmt: skip
CHANGED = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
UNKNOWN = frozenset({"NotImplemented", "501"})
ABSENT = frozenset({"NoSuchKey", "NoSuchVersion", "NoSuchBucket", "404", "MethodNotAllowed", "405"})
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
        DriverError: it has no version and no backup could be made, or it has an ACL that a PUT would not put back; or it
            is too large to be overwritten in one request.
    """
    reply = client.get_object(Bucket=bucket, Key=key)
    size, version = int(reply["ContentLength"]), str(reply.get("VersionId") or "null")
    digest = hashlib.sha256()
    with contextlib.closing(reply["Body"]) as body:
        if size > MAX_SIZE:
            raise DriverError(f"{key} has {size:,} bytes; at most {MAX_SIZE:,} can be overwritten in one request")
        if versioned:
            for chunk in chunks(body):
                digest.update(chunk)
        elif backup is None:
            raise DriverError(f"{key} has no version id, and there is no backup")
        elif version != "null":
            raise DriverError(
                f"versioning is suspended, and {key} has a version from before: overwriting would leave one more"
                " that no restore takes away; enable versioning"
            )
        else:
            _back_up(chunks(body), digest, backup, key)
    headers = {}
    if not versioned:
        _refuse_acl(client, bucket, key)
        headers = {name: reply[name] for name in KEPT if reply.get(name)}
        if "Expires" in headers:
            headers["Expires"] = headers["Expires"].isoformat()
        elif reply.get("ExpiresString"):
            raise DriverError(f"{key} has the header Expires: {reply['ExpiresString']}, which is no date to put back")
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


def overwrite(
    client: Any,
    bucket: str,
    original: Original,
    lease_id: str,
    body: IO[bytes],
    *,
    conditional: bool = True,
    current: dict[str, Any] | None = None,
) -> bool:
    """Write `body` (seekable) over the object, marked with the lease, its other metadata kept.

    Not `conditional`, for stores that do not know `If-Match`: then only the look just before protects others. `current`
    saves that look where `If-Match` protects: the reply to a read of the object, made by the caller.

    Returns:
        False when the object is neither the recorded one nor ours already: nothing was written.
    """
    if current is None or not conditional:
        current = unchanged(client, bucket, original)
    if current is None:
        return look(client, bucket, original, lease_id).state == "ours"
    headers = marked(current, lease_id)
    try:
        put(client, bucket, original.key, body, headers, if_match=original.etag if conditional else None)
    except client_errors()[0] as e:
        if code_of(e) in CHANGED | ABSENT:
            # The first try may have been written and its answer lost: then it is ours that no longer matches.
            return look(client, bucket, original, lease_id).state == "ours"
        raise
    return True


# ---- back


def restore(client: Any, bucket: str, original: Original, lease_id: str) -> int:
    """Take away what is there of ours now; without versions, put the backup back over what is still ours.

    Idempotent. What others wrote stays: above ours, it stays current. Look afterwards: see `restored`.

    Returns:
        How many versions of ours were there.

    Raises:
        DriverError: the backup is gone or damaged, so the content cannot be put back.
    """
    found = look(client, bucket, original, lease_id)
    if not found.present:
        return 0
    if not original.version:
        return _put_back(client, bucket, original, lease_id)
    mine = (found.version,) if found.state == "ours" else found.below
    for version in mine:
        client.delete_object(Bucket=bucket, Key=original.key, VersionId=version)
    return len(mine)


def restored(client: Any, bucket: str, original: Original, lease_id: str) -> Look:
    """`restore` until a read of the object shows nothing of ours; that read. A request sent twice is written twice.

    Clean is what is not `present` and, where it is the `same`, has the SHA-256 of the original.
    """
    for _ in range(10):
        restore(client, bucket, original, lease_id)
        found = look(client, bucket, original, lease_id, read=True)
        if not found.present:
            return found
    raise DriverError(f"{original.key} is damaged again and again")


def look(client: Any, bucket: str, original: Original, lease_id: str, *, read: bool = False) -> Look:
    """What is at the key now, by metadata, version id and ETag; with `read` also by the SHA-256 of the content.

    Where something else than the recorded version is current, the versions that are not older are looked through: ours may
    be below somebody else's.
    """
    current = _head(client, bucket, original.key) if not read else None
    sha256 = ""
    if read or (current is not None and _may_be_put_back(current, original, lease_id)):
        current, sha256 = _read(client, bucket, original.key)
    if current is None:
        return Look("gone", below=_below(client, bucket, original, lease_id))
    version = str(current.get("VersionId") or "null")
    if _is_ours(current, lease_id):
        return Look("ours", sha256, version)
    if is_recorded(current, original) or (not original.version and sha256 == original.sha256):
        return Look("same", sha256, version)
    return Look("theirs", sha256, version, _below(client, bucket, original, lease_id))


# ---- inside


def _refuse_acl(client: Any, bucket: str, key: str) -> None:
    """Whoever overwrites an object becomes the only one who may read it: fine only where that is so already."""
    try:
        said = client.get_object_acl(Bucket=bucket, Key=key)
    except client_errors()[0] as e:
        if code_of(e) in UNKNOWN | {"AccessControlListNotSupported", "MethodNotAllowed", "405"}:
            return  # a store without ACLs
        raise
    owner, grants = said.get("Owner", {}).get("ID", ""), said.get("Grants", [])
    whole = [g for g in grants if g.get("Permission") == "FULL_CONTROL" and "URI" not in g.get("Grantee", {})]
    if len(grants) != 1 or not whole or whole[0].get("Grantee", {}).get("ID", "") != owner:
        raise DriverError(
            f"{key} has an ACL of its own, which overwriting would lose; enable versioning, which keeps it"
        )


def _head(client: Any, bucket: str, key: str, **more: str) -> dict[str, Any] | None:
    try:
        return client.head_object(Bucket=bucket, Key=key, **more)
    except client_errors()[0] as e:
        if code_of(e) in ABSENT:
            return None
        raise


def _is_ours(head: dict[str, Any], lease_id: str) -> bool:
    return head.get("Metadata", {}).get(MARK) == lease_id


def unchanged(client: Any, bucket: str, original: Original) -> dict[str, Any] | None:
    """The reply to HEAD while the object is the recorded one."""
    head = _head(client, bucket, original.key)
    return head if head is not None and is_recorded(head, original) else None


def is_recorded(reply: dict[str, Any], original: Original) -> bool:
    """Whether a reply to HEAD or GET speaks of the recorded version."""
    same = not original.version or str(reply.get("VersionId") or "null") == original.version
    return same and reply["ETag"] == original.etag


def _may_be_put_back(head: dict[str, Any], original: Original, lease_id: str) -> bool:
    """An object put back from its backup may have another ETag than one uploaded in parts: only its content tells."""
    return not (original.version or _is_ours(head, lease_id) or head["ETag"] == original.etag)


def marked(head: dict[str, Any], lease_id: str) -> dict[str, Any]:
    """What is written beside a content: all that was there, and the mark."""
    headers = {name: head[name] for name in KEPT if head.get(name)}
    return {**headers, "Metadata": {**head.get("Metadata", {}), MARK: lease_id}}


def chunks(body: Any) -> Iterator[bytes]:
    """Of a reply's body, until nobody waits for it any more."""
    for chunk in body.iter_chunks(CHUNK):
        go_on()
        yield chunk


def put(
    client: Any, bucket: str, key: str, body: IO[bytes], headers: dict[str, Any], *, if_match: str | None = None
) -> None:
    """One PUT, from the start of `body`."""
    body.seek(0)
    more = {"IfMatch": if_match} if if_match else {}
    client.put_object(Bucket=bucket, Key=key, Body=body, **headers, **more)


def _read(client: Any, bucket: str, key: str) -> tuple[dict[str, Any] | None, str]:
    """What is current, and the SHA-256 of its content."""
    try:
        reply = client.get_object(Bucket=bucket, Key=key)
    except client_errors()[0] as e:
        if code_of(e) in ABSENT:
            return None, ""
        raise
    with contextlib.closing(reply["Body"]) as body:
        return reply, _digest(chunks(body))


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
        if code_of(e) not in ABSENT:
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
            if _digest(iter(lambda: file.read(CHUNK), b"")) != original.sha256:
                raise DriverError(f"the backup {original.backup} of {original.key} is damaged")
            head = _head(client, bucket, original.key)
            if head is None or not _is_ours(head, lease_id):
                return 0
            headers = dict(original.headers)
            if "Expires" in headers:
                headers["Expires"] = datetime.fromisoformat(headers["Expires"])
            if tags := headers.pop("Tags", None):
                headers["Tagging"] = urlencode([(name, value) for name, value in tags])
            try:
                put(client, bucket, original.key, file, headers, if_match=head["ETag"])
            except client_errors()[0] as e:
                if code_of(e) in CHANGED | ABSENT:
                    return 0
                if code_of(e) not in UNKNOWN:
                    raise
                put(client, bucket, original.key, file, headers)
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
            found = _digest(iter(lambda: file.read(CHUNK), b""))
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
