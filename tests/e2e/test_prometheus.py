"""An SLI asked of a real Prometheus that scrapes the real gateway, through a whole run."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Place, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.req("R0-05", "R4-03")
def test_a_promql_sli_is_measured_before_during_and_after(place: Place, tmp_path: Path) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no prometheus binary (Debian package prometheus)")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    gateway = place.observer.state()["ports"]["gateway"]
    config = tmp_path / "prometheus.yml"
    scrape = {"job_name": "gateway", "scrape_interval": "1s", "static_configs": [{"targets": [f"127.0.0.1:{gateway}"]}]}
    config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    path = place.library / "environments" / "fast.yaml"
    before = path.read_text()
    environment = yaml.safe_load(before)
    environment["prometheus"] = {"url": f"http://127.0.0.1:{port}"}
    environment["slis"]["answered"] = {"query": "sum(gateway_requests_total)", "reduce": "max"}
    path.write_text(yaml.safe_dump(environment, sort_keys=False))
    server = subprocess.Popen(
        [
            binary, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert wait_for(lambda: answers(f"http://127.0.0.1:{port}/-/ready"))
        scraped = f"http://127.0.0.1:{port}/api/v1/query?query=gateway_ready_replicas"
        assert wait_for(lambda: answers(scraped) and b'"value"' in urllib.request.urlopen(scraped, timeout=2).read())
        done = place.run("run", "feature-store-delay", "-o", "json")
        result = json.loads(done.stdout)
        told = result["slis"]["answered"]
        assert told["samples"] >= 2, told
        assert told["baseline"] is not None and told["during"] > told["baseline"], told
    finally:
        path.write_text(before)
        server.terminate()
        server.wait(10)
