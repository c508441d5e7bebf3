"""Before objects are damaged: which ones, and whether it could be undone. Reads only.

All refusals are here and in `s3_objects.record`.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlchaos_dagster.drivers import s3_client, s3_objects
from mlchaos_dagster.drivers.s3_objects import Original
from mlchaos_dagster.engine.ports import Step
from mlchaos_dagster.errors import DriverError

Entry = tuple[str, int, str]
"""Key, size in bytes, ETag."""
_SPARE_BYTES = 64 * 1024**2
"""Left free on the disk of the backups: the ledger must go on."""


def joined(prefix: str, more: str) -> str:
    """One prefix under another: a prefix need not end in a slash, a folder below it begins with one."""
    return f"{prefix}/{more}" if prefix and more and not prefix.endswith("/") else prefix + more


def listed(client: Any, bucket: str, prefix: str, select: str, base: int, step: Step) -> list[Entry]:
    """(key, size, ETag) of all objects under the prefix that a glob matches, from character `base` of their key on."""
    globs = [glob.strip() for glob in select.split(",")]
    found: list[Entry] = []
    pages = iter(client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    while (page := s3_client.beside(lambda: next(pages, None), step)) is not None:
        for entry in page.get("Contents", []):
            rest = entry["Key"][base:].lstrip("/")
            if any(fnmatchcase(rest, glob) for glob in globs):
                found.append((entry["Key"], int(entry["Size"]), entry["ETag"]))
    return found


def chosen(there: Sequence[Entry], fraction: float) -> tuple[list[Entry], list[Entry]]:
    """The fraction of all objects (rounded up) with the lowest hash of their key, empty ones left out; and the rest."""
    ranked = sorted((o for o in there if o[1] > 0), key=lambda o: hashlib.sha256(o[0].encode()).digest())
    # Rounded before rounding up: 0.1 × 30 is a little more than 3.
    wanted = max(1, math.ceil(round(fraction * len(there), 6)))
    return ranked[:wanted], ranked[wanted:]


def partner(
    client: Any, bucket: str, objects: Sequence[Original], others: Sequence[Entry], versioned: bool
) -> Original | None:
    """For `swap` where the chosen objects do not differ among themselves: one of the others that does."""
    if len({o.sha256 for o in objects}) > 1:
        return None
    for key, _, etag in others:
        if etag != objects[0].etag:
            # Not damaged itself, so it needs no backup; its content is read under its ETag.
            found = s3_objects.record(client, bucket, key, versioned=True)
            found = found if versioned else replace(found, version="")
            if found.sha256 != objects[0].sha256:
                return found
    raise DriverError("all objects have the same content: a swap would change nothing")


def keeps_versions(client: Any, bucket: str) -> bool:
    """Whether versioning is enabled; suspended is not. Raises DriverError: versions could not be deleted."""
    said = client.get_bucket_versioning(Bucket=bucket)
    if said.get("MFADelete") == "Enabled":
        raise DriverError(f"bucket {bucket} wants a second factor to delete a version")
    return said.get("Status") == "Enabled"


def refuse_unfit(client: Any, bucket: str) -> None:
    """Look whether a damaged version can be taken away for good.

    Raises:
        DriverError: a retention rule locks it, or it is copied elsewhere: the deletion of a version is not.
    """
    _refuse_locked(client, bucket)
    _refuse_replicated(client, bucket)


def _refuse_replicated(client: Any, bucket: str) -> None:
    try:
        said = client.get_bucket_replication(Bucket=bucket)
    except s3_client.client_errors()[0] as e:
        if s3_client.code_of(e) in ("AccessDenied", "403"):
            raise DriverError(
                f"not allowed to see whether bucket {bucket} is replicated (s3:GetReplicationConfiguration)"
            ) from e
        return  # no replication, or a store that knows none
    if any(rule.get("Status") == "Enabled" for rule in said.get("ReplicationConfiguration", {}).get("Rules", [])):
        raise DriverError(f"bucket {bucket} is replicated: a damaged version would stay at the other place")


def _refuse_locked(client: Any, bucket: str) -> None:
    try:
        said = client.get_object_lock_configuration(Bucket=bucket)
    except s3_client.client_errors()[0]:
        return  # no lock, or a store that knows none
    if said.get("ObjectLockConfiguration", {}).get("Rule"):
        raise DriverError(f"bucket {bucket} locks every new version for a time")


def refuse_full(backup: Path, size: int) -> None:
    """Raises DriverError: the disk of the backups has no room for so many bytes."""
    parent = next(p for p in (backup, *backup.parents) if p.exists())
    if shutil.disk_usage(parent).free < size + _SPARE_BYTES:
        raise DriverError(
            f"the bucket keeps no versions, and there is no room for a backup of {size:,} bytes in {parent}",
        )
