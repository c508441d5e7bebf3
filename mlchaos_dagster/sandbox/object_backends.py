"""What is behind the object store's door: moto's S3 in memory, or any S3 endpoint that was configured.

In memory, a store that died comes back with the seeded buckets as they were at first, and nothing else. An endpoint keeps
what it has; requests are signed again with its own credentials, which only the store's process reads.
"""

from __future__ import annotations

import http.client
import io
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from .sigv4 import REGION, sign

BUCKETS = ("training-data", "checkpoints", "models")
_XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
_VERSIONING = f'<VersioningConfiguration xmlns="{_XMLNS}"><Status>Enabled</Status></VersioningConfiguration>'.encode()
_PASSED_ON = ("content-type", "content-encoding", "content-md5", "range", "if-", "x-amz-")
_TIMEOUT_S = 5.0
Answer = tuple[int, list[tuple[str, str]], bytes]


class Unreachable(Exception):
    """There is no answer from the endpoint, or none that says yes while it is being set up."""


class Backend(Protocol):
    """A store that believes whoever calls it. One thread at a time."""

    region: str

    def call(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
        """One request; ``target`` is the path with its query, as it stands in the request line. Raises Unreachable."""
        ...


def build(config: Mapping[str, Any]) -> Backend:
    """The store that a process's configuration asks for.

    Raises:
        Unreachable: a reference to a credential leads nowhere.
    """
    store = config.get("object_store") or {}
    if not store:
        return Moto()
    keys = [_resolved(str(store[name])) for name in ("access_key", "secret_key")]
    return Endpoint(str(store["endpoint"]), keys[0], keys[1], str(store.get("region") or REGION))


def seed(backend: Backend, number: int) -> int:
    """Make the versioned buckets and, where there is none yet, the training data; returns the number of objects.

    Raises:
        Unreachable: it was refused.
    """
    from . import training_data

    # Only the first of all regions wants nothing to be said of it.
    where = f"<LocationConstraint>{backend.region}</LocationConstraint>" if backend.region != REGION else ""
    made = f'<CreateBucketConfiguration xmlns="{_XMLNS}">{where}</CreateBucketConfiguration>'.encode() if where else b""
    requests = [("PUT", f"/{bucket}", made) for bucket in BUCKETS]
    requests += [("PUT", f"/{bucket}?versioning=", _VERSIONING) for bucket in BUCKETS]
    for request in requests:
        _expect(backend, *request, 200, 409)  # 409: the bucket is there already, and ours
    manifest = f"/{training_data.BUCKET}/{training_data.MANIFEST}"
    if _expect(backend, "GET", manifest, b"", 200, 404) == 200:
        return 0
    contents = training_data.objects(number)
    for key, body in contents.items():  # the manifest is the last of them
        _expect(backend, "PUT", f"/{training_data.BUCKET}/{key}", body, 200)
    return len(contents)


def _expect(backend: Backend, method: str, target: str, body: bytes, *allowed: int) -> int:
    status, _, answer = backend.call(method, target, [("Host", "127.0.0.1")], body)
    if status not in allowed:
        raise Unreachable(f"{method} {target}: {status} {answer[:200].decode(errors='replace')}")
    return status


class Moto:
    """moto's WSGI application, called directly. One thread at a time: it holds the interpreter all the while anyway."""

    def __init__(self) -> None:
        """Import moto; takes a second."""
        from moto.moto_server.werkzeug_app import create_backend_app

        self.region = REGION
        self._app: Any = create_backend_app("s3")

    def call(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
        """One request; ``target`` is the path with its query, as it stands in the request line."""
        path, _, query = target.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query,
            "RAW_URI": target,
            "REQUEST_URI": target,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in headers:
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
        environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
        environ.pop("HTTP_TRANSFER_ENCODING", None)  # the body is whole already
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_CONTENT_LENGTH", None)
        started: list[Any] = []
        parts = self._app(environ, lambda status, found, exc_info=None: started.extend((status, found)))
        content = b"".join(parts)
        if hasattr(parts, "close"):
            parts.close()
        return int(started[0].split()[0]), started[1], content


class Endpoint:
    """An S3 API somewhere else, with path-style addresses."""

    def __init__(self, url: str, access: str, secret: str, region: str) -> None:
        """Make it; nothing is connected yet."""
        self._url = urlsplit(url)
        self._access, self._secret, self.region = access, secret, region
        self._connection: http.client.HTTPConnection | None = None

    def call(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
        """See ``Backend``. Raises Unreachable."""
        path, _, query = target.partition("?")
        given = {name.lower(): value for name, value in headers}
        sent = {name: value for name, value in given.items() if name.startswith(_PASSED_ON) and name != "x-amz-date"}
        sent["host"] = self._url.netloc
        payload = sent.pop("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
        sent |= sign(method, path, query, sent, payload, self._access, self._secret, self.region)
        for fresh in (self._connection is None, True):
            try:
                return self._send(method, target, sent, body)
            except (OSError, http.client.HTTPException) as error:
                self.close()  # a kept connection that was closed meanwhile is worth a new one
                if fresh:
                    raise Unreachable(f"{self._url.netloc}: {error or type(error).__name__}") from error
        raise AssertionError("the second try is fresh")

    def close(self) -> None:
        """Drop the kept connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        if self._connection is None:
            kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(self._url.netloc, timeout=_TIMEOUT_S)
        self._connection.request(method, target, body, dict(headers))
        response = self._connection.getresponse()
        content = response.read()
        return response.status, response.getheaders(), content


def _resolved(reference: str) -> str:
    """What ``env:NAME`` or ``file:PATH`` stands for."""
    kind, _, name = reference.partition(":")
    try:
        found = os.environ.get(name, "") if kind == "env" else Path(name).expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        raise Unreachable(f"{reference}: cannot be read") from error
    if not found:
        raise Unreachable(f"{reference}: there is nothing there")
    return found
