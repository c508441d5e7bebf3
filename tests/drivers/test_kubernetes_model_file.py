"""A model file on a volume that outlives its pod: the fault is there as long as the volume has it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.kubernetes.faults import model_volume
from mlchaos_dagster.drivers.kubernetes.faults.model_file import ModelCorruption
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import Agent
from mlchaos_dagster.engine.ports import no_step
from mlchaos_dagster.errors import RecoverFailed
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api
from tests.kube.test_leases import a_lease

REF = Ref("pod", "ml", "old", "uid-old")
PODS = "/api/v1/namespaces/ml/pods"
CLAIM = "/api/v1/namespaces/ml/persistentvolumeclaims/models"


def pod(name: str, source: dict[str, Any], at: str = "/models") -> dict[str, Any]:
    state = {"name": "server", "containerID": f"c://{name}", "state": {"running": {"startedAt": "now"}}}
    return {
        "metadata": {"name": name, "namespace": "ml", "uid": f"uid-{name}"},
        "spec": {
            "containers": [{"name": "server", "volumeMounts": [{"name": "v", "mountPath": at}]}],
            "volumes": [{"name": "v", **source}],
        },
        "status": {"phase": "Running", "containerStatuses": [state]},
    }


class World:
    """One volume, seen from whoever mounts it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any]) -> None:
        self.api, self.sha, self.asked = Api(), "damaged", list[tuple[str, str]]()
        self.site = Site(cast(Cluster, self.api), Kubernetes(context="x", namespace="ml"))
        self.api.objects[CLAIM] = {"metadata": {"name": "models"}}
        container = pod("old", source)["spec"]["containers"][0]
        before = {
            "container": "server",
            "container_id": "c://old",
            "path": "/models/m.bin",
            "mount": model_volume.mount_of(pod("old", source), container, "/models/m.bin"),
            "seed": "s",
            "sha256": "whole",
            "damaged_sha256": "damaged",
            "size": 1,
            "ino": 1,
            "user": [0, 0],
        }
        lease = a_lease("mlchaos-a", str(REF), fault={"pods": {str(REF): before}})
        lease.params["how"] = "bit_flip"
        self.injection = Injection(lease, (REF,), lease.undo["fault"])
        monkeypatch.setattr(Agent, "ask", self._ask)

    def _ask(self, site: Site, ref: Ref, container: str, verb: str, order: dict[str, Any], _: float = 0) -> Any:
        self.asked.append((ref.name, order["path"]))
        if verb == "restore":
            self.sha = "whole"
        return {"sha256": self.sha, "kept": self.sha == "damaged", "partial": False}


def test_a_claim_keeps_the_damage_though_the_pod_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, {"persistentVolumeClaim": {"claimName": "models"}})
    fault = ModelCorruption()
    assert fault.active(world.site, world.injection).present, "nobody mounts it: unknown is not clean"
    with pytest.raises(RecoverFailed, match="claim models"):
        fault.recover(world.site, world.injection, no_step)
    world.api.objects[f"{PODS}/new"] = pod("new", {"persistentVolumeClaim": {"claimName": "models"}}, "/srv")
    seen = fault.active(world.site, world.injection)
    assert seen.present and not seen.effective
    fault.recover(world.site, world.injection, no_step)
    assert world.asked[-1] == ("new", "/srv/m.bin")
    assert not fault.active(world.site, world.injection).present
    del world.api.objects[f"{PODS}/new"], world.api.objects[CLAIM]
    assert not fault.active(world.site, world.injection).present, "the claim is gone, too"


def test_what_ends_with_its_pod_is_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, {"emptyDir": {}})
    world.api.objects[f"{PODS}/new"] = pod("new", {"emptyDir": {}})
    assert not ModelCorruption().active(world.site, world.injection).present
    evicted = pod("old", {"emptyDir": {}})
    evicted["status"] = {"phase": "Failed"}
    world.api.objects[f"{PODS}/old"] = evicted
    assert not ModelCorruption().active(world.site, world.injection).present
    assert world.asked == []


def test_a_volume_that_only_its_node_knows_is_refused() -> None:
    found = pod("old", {"hostPath": {"path": "/data"}})
    assert "hostPath" in model_volume.unfit(found, found["spec"]["containers"][0], "/models/m.bin")
    assert model_volume.unfit(found, found["spec"]["containers"][0], "/other/m.bin") == ""
