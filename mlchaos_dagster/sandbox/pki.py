"""Certificates and credentials of the edge, as files: a CA of the sandbox's own, what it issued and what it revoked.

In ``edge/`` of the sandbox, for its owner's eyes but for ``trust.pem``:

- ``ca.pem``: key and certificate of the CA.
- ``trust.pem``: what clients trust: the CA's certificate and its list of revoked certificates (CRL).
- ``server.pem``: key and certificate that the edge serves, in one file so that both change at once.
- ``authorization``: what clients send, ``Bearer …``: their mounted secret.
- ``accepted.json``: SHA-256 of each accepted credential and until when (wall clock; null: for good).

Every file is replaced whole or not at all. ``cryptography`` is imported when something has to be made or parsed.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_CA_LIVES = timedelta(days=365)
_CERTIFICATE_LIVES = timedelta(days=30)
_RENEW_BEFORE = timedelta(days=1)
_CLOCK_SLACK = timedelta(minutes=1)
_NAME = "mlchaos sandbox CA"


@dataclass(frozen=True)
class Files:
    """Where the files of one sandbox are."""

    directory: Path

    @property
    def ca(self) -> Path:
        """Key and certificate of the CA."""
        return self.directory / "ca.pem"

    @property
    def trust(self) -> Path:
        """What clients trust."""
        return self.directory / "trust.pem"

    @property
    def server(self) -> Path:
        """Key and certificate of the edge."""
        return self.directory / "server.pem"

    @property
    def authorization(self) -> Path:
        """What clients send."""
        return self.directory / "authorization"

    @property
    def accepted(self) -> Path:
        """What the edge accepts."""
        return self.directory / "accepted.json"


def files(sandbox: Path) -> Files:
    """The files of the sandbox in this directory."""
    return Files(sandbox / "edge")


def ensure(found: Files) -> None:
    """Make what is missing or about to expire; what a former life left is used on."""
    found.directory.mkdir(mode=0o700, exist_ok=True)
    if not (found.ca.exists() and found.trust.exists()) or _about_to_expire(found.ca):
        _make_ca(found)
        found.server.unlink(missing_ok=True)
    if not found.server.exists() or _about_to_expire(found.server):
        issue(found)
    if not (found.authorization.exists() and found.accepted.exists()):
        credential = new_credential()
        accept(found, [(credential, None)])
        give_to_clients(found, credential)


# -- certificates -----------------------------------------------------------------------------------------------------


def issue(found: Files) -> str:
    """Put a new key and certificate in the place of those served; the SHA-256 fingerprint of the certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    ca_key, ca = _load(found.ca)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + _CERTIFICATE_LIVES)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    replace(found.server, _pem(key, certificate))
    return certificate.fingerprint(hashes.SHA256()).hex()


def revoke(found: Files, serial: int) -> None:
    """Put a certificate on the list of those that clients refuse; to do so twice changes nothing."""
    from cryptography import x509

    if serial in revoked(found):
        return
    text = found.trust.read_bytes()
    ca_key, ca = _load(found.ca)
    _write_trust(found, ca_key, ca, [*revoked(found, x509.load_pem_x509_crl(text)), serial])


def revoked(found: Files, listed: x509.CertificateRevocationList | None = None) -> list[int]:
    """Serial numbers on the list."""
    from cryptography import x509

    listed = listed or x509.load_pem_x509_crl(found.trust.read_bytes())
    return [entry.serial_number for entry in listed]


def served(found: Files) -> tuple[str, int]:
    """Fingerprint and serial number of the certificate on disk."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    certificate = x509.load_pem_x509_certificate(found.server.read_bytes())
    return certificate.fingerprint(hashes.SHA256()).hex(), certificate.serial_number


def _make_ca(found: Files) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{_NAME} {secrets.token_hex(4)}")])
    now = datetime.now(timezone.utc)
    usage = {
        "digital_signature": False,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + _CA_LIVES)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    replace(found.ca, _pem(key, certificate))
    _write_trust(found, key, certificate, [])


def _write_trust(found: Files, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, serials: list[int]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    now = datetime.now(timezone.utc)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject)
    builder = builder.last_update(now - _CLOCK_SLACK).next_update(now + _CA_LIVES)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _CLOCK_SLACK).build()
        builder = builder.add_revoked_certificate(entry)
    listed = builder.sign(ca_key, hashes.SHA256())
    replace(found.trust, ca.public_bytes(Encoding.PEM) + listed.public_bytes(Encoding.PEM), mode=0o644)


def _about_to_expire(path: Path) -> bool:
    from cryptography import x509

    ends = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    return ends - datetime.now(timezone.utc) < _RENEW_BEFORE


def _load(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = path.read_bytes()
    key = load_pem_private_key(content, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate(content)


def _pem(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    own = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return own + certificate.public_bytes(Encoding.PEM)


# -- credentials ------------------------------------------------------------------------------------------------------


def new_credential() -> str:
    """What a client sends from now on."""
    return f"Bearer {secrets.token_urlsafe(24)}"


def digest(credential: str) -> str:
    """How the edge knows a credential: not by its text."""
    return hashlib.sha256(credential.encode()).hexdigest()


def accept(found: Files, credentials: list[tuple[str, float | None]]) -> None:
    """Have the edge accept exactly these, the current one first, each until a moment (wall clock; None: for good)."""
    accept_digests(found, [(digest(credential), until) for credential, until in credentials])


def accept_digests(found: Files, known: list[tuple[str, float | None]]) -> None:
    """The same, where only their digests are known."""
    replace(found.accepted, json.dumps([{"sha256": one, "until": until} for one, until in known]).encode())


def accepted(found: Files) -> list[dict[str, Any]]:
    """``[{"sha256", "until"}, …]``, the current one first."""
    return json.loads(found.accepted.read_bytes())


def give_to_clients(found: Files, credential: str) -> None:
    """Replace the clients' mounted secret."""
    replace(found.authorization, credential.encode() + b"\n")


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file, whole or not at all; the disk has it afterwards."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
