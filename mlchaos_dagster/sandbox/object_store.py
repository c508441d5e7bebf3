"""The object store's door: /healthz, /state, … and every S3 request on one port; what is behind, see ``object_backends``.

Each request must be signed with this sandbox's keys (Signature V4 in the Authorization header; the signed SHA-256 is held
against the body). Presigned and anonymous requests are refused. Not checked: the age of a signature, bucket policies.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from xml.sax.saxutils import escape

from .lifeline import Lifeline
from .object_backends import Backend, Unreachable, build, seed
from .sigv4 import credentials, refusal

_AGAIN_S = 1.0
_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "server", "date"})


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
    worker = ThreadPoolExecutor(1, thread_name_prefix="store")
    backend: Backend | None = None
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
        if backend is None or path.startswith("/moto-api"):
            return error(503, "ServiceUnavailable", "The store is starting, or does not offer this.", method)
        try:
            with seconds.time():
                found = await asyncio.get_running_loop().run_in_executor(
                    worker, backend.call, method, target, list(request.headers.items()), body
                )
        except Unreachable as reason:
            return error(503, "ServiceUnavailable", str(reason), method)
        return answer(*found, method)

    async def state(request: web.Request) -> web.Response:
        return web.json_response({**counts, "born": born})

    async def started() -> None:
        nonlocal backend

        def begin() -> Backend:
            made = build(service.config)
            counts["seeded"] = seed(made, int(service.config["seed"]))
            return made

        while backend is None:
            try:
                backend = await asyncio.get_running_loop().run_in_executor(worker, begin)
            except Unreachable as reason:
                service.set_ready(False, str(reason))
                await asyncio.sleep(_AGAIN_S)
        service.set_ready()

    service.app.router.add_get("/state", state)
    service.app.router.add_route("*", "/{target:.*}", s3)
    await service.serve(started)
