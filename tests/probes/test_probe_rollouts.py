"""Predicates of Argo Rollouts, on the states that its controller (v1.9) went through when a bad version was shipped."""

from __future__ import annotations

from typing import Any

import pytest

from mlchaos_dagster.kube import rollouts
from mlchaos_dagster.probes.kubernetes_pods import Owner, owner_of
from mlchaos_dagster.probes.kubernetes_rollouts import RolloutBook

Object = dict[str, Any]


def rollout(current: str = "old", stable: str = "old", phase: str = "Healthy", **more: Any) -> Object:
    status: Object = {"phase": phase, "currentPodHash": current, "stableRS": stable, "observedGeneration": "2"}
    return {
        "metadata": {"name": "web", "uid": "u", "generation": 2},
        "spec": {"replicas": 4, "strategy": {"canary": more.pop("canary", {})}},
        "status": status | more,
    }


def replica_set(made_of: str, ready: int, available: int | None = None, uid: str = "u") -> Object:
    return {
        "metadata": {"labels": {rollouts.HASH: made_of}, "ownerReferences": [{"uid": uid, "controller": True}]},
        "status": {"readyReplicas": ready, "availableReplicas": ready if available is None else available},
    }


def test_from_shipping_to_an_abort_and_back() -> None:
    """In the order in which it was seen; another Rollout's ReplicaSet beside it counts nowhere."""
    book, others = RolloutBook(), replica_set("other", 9, uid="v")

    def told(one: Object, old: int, new: int) -> tuple[float, ...]:
        values = book.values([one], [replica_set("old", old), replica_set("new", new), others])
        return tuple(values[n] for n in ("traffic_safe", "rolled_back", "canary_ready", "canary_weight"))

    assert told(rollout(), 4, 0) == (1, 0, 0, 0), "nothing was shipped yet: nothing was rolled back"
    assert told(rollout("new", phase="Progressing"), 4, 0) == (1, 0, 0, 0), "under way is not back"
    assert told(rollout("new", phase="Progressing"), 3, 1) == (0, 0, 1, 0.25)
    aborted = rollout("new", phase="Degraded", abort=True)
    assert told(aborted, 3, 1) == (0, 0, 1, 0.25), "aborted, and the canary still answers"
    assert told(aborted, 3, 0) == (0, 0, 0, 0), "a stable replica is missing"
    assert told(aborted, 4, 0) == (1, 1, 0, 0), "Degraded, and everything is as it was"
    assert book.values([aborted], [replica_set("old", 4)])["rollout_healthy"] == 0
    assert told(rollout(), 4, 0) == (1, 0, 0, 0), "somebody put the template back: that is not the Rollout's doing"


def test_a_version_that_was_promoted_is_healthy_and_not_safe() -> None:
    book = RolloutBook()
    book.values([rollout()], [replica_set("old", 4)])
    values = book.values([rollout("new", "new")], [replica_set("new", 4), replica_set("old", 0)])
    assert values["rollout_healthy"] == 1
    assert (values["traffic_safe"], values["rolled_back"], values["canary_weight"]) == (0, 0, 1)
    assert (values["stable_available"], values["canary_ready"]) == (0, 4)


def test_what_is_said_of_an_older_spec_is_not_told() -> None:
    book, one = RolloutBook(), rollout("new", phase="Degraded", abort=True)
    book.values([one], sets := [replica_set("old", 4)])
    assert book.values([one], sets)["rolled_back"] == 1
    one["metadata"]["generation"] = 3
    values = book.values([one], sets)
    assert set(values) == {"canary_ready", "canary_weight", "stable_available", "rolled_back"}
    assert values["rolled_back"] == 0
    assert not rollouts.at_rest(one) and "not of its present spec" in rollouts.shown_phase(one)
    assert book.values([], []) == {}


def test_a_router_weighs_other_than_pods() -> None:
    routed = rollout("new", canary={"trafficRouting": {"istio": {}}})
    routed["status"]["canary"] = {"weights": {"canary": {"weight": 5}}}
    assert rollouts.canary_weight(routed, [replica_set("old", 4), replica_set("new", 4)]) == 0.05
    assert not rollouts.traffic_safe(routed, [replica_set("old", 4)], "old")


@pytest.mark.parametrize(
    ("status", "aborted", "under_way", "paused"),
    [
        ({}, False, True, False),
        ({"abort": True}, True, False, False),
        ({"conditions": [{"type": "Progressing", "reason": "RolloutAborted"}]}, True, False, False),
        ({"conditions": [{"type": "Progressing", "reason": "ProgressDeadlineExceeded"}]}, False, True, False),
        ({"pauseConditions": [{"reason": "CanaryPauseStep"}]}, False, True, True),
        ({"pauseConditions": [{"reason": "InconclusiveAnalysisRun"}]}, False, True, False),
    ],
)
def test_what_a_rollout_is_in(status: Object, aborted: bool, under_way: bool, paused: bool) -> None:
    found = rollout("new", phase="Progressing", **status)
    assert (rollouts.is_aborted(found), rollouts.is_under_way(found), rollouts.is_paused(found)) == (
        aborted,
        under_way,
        paused,
    )


def test_the_pods_of_a_rollout_are_of_the_rollout() -> None:
    meta = {
        "labels": {rollouts.HASH: "5d"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": "web-5d", "controller": True}],
    }
    assert owner_of({"metadata": meta}) == Owner("Rollout", "web")
