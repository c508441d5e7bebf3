"""A small S3 client for the sandbox's own processes: signed requests over kept connections, with or without retries.

Blocking, one request at a time and thus one thread at a time. boto3 would cost each process half a second at start
and 30 MB; what S3 demands of a client (signature, retries of 5xx and SlowDown with back-off) is kept.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

from .sigv4 import credentials, sign

_NS = "{http://s3.amazonaws.com/doc/2006-03-01/}"
_AGAIN = frozenset({429, 500, 502, 503, 504})
"""What S3 says when the same request may succeed a moment later."""


class S3Error(Exception):
    """The store answered no: ``status`` (HTTP) and ``code`` (``NoSuchKey``, ``SlowDown``)."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.status = status
        self.code = code


class S3Unavailable(Exception):
    """The store did not answer, or there is no address for it yet."""


class S3:
    """One store, path style. ``url`` may change from one request to the next (a restarted store, a new link)."""

    def __init__(
        self,
        url: Callable[[], str],
        token: str,
        *,
        tries: int = 6,
        timeout_s: float = 2.0,
        wait: Callable[[float], Any] = time.sleep,
    ) -> None:
        """Make a client; nothing is connected yet.

        Args:
            url: where the store is now; empty while nobody knows.
            token: the sandbox's child token, from which the credentials follow.
            tries: of each request; 1 = no retries.
            timeout_s: of each try, to connect and for each read.
            wait: how to wait between two tries.
        """
        self._url = url
        self._access, self._secret = credentials(token)
        self._tries = tries
        self._timeout_s = timeout_s
        self._wait = wait
        self._connection: http.client.HTTPConnection | None = None
        self._at = ""
        self._lock = threading.Lock()
        self.requests = 0
        """Tries that were sent."""
        self.failures = 0
        """Tries that failed in a way that is worth another one."""

    def get(self, bucket: str, key: str) -> bytes:
        """The object's current content. Raises S3Error (404 NoSuchKey), S3Unavailable."""
        return self._request("GET", f"/{bucket}/{key}")[0]

    def put(self, bucket: str, key: str, body: bytes, metadata: Mapping[str, str] | None = None) -> str:
        """Store an object whole or not at all; its version id. Raises S3Error, S3Unavailable."""
        extra = {f"x-amz-meta-{name}": value for name, value in (metadata or {}).items()}
        return self._request("PUT", f"/{bucket}/{key}", body=body, extra=extra)[1].get("x-amz-version-id", "")

    def delete(self, bucket: str, key: str, version: str = "") -> str:
        """Delete an object, or one version of it for good; the version id of the delete marker.

        Raises:
            S3Error, S3Unavailable: it may be there.
        """
        query = {"versionId": version} if version else {}
        return self._request("DELETE", f"/{bucket}/{key}", query=query)[1].get("x-amz-version-id", "")

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """All keys under a prefix, sorted. Raises S3Error, S3Unavailable."""
        found: list[str] = []
        token = ""
        while True:
            query = {"list-type": "2", "prefix": prefix, **({"continuation-token": token} if token else {})}
            root = ElementTree.fromstring(self._request("GET", f"/{bucket}", query=query)[0])
            found += [node.findtext(f"{_NS}Key") or "" for node in root.iter(f"{_NS}Contents")]
            token = root.findtext(f"{_NS}NextContinuationToken") or ""
            if not token:
                return sorted(found)

    def close(self) -> None:
        """Drop the kept connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
        extra: Mapping[str, str] | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        with self._lock:
            for attempt in range(1, self._tries + 1):
                try:
                    return self._try(method, quote(path, safe="/-_.~"), urlencode(query or {}), body, extra or {})
                except (S3Error, S3Unavailable) as error:
                    if isinstance(error, S3Error) and error.status not in _AGAIN:
                        raise
                    self.failures += 1
                    if attempt == self._tries:
                        raise
                # Full jitter, as the SDKs do it: two clients that were refused together do not come back together.
                self._wait(random.uniform(0.3, 1.0) * min(0.5, 0.05 * 2**attempt))
        raise AssertionError("tries is at least one")

    def _try(
        self, method: str, path: str, query: str, body: bytes, extra: Mapping[str, str]
    ) -> tuple[bytes, Mapping[str, str]]:
        url = self._url()
        if not url:
            raise S3Unavailable("the object store has no address yet")
        host = urlsplit(url).netloc
        if self._at != host:
            self.close()
        if self._connection is None:
            self._connection, self._at = http.client.HTTPConnection(host, timeout=self._timeout_s), host
        headers = {"Host": host, **extra}
        digest = hashlib.sha256(body).hexdigest()
        headers |= sign(method, path, query, headers, digest, self._access, self._secret)
        self.requests += 1
        try:
            self._connection.request(method, f"{path}?{query}" if query else path, body, headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise S3Unavailable(f"{method} {path}: {error or type(error).__name__}") from error
        if response.status >= 300:
            raise _error(response.status, content)
        return content, {name.lower(): value for name, value in response.getheaders()}


def _error(status: int, content: bytes) -> S3Error:
    try:
        root = ElementTree.fromstring(content)
        return S3Error(status, root.findtext("Code") or str(status), root.findtext("Message") or "")
    except ElementTree.ParseError:
        return S3Error(status, str(status), content[:100].decode(errors="replace"))
