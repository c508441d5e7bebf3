"""Litmus: who dies, stops, or wakes up late in the middle of it; what is missing is said before anything is measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.drivers.litmus.driver import LitmusDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import Halted, InjectFailed, RecoverFailed
from mlchaos_dagster.kube.client import Cluster
from tests.cluster import litmus_operator
from tests.cluster.api_proxy import ApiProxy, api_proxy  # noqa: F401  a fixture
from tests.cluster.conftest import deploy, eventually, kubectl, objects
from tests.cluster.litmus_operator import Script
from tests.cluster.litmus_place import DATA, OPERATOR, stand_in_only
from tests.cluster.test_litmus import (  # noqa: F401  fixtures
    Leasing,
    crds,
    driver,
    effective,
    faulting,
    litmus,
    names,
    nothing_left,
    options,
)

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout (../shared/data/litmus)"),
    pytest.mark.timeout(180),
]
OTHER = """
import json, sys
from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.litmus.driver import LitmusDriver
from mlchaos_dagster.engine.ports import Lease, Owner
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Cluster

told = json.loads(sys.stdin.readline())
options = Kubernetes.model_validate(told["options"])
lease = Lease(**{**told["lease"], "targets": tuple(told["lease"]["targets"]), "owner": Owner(**told["lease"]["owner"])})
driver = LitmusDriver.at(Cluster(options.context, options.kubeconfig.removeprefix("file:")), options)
asked = 0

def held(site, lease):
    global asked
    asked += 1
    if asked == told["pause_at"]:
        print("paused", flush=True)
        sys.stdin.readline()

leases.held = held
try:
    getattr(driver, told["verb"])(lease)
    print("done", flush=True)
except MlChaosError as e:
    print(f"{type(e).__name__}: {e}", flush=True)
