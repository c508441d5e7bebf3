"""A whole run whose fault is made by Chaos Mesh: from `mlchaos run` to the verdict, and stopped from another machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import HELPER_IMAGE, deploy, eventually, kubectl, objects
from tests.cluster.test_chaos_mesh import (
    there,  # noqa: F401  a fixture: skips where Chaos Mesh does not run
)
from tests.cluster.test_sweeper import (
    TTL_S,
    all_ready,
    grant,
    open_leases,
    sweeper,  # noqa: F401  a fixture
)
from tests.cluster.test_whole_run import Machine

pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def machines(sweeper: str, context: str, tmp_path: Path) -> Iterator[tuple[Machine, Machine, str, str]]:  # noqa: F811
    """Two machines that know one environment; its `pod_failure` may come from either backend, and Chaos Mesh is preferred."""
    select = deploy(sweeper, replicas=3)
    grant(sweeper, "chaos_mesh")
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
            "request_timeout": "15s",
            "chaos_mesh": {"inject_within": "60s"},
        },
        "backends": {"kubernetes": ["pod_failure"], "chaos_mesh": ["pod_failure"]},
        "prefer": "chaos_mesh",
        "targets": {"prediction-service": {"select": select}},
        "probe": {"url": f"http://{node}:{port}/", "rate": 40, "timeout": "1s", "method": "GET"},
        "slis": {"availability": {"measure": "availability"}},
        "sampling": {"baseline": "4s"},
    }
    library = tmp_path / "library"
    (library / "environments").mkdir(parents=True)
    (library / "environments" / "tiny.yaml").write_text(json.dumps(environment))
    (library / "experiments").mkdir()
    for name, duration in (("tiny-fail", "12s"), ("tiny-long", "90s")):
        experiment = {
            "schema": "mlchaos/v1",
            "name": name,
            "title": "One pod of three held down",
            "hypothesis": "half of the requests are answered",
            "area": "serving",
            "owner": "ml-platform@example.com",
            "target": "prediction-service",
            "fault": {"kind": "pod_failure"},
            "blast_radius": {"count": 1},
            "duration": duration,
            "steady_state": [{"sli": "availability", "at_least": "30%"}],
            "expect": [],
            "recovery": {"within": "40s"},
        }
        (library / "experiments" / f"{name}.yaml").write_text(json.dumps(experiment))
    yield Machine(tmp_path / "a", library), Machine(tmp_path / "b", library), sweeper, select


@pytest.mark.req("R0-02", "R0-10")
def test_a_run_through_chaos_mesh_from_start_to_verdict(machines: tuple[Machine, Machine, str, str]) -> None:
    here, _, namespace, select = machines
    run = here.start("run", "tiny-fail", "-e", "tiny")
    made = eventually(lambda: objects("podchaos.chaos-mesh.org", namespace) or run.poll() is not None, 150)
    told = " ".join(run.communicate(timeout=100)[0].split())
    print(told)
    assert run.returncode == 0 and "HELD" in told, told
    assert made is not True, "no resource of Chaos Mesh was seen"
    assert objects("podchaos.chaos-mesh.org", namespace) == [] and open_leases(namespace) == []
    eventually(lambda: all_ready(namespace, select, 3), 60)


@pytest.mark.req("R0-10", "R4-05")
def test_a_run_through_chaos_mesh_is_stopped_from_another_machine(machines: tuple[Machine, Machine, str, str]) -> None:
    here, there_, namespace, select = machines
    run = here.start("run", "tiny-long", "-e", "tiny")
    eventually(lambda: not all_ready(namespace, select, 3) and open_leases(namespace), 120)
    code, said = there_.says("stop", "tiny-long", "-e", "tiny")
    assert code == 0 and "clean after" in said, said
    told = " ".join(run.communicate(timeout=90)[0].split())
    assert "ABORTED" in told, told
    proven = re.search(r"stopped → proven clean in ([\d.]+ (?:ms|s))\b", told)
    print(proven[1] if proven else told)
    assert proven, told
    assert objects("podchaos.chaos-mesh.org", namespace) == [] and open_leases(namespace) == []
    eventually(lambda: all_ready(namespace, select, 3), 60)
