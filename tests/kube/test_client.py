"""What is no answer of an API server is never taken for one: neither for an empty list, nor for an object that is gone."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube.address import other_ledger
from mlchaos_dagster.kube.client import ApiRefused, Cluster

POD = "/api/v1/namespaces/ml/pods/a"


class Server(http.server.ThreadingHTTPServer):
    answer: tuple[int, str, str] = (200, "application/json", "{}")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        code, kind, body = server.answer
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Cluster:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    return Cluster("x", str(tmp_path / "config"))


def status(code: int, reason: str, message: str = "m") -> tuple[int, str, str]:
    return code, "application/json", json.dumps({"kind": "Status", "reason": reason, "message": message})


def test_gone_is_only_what_the_api_server_says_is_gone(cluster: Cluster, server: Server) -> None:
    server.answer = status(404, "NotFound")
    assert cluster.get(POD) is None
    server.answer = (404, "text/html", "<html>no such site</html>")
    with pytest.raises(DriverUnavailable, match="is it the API server"):
        cluster.get(POD)
    server.answer = (404, "text/plain", "404 page not found")
    assert cluster.get("/apis/litmuschaos.io/v1alpha1") is None, "a group that is not installed has no Status"


def test_a_page_that_is_no_object_is_no_answer(cluster: Cluster, server: Server) -> None:
    server.answer = (200, "text/html", "<html>log in</html>")
    for ask in (lambda: cluster.get(POD), lambda: cluster.list(POD.rpartition("/")[0])):
        with pytest.raises(DriverUnavailable, match="is it the API server"):
            ask()
    server.answer = (200, "application/json", "{}")
    with pytest.raises(DriverUnavailable, match="no list"):
        cluster.list(POD.rpartition("/")[0])


def test_why_no_command_was_started_is_told_without_the_command(cluster: Cluster, server: Server) -> None:
    dial = (
        'error dialing backend: Post "https://10.0.0.7:10250/exec/ml/a/c?command=python3&command='
        + "x" * 900
        + '": no route'
    )
    server.answer = status(500, "InternalError", dial)
    with pytest.raises(ApiRefused) as refused:
        cluster.exec("ml", "a", "c", ["python3", "-c", "x" * 900])
    assert "no route" in str(refused.value) and len(str(refused.value)) < 200


def test_two_ledgers_of_one_cluster_are_told(tmp_path: Path) -> None:
    def known(name: str, uid: str, space: str) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"uid": uid, "options": {"control_namespace": space}}))
        return path

    mine = known("mine", "u1", "a")
    known("same", "u1", "a")
    known("another", "u2", "b")
    (tmp_path / "broken.json").write_text("{")
    assert other_ledger(mine) == ""
    known("rival", "u1", "b")
    assert other_ledger(mine) == "environment rival keeps its leases of this cluster in the namespace b"