"""
"""Another process that knows the lease and nothing else; it sleeps after its `pause_at`th look at its lease."""


@contextmanager
def another(verb: str, lease: Lease, given: Kubernetes, pause_at: int = 0) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        told = {"verb": verb, "lease": dataclasses.asdict(lease), "pause_at": pause_at}
        process.stdin.write(json.dumps({**told, "options": given.model_dump(mode="json")}) + "\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def engines(namespace: str) -> list[dict[str, Any]]:
    return objects("chaosengines", namespace)


@pytest.mark.req("R2-02")
@pytest.mark.parametrize("when", ["asked", "experiment", "policy"])
def test_a_run_that_is_killed_is_recovered_by_another_process(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    options: Kubernetes,  # noqa: F811
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
    when: str,
) -> None:
    lease = faulting.lease("network_isolation", deploy(namespace), count=1, duration_s=120)
    litmus.script = Script(deaf=when == "asked")
    there = {
        "asked": lambda: [e for e in engines(namespace) if e["spec"]["engineState"] == "active"],
        "experiment": lambda: objects("jobs", namespace),
        "policy": lambda: objects("networkpolicies", namespace),
    }
    with another("inject", lease, options) as process:
        eventually(there[when], 40)
        process.kill()
    litmus.script = Script()
    with another("recover", lease, options) as process:
        assert read(process) == "done"
    assert not driver.active(lease).present and nothing_left(namespace)


def test_who_wakes_up_late_starts_nothing(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    options: Kubernetes,  # noqa: F811
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
) -> None:
    """Asleep between making the engine and starting it, for longer than a recovery; then before making it."""
    select = deploy(namespace)
    before = names(namespace, select)
    for pause_at, said in ((2, "was taken away before it began"), (1, "done|no effect|InjectFailed")):
        lease = faulting.lease("pod_delete", select, count=1, duration_s=10)
        with another("inject", lease, options, pause_at=pause_at) as process:
            assert read(process) == "paused"
            driver.recover(lease)
            assert nothing_left(namespace)
            if pause_at == 1:  # what it makes now is inert: it dies before its last look at the lease
                continue
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            assert said in read(process)
        assert nothing_left(namespace) and names(namespace, select) == before


def test_an_abort_in_the_middle_of_the_injection(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
) -> None:
    select = deploy(namespace)
    before = names(namespace, select)
    lease = faulting.lease("pod_delete", select, count=1, duration_s=60)
    litmus.script = Script(slow_s=60)

    def step(done: int, total: int) -> None:
        if objects("pods", namespace, "app.kubernetes.io/component=chaos-runner"):
            raise Halted("enough")

    with pytest.raises(Halted):
        driver.inject(lease, step)
    started = time.monotonic()
    driver.recover(lease)
    took = time.monotonic() - started
    assert not driver.active(lease).present and nothing_left(namespace) and took < 20, took
    assert names(namespace, select) == before


def test_an_api_server_that_is_away_during_the_recovery(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    options: Kubernetes,  # noqa: F811
    faulting: Leasing,  # noqa: F811
    api_proxy: ApiProxy,  # noqa: F811
) -> None:
    through = LitmusDriver.at(Cluster(api_proxy.context, str(api_proxy.kubeconfig)), options)
    lease = faulting.lease("network_isolation", deploy(namespace), count=1, duration_s=120)
    through.inject(lease)
    api_proxy.cut()
    started = time.monotonic()
    with pytest.raises(Exception, match="does not answer"):
        through.recover(lease)
    assert time.monotonic() - started < 15
    assert objects("networkpolicies", namespace)
    api_proxy.restore()
    through.recover(lease)
    assert not through.active(lease).present and nothing_left(namespace)


def test_several_leases_at_once(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
) -> None:
    """The operator ends one engine after the other; none of ours waits for another's end."""
    leases = [
        faulting.lease("network_isolation", deploy(namespace, name, replicas=1), duration_s=120) for name in ("a", "b")
    ]
    errors: list[Exception] = []

    def with_all(verb: str) -> None:
        def one(lease: Lease) -> None:
            try:
                getattr(driver, verb)(lease)
            except Exception as e:  # noqa: BLE001  told below
                errors.append(e)

        threads = [threading.Thread(target=one, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)

    with_all("inject")
    assert not errors and len(objects("networkpolicies", namespace)) == 2
    driver.recover(leases[0])
    assert effective(driver, leases[1]).present and len(objects("networkpolicies", namespace)) == 1
    driver.recover(leases[1])
    assert not errors and nothing_left(namespace)


BROUGHT: dict[str, Any] = {
    "chaosServiceAccount": "litmus-admin",
    "appinfo": {"appns": "elsewhere", "applabel": "app=other", "appkind": "deployment"},
    "experiments": [
        {
            "name": "pod-delete",
            "spec": {
                "components": {"env": [{"name": "CHAOS_INTERVAL", "value": "3"}, {"name": "FORCE", "value": "true"}]},
                "probe": [
                    {
                        "name": name,
                        "type": "httpProbe",
                        "mode": "EOT",
                        "httpProbe/inputs": {
                            "url": "http://web",
                            "method": {"get": {"criteria": "==", "responseCode": code}},
                        },
                        "runProperties": {"probeTimeout": "5s", "interval": "1s"},
                    }
                    for name, code in (("teapot", "418"), ("up", "200"))
                ],
            },
        }
    ],
}
FAILED = {"teapot": ("Failed", "Actual value: 200, Expected value: 418")}


@pytest.mark.req("R3-01")
def test_a_brought_engine_runs_on_frozen_pods_and_is_judged_by_its_probes(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
) -> None:
    select = deploy(namespace, replicas=3)
    before = names(namespace, select)
    litmus.script = Script(probes=FAILED)
    lease = faulting.lease("litmus_engine", select, count=1, duration_s=6, engine=BROUGHT)
    driver.inject(lease)
    assert driver.active(lease).effective and len(before & names(namespace, select)) == 2
    found = {f.name: f for f in driver.findings(lease)}
    assert found["litmus probe teapot"].passed is False and "418" in found["litmus probe teapot"].saw
    assert found["litmus probe up"].passed is True and found["litmus verdict"].passed is False
    assert len(before & names(namespace, select)) == 2  # one round: a second one would have taken others, or failed
    driver.recover(lease)
    assert not driver.active(lease).present and nothing_left(namespace)


def objections(driver: LitmusDriver, kind: str, select: str, **params: Any) -> str:  # noqa: F811
    target = Target(select=select)
    ids = driver.resolve(target)
    return "\n".join(f"{o.saw} | {o.needs}" for o in driver.preflight(kind, ids[:1], ids, params, target=target))


@pytest.mark.req("R0-01")
def test_what_is_missing_is_said_with_the_command_that_brings_it(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
) -> None:
    stand_in_only(litmus)
    select = deploy(namespace)
    assert objections(driver, "pod_delete", select) == ""
    role = json.loads(kubectl("get", "role", "litmus-admin", "-n", namespace, "-o", "json"))
    for rule in role["rules"]:
        rule["resources"] = [r for r in rule["resources"] if r != "replicasets"] or ["nothing"]
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(role))
    said = eventually(lambda: objections(driver, "pod_delete", select))
    assert (
        "litmus-admin may not list, get replicasets" in said and "kubectl apply -f manifests/litmus/roles.yaml" in said
    )
    kubectl("delete", "serviceaccount", "litmus-admin", "-n", namespace)
    said = objections(driver, "pod_delete", select)
    assert f"there is no service account litmus-admin in namespace {namespace}" in said
    kubectl("delete", "chaosexperiment", "pod-delete", "-n", namespace)
    said = objections(driver, "pod_delete", select)
    assert "there is no ChaosExperiment pod-delete" in said and "-k manifests/litmus/faults" in said
    kubectl("set", "env", f"deployment/{OPERATOR}", "WATCH_NAMESPACE=elsewhere", "-n", namespace)
    assert "watches elsewhere" in objections(driver, "pod_delete", select)
    kubectl("scale", f"deployment/{OPERATOR}", "--replicas=0", "-n", namespace)
    said = eventually(lambda: s if "no replica" in (s := objections(driver, "pod_delete", select)) else "")
    assert f"kubectl -n {namespace} scale deployment {OPERATOR} --replicas=1" in said
    kubectl("delete", "deployment", OPERATOR, "-n", namespace)
    assert "the chaos operator runs nowhere" in objections(driver, "pod_delete", select)


