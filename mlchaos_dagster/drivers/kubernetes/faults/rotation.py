"""Rotations of Secrets: a credential, or a TLS certificate, under load. They are acts: what is new stays.

As in the sandbox, a rotation is not undone. To recover means that it is complete, whenever it is asked for: the new one is
in force, the old one is nowhere, and nothing of the lease is left on the Secret. One patch makes it, so it is never half
there. What was before is in no lease, no record and no second object: until the overlap is over it stands in the Secret
itself, as `KEY.previous`, for whoever accepts both; then it is gone.

It fired when the Secret holds the new one. Whether it is served and accepted is the platform's part, and what the experiment
is about: a kubelet brings a mounted Secret to its pods within a minute or so, so the overlap should be longer than that.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import ssl
import threading
from abc import abstractmethod
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster.frozen import UNDO, marked_by, read
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults.marking import put_on, take_off
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.errors import DriverError, InjectFailed, LeaseRefused
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref, collection

PREVIOUS = ".previous"
"""Added to a key's name: what it held before, until the overlap is over."""
CERTIFICATE, KEY, TLS = "tls.crt", "tls.key", "kubernetes.io/tls"
_CA_KEYS = (("ca.crt", "ca.key"), (CERTIFICATE, KEY))
"""Where a Secret has a CA's certificate and its key: either pair."""
_CREDENTIALS = ("", "Opaque", "kubernetes.io/basic-auth")
_SCHEMES = ("Bearer", "Basic", "Token")
_HANDSHAKE_S = 1.5


