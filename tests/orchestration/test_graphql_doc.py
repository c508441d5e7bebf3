"""docs/graphql.md, executed as it stands against a real `dagster dev`; the sandbox's truth log says what really happened."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "graphql.md"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240), pytest.mark.req("R4-01", "R4-05")]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("definitions.py", "dagster.yaml", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


@pytest.fixture
def dagster(project: Path) -> Iterator[str]:
    """`dagster dev` on a free port, ended by SIGINT to its own group; then the sandbox that its runs started."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("DAGSTER_HOME", "MLCHAOS_HOME")}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    log = (project / "dev.log").open("w")
    # Started from a shell's background, it would inherit an ignored SIGINT and never end.
    command = ["env", "--default-signal=INT,TERM", str(BIN / "dagster"), "dev", "-h", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/graphql"
    try:
        _wait_until_loaded(url, process, project / "dev.log")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)
        log.close()
        subprocess.run(
            [str(BIN / "mlchaos"), "sandbox", "down"], cwd=project, env=env, check=False, capture_output=True
        )


def _wait_until_loaded(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    body = json.dumps({"query": "{ assetNodes { id } }"}).encode()
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=5) as answer:
                if json.load(answer)["data"]["assetNodes"]:
                    return
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"dagster dev did not come up:\n{log.read_text()[-3000:]}")


def commands() -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```", DOC.read_text(), re.S | re.M)
    assert len(blocks) >= 8
    return "set -euo pipefail\n" + "\n".join(blocks)


@pytest.mark.req("R4-01")
def test_every_command_of_the_document(dagster: str, project: Path) -> None:
    env = {**os.environ, "DAGSTER": dagster}
    done = subprocess.run(["bash", "-c", commands()], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    assert '"errors"' not in done.stdout and "PythonError" not in done.stdout, done.stdout[-3000:]
    assert "TerminateRunSuccess" in done.stdout and "ABORTED" in done.stdout

    events = [json.loads(x) for x in (project / ".mlchaos/sandbox/sandbox/truth.jsonl").read_text().splitlines()]
    added = [e for e in events if e["what"] == "fault_added"]
    removed = [e for e in events if e["what"] == "fault_removed"]
    assert len(added) == 1, "the terminated run injected once, and nothing injected again"
    assert [e["lease"] for e in removed] == [e["lease"] for e in added]
    assert removed[0]["at"] - added[0]["at"] < 10, "long before its window of 15 s would have ended"
    record = json.loads(next((project / ".mlchaos/records").glob("*[0-9a-f].json")).read_text())["record"]
    assert record["clean"]["proven"] and record["started_by"] == "curl"
