"""`mlchaos clean` takes away what our leases made in Litmus and Chaos Mesh, also when the leases are lost; nobody else's (R0-10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster.drivers.litmus.driver import LitmusDriver
from tests.cluster.conftest import Faulting, deploy, eventually, kubectl, objects, pods, ready
from tests.cluster.litmus_operator import Litmus, Script
from tests.cluster.litmus_place import DATA
from tests.cluster.surroundings import CommandLine, environment
from tests.cluster.test_chaos_mesh import by_mesh, mesh, there  # noqa: F401  fixtures
from tests.cluster.test_litmus import crds, driver, faulting, litmus, options  # noqa: F401  fixtures

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout (../shared/data/litmus)"),
    pytest.mark.timeout(240),
]


@pytest.fixture
def line(tmp_path: Path, namespace: str, context: str, admin_kubeconfig: str) -> CommandLine:
    """As who installed it."""
    written = environment(namespace, context, admin_kubeconfig)
    written["kubernetes"]["litmus"] = {"operator_namespace": namespace}
    return CommandLine(tmp_path, written)


def cleaned(line: CommandLine, namespace: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, err = line("clean", "--namespace", namespace, "--output", "json", *arguments, timeout=200)
    assert not err, err
    print(out)
    return code, json.loads(out)


@pytest.mark.req("R0-10", "R1-06")
def test_what_chaos_mesh_keeps_for_a_lost_lease(
    there: None,  # noqa: F811
    by_mesh: Faulting,  # noqa: F811
    line: CommandLine,
    namespace: str,
) -> None:
    deploy(namespace, replicas=2)
    lease = by_mesh.lease("pod_failure", "app=web", count=1)
    by_mesh.driver.inject(lease)
    eventually(lambda: sum(map(ready, pods(namespace, "app=web"))) == 1)
    theirs = {
        "apiVersion": "chaos-mesh.org/v1alpha1",
        "kind": "PodChaos",
        "metadata": {"name": "theirs", "annotations": {"experiment.chaos-mesh.org/pause": "true"}},
        "spec": {"action": "pod-failure", "mode": "all", "selector": {"labelSelectors": {"app": "nobody"}}},
    }
    kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(theirs))

    code, told = cleaned(line, namespace, "--dry-run")
    assert (code, told["clean"]) == (0, False)
    assert [(r["action"], lease.id in r["what"]) for r in told["rows"]] == [("would remove", True)]
    assert by_mesh.driver.active(lease).present, "a dry run changes nothing"

    code, told = cleaned(line, namespace)
    assert code == 0 and [r["action"] for r in told["rows"]] == ["mended"]
    assert [o["metadata"]["name"] for o in objects("podchaos.chaos-mesh.org", namespace)] == ["theirs"]
    assert not by_mesh.driver.active(lease).present
    eventually(lambda: all(map(ready, pods(namespace, "app=web"))), within=90)
    assert cleaned(line, namespace) == (0, {"dry_run": False, "clean": True, "rows": []})


@pytest.mark.req("R0-10")
@pytest.mark.parametrize("operator", ["up", "down"])
def test_what_litmus_keeps_for_a_lost_lease(
    operator: str,
    litmus: Litmus,  # noqa: F811
    faulting: Faulting,  # noqa: F811
    driver: LitmusDriver,  # noqa: F811
    line: CommandLine,
    namespace: str,
) -> None:
    deploy(namespace, replicas=2)
    lease = faulting.lease("network_isolation", "app=web", count=1)
    driver.inject(lease)
    assert objects("networkpolicies", namespace)
    theirs = {
        "apiVersion": "litmuschaos.io/v1alpha1",
        "kind": "ChaosEngine",
        "metadata": {"name": "theirs"},
        "spec": {"engineState": "stop", "experiments": [{"name": "pod-delete"}]},
    }
    kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(theirs))
    if operator == "down":
        litmus.script = Script(deaf=True)
        kubectl("delete", "chaosengine", "-n", namespace, "-l", f"mlchaos.dev/lease={lease.id}", "--wait=false")

    code, told = cleaned(line, namespace, "--dry-run")
    said = {r["what"].split()[0] for r in told["rows"]}
    assert code == 0 and {"chaosengine", "chaosresult", "networkpolicy", "pod"} <= said, said
    own = lease.id.removeprefix("mlchaos-test-")  # of the helper container too, by which we look
    assert all(own in r["what"] for r in told["rows"]), told

    for _ in range(3):  # a busy node may not answer for the helper in time; it says so, and the next try goes on
        code, told = cleaned(line, namespace)
        if code == 0:
            break
    assert code == 0, told
    assert objects("chaosresults,networkpolicies", namespace) == []
    assert [o["metadata"]["name"] for o in objects("chaosengines", namespace)] == ["theirs"]
    eventually(lambda: not [p for p in objects("pods", namespace) if "chaosUID" in p["metadata"]["labels"]])
    assert not any("mlchaos.dev/fault" in p["metadata"]["labels"] for p in pods(namespace, "app=web"))
    assert cleaned(line, namespace)[1]["rows"] == []
