"""Bad input and guards on a real cluster: one clear line, the documented exit code, nothing left."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import deploy, kubectl, objects
from tests.cluster.surroundings import EXPERIMENT, CommandLine, account, environment, forget_account

REFUSED, USAGE = 3, 2


@pytest.fixture
def limited(namespace: str) -> Iterator[str]:
    yield namespace
    forget_account(namespace)


def one_line(said: str, *words: str) -> None:
    """Exactly one line says what is wrong, with all the words, and none is a traceback."""
    lines = [line for line in said.splitlines() if all(w in line for w in words)]
    assert len(lines) >= 1, said
    assert "Traceback" not in said


def untouched(namespace: str) -> None:
    """No object of ours, no mark, no helper container."""
    assert objects("leases", namespace) == []
    assert objects("all,secrets,configmaps,networkpolicies", namespace, "app.kubernetes.io/managed-by=mlchaos") == []
    for pod in objects("pods", namespace):
        assert "mlchaos.dev/lease" not in pod["metadata"].get("annotations", {})
        assert not pod["spec"].get("ephemeralContainers")


def test_a_cluster_that_does_not_answer(tmp_path: Path, namespace: str, context: str, kubeconfig: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"https://127.0.0.1:{closed.getsockname()[1]}"
    config = yaml.safe_load(Path(kubeconfig).read_text())
    for cluster in config["clusters"]:
        cluster["cluster"]["server"] = nobody
    path = tmp_path / "nobody.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    code, _, err = CommandLine(tmp_path, environment(namespace, context, str(path)))("run", "web-down")
    assert code == USAGE
    one_line(err, "the cluster of environment test", nobody, "does not answer")


def test_a_context_that_is_not_there(tmp_path: Path, namespace: str, context: str, kubeconfig: str) -> None:
    line = CommandLine(tmp_path, environment(namespace, "production", kubeconfig))
    code, _, err = line("run", "web-down")
    assert code == USAGE
    one_line(err, 'no context "production"', f"Allowed: {context}")
    code, out, _ = line("doctor")
    assert code == 1
    one_line(out, "kubeconfig", 'no context "production"')


def test_a_context_that_leads_to_another_cluster_than_before(
    tmp_path: Path, namespace: str, context: str, kubeconfig: str
) -> None:
    line = CommandLine(tmp_path, environment(namespace, context, kubeconfig))
    remembered = line.home / "clusters" / "test.json"
    remembered.parent.mkdir(parents=True)
    remembered.write_text('{"uid": "0000-another", "options": {}}')
    code, _, err = line("run", "web-down")
    assert code == USAGE
    one_line(err, "leads to another cluster than before", "0000-another")


def test_a_cluster_that_is_not_the_one_the_environment_names(
    tmp_path: Path, namespace: str, context: str, kubeconfig: str
) -> None:
    written = environment(namespace, context, kubeconfig)
    written["kubernetes"]["uid"] = "1234-production"
    code, _, err = CommandLine(tmp_path, written)("run", "web-down")
    assert code == USAGE
    one_line(err, "leads to the cluster", "Allowed: 1234-production")


def test_credentials_that_are_refused(tmp_path: Path, namespace: str, context: str, kubeconfig: str) -> None:
    config = yaml.safe_load(Path(kubeconfig).read_text())
    config["users"] = [{"name": u["name"], "user": {"token": "expired"}} for u in config["users"]]
    path = tmp_path / "expired.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    code, _, err = CommandLine(tmp_path, environment(namespace, context, str(path)))("run", "web-down")
    assert code == USAGE
    one_line(err, "does not accept the credentials", "401")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("label", ("has not opted in to faults", "kubectl label namespace")),
        ("selector", ("app=nothing matches 0",)),
        ("system", ("namespace kube-system carries the cluster itself",)),
        ("budget", ("PodDisruptionBudget", "allows 0 pods to be down, and 1 would be")),
    ],
)
def test_a_target_that_must_not_be_hit(
    tmp_path: Path, namespace: str, context: str, kubeconfig: str, change: str, words: tuple[str, ...]
) -> None:
    deploy(namespace, replicas=2)
    written, experiment = environment(namespace, context, kubeconfig), dict(EXPERIMENT)
    if change == "label":
        kubectl("label", "namespace", namespace, "mlchaos.dev/allow-")
    elif change == "selector":
        experiment["target"] = "nothing"
    elif change == "system":
        written["targets"]["web"] = {"select": "k8s-app=kube-dns", "kubernetes": {"namespace": "kube-system"}}
    elif change == "budget":
        kubectl("create", "pdb", "keep", "-n", namespace, "--selector=app=web", "--min-available=2")
    code, out, err = CommandLine(tmp_path, written, experiment)("run", "web-down")
    assert code == REFUSED, out + err
    one_line(out + err, *words)
    untouched(namespace)


def test_a_missing_permission_is_printed_as_the_rule_to_add(
    tmp_path: Path, limited: str, context: str, kubeconfig: str
) -> None:
    deploy(limited, replicas=2)
    reads: list[dict[str, Any]] = [
        {
            "apiGroups": ["", "apps", "policy", "coordination.k8s.io"],
            "resources": ["*"],
            "verbs": ["get", "list", "watch"],
        }
    ]
    path = account(limited, reads, tmp_path)
    code, out, err = CommandLine(tmp_path, environment(limited, "limited", path))("run", "web-down")
    assert code == REFUSED, out + err
    said = " ".join((out + err).split())  # the terminal's line breaks are its own
    rule = f'Role in namespace {limited}: {{apiGroups: [""], resources: ["pods"], verbs: ["delete", "patch"]}}'
    assert rule in said.replace("- ", "-"), said
    untouched(limited)


def test_doctor_names_what_is_missing_and_the_command_that_mends_it(
    tmp_path: Path, namespace: str, context: str, kubeconfig: str
) -> None:
    deploy(namespace, replicas=2)
    kubectl("label", "namespace", namespace, "mlchaos.dev/allow-")
    code, out, _ = CommandLine(tmp_path, environment(namespace, context, kubeconfig))("doctor")
    assert code == 1
    one_line(out, "✔ ok", "cluster", "Kubernetes 1.")
    one_line(out, "→ kubectl label namespace", namespace)
    one_line(out, "✘ missing", "target nothing", "app=nothing matches no pod")
    one_line(out, "✔ ok", "target web", "app=web matches 2")
    one_line(out, "✘ missing", "sweeper")
