"""A new certificate in the place of an old one: same names, same lifetime, a new key, signed by the same CA. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

_CLOCK_SLACK = timedelta(minutes=1)
_OWN_KEY = (x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier)
"""Extensions that are made from keys, not copied."""


class Unusable(ValueError):
    """What is there cannot be renewed; says why."""


@dataclass(frozen=True)
class Renewed:
    """What goes into the Secret."""

    chain: bytes
    key: bytes
    serial: int


def serial_of(chain: bytes) -> int:
    """Serial number of the first certificate of a PEM text. Raises Unusable."""
    return _chain(chain)[0].serial_number


def renew(chain: bytes, ca_chain: bytes, ca_key: bytes) -> Renewed:
    """Issue it.

    Args:
        chain: `tls.crt` as it is: the certificate, and those between it and the CA.
        ca_chain: The CA's certificate; only the first of the text counts.
        ca_key: The CA's private key, not encrypted.

    Raises:
        Unusable: a text is no PEM, or the certificate is not of this CA: those who trust the old one would refuse a new one.
    """
    old, *between = _chain(chain)
    ca = _chain(ca_chain)[0]
    try:
        signer: Any = serialization.load_pem_private_key(ca_key, None)
    except (ValueError, TypeError) as e:
        raise Unusable(f"the CA's key cannot be read: {e}") from e
    if _public(signer.public_key()) != _public(ca.public_key()):
        raise Unusable("the CA's key is not that of its certificate")
    try:
        old.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as e:
        raise Unusable(f"the certificate was not issued by this CA ({ca.subject.rfc4514_string()})") from e
    now = datetime.now(timezone.utc)
    if ca.not_valid_after_utc <= now:
        raise Unusable(f"the CA expired at {ca.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    key = _like(old.public_key())
    lifetime = old.not_valid_after_utc - old.not_valid_before_utc
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(min(now - _CLOCK_SLACK + lifetime, ca.not_valid_after_utc))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False)  # type: ignore[arg-type]
    )
    for extension in old.extensions:
        if not isinstance(extension.value, _OWN_KEY):
            builder = builder.add_extension(extension.value, extension.critical)
    plain = isinstance(signer, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey))
    new = builder.sign(signer, None if plain else hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Renewed(b"".join(c.public_bytes(pem) for c in (new, *between)), private, new.serial_number)


def _chain(text: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError as e:
        raise Unusable(f"there is no certificate in it: {e}") from e


def _like(public: Any) -> Any:
    """A new key of the same kind; where we do not know the kind, of the one that everything understands."""
    if isinstance(public, rsa.RSAPublicKey):
        return rsa.generate_private_key(65537, public.key_size)
    if isinstance(public, ed25519.Ed25519PublicKey):
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(public.curve if isinstance(public, ec.EllipticCurvePublicKey) else ec.SECP256R1())


def _public(key: Any) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