class _Rotation:
    """What both have in common."""

    kinds = frozenset({"secret"})
    self_limiting = False

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """To read and to change the Secrets."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            yield from (Permission(verb, "secrets", namespace) for verb in ("get", "patch"))

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """What could not be rotated, or would be put back."""
        for ref in request.refs:
            found = read(site, ref)
            if found is None:
                yield Objection(f"{ref.shown} is gone", "a Secret that is there")
                continue
            if marked_by(found):
                yield Objection(
                    f"{ref.shown} carries the fault of lease {marked_by(found)}", f"mlchaos recover {marked_by(found)}"
                )
            if found.get("immutable"):
                yield Objection(f"{ref.shown} is immutable", "a Secret that may change")
            for owner in items(found, "metadata", "ownerReferences"):
                if owner.get("controller"):
                    who = f"{text(owner, 'kind')} {text(owner, 'name')}"
                    yield Objection(
                        f"{who} keeps {ref.shown} and would put it back", "a Secret that nobody else writes"
                    )
            yield from self.unfit(site, ref, found, request.target)

    @abstractmethod
    def unfit(self, site: Site, ref: Ref, found: Object, target: Target) -> Iterator[Objection]:
        """What speaks against this kind only."""


class CredentialRotation(_Rotation):
    """The value of one key is replaced by a random one; the old one is gone when the overlap is over."""

    def unfit(self, site: Site, ref: Ref, found: Object, target: Target) -> Iterator[Objection]:
        """Not a credential, or not alone."""
        key, data = target.kubernetes.key, mapping(found, "data")
        if text(found, "type") not in _CREDENTIALS:
            yield Objection(f"{ref.shown} is of type {text(found, 'type')}", "type Opaque or kubernetes.io/basic-auth")
        if not key or not data.get(key):
            yield Objection(f'{ref.shown} has no key "{key}"', f"targets.….kubernetes.key: {' or '.join(sorted(data))}")
        if key + PREVIOUS in data:
            yield Objection(f"another rotation of {ref.shown} is not complete", f"no key {key}{PREVIOUS} in it")

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which key; nothing of what is in it."""
        return {"key": request.target.kubernetes.key}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Put the new one in force; the old one is withdrawn beside the run when the overlap is over."""
        key, overlap_s = injection.undo["key"], float(injection.params.get("overlap_s") or 0.0)
        for done, ref in enumerate(injection.refs):
            step(done, len(injection.refs))
            put_on(site, ref, injection.lease, lambda found: _renewed(found, key, injection.lease, overlap_s > 0))
        if overlap_s > 0:
            timer = threading.Timer(overlap_s, _withdraw, (site, injection))
            timer.daemon = True  # who dies before leaves it to whoever recovers
            timer.start()

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """Complete it: the old one is gone."""
        for done, ref in enumerate(injection.refs):
            step(done, len(injection.refs))
            take_off(site, ref, injection.lease, _completed)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """The Secret, as it is now."""
        key, lines, present, new = injection.undo["key"], list[str](), False, 0
        for ref in injection.refs:
            found = read(site, ref)
            ours = marked_by(found) == injection.lease.id
            data = mapping(found, "data")
            there = ours and _noted(found, "rotated") == _digest(data.get(key, ""))
            present, new = present or ours, new + there
            if found is None:
                lines.append(f"{ref.shown} is gone, and the rotation with it")
            elif not ours:
                lines.append(f"{ref.shown}: no rotation of this lease is under way")
            else:
                old = "is there for who still accepts it" if key + PREVIOUS in data else "is gone"
                lines.append(
                    f"{ref.shown}: {key} {'is new' if there else 'was replaced again by others'}, the old one {old}"
                )
        return Evidence(present=present, effective=new == len(injection.refs), lines=tuple(lines))


class CertificateRotation(_Rotation):
    """A new certificate of the same names and the same CA takes the place of the one that is there."""

    def unfit(self, site: Site, ref: Ref, found: Object, target: Target) -> Iterator[Objection]:
        """Not a certificate of that CA, or somebody else renews it."""
        from mlchaos_dagster.drivers.kubernetes.faults import certificates

        if text(found, "type") != TLS:
            yield Objection(f"{ref.shown} is of type {text(found, 'type')}", f"type {TLS}")
            return
        if "cert-manager.io/certificate-name" in mapping(found, "metadata", "annotations"):
            yield Objection(f"cert-manager keeps {ref.shown} and would put it back", "a Secret that nobody else writes")
        try:
            certificates.renew(_value(found, CERTIFICATE), *_ca(site, ref.namespace, target.kubernetes.ca))
        except (certificates.Unusable, DriverError) as e:
            yield Objection(f"{ref.shown}: {e}", "targets.….kubernetes.ca: the Secret with its CA (ca.crt and ca.key)")

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Whose CA, and who can be asked for the certificate that is served; nothing that is secret."""
        url = urlsplit(request.target.probe.url if request.target.probe else "")
        asked = [url.hostname, url.port or 443] if url.scheme == "https" and url.hostname else None
        return {"ca": request.target.kubernetes.ca, "asked": asked}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Issue it and put it in force. Raises InjectFailed: it could not be issued."""
        from mlchaos_dagster.drivers.kubernetes.faults import certificates

        for done, ref in enumerate(injection.refs):
            step(done, len(injection.refs))
            try:
                ca = _ca(site, ref.namespace, injection.undo["ca"])

                def issued(found: Object, ca: tuple[bytes, bytes] = ca) -> Object:
                    new = certificates.renew(_value(found, CERTIFICATE), *ca)
                    data = {CERTIFICATE: _encoded(new.chain), KEY: _encoded(new.key)}
                    return {"data": data, **_note(_digest(data[CERTIFICATE]))}

                put_on(site, ref, injection.lease, issued)
            except certificates.Unusable as e:
                raise InjectFailed(f"{ref.shown}: {e}", driver=NAME, verb="inject") from e

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """It is complete as it is; the mark goes."""
        for done, ref in enumerate(injection.refs):
            step(done, len(injection.refs))
            take_off(site, ref, injection.lease, _completed)

    def active(self, site: Site, injection: Injection) -> Evidence:
        """The Secret as it is now, and the certificate that a new connection gets."""
        lines, present, new = list[str](), False, 0
        for ref in injection.refs:
            found = read(site, ref)
            ours = marked_by(found) == injection.lease.id
            there = ours and _noted(found, "rotated") == _digest(mapping(found, "data").get(CERTIFICATE, ""))
            present, new = present or ours, new + there
            if found is None:
                lines.append(f"{ref.shown} is gone, and the rotation with it")
                continue
            serial = _serial(_value(found, CERTIFICATE))
            said = (
                "no rotation of this lease is under way" if not ours else "new" if there else "replaced again by others"
            )
            lines.append(f"{ref.shown}: certificate {serial}, {said}")
            if ours and (asked := injection.undo["asked"]):
                lines.append(f"{asked[0]}:{asked[1]} shows certificate {_served(*asked)} (TLS handshake)")
        return Evidence(present=present, effective=new == len(injection.refs), lines=tuple(lines))


def _renewed(found: Object, key: str, lease: Lease, overlap: bool) -> Object:
    """The patch; of a Secret that has it already, nothing but the mark."""
    if marked_by(found) == lease.id and _noted(found, "rotated"):
        return {}
    old = _value(found, key)
    if not old:
        raise InjectFailed(f"the Secret has no key {key}", driver=NAME, verb="inject")
    scheme = old.decode(errors="replace").partition(" ")[0]
    value = (f"{scheme} " if scheme in _SCHEMES else "") + secrets.token_urlsafe(32)
    data = {key: _encoded(value.encode())}
    if overlap:
        data[key + PREVIOUS] = _encoded(old)
    return {"data": data, **_note(_digest(data[key]), key)}


def _completed(found: Object) -> Object:
    """The patch. The Secret itself tells which key was rotated: it works for whoever has lost the lease, too."""
    patch: Object = {"metadata": {"annotations": {UNDO: None}}}
    previous = _noted(found, "key") + PREVIOUS
    if previous != PREVIOUS and previous in mapping(found, "data"):
        patch["data"] = {previous: None}
    return patch


def _withdraw(site: Site, injection: Injection) -> None:
    """The overlap is over. What goes wrong here is left to `recover`, which comes in any case."""
    key = injection.undo["key"]

    def without(found: Object) -> Object:
        if marked_by(found) != injection.lease.id:
            raise LeaseRefused(f"lease {injection.lease.id} is over")
        return {"data": {key + PREVIOUS: None}}

    for ref in injection.refs:
        try:
            put_on(site, ref, injection.lease, without)
        except (DriverError, LeaseRefused):
            continue


def _note(digest: str, key: str = "") -> Object:
    """On the Secret: what we made, as a digest. It is random of 256 bits, or public: a digest gives nothing away."""
    return {"metadata": {"annotations": {UNDO: json.dumps({"rotated": digest, "key": key})}}}


def _noted(found: Object | None, what: str) -> str:
    known = text(found, "metadata", "annotations", UNDO)
    try:
        return str(json.loads(known)[what]) if known else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _value(found: Object, key: str) -> bytes:
    try:
        return b64decode(text(found, "data", key), validate=True)
    except (NotBase64, ValueError):
        return b""


def _encoded(value: bytes) -> str:
    return b64encode(value).decode()


def _digest(encoded: str) -> str:
    return hashlib.sha256(encoded.encode()).hexdigest()[:32]


def _ca(site: Site, namespace: str, name: str) -> tuple[bytes, bytes]:
    """Certificate and key of the CA. Raises DriverError: the Secret is missing, or has neither pair of keys."""
    found = site.cluster.get(f"{collection('secret', namespace)}/{name}") if name else None
    for certificate, key in _CA_KEYS:
        if found is not None and _value(found, certificate) and _value(found, key):
            return _value(found, certificate), _value(found, key)
    missing = "there is no such Secret" if found is None else "it has neither ca.crt and ca.key nor tls.crt and tls.key"
    raise DriverError(f'CA "{name}": {missing}', driver=NAME)


def _serial(chain: bytes) -> str:
    from mlchaos_dagster.drivers.kubernetes.faults import certificates

    try:
        return f"{certificates.serial_of(chain):x}"[:12]
    except certificates.Unusable:
        return "(unreadable)"


def _served(host: str, port: int) -> str:
    """Serial number of the certificate that a new connection gets, whoever trusts it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), _HANDSHAKE_S) as raw:
            with context.wrap_socket(raw, server_hostname=host) as connection:
                found = connection.getpeercert(binary_form=True)
    except OSError as e:
        return f"(no answer: {e})"
    return _serial(ssl.DER_cert_to_PEM_cert(found).encode()) if found else "(none)"
