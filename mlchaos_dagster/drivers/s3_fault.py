"""The fault on one object: overwrite it with a damaged copy of itself, or with another object.

Functions over a boto3 client, without state, by the rules drawn in s3_objects.py, where the way back is, too.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Generator, Iterator
from typing import IO, Any

from mlchaos_dagster.drivers import s3_objects
from mlchaos_dagster.drivers.s3_client import client_errors, code_of
from mlchaos_dagster.drivers.s3_damage import damaged
from mlchaos_dagster.drivers.s3_objects import Original

_WRONG_PROBE = '"00000000000000000000000000000000"'
_IN_MEMORY = 4 * 1024**2
"""Bytes of a body kept in memory, per request in flight; the rest goes to a temporary file."""


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

    Memory is bounded whatever the size; large copies go through a temporary file. See `s3_objects.overwrite`.
    """
    with _damaged_copy(client, bucket, original, lease_id, how, partner) as (current, body):
        if current is None:
            return s3_objects.look(client, bucket, original, lease_id).state == "ours"
        return s3_objects.overwrite(client, bucket, original, lease_id, body, conditional=conditional, current=current)


def knows_if_match(
    client: Any, bucket: str, original: Original, lease_id: str, how: str, *, partner: Original | None = None
) -> bool:
    """Whether the store honours `If-Match` on writes, asked by damaging the object under a wrong ETag.

    A store that does not honour it has then written what was to be written there anyway: ask with an object of the fault.
    """
    with _damaged_copy(client, bucket, original, lease_id, how, partner) as (current, body):
        if current is None:
            return True
        try:
            s3_objects.put(
                client, bucket, original.key, body, s3_objects.marked(current, lease_id), if_match=_WRONG_PROBE
            )
        except client_errors()[0] as e:
            if code_of(e) in s3_objects.CHANGED:
                return True
            if code_of(e) not in s3_objects.UNKNOWN:
                raise
    return False


@contextlib.contextmanager
def _damaged_copy(
    client: Any, bucket: str, original: Original, lease_id: str, how: str, partner: Original | None
) -> Generator[tuple[dict[str, Any] | None, IO[bytes]], None, None]:
    """(reply to a read of the object, damaged content); (None, nothing) when something is no longer what was recorded."""
    source = partner or original
    with tempfile.TemporaryFile() if source.size > _IN_MEMORY else io.BytesIO() as file:
        current = None
        try:
            with _content(client, bucket, source, current=partner is None) as (reply, chunks):
                current = (
                    reply if partner is None and reply is not None else s3_objects.unchanged(client, bucket, original)
                )
                if current is not None and not s3_objects.is_recorded(current, original):
                    current = None
                if current is not None:
                    for chunk in damaged(chunks, source.size, how, f"{lease_id}:{original.key}"):
                        file.write(chunk)
        except client_errors()[0] as e:
            if code_of(e) not in s3_objects.CHANGED | s3_objects.ABSENT:
                raise
            current = None
        yield current, file


@contextlib.contextmanager
def _content(
    client: Any, bucket: str, original: Original, *, current: bool
) -> Generator[tuple[dict[str, Any] | None, Iterator[bytes]], None, None]:
    """(reply or None, content): from the backup, else the recorded version, or (`current`) what is current."""
    if original.backup:
        with open(original.backup, "rb") as file:
            yield None, iter(lambda: file.read(s3_objects.CHUNK), b"")
        return
    version = {"VersionId": original.version} if original.version and not current else {}
    reply = client.get_object(Bucket=bucket, Key=original.key, IfMatch=original.etag, **version)
    with contextlib.closing(reply["Body"]) as body:
        yield reply, s3_objects.chunks(body)
