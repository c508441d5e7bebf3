"""From a fault to an experiment's variables and to a ChaosEngine: words and numbers, no cluster."""

from __future__ import annotations

from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Litmus
from mlchaos_dagster.drivers.litmus import engine, faults, sights
from mlchaos_dagster.drivers.litmus.eyes import Gone, Node, Standing, Told
from mlchaos_dagster.drivers.litmus.eyes_load import Load
from mlchaos_dagster.drivers.litmus.eyes_network import Wire, netems
from mlchaos_dagster.drivers.litmus.faults import Selection

TWO = Selection("ml", ("web-a", "web-b"), container="app")
LINK = {"peers": ["10.0.0.1", "10.0.0.2"], "ports": [80, 8080]}


def env(
    kind: str, params: dict[str, Any], targets: Selection = TWO, seconds: float = 29.2, **peers: Any
) -> dict[str, str]:
    return faults.plan(kind, params, targets, seconds, peers or None).env


def brought(name: str, **variables: str) -> dict[str, Any]:
    pairs = [{"name": k, "value": v} for k, v in variables.items()]
    return {"engine": {"experiments": [{"name": name, "spec": {"components": {"env": pairs}}}]}}


@pytest.mark.parametrize(
    "kind,params,peers,wanted",
    [
        # A fraction of a core is one busy worker; CPU_CORES=0 would be all of the node's.
        ("cpu_stress", {"cores": 0.4, "load": 0.5}, {}, {"CPU_CORES": "1", "CPU_LOAD": "20"}),
        ("cpu_stress", {"cores": 2.5, "load": 1.0}, {}, {"CPU_CORES": "3", "CPU_LOAD": "83"}),
        ("memory_stress", {"bytes": 100 * 2**20 + 1}, {}, {"MEMORY_CONSUMPTION": "101", "NUMBER_OF_WORKERS": "1"}),
        # Numbers are whole there: 0.4 ms would read as no latency at all.
        ("network_latency", {"latency_s": 0.0004, "jitter_s": 0.0}, {}, {"NETWORK_LATENCY": "1", "JITTER": "0"}),
        (
            "network_latency",
            {"latency_s": 0.2, "jitter_s": 0.05},
            LINK,
            {"DESTINATION_IPS": "10.0.0.1|80|8080,10.0.0.2|80|8080"},
        ),
        ("network_loss", {"fraction": 0.125}, {}, {"NETWORK_PACKET_LOSS_PERCENTAGE": "12.5"}),
        ("network_partition", {}, LINK, {"POLICY_TYPES": "all", "DESTINATION_IPS": "10.0.0.1,10.0.0.2"}),
        ("network_isolation", {}, {}, {"POLICY_TYPES": "all"}),
        ("pod_delete", {"interval_s": None, "signal": "term"}, {}, {"FORCE": "false", "CHAOS_INTERVAL": "30"}),
        ("container_kill", {}, {}, {"SIGNAL": "SIGKILL", "CHAOS_INTERVAL": "30", "TARGET_CONTAINER": "app"}),
    ],
)
def test_variables(kind: str, params: dict[str, Any], peers: dict[str, Any], wanted: dict[str, str]) -> None:
    found = env(kind, params, **peers)
    assert wanted.items() <= found.items()
    assert found["TOTAL_CHAOS_DURATION"] == "30" and found["RAMP_TIME"] == "0" and found["SEQUENCE"] == "parallel"
    frozen = {"TARGET_PODS": "web-a,web-b", "PODS_AFFECTED_PERC": "100"}
    assert frozen.items() <= found.items() or kind in ("network_partition", "network_isolation")


def test_a_second_round_never_looks_for_pods_that_are_gone() -> None:
    """litmus-go fails in its second round where TARGET_PODS names pods that were replaced."""
    again = {"interval_s": 5.0}
    assert env("pod_delete", again)["CHAOS_INTERVAL"] == "30"
    whole = Selection("ml", ("web-a",), workloads=(("deployment", "web"),))
    assert env("pod_delete", again, whole)["CHAOS_INTERVAL"] == "5" and "TARGET_PODS" not in env(
        "pod_delete", again, whole
    )
    stable = Selection("ml", ("db-0",), stable=True, kind="statefulset")
    assert (
        env("pod_delete", again, stable)["CHAOS_INTERVAL"] == "5"
        and env("pod_delete", again, stable)["TARGET_PODS"] == "db-0"
    )
    own = brought("pod-delete", CHAOS_INTERVAL="10", TOTAL_CHAOS_DURATION="60")
    assert (
        env(faults.BROUGHT, own)["CHAOS_INTERVAL"] == "30" and env(faults.BROUGHT, own, whole)["CHAOS_INTERVAL"] == "10"
    )
    kills = brought("container-kill", CHAOS_INTERVAL="10")
    assert env(faults.BROUGHT, kills)["CHAOS_INTERVAL"] == "10"  # the pod stays, and its name


