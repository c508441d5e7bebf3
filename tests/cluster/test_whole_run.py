"""A whole run on a cluster, from `mlchaos run` to the sweeper: stopped from another machine, and killed with its watchdog."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import HELPER_IMAGE, deploy, eventually, kubectl, objects
from tests.cluster.test_sweeper import (
    TTL_S,
    all_ready,
    open_leases,
    sweeper,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.timeout(240)


class Machine:
    """One state directory and one library: what a person has on his laptop."""

    def __init__(self, home: Path, library: Path) -> None:
        self.env = {**os.environ, "MLCHAOS_HOME": str(home), "MLCHAOS_LIBRARY": str(library), "NO_COLOR": "1"}
        self.command = [str(Path(sys.executable).with_name("mlchaos"))]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [*self.command, *arguments]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def says(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        return process.wait(100), process.communicate()[0]


@pytest.fixture
def machines(sweeper: str, context: str, tmp_path: Path) -> Iterator[tuple[Machine, Machine, str, str]]:  # noqa: F811
    """Two machines that know one environment, the namespace, and its pods' selector."""
    select = deploy(sweeper, replicas=3)
    kubectl("patch", "service", "web", "-n", sweeper, "-p", '{"spec":{"type":"NodePort"}}')
    port = objects("services", sweeper)[0]["spec"]["ports"][0]["nodePort"]
    addresses = objects("nodes", "")[0]["status"]["addresses"]
    node = next(a["address"] for a in addresses if a["type"] == "InternalIP")
    environment = {
        "schema": "mlchaos/v1",
        "name": "tiny",
        "kubernetes": {
            "context": context,
            "namespace": sweeper,
            "control_namespace": sweeper,
            "sweeper_ttl": f"{TTL_S:g}s",
            "helper_image": HELPER_IMAGE,
        },
        "backends": {"kubernetes": ["pod_failure"]},
        "targets": {"prediction-service": {"select": select}},
        "probe": {"url": f"http://{node}:{port}/", "rate": 40, "timeout": "1s", "method": "GET"},
        "slis": {"availability": {"measure": "availability"}},
        "sampling": {"baseline": "4s"},
    }
    experiment = {
        "schema": "mlchaos/v1",
        "name": "tiny-fail",
        "title": "One pod of three held down",
        "hypothesis": "half of the requests are answered",
        "area": "serving",
        "owner": "ml-platform@example.com",
        "target": "prediction-service",
        "fault": {"kind": "pod_failure"},
        "blast_radius": {"count": 1},
        "duration": "60s",
        "steady_state": [{"sli": "availability", "at_least": "50%"}],
        "expect": [],
        "recovery": {"within": "20s"},
    }
    for kind, content in (("environments", environment), ("experiments", experiment)):
        (tmp_path / "library" / kind).mkdir(parents=True)
        (tmp_path / "library" / kind / f"{content['name']}.yaml").write_text(json.dumps(content))
    yield Machine(tmp_path / "a", tmp_path / "library"), Machine(tmp_path / "b", tmp_path / "library"), sweeper, select


@pytest.mark.req("R0-10", "R4-05")
def test_a_run_is_stopped_from_another_machine(machines: tuple[Machine, Machine, str, str]) -> None:
    here, there, namespace, select = machines
    run = here.start("run", "tiny-fail", "-e", "tiny")
    eventually(lambda: not all_ready(namespace, select, 3) and open_leases(namespace), 60)
    code, said = there.says("status", "-e", "tiny")
    assert code == 0 and open_leases(namespace)[0] in said
    code, said = there.says("stop", "tiny-fail", "-e", "tiny")
    assert code == 0 and "clean after" in said, said
    assert open_leases(namespace) == []
    told = " ".join(run.communicate(timeout=60)[0].split())
    assert "ABORTED" in told and "Stopped by a stop request" in told, told
    proven = re.search(r"stopped → proven clean in ([\d.]+) (ms|s)\b", told)
    assert proven is not None and (proven[2] == "ms" or float(proven[1]) < 5.0), told
    eventually(lambda: all_ready(namespace, select, 3), 40)


@pytest.mark.req("R0-10", "RX-01")
def test_a_run_that_is_killed_with_its_watchdog_leaves_nothing(machines: tuple[Machine, Machine, str, str]) -> None:
    here, _, namespace, select = machines
    run = here.start("run", "tiny-fail", "-e", "tiny")
    eventually(lambda: not all_ready(namespace, select, 3) and open_leases(namespace), 60)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert children
    for pid in (*map(int, children), run.pid):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    run.communicate()
    eventually(lambda: not open_leases(namespace), TTL_S + 8)
    assert time.monotonic() - killed < TTL_S + 8
    eventually(lambda: all_ready(namespace, select, 3), 40)
    code, said = here.says("recover")
    assert code == 0 and "recovered" in said, said
    code, said = here.says("status", "-e", "tiny")
    assert code == 0 and "no lease of another machine" in said and "none of this machine" in said, said
