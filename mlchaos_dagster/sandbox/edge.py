"""The edge: what users of the platform meet first. Ends TLS, asks for a credential, passes requests on to the gateway.

Users' face, HTTPS on a port of its own: POST or GET /predict and GET /whoami need ``Authorization: Bearer …`` (else 401);
/healthz and /readyz do not. The supervisor's face is plain HTTP, as of every process: GET /state, PUT /reload (at once what
is looked for twice a second anyway: files that have changed).

- ``cert_reload``: a new certificate on disk is given to connections that are made from then on; those that are open go on
  with the old one. Off: what was there at start is served until the process ends.
- ``credential_overlap``: a credential that was replaced is accepted until its time is over. Off: from its replacement
  on only the current one is.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Counter, Gauge

from . import audit, pki
from .lifeline import Lifeline, listen
from .service import Service

_LOOK_S = 0.5
_GATEWAY_S = 1.5
"""Above the gateway's own deadline: its verdict is passed on, not ours."""
_KEPT_HEADERS = ("X-Answered-By", "X-Replica", "Content-Type")
_NOTE_EVERY_S = 1.0
"""Refusals between two entries of the audit log are counted, not listed: whoever guesses must not fill the disk."""
_VERIFY_EVERY_S = 1.0


class Edge:
    """Certificate, credentials and the way to the gateway."""

    def __init__(self, service: Service) -> None:
        self.service = service
        config = service.config
        self.mechanisms: dict[str, bool] = config["mechanisms"]
        self.files = pki.files(Path(config["sandbox"]))
        self.audit = Path(config["sandbox"]) / audit.NAME
        self.port = 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.fingerprint = ""
        self.loaded_at = 0.0
        self.certificates = 0
        self.credentials: list[tuple[str, float | None]] = []
        self.refused = 0
        self.requests = 0
        self.audit_intact = True
        self.audit_head = audit.Head(0, "")
        self.session: aiohttp.ClientSession
        self._seen: dict[Path, tuple[int, int]] = {}
        self._unnoted: dict[str, int] = {}
        self._noted_at = 0.0
        registry = service.registry
        self._answers = Counter("edge_requests", "Requests by status", ["code"], registry=registry)
        Gauge("edge_certificate_age_seconds", "Since the certificate was loaded", registry=registry).set_function(
            lambda: time.monotonic() - self.loaded_at
        )
        Gauge("edge_certificates_served", "Certificates served in this life", registry=registry).set_function(
            lambda: self.certificates
        )
        Gauge("edge_credentials_refused", "Requests without a good credential", registry=registry).set_function(
            lambda: self.refused
        )

    # -- what is on disk --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take what changed on disk."""
        if self._changed(self.files.server) and (self.mechanisms["cert_reload"] or not self.certificates):
            try:
                self.context.load_cert_chain(self.files.server)
                pem = self.files.server.read_text()
                body = pem[pem.index("-----BEGIN CERTIFICATE-----") :]
                self.fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(body)).hexdigest()
            except (OSError, ValueError):  # ssl.SSLError is an OSError: what is served goes on
                return
            self.certificates += 1
            self.loaded_at = time.monotonic()
        if self._changed(self.files.accepted):
            try:
                self.credentials = [(one["sha256"], one["until"]) for one in pki.accepted(self.files)]
            except (OSError, ValueError, KeyError, TypeError):
                return

    def _changed(self, path: Path) -> bool:
        try:
            stat = path.stat()
        except OSError:
            return False
        now = (stat.st_ino, stat.st_mtime_ns)
        if self._seen.get(path) == now:
            return False
        self._seen[path] = now
        return True

    async def ready(self) -> None:
        """Task: ready once it is told where the gateway is."""
        await self.service.peers_known.wait()
        self.service.set_ready()

    async def watch(self) -> None:
        """Task: files, refusals for the audit log, and the audit log itself."""
        verified_at = 0.0
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.look)
            await self._note_refusals()
            if time.monotonic() - verified_at >= _VERIFY_EVERY_S:
                verified_at = time.monotonic()
                await asyncio.to_thread(self.verify)

    def verify(self) -> None:
        """Look at the whole log; a line that was there before must still be."""
        if not self._changed(self.audit) and self.audit.exists() == bool(self.audit_head.n):
            return
        self.audit_intact = audit.verify(self.audit, self.audit_head if self.audit_head.n else None) is None
        if self.audit_intact:
            self.audit_head = audit.head(self.audit)

    async def _note_refusals(self) -> None:
        if not self._unnoted or time.monotonic() - self._noted_at < _NOTE_EVERY_S:
            return
        counted, self._unnoted = self._unnoted, {}
        self._noted_at = time.monotonic()
        for where, count in counted.items():
            try:
                await audit.note(self.audit, "edge", "credential_refused", where, count=count)
            except OSError:
                self._unnoted[where] = self._unnoted.get(where, 0) + count

    # -- users ------------------------------------------------------------------------------------------------------

    def good(self, given: str) -> bool:
        """Whether a credential is accepted now. All are compared, so that the time it takes tells nothing."""
        asked, now, found = pki.digest(given), time.time(), False
        for place, (known, until) in enumerate(self.credentials):
            in_time = place == 0 or (self.mechanisms["credential_overlap"] and until is not None and now < until)
            found |= hmac.compare_digest(asked, known) and in_time
        return found

    def guarded(self, handler: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
        """Let only requests with a good credential through."""

        async def checked(request: web.Request) -> web.Response:
            self.requests += 1
            if self.good(request.headers.get("Authorization", "")):
                answer = await handler(request)
            else:
                self.refused += 1
                where = request.remote or "unknown"
                self._unnoted[where] = self._unnoted.get(where, 0) + 1
                headers = {"WWW-Authenticate": "Bearer", "X-Answered-By": "error"}
                answer = web.json_response(
                    {"error": "the credential is missing or refused"}, status=401, headers=headers
                )
            self._answers.labels(str(answer.status)).inc()
            return answer

        return checked

    async def predict(self, request: web.Request) -> web.Response:
        """Pass a request on and its answer back."""
        gateway = self.service.peers.get("gateway", "")
        try:
            async with self.session.request(
                request.method,
                f"{gateway}/predict",
                params=request.query,
                data=await request.read() or None,
                headers={"Content-Type": request.headers.get("Content-Type", "application/json")},
            ) as response:
                kept = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
                return web.Response(body=await response.read(), status=response.status, headers=kept)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            late = isinstance(error, asyncio.TimeoutError)
            said = {"error": f"the gateway did not answer: {type(error).__name__}"}
            return web.json_response(said, status=504 if late else 502, headers={"X-Answered-By": "error"})

    async def whoami(self, request: web.Request) -> web.Response:
        """Which credential this is, by the start of its digest."""
        return web.json_response({"credential": pki.digest(request.headers["Authorization"])[:12]})

    async def serve_users(self) -> web.AppRunner:
        """Open the HTTPS face."""
        app = web.Application()
        app.router.add_post("/predict", self.guarded(self.predict))
        app.router.add_get("/predict", self.guarded(self.predict), allow_head=False)
        app.router.add_get("/whoami", self.guarded(self.whoami))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        port_file = self.files.directory / "port"
        try:
            before = int(port_file.read_text())
        except (OSError, ValueError):
            before = 0
        sock = listen(before)
        await web.SockSite(runner, sock, ssl_context=self.context).start()
        self.port = sock.getsockname()[1]
        pki.replace(port_file, str(self.port).encode())
        return runner

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _readyz(self, request: web.Request) -> web.Response:
        return web.json_response({"ready": self.service.ready}, status=200 if self.service.ready else 503)

    # -- the supervisor ---------------------------------------------------------------------------------------------

    async def reload(self, request: web.Request) -> web.Response:
        """PUT /reload: look at the files now."""
        await asyncio.to_thread(self.look)
        return web.json_response({"fingerprint": self.fingerprint, "current": self._current()})

    async def state(self, request: web.Request) -> web.Response:
        """GET /state."""
        return web.json_response(
            {
                "port": self.port,
                "fingerprint": self.fingerprint,
                "certificate_age_s": round(time.monotonic() - self.loaded_at, 3),
                "certificates": self.certificates,
                "current": self._current(),
                "credentials_refused": self.refused,
                "requests": self.requests,
                "audit_intact": self.audit_intact,
                "audit_entries": self.audit_head.n,
            }
        )

    def _current(self) -> str:
        return self.credentials[0][0] if self.credentials else ""


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    service = Service(lifeline)
    edge = Edge(service)
    service.app.router.add_get("/state", edge.state)
    service.app.router.add_put("/reload", service.guarded(edge.reload))
    kept: list[Any] = []

    async def started() -> None:
        await asyncio.to_thread(pki.ensure, edge.files)
        await asyncio.to_thread(edge.look)
        await asyncio.to_thread(edge.verify)
        timeout = aiohttp.ClientTimeout(total=_GATEWAY_S)
        edge.session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        kept.append(await edge.serve_users())
        kept.append(asyncio.get_running_loop().create_task(edge.watch()))
        kept.append(asyncio.get_running_loop().create_task(edge.ready()))

    await service.serve(started)
    await kept[0].cleanup()
    await edge.session.close()
