"""`bad_model`: a worse but well-formed version is promoted in a model registry on S3, and taken back version by version.

The registry's layout is that of the sandbox (see sandbox/registry.py): `<name>/current.json` promotes
`<name>/versions/<version>/{model.bin, card.json}`. The bad version answers with the probability of the wrong class; its
checksum, signature and golden predictions are its own and right, so that nothing is wrong with it but its answers.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers import s3_choice, s3_client, s3_objects
from mlchaos_dagster.drivers.s3_client import beside, told
from mlchaos_dagster.drivers.s3_evidence import Notes
from mlchaos_dagster.drivers.s3_objects import MARK, Original
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, InjectFailed, RecoverFailed

CURRENT = "current.json"


def undo(target: Target, directory: Path, backup: Path, step: Step = no_step) -> dict[str, Any]:
    """Read what is promoted, and make the worse version of it.

    Raises:
        DriverUnavailable: the store could not be asked.
        DriverError: nothing is promoted, its artifact is not readable, or the bucket keeps no versions or copies them.
    """
    where = {"driver": "model", "verb": "undo"}
    if target.s3 is None:
        raise DriverError("bad_model needs a registry: s3: {bucket: …, prefix: …}", **where)
    place = s3_client.place_of(target.s3, directory)
    bucket, root = place["bucket"], place["prefix"]

    def read(client: Any) -> tuple[Original, str, bytes, dict[str, Any]]:
        if not s3_choice.keeps_versions(client, bucket):
            raise DriverError(f"s3://{bucket} keeps no versions: a promotion could not be taken back exactly", **where)
        s3_choice.refuse_unfit(client, bucket)
        pointer = s3_objects.record(client, bucket, root + CURRENT, versioned=True)
        version = str(_json(_get(client, bucket, root + CURRENT)).get("version"))
        card = _json(_get(client, bucket, f"{root}versions/{version}/card.json"))
        return pointer, version, *_worse(_get(client, bucket, f"{root}versions/{version}/model.bin"), card)

    with told(DriverUnavailable, place, **where), s3_client.opened(place) as client:
        pointer, version, worse, worse_card = beside(lambda: read(client), step)
    try:
        backup.mkdir(parents=True, exist_ok=True)
        (backup / "armed").write_text("")
        (backup / "model.bin").write_bytes(worse)
    except OSError as e:
        raise DriverError(f"cannot write in {backup}: {e.strerror or e}", **where) from e
    return {
        "place": place,
        "backup": str(backup.resolve()),
        "objects": [pointer.to_json()],
        "before": version,
        "card": worse_card,
    }


def inject(lease: Lease, step: Step = no_step) -> None:
    """Store the worse version, then promote it, if what is promoted is still what was read.

    What is under way is noted as it is for objects, see s3.py.

    Raises:
        DriverUnavailable: nothing was touched.
        InjectFailed: it may be partly there.
    """
    where = {"driver": "model", "verb": "inject", "lease_id": lease.id}
    place, card = lease.undo["place"], lease.undo["card"]
    bucket = place["bucket"]
    if s3_client.sandbox_is_another(place):
        raise DriverUnavailable("the sandbox is another one than when the registry was read", **where)
    backup, notes, unanswered = Path(lease.undo["backup"]), Notes(lease), list[str]()

    def promote(client: Any) -> None:
        new = {"version": card["version"], "previous": lease.undo["before"], "promoted_by": lease.id}
        steps = ((_artifact_key(lease), (backup / "model.bin").read_bytes()), (_card_key(lease), _dump(card)))
        for key, content in steps:
            _refuse_recovered(backup, where)
            notes.sending()
            client.put_object(Bucket=bucket, Key=key, Body=content, Metadata={MARK: lease.id})
        _refuse_recovered(backup, where)
        notes.sending()
        if not s3_objects.overwrite(client, bucket, _pointer(lease), lease.id, io.BytesIO(_dump(new))):
            raise InjectFailed("somebody else promoted a version meanwhile; theirs stays", **where)

    def sending(done: int, total: int) -> None:
        notes.sending()
        step(done, total)

    with told(InjectFailed, place, **where), s3_client.opened(place) as client:
        s3_client.tell_unanswered(client, lambda: unanswered.append(""))
        _refuse_recovered(backup, where)
        notes.begin()
        try:
            beside(lambda: promote(client), sending)
        except s3_client.client_errors()[1]:
            unanswered.append("")
            raise
        finally:
            if not unanswered:
                notes.end(Counter({True: 1}), 1, True)


def recover(lease: Lease, step: Step = no_step) -> None:
    """Take our promotion and our version away; what others promoted meanwhile stays. Idempotent.

    After an injection that did not end orderly, again until nothing of it can come through any more.

    Raises:
        RecoverFailed: the store does not answer, or the pointer has not its content.
    """
    where = {"driver": "model", "verb": "recover", "lease_id": lease.id}
    place, notes = lease.undo["place"], Notes(lease)
    notes.disarm()
    if s3_client.vanished(place):
        return
    bucket, pointer = place["bucket"], _pointer(lease)

    def restore(client: Any) -> None:
        found = s3_objects.restored(client, bucket, pointer, lease.id)
        if found.state == "same" and found.sha256 != pointer.sha256 and not s3_client.sandbox_is_another(place):
            raise RecoverFailed(f"{pointer.key} has its version but not its content", **where)
        for key in (_artifact_key(lease), _card_key(lease)):
            for version in _ours(client, bucket, key, lease.id):
                client.delete_object(Bucket=bucket, Key=key, VersionId=version)

    with told(RecoverFailed, place, **where), s3_client.opened(place) as client:
        for _ in notes.looks(step):
            beside(lambda: restore(client), step)


def active(lease: Lease) -> Evidence:
    """What is promoted now, and what of ours is in the registry.

    Raises:
        DriverUnavailable: the store did not answer.
    """
    where = {"driver": "model", "verb": "active", "lease_id": lease.id}
    place = lease.undo["place"]
    if line := s3_client.vanished(place):
        return Evidence(present=False, effective=False, lines=(line,))
    bucket, pointer, bad = place["bucket"], _pointer(lease), lease.undo["card"]["version"]
    with told(DriverUnavailable, place, **where), s3_client.opened(place) as client:
        look = s3_objects.look(client, bucket, pointer, lease.id, read=True)
        left = sum(len(_ours(client, bucket, key, lease.id)) for key in (_artifact_key(lease), _card_key(lease)))
        now = _json(_get(client, bucket, pointer.key)).get("version") if look.state != "gone" else None
    lines = [f"s3://{bucket}/{pointer.key}: promoted is version {now}, before it was {lease.undo['before']}"]
    if look.state == "ours":
        lines.insert(0, f"the bad version {bad} is promoted")
    elif look.present:
        lines.insert(0, f"the bad version {bad} was promoted; somebody took it back since")
    elif look.state == "same":
        lines.append(f"version id {pointer.version[:12]}… and SHA-256 {pointer.sha256[:12]}… as before")
    else:
        lines.append("written by somebody else since, left alone")
    if left:
        lines.append(f"{left} objects of version {bad} are in the registry")
    # A promotion is an act: that the platform took it back does not undo that it happened.
    return Evidence(present=look.present or left > 0, effective=look.present, lines=tuple(lines))


def _worse(artifact: bytes, card: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The same model with its classes exchanged, and its own card."""
    from mlchaos_dagster.sandbox.model import FEATURES, ModelRejected, card_of, unpack

    try:
        unpack(artifact)
    except ModelRejected as e:
        raise DriverError(
            f"the promoted model is not one that can be made worse: {e}", driver="model", verb="undo"
        ) from e
    row, parts = FEATURES * 8, list[bytes]()
    for start in (0, 2 * row):
        parts += [artifact[start + row : start + 2 * row], artifact[start : start + row]]
    priors = artifact[4 * row :]
    worse = b"".join([*parts, priors[8:], priors[:8]])
    return worse, card_of(worse, card["golden_rows"])


def _pointer(lease: Lease) -> Original:
    return Original(**lease.undo["objects"][0])


def _artifact_key(lease: Lease) -> str:
    return f"{lease.undo['place']['prefix']}versions/{lease.undo['card']['version']}/model.bin"


def _card_key(lease: Lease) -> str:
    return f"{lease.undo['place']['prefix']}versions/{lease.undo['card']['version']}/card.json"


def _ours(client: Any, bucket: str, key: str, lease_id: str) -> list[str]:
    """Versions of a key that carry the lease's mark."""
    found: list[str] = []
    for version in client.list_object_versions(Bucket=bucket, Prefix=key).get("Versions", []):
        if version["Key"] != key:
            continue
        head: dict[str, Any] = client.head_object(Bucket=bucket, Key=key, VersionId=version["VersionId"])
        if head["Metadata"].get(MARK) == lease_id:
            found.append(version["VersionId"])
    return found


def _get(client: Any, bucket: str, key: str) -> bytes:
    content: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    return content


def _json(content: bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(content)
    except ValueError:
        value = None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _refuse_recovered(backup: Path, where: dict[str, str]) -> None:
    if not (backup / "armed").exists():
        raise InjectFailed("the lease was recovered already", **where)
