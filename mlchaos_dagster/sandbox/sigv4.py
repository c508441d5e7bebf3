"""AWS Signature Version 4 for S3, both sides: requests are signed by our clients and checked by the object store.

Only the form every SDK uses: the ``Authorization`` header. Presigned URLs and the streaming form whose chunks carry
signatures of their own are not known here.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, unquote

_ALGORITHM = "AWS4-HMAC-SHA256"
REGION = "us-east-1"


def credentials(child_token: str) -> tuple[str, str]:
    """(access key, secret key) of the sandbox's store, drawn from the token that all processes of one sandbox hold.

    The token is random per sandbox and cannot be told from either of them.
    """
    access = hmac.new(child_token.encode(), b"s3 access key", hashlib.sha256).hexdigest()[:18].upper()
    return f"SB{access}", hmac.new(child_token.encode(), b"s3 secret key", hashlib.sha256).hexdigest()[:40]


def sign(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    payload_sha256: str,
    access: str,
    secret: str,
    region: str = REGION,
) -> dict[str, str]:
    """The headers to add to a request with this (quoted) path and query; ``headers`` are signed, Host must be there."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    signed = {name.lower(): value for name, value in headers.items()}
    signed |= {"x-amz-date": stamp, "x-amz-content-sha256": payload_sha256}
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    names = ";".join(sorted(signed))
    signature = _signature(method, path, query, signed, names, payload_sha256, scope, stamp, secret)
    authorization = f"{_ALGORITHM} Credential={access}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {"x-amz-date": stamp, "x-amz-content-sha256": payload_sha256, "Authorization": authorization}


def refusal(
    method: str, path: str, query: str, headers: Mapping[str, str], access: str, secret: str
) -> tuple[str, str] | None:
    """S3's (error code, message) for a request that its signature does not carry; None when it does.

    Header names in lower case. Neither the clock nor the body is checked: a caller must hash what it received.
    """
    algorithm, _, rest = headers.get("authorization", "").partition(" ")
    fields = {name: value for name, _, value in (part.strip().partition("=") for part in rest.split(","))}
    key, _, scope = fields.get("Credential", "").partition("/")
    names, signature = fields.get("SignedHeaders", ""), fields.get("Signature", "")
    if algorithm != _ALGORITHM or not scope or not names or not signature:
        return "AccessDenied", "Anonymous and presigned requests are not allowed"
    if not hmac.compare_digest(key, access):
        return "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."
    payload, stamp = headers.get("x-amz-content-sha256", ""), headers.get("x-amz-date", "")
    if not hmac.compare_digest(
        signature, _signature(method, path, query, headers, names, payload, scope, stamp, secret)
    ):
        return "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided."
    return None


def _signature(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    names: str,
    payload: str,
    scope: str,
    stamp: str,
    secret: str,
) -> str:
    pairs = sorted((quote(n, safe="-_.~"), quote(v, safe="-_.~")) for n, v in parse_qsl(query, keep_blank_values=True))
    lines = "".join(f"{name}:{' '.join(headers.get(name, '').split())}\n" for name in names.split(";"))
    canonical = "\n".join(
        (
            method,
            quote(unquote(path), safe="/-_.~"),
            "&".join(f"{name}={value}" for name, value in pairs),
            lines,
            names,
            payload,
        )
    )
    to_sign = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
