"""How a lease lies in a cluster: object names, annotations, the Secrets with its content.

    Lease   NAME             facts in annotations; its presence means that a fault may be live
    Secret  NAME-0, NAME-1…  the whole lease as gzipped JSON (undo data may be secret, and large); hash in the Lease

NAME is the lease id. Knows nothing of who may do what: see leases.py.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from pydantic import TypeAdapter

from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.kube import labels
from mlchaos_dagster.kube.objects import Object, text

ABOUT = "mlchaos.dev/"
"""Prefix of our annotations."""
CHUNK_BYTES = 600 * 1024
"""Of gzipped content a Secret: base64 makes it 800 KiB, and an object may have 1 MiB."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?")
_LEASE = TypeAdapter(Lease)
_WORDS_MAX = 500


@dataclass(frozen=True)
class Head:
    """What the Lease object itself tells."""

    id: str
    uid: str
    version: str
    """Its resource version: the fence of every change."""
    holder: str
    """Identity of who may renew and close it."""
    token: int
    beat: int
    sha256: str
    """Of the content; empty in a damaged object."""
    parts: int
    run_id: str
    experiment: str
    environment: str
    driver: str
    kind: str
    lifetime_s: float
    """From opening to deadline, seconds."""
    holds: frozenset[str]
    """Keys that no other lease may hold, nor be within."""
    within: frozenset[str]
    """Keys of what its targets are part of (their Deployment, their node): others may share them, nobody hold them."""
    stop: str
    """Why it is to stop; empty: nobody asked."""
    taken_by: str
    """Who took it over from its owner; empty: nobody."""

    def stub(self) -> Lease:
        """The lease as far as its object tells: no targets, no undo data."""
        return Lease(
            id=self.id,
            run_id=self.run_id,
            experiment=self.experiment,
            environment=self.environment,
            driver=self.driver,
            kind="",
            targets=(),
            params={},
            undo={},
            duration_s=0.0,
            opened_wall=0.0,
            deadline_wall=0.0,
            owner=Owner(pid=0, started=0.0, boot_id="", host=""),
            token=self.token,
            stop_requested=self.stop,
        )


def identity(owner: Owner) -> str:
    """Who holds a lease: a process, told apart from a later one with the same pid."""
    return f"{owner.host}/{owner.pid}@{owner.started:g}/{owner.boot_id[:8]}"


def object_name(lease_id: str) -> str:
    """The lease id where it can be a name in a cluster (ours can), else one made from it."""
    if _NAME.fullmatch(lease_id):
        return lease_id
    plain = re.sub(r"[^a-z0-9]+", "-", lease_id.lower()).strip("-")[:40]
    return f"{plain or 'lease'}-{hashlib.sha256(lease_id.encode()).hexdigest()[:10]}"


def key(what: str) -> str:
    """A lock key: short, so that a thousand of them fit into an annotation."""
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def now() -> str:
    """For `renewTime`, for people; nothing of ours is judged by it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def lease_object(
    lease: Lease, namespace: str, holder: str, content: bytes, holds: Iterable[str], within: Iterable[str]
) -> Object:
    """The Lease object of a lease that is about to be opened."""
    facts = {
        "token": str(lease.token),
        "beat": "0",
        "sha256": hashlib.sha256(content).hexdigest(),
        "parts": str(len(chunks(content))),
        "run": lease.run_id,
        "experiment": lease.experiment,
        "environment": lease.environment,
        "driver": lease.driver,
        "kind": lease.kind,
        "lifetime": f"{lease.deadline_wall - lease.opened_wall:.3f}",
        "holds": " ".join(sorted(holds)),
        "within": " ".join(sorted(within)),
        "id": lease.id,
    }
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": object_name(lease.id),
            "namespace": namespace,
            "labels": labels.of_lease(object_name(lease.id), "lease"),
            "annotations": {ABOUT + k: v for k, v in facts.items()},
        },
        "spec": {
            "holderIdentity": holder,
            "acquireTime": now(),
            "renewTime": now(),
            "leaseTransitions": 0,
        },
    }


def head(found: Mapping[str, Any]) -> Head:
    """Read a Lease object. What is damaged reads as empty; it never raises."""

    def fact(name: str) -> str:
        return text(found, "metadata", "annotations", ABOUT + name)

    return Head(
        id=fact("id") or text(found, "metadata", "name"),
        uid=text(found, "metadata", "uid"),
        version=text(found, "metadata", "resourceVersion"),
        holder=text(found, "spec", "holderIdentity"),
        token=_whole(fact("token")),
        beat=_whole(fact("beat")),
        sha256=fact("sha256"),
        parts=_whole(fact("parts")),
        run_id=fact("run"),
        experiment=fact("experiment"),
        environment=fact("environment"),
        driver=fact("driver"),
        kind=fact("kind"),
        lifetime_s=_seconds(fact("lifetime")),
        holds=frozenset(fact("holds").split()),
        within=frozenset(fact("within").split()),
        stop=fact("stop"),
        taken_by=fact("taken-by"),
    )


def about(**facts: str) -> dict[str, str]:
    """Annotations; an underscore in a name is a dash, long texts are cut."""
    return {ABOUT + k.replace("_", "-"): " ".join(v.split())[:_WORDS_MAX] for k, v in facts.items()}


# -- the content --------------------------------------------------------------------------------------------------


def pack(lease: Lease) -> bytes:
    """The whole lease; the same bytes for the same lease."""
    return gzip.compress(json.dumps(asdict(lease), sort_keys=True).encode(), compresslevel=6, mtime=0)


def unpack(head: Head, parts: Sequence[bytes | None]) -> Lease:
    """The lease with what its object says now. Raises ValueError: content is missing, damaged or of another lease."""
    if not head.parts or len(parts) != head.parts or any(p is None for p in parts):
        raise ValueError("a Secret with its content is missing")
    content = b"".join(p for p in parts if p is not None)
    if hashlib.sha256(content).hexdigest() != head.sha256:
        raise ValueError("the Secret with its content was changed")
    lease = _LEASE.validate_python(json.loads(gzip.decompress(content)))
    if lease.id != head.id:
        raise ValueError("the content is of another lease")
    return replace(lease, token=head.token, stop_requested=head.stop or lease.stop_requested)


def chunks(content: bytes) -> list[bytes]:
    """Cut into what one Secret holds."""
    return [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)] or [b""]


def secret_name(lease_id: str, part: int) -> str:
    """Of one part of a lease's content."""
    return f"{object_name(lease_id)}-{part}"


def secrets(lease: Lease, namespace: str, content: bytes) -> list[Object]:
    """The Secrets that hold the content. They belong to no owner: nothing but we may collect them."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "immutable": True,
            "metadata": {
                "name": secret_name(lease.id, i),
                "namespace": namespace,
                "labels": labels.of_lease(object_name(lease.id), "undo"),
            },
            "data": {"lease": base64.b64encode(part).decode()},
        }
        for i, part in enumerate(chunks(content))
    ]


def secret_content(found: Mapping[str, Any] | None) -> bytes | None:
    """What a Secret holds; None when it is gone or holds something else."""
    try:
        return base64.b64decode(text(found, "data", "lease"), validate=True) or None
    except ValueError:
        return None


def _whole(word: str) -> int:
    return int(word) if word.isascii() and word.isdigit() else 0


def _seconds(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return 0.0
