"""The object store: moto's S3, in memory, behind our own door. One port: /healthz, /state, … and every S3 request.

What the door adds to moto, which asks nobody who they are: each request must be signed with this sandbox's keys
(Signature V4 in the Authorization header; the signed SHA-256 is held against the body). Presigned and anonymous
requests and moto's own control API are refused. Not checked: the age of a signature, bucket policies.

Everything is in memory: a store that died comes back with the seeded buckets as they were at first, and nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.sax.saxutils import escape

from .lifeline import Lifeline
from .sigv4 import credentials, refusal

BUCKETS = ("training-data", "checkpoints", "models")
_VERSIONING = (
    b'<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>Enabled</Status>'
    b"</VersioningConfiguration>"
)
_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "server", "date"})
Answer = tuple[int, list[tuple[str, str]], bytes]


class Moto:
    """moto's WSGI application, called directly. One thread at a time: it holds the interpreter all the while anyway."""

    def __init__(self) -> None:
        """Import moto; takes a second."""
        from moto.moto_server.werkzeug_app import create_backend_app

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

    def seed(self, seed: int) -> int:
        """Make the versioned buckets and the training data; returns the number of objects."""
        from . import training_data

        contents = training_data.objects(seed)
        requests = [("PUT", f"/{bucket}", b"") for bucket in BUCKETS]
        requests += [("PUT", f"/{bucket}?versioning", _VERSIONING) for bucket in BUCKETS]
        requests += [("PUT", f"/{training_data.BUCKET}/{key}", body) for key, body in contents.items()]
        for method, target, body in requests:
            status, _, answer = self.call(method, target, [("Host", "127.0.0.1")], body)
            if status != 200:
                raise RuntimeError(f"{method} {target}: {status} {answer[:200]!r}")
        return len(contents)


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Counter, Histogram

    from .service import Service

    service = Service(lifeline)
    access, secret = credentials(str(service.config["token"]))
    requests = Counter("object_store_requests_total", "S3 requests", ["method", "status"], registry=service.registry)
    seconds = Histogram("object_store_seconds", "Time in the store", registry=service.registry)
    counts = {"requests": 0, "errors": 0, "denied": 0, "seeded": 0}
    worker = ThreadPoolExecutor(1, thread_name_prefix="moto")
    moto: Moto | None = None
    born = time.time()

    def answer(status: int, headers: Iterable[tuple[str, str]], body: bytes, method: str) -> web.Response:
        counts["requests"] += 1
        counts["errors"] += status >= 500
        counts["denied"] += status == 403
        requests.labels(method, str(status)).inc()
        response = web.Response(status=status, body=body)
        for name, value in headers:
            if name.lower() not in _HOP:
                response.headers[name] = value
        return response

    def error(status: int, code: str, message: str, method: str) -> web.Response:
        said = f"<Code>{code}</Code><Message>{escape(message)}</Message>"
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{said}</Error>'.encode()
        return answer(status, [("Content-Type", "application/xml")], b"" if method == "HEAD" else body, method)

    async def s3(request: web.Request) -> web.StreamResponse:
        method = request.method
        body = await request.content.read()
        target = request.raw_path
        path, _, query = target.partition("?")
        headers = {name.lower(): value for name, value in request.headers.items()}
        if said := refusal(method, path, query, headers, access, secret):
            return error(403, *said, method)
        signed = headers.get("x-amz-content-sha256", "")
        if len(signed) == 64 and hashlib.sha256(body).hexdigest() != signed:
            return error(400, "XAmzContentSHA256Mismatch", "The body is not the one that was signed.", method)
        if moto is None or path.startswith("/moto-api"):
            return error(503, "ServiceUnavailable", "The store is starting, or does not offer this.", method)
        with seconds.time():
            found = await asyncio.get_running_loop().run_in_executor(
                worker, moto.call, method, target, list(request.headers.items()), body
            )
        return answer(*found, method)

    async def state(request: web.Request) -> web.Response:
        return web.json_response({**counts, "born": born})

    async def started() -> None:
        nonlocal moto

        def build() -> Moto:
            made = Moto()
            counts["seeded"] = made.seed(int(service.config["seed"]))
            return made

        moto = await asyncio.get_running_loop().run_in_executor(worker, build)
        service.set_ready()

    service.app.router.add_get("/state", state)
    service.app.router.add_route("*", "/{target:.*}", s3)
    await service.serve(started)
