"""What becomes of a fault when its namespace goes, and the rights that were bound there go with it."""

from __future__ import annotations

import pytest

from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from tests.cluster.conftest import Faulting, deploy, kubectl
from tests.cluster.rights import Rights


def test_a_namespace_that_is_deleted_takes_fault_and_rights_along(
    namespace: str, driver: KubernetesDriver, faulting: Faulting, rights: Rights | None
) -> None:
    if rights is None:
        pytest.skip("RIGHTS=admin: no rights are bound to the namespace")
    lease = faulting.lease("pod_failure", deploy(namespace, replicas=1))
    driver.inject(lease)
    assert driver.active(lease).present
    kubectl("delete", "namespace", namespace, "--wait=true", timeout=120)
    driver.recover(lease)
    found = driver.active(lease)
    assert not found.present and "is gone" in found.lines[0]
