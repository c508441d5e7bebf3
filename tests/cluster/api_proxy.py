"""A way to the API server that a test can cut, hang, slow down and restore, while the shared API server goes on.

    def test_x(api_proxy: ApiProxy) -> None:
        cluster = Cluster(api_proxy.context, str(api_proxy.kubeconfig))   # or kubernetes.kubeconfig of an environment
        api_proxy.cut()        # connections are reset, new ones refused: the API server is down
        api_proxy.hang()       # connections stay and nothing comes through: the network swallows it
        api_proxy.delay_s = 1  # every piece of data comes this much later, in either direction
        api_proxy.restore()

Bytes are passed as they are: TLS goes through, so credentials and certificates are those of the real kubeconfig. The
kubeconfig points at https://127.0.0.1:PORT; where the API server's certificate is not for 127.0.0.1 it also names the
server that it is for (`tls-server-name`). Import the fixture by name: `from .api_proxy import ApiProxy, api_proxy`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import kubectl

_RAW = ("--raw", "--minify", "--flatten", "-o", "json")
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset, as a server that was killed does."""


class ApiProxy:
    """TCP from a port of this machine to the API server. `close` it; not for more than one test."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        """`config` is a kubeconfig with one context and all data in it (`kubectl config view --raw --minify`)."""
        server = urlsplit(config["clusters"][0]["cluster"]["server"])
        self._far = (server.hostname or "", server.port or 443)
        self.context: str = config["current-context"]
        self.delay_s = 0.0
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._half: set[socket.socket] = set()
        """Of connections of which one direction is over."""
        self._listener: socket.socket | None = None
        self.port = 0
        self.restore()
        self.kubeconfig = folder / "through-proxy.kubeconfig"
        self.kubeconfig.write_text(json.dumps(self._redirected(config)))
        self.kubeconfig.chmod(0o600)

    @property
    def connections(self) -> int:
        """How many connections to the API server are open."""
        with self._lock:
            return len(self._open) // 2

    def cut(self) -> None:
        """The API server is down: what is open is reset, what is new refused."""
        with self._lock:
            listener, self._listener = self._listener, None
            gone, self._open = self._open, set()
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes up the thread that accepts
            listener.close()
        self._flows.set()
        for one in gone:
            _reset(one)

    def hang(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self._flows.clear()

    def restore(self) -> None:
        """As if nothing had been: hanging connections go on, cut ones can be made anew. Keeps `delay_s`."""
        self._flows.set()
        if self._listener is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
            listener.listen(128)
            self.port = listener.getsockname()[1]
            self._listener = listener
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """For good."""
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._far, timeout=5)
            except OSError:
                _reset(near)
                continue
            far.settimeout(None)
            with self._lock:
                if self._listener is not listener:  # cut meanwhile
                    _reset(near)
                    _reset(far)
                    return
                self._open |= {near, far}
            for a, b in ((near, far), (far, near)):
                a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._flows.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                if source not in self._open:  # cut: nothing that was under way arrives
                    return
                sink.sendall(data)
            self._flows.wait()
            if source not in self._open:
                return
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(sink)
        with self._lock:
            # A socket stays until both directions are over: the one that it is the source of, and the other.
            over = {source, sink} & self._half
            self._half ^= {source, sink}
            self._open -= over
        for one in over:
            one.close()

    def _redirected(self, config: dict[str, Any]) -> dict[str, Any]:
        cluster = {**config["clusters"][0]["cluster"], "server": f"https://127.0.0.1:{self.port}"}
        if not self._certified(cluster.get("certificate-authority-data", ""), "127.0.0.1"):
            cluster.setdefault("tls-server-name", self._far[0])
        return {**config, "clusters": [{**config["clusters"][0], "cluster": cluster}]}

    def _certified(self, ca: str, name: str) -> bool:
        trust = ssl.create_default_context(cadata=base64.b64decode(ca).decode() if ca else None)
        try:
            with socket.create_connection(self._far, timeout=5) as raw, trust.wrap_socket(raw, server_hostname=name):
                return True
        except ssl.SSLCertVerificationError:
            return False


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        one.shutdown(socket.SHUT_RD)  # wakes up who reads; the reset is the closing's
    one.close()


@pytest.fixture
def api_proxy(tmp_path: Path, kubeconfig: str) -> Iterator[ApiProxy]:
    """The current context's API server, through a proxy of this test's own; with the rights of our client."""
    proxy = ApiProxy(json.loads(kubectl("config", "view", *_RAW, f"--kubeconfig={kubeconfig}")), tmp_path)
    try:
        yield proxy
    finally:
        proxy.close()
