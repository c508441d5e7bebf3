"""The S3 backend: a fraction of the objects under a prefix is overwritten with damaged copies, and taken back.

The lock is the bucket: prefixes overlap. What may be overwritten, what is taken away and what is left to others is decided
object by object in s3_objects.py; here is the order of the work. Beside the lease, the directory `backup` tells one
process from another's point of view:

    armed        made by `undo`, removed by `recover`: without it nothing is (any longer) injected
    injecting    an injection was begun; its time of modification is when it was last known to send
    injected     it has ended and no request of it is under way: what it did, as JSON
    00000.bin …  contents, in a bucket that keeps no versions
    restored     what the last recovery read back, as JSON
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers import s3_choice, s3_client, s3_fault, s3_objects
from mlchaos_dagster.drivers.s3_client import beside, in_parallel, told
from mlchaos_dagster.drivers.s3_evidence import Notes, evidence
from mlchaos_dagster.drivers.s3_objects import Look, Original
from mlchaos_dagster.engine.files import sync_directory
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed

NAME = "s3"
SAMPLE = 50
"""Objects whose content `active` reads, and above four times as many, that it looks at first."""
_SAMPLE_BYTES = 64 * 1024**2
_WORTH_LISTING = 10
"""Objects under the prefix for each of the lease, up to which a list takes less time than a look at each."""
_ROUNDS = 20
"""How often what was found again is taken away again: a request that was sent twice is written twice."""


class S3Driver:
    """Driver for buckets. Every request is bounded, verbs over many objects call their step.

    Args:
        sandbox_directory: Of the sandbox whose own store `{object_store}` stands for.
    """

    name = NAME
    faults = frozenset({"s3_object_corruption"})
    self_limiting: frozenset[str] = frozenset()
    """None: a damaged object stays damaged until somebody takes it back."""

    def __init__(self, sandbox_directory: Path | str) -> None:
        self.directory = Path(sandbox_directory)

    def resolve(self, target: Target) -> tuple[str, ...]:
        """The bucket as `s3://NAME`, when it is there.

        Raises:
            DriverUnavailable: the store did not answer, or has no such bucket for us.
            DriverError: the target names no bucket, or its credentials are not references.
        """
        place = self._place(target, "resolve")
        with told(DriverUnavailable, place, driver=NAME, verb="resolve"), s3_client.opened(place) as client:
            client.head_bucket(Bucket=place["bucket"])
        return (f"s3://{place['bucket']}",)

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target,
        backup: Path,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """Choose the objects, read every one of them, keep what identifies it; without versions, keep its content.

        The same objects are chosen whenever they are the same: those with the lowest SHA-256 of their key.

        Raises:
            DriverUnavailable: the store could not be asked.
            DriverError: nothing to damage, or it could not be undone (no room for a backup, a lock on new versions).
        """
        place = self._place(target, "undo")
        prefix = s3_choice.joined(place["prefix"], params.get("prefix", ""))
        bucket, how = place["bucket"], str(params.get("how", "random_bytes"))
        with told(DriverUnavailable, place, driver=NAME, verb="undo"), s3_client.opened(place) as client:
            versioned = beside(lambda: s3_choice.keeps_versions(client, bucket), step)
            beside(lambda: s3_choice.refuse_unfit(client, bucket), step)
            there = s3_choice.listed(client, bucket, prefix, target.select, len(place["prefix"]), step)
            chosen, others = s3_choice.chosen(there, float(params["fraction"]))
            if not chosen:
                what = "only empty objects" if there else "no object"
                raise DriverError(
                    f"{what} under s3://{bucket}/{prefix} that {target.select} matches", driver=NAME, verb="undo"
                )
            if not versioned:
                s3_choice.refuse_full(backup, sum(size for _, size, _ in chosen))
            with _backup_errors(backup):
                backup.mkdir(parents=True, exist_ok=True)

            def record(numbered: tuple[int, str]) -> Original | None:
                number, key = numbered
                path = None if versioned else backup / f"{number:05}.bin"
                try:
                    return s3_objects.record(client, bucket, key, versioned=versioned, backup=path)
                except s3_client.client_errors()[0] as e:
                    if s3_client.code_of(e) == "NoSuchKey":  # deleted since it was listed
                        return None
                    raise

            names = [(i, key) for i, (key, _, _) in enumerate(chosen)]
            found = in_parallel(record, names, len(names), step)
            objects = sorted((o for o in found if o is not None), key=lambda o: o.key)
            if not objects:
                raise DriverError("all chosen objects were deleted meanwhile", driver=NAME, verb="undo")
            partner = None
            if how == "swap":
                partner = beside(lambda: s3_choice.partner(client, bucket, objects, others, versioned), step)
        with _backup_errors(backup):
            (backup / "armed").write_text("")
            sync_directory(backup)
        return {
            "place": place,
            "prefix": prefix,
            "backup": str(backup.resolve()),
            "versioned": versioned,
            "matched": len(there),
            "objects": [o.to_json() for o in objects],
            "partner": partner.to_json() if partner else None,
        }

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Overwrite the chosen objects, marked with the lease; what others wrote since `undo` is left alone and counted.

        No request is under way any more when this returns or raises.

        Raises:
            DriverUnavailable: the store did not answer; nothing was touched.
            InjectFailed: it stopped answering halfway, the lease is recovered already, or all objects changed meanwhile.
        """
        place, bucket = lease.undo["place"], lease.undo["place"]["bucket"]
        where = {"driver": NAME, "verb": "inject", "lease_id": lease.id}
        objects, notes = _objects(lease), Notes(lease)
        how, halves = str(lease.params.get("how", "random_bytes")), _partners(lease, objects)
        if s3_client.sandbox_is_another(place):
            raise DriverUnavailable("the sandbox is another one than when the objects were read", **where)
        conditional, counts, unanswered = True, Counter[bool](), list[str]()

        def one(original: Original) -> None:
            if not notes.armed:
                raise InjectFailed("the lease was recovered meanwhile", **where)
            if time.time() >= lease.deadline_wall:
                raise InjectFailed("the lease's deadline has passed", **where)
            notes.sending()
            try:
                written = s3_fault.damage(
                    client, bucket, original, lease.id, how, partner=halves.get(original.key), conditional=conditional
                )
            except s3_client.client_errors()[1]:
                unanswered.append(original.key)  # it may still be carried out
                raise
            counts[written] += 1

        def sending(done: int, total: int) -> None:
            notes.sending()
            step(done, total)

        with told(DriverUnavailable, place, **where), s3_client.opened(place) as client:
            beside(lambda: client.head_bucket(Bucket=bucket), step)
            s3_client.tell_unanswered(client, lambda: unanswered.append(""))
            if not notes.armed:
                raise InjectFailed("the lease was recovered already", **where)
            with told(InjectFailed, place, **where):
                notes.begin()
                try:
                    step(0, len(objects))
                    first = objects[0]
                    partner = halves.get(first.key)
                    conditional = beside(
                        lambda: s3_fault.knows_if_match(client, bucket, first, lease.id, how, partner=partner), sending
                    )
                    in_parallel(one, objects, len(objects), sending)
                except s3_client.client_errors()[1]:
                    unanswered.append("")
                    raise
                finally:
                    if not unanswered:
                        notes.end(counts, len(objects), conditional)
        if not counts[True]:
            said = f"all {len(objects):,} objects were changed by others since they were read; none was touched"
            raise InjectFailed(said, **where)

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Take away what is ours, object by object, and read every object back.

        After an injection that did not end orderly, a request of it may still come through: looked for again until none
        can come any more (`s3_evidence.LATE_S` after the injection last sent).

        Raises:
            RecoverFailed: the store does not answer, or an object is not as it was and nobody else wrote it.
        """
        where = {"driver": NAME, "verb": "recover", "lease_id": lease.id}
        if "place" not in lease.undo:
            said = f"the lease's undo data is lost; look for objects with the metadata {s3_objects.MARK}: {lease.id}"
            raise RecoverFailed(said, **where)
        place, bucket, objects, notes = (
            lease.undo["place"],
            lease.undo["place"]["bucket"],
            _objects(lease),
            Notes(lease),
        )
        notes.disarm()
        try:
            if s3_client.vanished(place):
                return
        except OSError as e:
            raise RecoverFailed(str(e), **where) from e
        with told(RecoverFailed, place, **where):
            try:
                with s3_client.opened(place) as client:
                    self._restore(client, bucket, lease, objects, notes, step)
            except RecoverFailed:
                raise
            except DriverError as e:
                raise RecoverFailed(str(e), **where) from e

    def active(self, lease: Lease) -> Evidence:
        """What is at the chosen keys now: metadata, version id and ETag of each, and the content of some.

        Of many objects a sample is looked at first; all of it damaged is an answer, anything else is looked at in full: in
        lists of a thousand where those are mostly of the lease, each object that is not listed as recorded by itself.

        Raises:
            DriverUnavailable: the store did not answer.
        """
        where = {"driver": NAME, "verb": "active", "lease_id": lease.id}
        if "place" not in lease.undo:
            raise DriverUnavailable("the lease's undo data is lost", **where)
        place, objects = lease.undo["place"], _objects(lease)
        if line := s3_client.vanished(place):
            return Evidence(present=False, effective=False, lines=(line,))
        with told(DriverUnavailable, place, **where), s3_client.opened(place) as client:
            sample = _sample(objects)
            looks = _looks(client, place["bucket"], lease, sample, read=True)
            seen = {o.key: found for o, found in looks}
            full = len(objects) <= 4 * SAMPLE or not seen or any(found.state != "ours" for found in seen.values())
            if full:
                rest = [o for o in objects if o.key not in seen]
                seen |= _listed(client, place["bucket"], lease, rest)
                rest = [o for o in rest if o.key not in seen]
                seen |= {o.key: found for o, found in _looks(client, place["bucket"], lease, rest, read=False)}
        return evidence(lease, objects, seen)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _place(self, target: Target, verb: str) -> dict[str, Any]:
        if target.s3 is None:
            raise DriverError("the target has no s3: {bucket: …}", driver=NAME, verb=verb)
        try:
            return s3_client.place_of(target.s3, self.directory)
        except DriverError as e:
            raise type(e)(str(e), driver=NAME, verb=verb) from e

    @staticmethod
    def _restore(client: Any, bucket: str, lease: Lease, objects: Sequence[Original], notes: Notes, step: Step) -> None:
        another = s3_client.sandbox_is_another(lease.undo["place"])

        def restored(original: Original) -> tuple[int, str]:
            try:
                return s3_objects.restore(client, bucket, original, lease.id), ""
            except (
                s3_client.client_errors()[0],
                DriverError,
            ) as e:  # one that resists must not keep the others damaged
                return 0, f"{original.key}: {s3_client.words(e) if s3_client.code_of(e) else e}"

        def read(original: Original) -> tuple[Original, Look]:
            return original, s3_objects.look(client, bucket, original, lease.id, read=True)

        for _ in range(_ROUNDS):
            for _ in notes.looks(step):
                first = in_parallel(restored, objects, len(objects), lambda done, total: step(done, 2 * total))
                if failed := [said for _, said in first if said]:
                    raise RecoverFailed(
                        f"{len(failed)} of {len(objects)} objects: {failed[0]}",
                        driver=NAME,
                        verb="recover",
                        lease_id=lease.id,
                    )
            second = in_parallel(read, objects, len(objects), lambda done, total: step(total + done, 2 * total))
            if not any(found.present for _, found in second):
                break
        else:
            raise RecoverFailed("damaged objects keep coming", driver=NAME, verb="recover", lease_id=lease.id)
        wrong = [o.key for o, found in second if found.state == "same" and found.sha256 != o.sha256]
        if wrong and not another:
            said = f"{len(wrong)} objects have their version but not their content, such as {wrong[0]}"
            raise RecoverFailed(said, driver=NAME, verb="recover", lease_id=lease.id)
        notes.restored(Counter(found.state for _, found in second))


def _partners(lease: Lease, objects: Sequence[Original]) -> dict[str, Original]:
    """Key → whose content it gets: the next chosen object that differs."""
    if lease.params.get("how") != "swap":
        return {}
    if lease.undo.get("partner"):
        return {o.key: Original(**lease.undo["partner"]) for o in objects}
    found: dict[str, Original] = {}
    follower = next(o for o in objects if o.sha256 != objects[-1].sha256)
    after = objects[-1]
    for original in reversed(objects):
        if after.sha256 != original.sha256:
            follower = after
        found[original.key] = follower
        after = original
    return found


def _objects(lease: Lease) -> list[Original]:
    return [Original(**entry) for entry in lease.undo["objects"]]


def _sample(objects: Sequence[Original]) -> list[Original]:
    """Some of them, spread evenly, with not too much to read."""
    found: list[Original] = []
    size = 0
    for original in objects[:: max(1, math.ceil(len(objects) / SAMPLE))]:
        size += original.size
        if size <= _SAMPLE_BYTES:
            found.append(original)
    return found


def _looks(
    client: Any, bucket: str, lease: Lease, objects: Sequence[Original], *, read: bool
) -> list[tuple[Original, Look]]:
    def one(original: Original) -> tuple[Original, Look]:
        return original, s3_objects.look(client, bucket, original, lease.id, read=read)

    return in_parallel(one, objects, len(objects), no_step)


def _listed(client: Any, bucket: str, lease: Lease, objects: Sequence[Original]) -> dict[str, Look]:
    """Those of many objects that a list shows as recorded: a thousand in one request, not one."""
    if len(objects) <= 4 * SAMPLE or lease.undo["matched"] > _WORTH_LISTING * len(objects):
        return {}
    recorded = {o.key: o for o in objects}
    versioned = bool(objects[0].version)
    name, entries = ("list_object_versions", "Versions") if versioned else ("list_objects_v2", "Contents")
    pages = client.get_paginator(name).paginate(Bucket=bucket, Prefix=lease.undo["prefix"])
    found: dict[str, Look] = {}
    for page in islice(pages, 1 + lease.undo["matched"] * 2 // 1000):  # others may have made any number meanwhile
        for entry in page.get(entries, []):
            original = recorded.get(entry["Key"])
            if original is None or not entry.get("IsLatest", True) or entry["ETag"] != original.etag:
                continue
            if entry.get("VersionId", "") == original.version:
                found[original.key] = Look("same", version=original.version or "null")
    return found


@contextlib.contextmanager
def _backup_errors(backup: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as e:
        raise DriverError(f"cannot write in {backup}: {e.strerror or e}", driver=NAME, verb="undo") from e
