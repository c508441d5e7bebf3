"""A model file inside containers: damaged, noticed, put back, whatever happens to container and run meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, KubernetesObjects, Target
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import InjectFailed, LeaseRefused
from mlchaos_dagster.kube import leases

from .conftest import TARGET_IMAGE, Faulting, eventually, kubectl, objects
from .test_stress import elsewhere, said_done

LOADER = """
import hashlib, os, pathlib, sys, time
path = pathlib.Path(os.environ["MODEL"])
if not path.exists():
    path.write_bytes(bytes(range(256)) * 400)
    os.utime(path, (1e9, 1e9))
good = hashlib.sha256(bytes(range(256)) * 400).hexdigest()
while True:
    if hashlib.sha256(path.read_bytes()).hexdigest() != good:
        print("rejected", flush=True)
        if os.environ["STRICT"]:
            sys.exit("the model is damaged")
    time.sleep(0.1)
"""
"""A service that checks what it loads; a strict one does not start with a damaged model."""


def serve(namespace: str, model: str = "/models/model.bin", *, strict: bool = False, user: int = 10001) -> str:
    """A pod with a model on an emptyDir at /models; its name."""
    volume = {"name": "models", "mountPath": "/models"}
    container = {
        "name": "server",
        "image": TARGET_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["tini", "--", "python3", "-c", LOADER],
        "env": [{"name": "MODEL", "value": model}, {"name": "STRICT", "value": "1" if strict else ""}],
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"cpu": "300m", "memory": "96Mi"}},
        "securityContext": {"runAsUser": user, "readOnlyRootFilesystem": user != 0, "allowPrivilegeEscalation": False},
        "volumeMounts": [volume],
    }
    spec = {
        "containers": [container],
        "volumes": [{"name": "models", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"fsGroup": user},
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "server", "labels": {"app": "server"}}, "spec": spec}
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    kubectl("wait", "-n", namespace, "pod/server", "--for=condition=Ready", "--timeout=30s")
    eventually(lambda: kubectl("exec", "-n", namespace, "server", "--", "ls", model, check=False))
    return "server"


def state(namespace: str, path: str = "/models/model.bin") -> str:
    """What `sha256sum` and `stat` say inside the container."""
    words = f"sha256sum {path}; stat -c '%u:%g %a %Y %s' {path}"
    return kubectl("exec", "-n", namespace, "server", "--", "sh", "-c", words)


def beside(namespace: str, directory: str = "/models") -> list[str]:
    return kubectl("exec", "-n", namespace, "server", "--", "ls", "-A", directory).split()


def lease_on(faulting: Faulting, path: str = "/models/model.bin", how: str = "bit_flip") -> Lease:
    return faulting.lease("model_corruption", "app=server", objects=KubernetesObjects(path=path), how=how)


def status(namespace: str) -> dict[str, Any]:
    (pod,) = objects("pods", namespace, "app=server")
    return pod["status"]["containerStatuses"][0]


@pytest.mark.req("R3-04")
@pytest.mark.parametrize("how", ["random_bytes", "truncate", "bit_flip"])
def test_it_is_damaged_noticed_and_put_back(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, how: str
) -> None:
    serve(namespace)
    before = state(namespace)
    lease = lease_on(faulting, how=how)
    assert state(namespace) == before and beside(namespace) == ["model.bin"], "undo only looks"
    driver.inject(lease)
    try:
        evidence = driver.active(lease)
        assert evidence.present and evidence.effective and f"damaged ({how})" in evidence.lines[0]
        during = state(namespace)
        assert during.split()[0] != before.split()[0]
        assert during.splitlines()[1].split()[:2] == before.splitlines()[1].split()[:2], "owner and mode"
        eventually(lambda: "rejected" in kubectl("logs", "-n", namespace, "server"), within=5)
    finally:
        driver.recover(lease)
    assert state(namespace) == before, "content, owner, mode, time of change"
    assert beside(namespace) == ["model.bin"]
    after = driver.active(lease)
    assert not after.present and "as before" in after.lines[0]
    driver.recover(lease)
    assert state(namespace) == before


@pytest.mark.req("RX-01")
def test_another_process_puts_it_back_after_the_run_was_killed(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, options: Kubernetes
) -> None:
    serve(namespace)
    before = state(namespace)
    lease = lease_on(faulting)
    with elsewhere(lease, options, verb="inject", then="os.kill(os.getpid(), 9)") as run:
        said_done(run)
    assert driver.active(lease).effective
    with elsewhere(lease, options, verb="recover") as other:
        said_done(other)
    assert state(namespace) == before and beside(namespace) == ["model.bin"]


@pytest.mark.req("RX-01")
def test_a_lease_that_was_taken_away_damages_nothing(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: everything is prepared, the lease is looked at, and somebody recovers before the word is sent."""
    serve(namespace)
    before = state(namespace)
    lease = lease_on(faulting)
    monkeypatch.setattr(leases, "held", lambda site, held: driver.recover(lease))
    with pytest.raises(InjectFailed):
        driver.inject(lease)
    assert state(namespace) == before and beside(namespace) == ["model.bin"]

    def refuse(site: object, held: object) -> None:
        raise LeaseRefused("taken over")

    monkeypatch.setattr(leases, "held", refuse)
    with pytest.raises(LeaseRefused):
        driver.inject(lease_on(faulting))
    assert state(namespace) == before
    eventually(lambda: beside(namespace) == ["model.bin"], within=5)