def test_of_a_brought_engine_only_targets_and_duration_are_ours() -> None:
    own = brought(
        "pod-cpu-hog",
        TARGET_PODS="other",
        NODE_LABEL="a=b",
        CPU_CORES="2",
        SEQUENCE="serial",
        RAMP_TIME="7",
        INSTANCE_ID="x",
    )
    plan = faults.plan(faults.BROUGHT, own, TWO, 30.0)
    assert plan.ramp_s == 7 and plan.env == {
        "CPU_CORES": "2",
        "SEQUENCE": "serial",
        "RAMP_TIME": "7",
        "TOTAL_CHAOS_DURATION": "30",
        "TARGET_PODS": "web-a,web-b",
        "PODS_AFFECTED_PERC": "100",
    }


def test_nodes() -> None:
    drain = brought("node-drain", TARGET_NODE="", TOTAL_CHAOS_DURATION="60")
    assert env(faults.BROUGHT, drain, Selection("", nodes=("n1",)))["TARGET_NODE"] == "n1"
    hog = brought("node-cpu-hog")
    assert env(faults.BROUGHT, hog, Selection("", nodes=("n1", "n2")))["TARGET_NODES"] == "n1,n2"


def body(kind: str, params: dict[str, Any], targets: Selection = TWO, **options: Any) -> dict[str, Any]:
    plan = faults.plan(kind, params, targets, 30.0)
    return engine.body("mlchaos-x-0123456789", Litmus(**options), "chaos", plan, targets, params)


def test_the_engine_of_a_lease() -> None:
    found = body("cpu_stress", {"cores": 1, "load": 1}, env={"SOCKET_PATH": "/run/crio.sock"})
    meta, spec = found["metadata"], found["spec"]
    assert meta["name"] == "mlchaos-x-0123456789" and meta["labels"]["mlchaos.dev/lease"] == meta["name"]
    assert "finalizers" not in meta  # the operator sets its own only where there is none
    assert spec["engineState"] == "stop" and spec["jobCleanUpPolicy"] == "delete" and len(spec["experiments"]) == 1
    assert spec["selectors"] == {"pods": [{"namespace": "ml", "names": "web-a,web-b"}]}
    assert spec["components"]["runner"]["runnerLabels"]["mlchaos.dev/lease"] == meta["name"]
    pairs = {e["name"]: e["value"] for e in spec["experiments"][0]["spec"]["components"]["env"]}
    # Helpers take the variable: the field alone leaves it at what the ChaosExperiment says.
    assert spec["terminationGracePeriodSeconds"] == 30 and pairs["TERMINATION_GRACE_PERIOD_SECONDS"] == "30"
    assert pairs["SOCKET_PATH"] == "/run/crio.sock"
    assert all(isinstance(v, str) for v in pairs.values())


def test_what_a_team_brought_stays() -> None:
    secret = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    own = brought("pod-delete", CHAOS_INTERVAL="60", TOTAL_CHAOS_DURATION="60")
    entry = own["engine"]["experiments"][0]
    entry["spec"]["probe"] = [{"name": "p", "type": "httpProbe"}]
    entry["spec"]["components"]["env"].append(secret)
    own["engine"] |= {
        "chaosServiceAccount": "mine",
        "appinfo": {"appns": "other", "applabel": "a=b", "appkind": "deployment"},
        "terminationGracePeriodSeconds": 45,
        "labels": {"team": "ml"},
        "annotations": {"note": "kept"},
        "auxiliaryAppInfo": "kept",
    }
    found = body(faults.BROUGHT, own)
    spec = found["spec"]
    assert spec["chaosServiceAccount"] == "mine" and spec["auxiliaryAppInfo"] == "kept"
    assert spec["terminationGracePeriodSeconds"] == 45
    assert spec["experiments"][0]["spec"]["probe"] == [{"name": "p", "type": "httpProbe"}]
    assert secret in spec["experiments"][0]["spec"]["components"]["env"]
    assert spec["appinfo"] == {"appns": "ml"} and found["metadata"]["labels"]["team"] == "ml"
    assert found["metadata"]["annotations"]["note"] == "kept" and "labels" not in spec
    assert own["engine"]["appinfo"]["appns"] == "other"  # the fault itself is not changed


