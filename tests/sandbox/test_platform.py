"""The platform without faults: what it answers, who may ask, how it scales."""

from __future__ import annotations

import http.client
import json
import stat
import subprocess
import sys

import psutil
import pytest

from mlchaos_dagster.sandbox.api import SandboxRefused

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(180)


def _get(url: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_answers_with_the_model_from_every_replica(platform: Platform) -> None:
    answers = [platform.ask(entity) for entity in range(6)]
    assert {answer.status for answer in answers} == {200}
    assert {answer.path for answer in answers} == {"model"}
    assert {answer.replica for answer in answers} == {"inference-1", "inference-2"}


def test_same_entity_same_score(platform: Platform) -> None:
    url = platform.client.status()["gateway_url"]
    scores = {json.loads(_get(url, "/predict?entity_id=3")[1])["score"] for _ in range(4)}
    assert len(scores) == 1


@pytest.mark.parametrize(("query", "status"), [("x", 400), ("-1", 400), ("999999", 404)])
def test_bad_entities_are_the_callers_fault(platform: Platform, query: str, status: int) -> None:
    before = platform.client.gateway_state()["errors_total"]
    assert _get(platform.client.status()["gateway_url"], f"/predict?entity_id={query}")[0] == status
    assert platform.client.gateway_state()["errors_total"] == before


def test_every_process_has_health_readiness_and_metrics(platform: Platform) -> None:
    status = platform.client.status()
    urls = [entry["url"] for entry in status["processes"]] + [status["control_url"]]
    assert len(urls) == 7
    for url in urls:
        assert _get(url, "/healthz")[0] == 200
        assert _get(url, "/readyz")[0] == 200
        code, metrics = _get(url, "/metrics")
        assert code == 200
        assert b"# TYPE" in metrics


def test_status_names_live_processes(platform: Platform) -> None:
    for entry in platform.client.status()["processes"]:
        command = psutil.Process(entry["pid"]).cmdline()
        assert entry["name"] in command
        assert str(platform.directory) in command
        assert not any("token" in word for word in command)


def test_control_needs_the_token(platform: Platform) -> None:
    control = platform.client.status()["control_url"]
    assert _get(control, "/status")[0] == 403
    assert _get(control, "/faults", {"X-Sandbox-Token": "wrong"})[0] == 403
    proxy = platform.process("proxy-inference")["url"]
    assert _get(proxy, "/rules")[0] == 403
    assert stat.S_IMODE((platform.directory / "state.json").stat().st_mode) == 0o600


def test_counts_requests_for_the_error_budget(platform: Platform) -> None:
    before = platform.client.requests(600)
    for entity in range(5):
        platform.ask(entity)
    after = platform.client.requests(600)
    assert after["total"] - before["total"] == 5
    assert after["bad"] == before["bad"]
    assert after["age_s"] < 1


def test_scales_out_and_in(platform: Platform) -> None:
    platform.client.scale(3)
    eventually(lambda: platform.client.status()["ready"] and platform.client.status()["replicas"] == 3)
    pid = platform.process("inference-3")["pid"]
    assert "inference-3" in {platform.ask(entity).replica for entity in range(9)}
    lease = platform.inject("network_latency", "gateway->inference-3", latency_ms=1)
    with pytest.raises(SandboxRefused, match=lease):
        platform.client.scale(2)
    platform.client.remove_fault(lease)
    platform.client.scale(2)
    assert not psutil.pid_exists(pid)
    eventually(lambda: platform.client.status()["ready"])
    assert "gateway->inference-3" not in platform.client.status()["links"]


def test_api_imports_no_heavy_library() -> None:
    code = "import sys, mlchaos_dagster.sandbox.api; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"aiohttp", "sklearn", "numpy", "psutil", "prometheus_client", "pydantic"} & set(loaded)