def test_a_restart_keeps_a_volume_and_loses_a_layer(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    serve(namespace, user=0)
    # Of the image itself, in the container's own layer.
    layer = "/etc/debian_version"
    for path, kept in (("/models/model.bin", True), (layer, False)):
        before, restarts = state(namespace, path), status(namespace)["restartCount"]
        lease = lease_on(faulting, path)
        driver.inject(lease)
        assert driver.active(lease).effective
        kubectl("exec", "-n", namespace, "server", "--", "kill", "1", check=False)
        eventually(
            lambda n=restarts: (s := status(namespace))["restartCount"] > n and "running" in s["state"], within=40
        )
        evidence = driver.active(lease)
        assert (evidence.present, evidence.effective) == (kept, kept), evidence.lines
        assert ("the volume kept both" if kept else "its layer is the image's again") in " ".join(evidence.lines)
        assert (state(namespace, path) != before) is kept
        driver.recover(lease)
        assert not driver.active(lease).present
        assert state(namespace, path) == before


@pytest.mark.req("R3-04", "RX-01")
def test_it_is_put_back_though_the_service_does_not_start_any_more(
    namespace: str, driver: KubernetesDriver, faulting: Faulting
) -> None:
    serve(namespace, strict=True)
    before = state(namespace)
    lease = lease_on(faulting)
    driver.inject(lease)
    eventually(lambda: "waiting" in (s := status(namespace))["state"] and s["restartCount"] > 0, within=40)
    evidence = driver.active(lease)
    assert evidence.present and "cannot be read" in evidence.lines[0]
    driver.recover(lease)
    assert not driver.active(lease).present
    eventually(lambda: "running" in status(namespace)["state"], within=60)
    assert state(namespace) == before and beside(namespace) == ["model.bin"]


def test_what_others_wrote_stays(namespace: str, driver: KubernetesDriver, faulting: Faulting) -> None:
    serve(namespace)
    lease = lease_on(faulting)
    driver.inject(lease)
    kubectl("exec", "-n", namespace, "server", "--", "sh", "-c", "echo newer > /models/model.bin")
    evidence = driver.active(lease)
    assert evidence.present and not evidence.effective and "somebody else" in evidence.lines[0]
    driver.recover(lease)
    assert kubectl("exec", "-n", namespace, "server", "--", "cat", "/models/model.bin") == "newer\n"
    assert beside(namespace) == ["model.bin"]


def test_what_speaks_against_it(namespace: str, driver: KubernetesDriver) -> None:
    serve(namespace)

    def said(path: str) -> str:
        target = Target(select="app=server", kubernetes=KubernetesObjects(path=path))
        ids = driver.resolve(target)
        found = driver.preflight("model_corruption", ids, ids, {"how": "truncate"}, target=target)
        return "; ".join(f"{o.saw} → {o.needs}" for o in found)

    assert not said("/models/model.bin")
    assert "names no file" in said("")
    assert "No such file" in said("/models/none")
    assert "no regular file" in said("/models")
    assert "may not write" in said("/etc/debian_version")


@pytest.fixture(autouse=True)
def _no_pods_left(namespace: str) -> Iterator[None]:
    yield
    kubectl("delete", "pods", "-n", namespace, "--all", "--grace-period=0", "--force", "--wait=false", check=False)