def test_a_health_check_looks_for_the_owner_of_what_was_deleted() -> None:
    """By the names of deleted pods it would fail for ever; they are hit by TARGET_PODS all the same."""
    own = brought("pod-delete")
    theirs = {"appns": "other", "applabel": "a=b", "appkind": "deployment"}
    own["engine"] |= {"defaultHealthCheck": True, "appinfo": theirs}
    spec = body(faults.BROUGHT, own)["spec"]
    assert spec["appinfo"] == {**theirs, "appns": "ml"} and "selectors" not in spec
    assert {"name": "TARGET_PODS", "value": "web-a,web-b"} in spec["experiments"][0]["spec"]["components"]["env"]


def test_a_partition_is_told_by_a_label_of_the_lease() -> None:
    """Litmus makes the policy from one label `key=value`; it panics without one."""
    spec = body("network_isolation", {}, Selection("ml", ("web-a",), kind="deployment"))["spec"]
    wanted = {"appns": "ml", "applabel": "mlchaos.dev/fault=mlchaos-x-0123456789", "appkind": "deployment"}
    assert spec["appinfo"] == wanted and "selectors" not in spec


@pytest.mark.parametrize(
    "params,eyes",
    [
        (brought("pod-delete"), Gone),
        (brought("pod-cpu-hog", CPU_CORES="0"), Load),
        (brought("pod-memory-hog", MEMORY_CONSUMPTION="40-60"), Told),
        (brought("pod-network-partition"), Wire),
        (brought("pod-network-partition", POLICY_TYPES="egress"), Standing),
        (brought("pod-network-partition", DESTINATION_IPS="10.0.0.1"), Standing),
        (brought("node-drain"), Node),
        (brought("pod-http-latency"), Told),
    ],
)
def test_who_looks_at_a_brought_experiment(params: dict[str, Any], eyes: type) -> None:
    assert type(sights.chosen(faults.BROUGHT, params)) is eyes


def test_queues_as_tc_tells_them() -> None:
    shown = [
        {"kind": "noqueue", "dev": "lo", "packets": 0, "drops": 0},
        {"kind": "prio", "dev": "eth0", "options": {}},
        {
            "kind": "netem",
            "dev": "eth0",
            "packets": 40,
            "drops": 3,
            "options": {"delay": {"delay": 0.2, "jitter": 0.0}},
        },
    ]
    assert [(q.device, q.delay_s, q.dropped, q.packets) for q in netems(shown)] == [("eth0", 0.2, 3, 40)]
    assert netems(shown[:2]) == []


def test_whom_it_hits_and_by_what_it_is_found_cannot_come_from_elsewhere() -> None:
    """A brought engine keeps its own marks and variables, but for those by which its targets and its pods are known."""
    elsewhere = {"valueFrom": {"configMapKeyRef": {"name": "a", "key": "b"}}}
    fault = brought("pod-delete", CHAOS_INTERVAL="10")
    variables = fault["engine"]["experiments"][0]["spec"]["components"]["env"]
    variables += [{"name": "TARGET_PODS", **elsewhere}, {"name": "TOKEN", **elsewhere}]
    marks = {"chaosUID": "x", "mlchaos.dev/undo": "x", "team": "ml"}
    fault["engine"] |= {"labels": marks, "annotations": marks, "components": {"runner": {"runnerLabels": marks}}}
    owned = Selection("ml", ("web-a", "web-b"), workloads=(("deployment", "web"),))
    made = engine.body("l", Litmus(), "ml", faults.plan(faults.BROUGHT, fault, owned, 30.0), owned, fault)
    names = [e["name"] for e in made["spec"]["experiments"][0]["spec"]["components"]["env"]]
    assert "TOKEN" in names and "TARGET_PODS" not in names
    runner = made["spec"]["components"]["runner"]["runnerLabels"]
    for found in (made["metadata"]["labels"], made["metadata"]["annotations"], runner):
        assert found["team"] == "ml" and not {"chaosUID", "mlchaos.dev/undo"} & set(found)
