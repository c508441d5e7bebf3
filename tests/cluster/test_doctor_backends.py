"""`mlchaos doctor --backend` on a cluster where each part is missing in turn: Litmus with its real objects, the real Chaos Mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import deploy, kubectl
from tests.cluster.litmus_operator import Litmus
from tests.cluster.litmus_place import DATA, OPERATOR, stand_in_only
from tests.cluster.surroundings import CommandLine, environment
from tests.cluster.test_chaos_mesh import SYSTEM, there  # noqa: F401  a fixture
from tests.cluster.test_litmus import crds, litmus  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout (../shared/data/litmus)"),
    pytest.mark.timeout(240),
]


def told(line: CommandLine, backend: str) -> tuple[int, dict[str, str]]:
    """Exit code, and each line that says missing with its commands."""
    code, out, err = line("doctor", "--backend", backend)
    print(out)
    assert not err, err
    found: dict[str, str] = {}
    missing = ""
    for said in out.splitlines():
        if not said.startswith(" "):
            missing = said.partition("✘ missing")[2].strip()
        if said.startswith(" ") and missing:
            found[missing] = f"{found[missing]}\n{said.strip().removeprefix('→ ')}".strip()
        elif missing:
            found[missing] = ""
    return code, found


@pytest.fixture
def roles(admin_kubeconfig: str) -> Iterator[None]:
    """Those of `manifests/litmus`; where they are installed already they stay."""
    before = kubectl("get", "clusterrole", "litmus-faults", "--ignore-not-found", "-o", "name")
    kubectl("apply", "-f", str(ROOT / "manifests/litmus/roles.yaml"))
    yield
    if not before:
        kubectl("delete", "-f", str(ROOT / "manifests/litmus/roles.yaml"), "--ignore-not-found")


@pytest.mark.req("R0-01")
def test_litmus_with_each_part_missing_in_turn(
    litmus: Litmus,  # noqa: F811
    roles: None,
    namespace: str,
    tmp_path: Path,
    context: str,
    admin_kubeconfig: str,
) -> None:
    stand_in_only(litmus)
    written = environment(namespace, context, admin_kubeconfig)
    written["kubernetes"]["litmus"] = {"operator_namespace": namespace}
    line = CommandLine(tmp_path, written)
    deploy(namespace, replicas=1)
    bound = f"--serviceaccount={namespace}:litmus-admin"
    # The roles that are shipped in place of those of the stand-in: they must be enough for what Litmus itself asks for.
    kubectl("delete", "rolebinding", "litmus-admin", "-n", namespace)
    code, found = told(line, "litmus")
    assert code == 1 and {w.partition(":")[0] for w in found} == {"litmus"}
    remedies = [command for command in found.values() if command]  # the same one is told once
    assert len(remedies) == 2 and all("kubectl create rolebinding" in command for command in remedies), found
    for role in ("litmus-faults", "litmus-network-partition"):
        kubectl("create", "rolebinding", role, "-n", namespace, f"--clusterrole={role}", bound)
    assert told(line, "litmus") == (0, {}), "with the roles of manifests/litmus nothing is missing"

    steps: list[tuple[Callable[[], Any], str, str, Callable[[], Any]]] = [
        (
            lambda: kubectl("delete", "chaosexperiment", "pod-cpu-hog", "-n", namespace),
            f"litmus: experiments in {namespace}: no ChaosExperiment pod-cpu-hog",
            f"kubectl apply -n {namespace} -k manifests/litmus/faults",
            lambda: kubectl("apply", "-n", namespace, "-f", str(DATA / "faults")),
        ),
        (
            lambda: kubectl("delete", "serviceaccount", "litmus-admin", "-n", namespace),
            f"litmus: account in {namespace}: no ServiceAccount litmus-admin",
            f"kubectl create serviceaccount litmus-admin -n {namespace}",
            lambda: kubectl("create", "serviceaccount", "litmus-admin", "-n", namespace),
        ),
        (
            lambda: kubectl("delete", "rolebinding", "litmus-network-partition", "-n", namespace),
            f"litmus: account in {namespace}: litmus-admin may not create, delete, get, list networkpolicies",
            "--clusterrole=litmus-network-partition",
            lambda: kubectl(
                *("create", "rolebinding", "litmus-network-partition", "-n", namespace),
                *("--clusterrole=litmus-network-partition", bound),
            ),
        ),
        (
            lambda: kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=baseline"),
            f"litmus: helpers in {namespace}: pod security baseline refuses",
            "pod-security.kubernetes.io/enforce=privileged",
            lambda: kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce-"),
        ),
        (
            lambda: kubectl("scale", "deployment", OPERATOR, "-n", namespace, "--replicas=0"),
            f"litmus: operator: Deployment {namespace}/{OPERATOR} is scaled to 0",
            f"kubectl scale deployment {OPERATOR} -n {namespace} --replicas=1",
            lambda: kubectl("delete", "deployment", OPERATOR, "-n", namespace),
        ),
        (lambda: None, f"litmus: operator: no Deployment of it in {namespace}", "helm upgrade --install litmus", str),
    ]
    for take_away, what, help, bring_back in steps:
        take_away()
        code, found = told(line, "litmus")
        ((said, command),) = found.items()
        assert code == 1 and said.startswith(what) and help in command
        bring_back()


@pytest.mark.req("R1-06")
def test_chaos_mesh_as_it_runs_and_for_who_has_no_rights(
    there: None,  # noqa: F811
    namespace: str,
    tmp_path: Path,
    context: str,
    admin_kubeconfig: str,
    kubeconfig: str,
) -> None:
    deploy(namespace, replicas=1)
    assert told(CommandLine(tmp_path / "admin", environment(namespace, context, admin_kubeconfig)), "chaos_mesh") == (
        0,
        {},
    )
    elsewhere = environment(namespace, context, admin_kubeconfig)
    elsewhere["kubernetes"]["chaos_mesh"] = {"system_namespace": namespace}
    code, found = told(CommandLine(tmp_path / "elsewhere", elsewhere), "chaos_mesh")
    assert code == 1 and f"system_namespace: {SYSTEM}" in next(iter(found.values())), found

    # The runner's account, whose rights for Chaos Mesh are not bound in this namespace.
    for name in kubectl("get", "rolebindings", "-n", namespace, "-o", "name").split():
        if "chaos-mesh" in name:
            kubectl("delete", "-n", namespace, name)
    if kubeconfig == admin_kubeconfig:
        return
    code, found = told(CommandLine(tmp_path / "runner", environment(namespace, context, kubeconfig)), "chaos_mesh")
    assert code == 1
    bind = f"kubectl apply -n {namespace} -k manifests/rbac/chaos_mesh/namespace"
    assert bind in found[next(w for w in found if w.startswith(f"chaos_mesh: webhook in {namespace}"))]
    assert all(bind in command for what, command in found.items()), found