def test_what_litmus_would_do_to_others_or_refuse_is_said_before(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
) -> None:
    select = deploy(namespace)
    assert "cannot be kept to the frozen pods" in objections(driver, "pod_delete", select, interval_s=5.0)
    assert "without asking budgets" in objections(driver, "pod_delete", select, evict=True)
    wrong = {**BROUGHT, "defaultHealthCheck": "yes"}
    said = objections(driver, "litmus_engine", select, engine=wrong)
    assert "spec.defaultHealthCheck" in said and "boolean" in said
    drain = {"experiments": [{"name": "node-drain"}]}
    assert "node-drain hits nodes" in objections(driver, "litmus_engine", select, engine=drain)
    assert not engines(namespace)


def test_an_engine_that_somebody_else_stops_has_failed(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
) -> None:
    lease = faulting.lease("pod_delete", deploy(namespace), count=1, duration_s=60)
    litmus.script = Script(slow_s=60)

    def step(done: int, total: int) -> None:
        for engine in engines(namespace):
            if (
                engine.get("status", {}).get("engineStatus") == "initialized"
                and engine["spec"]["engineState"] == "active"
            ):
                stop = '{"spec": {"engineState": "stop"}}'
                kubectl("patch", "chaosengine", engine["metadata"]["name"], "-n", namespace, "--type=merge", "-p", stop)

    with pytest.raises(InjectFailed, match="did not make the fault"):
        driver.inject(lease, step)
    driver.recover(lease)
    assert nothing_left(namespace)


def test_a_pod_that_does_not_end_is_never_called_clean(
    litmus: litmus_operator.Litmus,  # noqa: F811
    namespace: str,
    driver: LitmusDriver,  # noqa: F811
    faulting: Leasing,  # noqa: F811
) -> None:
    """A finalizer on the experiment's pod stands for a node that does not answer."""
    lease = faulting.lease("network_isolation", deploy(namespace), count=1, duration_s=120)
    driver.inject(lease)
    pod = objects("pods", namespace, "job-name")[0]["metadata"]["name"]
    hold = '{"metadata": {"finalizers": ["example.com/hold"]}}'
    kubectl("patch", "pod", pod, "-n", namespace, "--type=merge", "-p", hold)
    litmus.script = Script(deaf=True)
    with pytest.raises(RecoverFailed, match=f"does not end: .*{pod}"):
        driver.recover(lease)
    assert driver.active(lease).present
    kubectl("patch", "pod", pod, "-n", namespace, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    driver.recover(lease)
    assert not driver.active(lease).present and nothing_left(namespace)
