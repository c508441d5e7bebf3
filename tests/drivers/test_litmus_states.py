"""What the objects of a ChaosEngine say, read together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.agents import name_of
from mlchaos_dagster.drivers.litmus import eyes_network, states
from mlchaos_dagster.drivers.litmus.eyes import Gone, Node, Told
from mlchaos_dagster.drivers.litmus.tracks import Tracks
from mlchaos_dagster.engine.ports import no_step
from mlchaos_dagster.kube.client import Cluster, Site
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api
from tests.kube.test_leases import a_lease


def an_engine(state: str = "active", status: str = "initialized", entry: str = "", **meta: Any) -> dict[str, Any]:
    experiments = [{"name": "pod-delete", "status": entry}] if entry else []
    return {
        "metadata": {"name": "e", **meta},
        "spec": {"engineState": state},
        "status": {"engineStatus": status, "experiments": experiments},
    }


def a_result(phase: str = "Running", verdict: str = "Awaited", **more: Any) -> dict[str, Any]:
    error = more.pop("error", None)
    status = {"phase": phase, "verdict": verdict, **({"errorOutput": error} if error else {})}
    status["probeSuccessPercentage"] = more.pop("share", "Awaited")
    return {"metadata": {"annotations": more.pop("notes", {})}, "status": {"experimentStatus": status, **more}}


TEAPOT = {
    "name": "teapot",
    "type": "httpProbe",
    "mode": "SOT",
    "status": {"verdict": "Failed", "description": "Actual value: 200. Expected value: should be equal to 418"},
}
ERROR = {"errorCode": "TARGET_SELECTION_ERROR", "reason": "no pods\n found"}


@pytest.mark.parametrize(
    "tracks,phase,said",
    [
        (Tracks(), "absent", "gone"),
        (Tracks(an_engine("stop", "")), "inert", "stop"),
        (Tracks(an_engine(status="")), "accepted", "has not seen"),
        (Tracks(an_engine()), "accepted", "initialized"),
        (Tracks(an_engine(), [a_result()]), "running", "initialized"),
        (Tracks(an_engine("stop")), "aborting", "stop"),
        (Tracks(an_engine(deletionTimestamp="now")), "aborting", "deleted"),
        # The engine says nothing wrong, the result does: also after `completed`.
        (
            Tracks(an_engine(), [a_result("Error", "Error", error=ERROR)]),
            "failed",
            "TARGET_SELECTION_ERROR: no pods found",
        ),
        (Tracks(an_engine("stop", "completed"), [a_result("Completed", "Error")]), "failed", "verdict Error"),
        (  # by a probe with stopOnFailure, as the real one leaves it
            Tracks(an_engine(), [a_result("Stopped", "Stopped", share="0", probeStatuses=[TEAPOT])]),
            "failed",
            "litmus probe teapot: httpProbe, mode SOT: Failed: Actual value: 200.",
        ),
        (Tracks(an_engine(entry="Skipped")), "failed", "experiment pod-delete: Skipped"),
        (Tracks(an_engine(entry="ChaosExperiment Not Found")), "failed", "Not Found"),
        (Tracks(an_engine("stop", "completed"), [a_result("Completed", "Pass")]), "over", ""),
        (Tracks(an_engine("stop", "stopped")), "over", "engineStatus is stopped"),
        (Tracks(an_engine(), [a_result("Completed_With_Probe_Failure", "Fail", share="0")]), "over", "verdict Fail"),
    ],
)
def test_phases(tracks: Tracks, phase: str, said: str) -> None:
    found = states.of(tracks)
    assert found.phase == phase and said in found.said


def test_targets_by_notes_and_by_history() -> None:
    notes = {"pod/a": "injected", "pod/b": "reverted", "note": "injected"}
    history = {"targets": [{"name": "c", "chaosStatus": "targeted"}, {"name": "a", "chaosStatus": "reverted"}]}
    tracks = Tracks(results=[a_result(notes=notes, history=history)])
    assert states.touched(tracks) == {"a", "b", "c"}
    assert states.still_injected(tracks) == {"a"}  # a note is younger than the history


@pytest.mark.parametrize(
    ("notes", "sequence", "seen"),
    [
        ({"pod/a": "injected", "pod/b": "injected"}, "", True),
        ({"pod/a": "injected", "pod/b": "reverted"}, "", False),
        ({"pod/a": "reverted", "pod/b": "injected"}, "serial", True),
        ({"pod/a": "injected"}, "serial", False),
    ],
)
def test_a_fault_that_litmus_took_back_early_has_no_effect(notes: dict[str, str], sequence: str, seen: bool) -> None:
    refs = (Ref("pod", "ml", "a", "1"), Ref("pod", "ml", "b", "2"))
    env = [{"name": "SEQUENCE", "value": sequence}]
    params = {"engine": {"experiments": [{"name": "pod-http-latency", "spec": {"components": {"env": env}}}]}}
    lease = replace(a_lease(), kind="litmus_engine", params=params)
    tracks = Tracks(an_engine(), [a_result(notes=notes)])
    assert Told().look(cast(Site, None), Injection(lease, refs, {}), tracks).effective is seen


def test_why_nothing_goes_on() -> None:
    waiting = {"reason": "ErrImagePull", "message": "no such image"}
    pod = {"metadata": {"name": "e-runner"}, "status": {"containerStatuses": [{"state": {"waiting": waiting}}]}}
    event = {
        "type": "Warning",
        "reason": "ChaosResourcesOperationFailed",
        "message": "(chaos start) Unable to get chaos resources",
    }
    said = states.stuck(Tracks(an_engine(), pods=[pod]), [event])
    assert "e-runner: ErrImagePull: no such image" in said and "ChaosResourcesOperationFailed: (chaos start)" in said
    assert "is it running" in states.stuck(Tracks(an_engine(status="")), [])


def test_findings() -> None:
    probes = [
        {
            "name": "up",
            "type": "httpProbe",
            "mode": "Continuous",
            "status": {"verdict": "Failed", "description": "got 503"},
        },
        {"name": "db", "type": "cmdProbe", "mode": "EOT", "status": {"verdict": "Passed", "description": ""}},
        {"name": "late", "type": "promProbe", "mode": "EOT", "status": {"verdict": "N/A", "description": "never ran"}},
    ]
    result = a_result("Completed_With_Probe_Failure", "Fail", share="33", probeStatuses=probes)
    found = {f.name: (f.passed, f.saw) for f in states.findings([result])}
    assert [p for p, _ in found.values()] == [False, True, None, False]
    assert found["litmus probe up"][1] == "httpProbe, mode Continuous: Failed: got 503"
    assert "33 %" in found["litmus verdict"][1]
    assert not states.judged([a_result()]) and not states.judged([]) and states.judged([result])
    stopped = states.findings([a_result("Stopped", "Stopped", share="0")])[0]
    assert stopped.passed is None
    bare = states.findings([a_result("Completed", "Pass", share="100")])[0]
    assert bare.passed and "no probes" in bare.saw


def test_a_pod_that_is_gone_is_called_somebody_elses_only_before_the_experiment_ran() -> None:
    """After the clean-up there is no result any more: that says nothing of whether one was there."""
    pod = Ref("pod", "ml", "a", "1")
    site, injection = Site(cast(Cluster, Api()), Kubernetes(namespace="ml")), Injection(a_lease(), (pod,), {})
    found = {"before": Tracks(an_engine()), "ran": Tracks(an_engine(), [a_result()]), "cleaned": Tracks()}
    said = {name: " ".join(Gone().look(site, injection, tracks).lines) for name, tracks in found.items()}
    assert {name for name, lines in said.items() if "not by this run" in lines} == {"before"}, said


@pytest.mark.parametrize("ran", [True, False])
def test_a_node_that_somebody_else_cordoned_stays_so(ran: bool) -> None:
    """Where no experiment of ours ran it was an administrator, and an uncordon would undo his work."""
    api, node = Api(), Ref("node", "", "n1", "u-n1")
    api.objects[node.path] = {"metadata": {"uid": "u-n1", "resourceVersion": "1"}, "spec": {"unschedulable": True}}
    site, injection = Site(cast(Cluster, api), Kubernetes(namespace="ml")), Injection(a_lease(), (node,), {})
    tracks = Tracks(results=[a_result()]) if ran else Tracks()
    assert Node().look(site, injection, tracks).present is ran
    Node().clean(site, injection, tracks, no_step)
    assert bool(api.objects[node.path]["spec"].get("unschedulable")) is not ran


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(site: Site, ref: Ref, name: str, until: Callable[[agents.Agent], bool], timeout_s: float) -> Any:
        pod = site.cluster.get(ref.path)
        assert pod is not None
        return pod, agents.look(pod, name)

    monkeypatch.setattr(agents, "wait", wait)


NETEM = {"kind": "netem", "dev": "eth0", "options": {}, "packets": 9, "drops": 1}


def with_containers(api: Api, **states: dict[str, Any]) -> tuple[Site, Ref]:
    """A pod with containers of ours, by the end of their names (`agent`: the agent itself)."""
    names = {k: name_of(a_lease(), "" if k == "agent" else f"-{k}") for k in states}
    ref = Ref("pod", "ml", "a", "1")
    api.objects[ref.path] = {
        "metadata": {"uid": "1", "resourceVersion": "1"},
        "spec": {"ephemeralContainers": [{"name": n} for n in names.values()]},
        "status": {"ephemeralContainerStatuses": [{"name": n, "state": states[k]} for k, n in names.items()]},
    }
    return Site(cast(Cluster, api), Kubernetes(namespace="ml")), ref


def told(*queues: dict[str, Any]) -> dict[str, Any]:
    return {"terminated": {"exitCode": 0, "message": json.dumps({"queues": list(queues)})}}


def test_a_pod_in_which_our_agent_never_started_needs_no_other_of_ours_to_be_clean() -> None:
    """No agent, no experiment. With an image that cannot be pulled a second container would not start either."""
    site, ref = with_containers(Api(), agent={"waiting": {"reason": "ImagePullBackOff"}})
    assert eyes_network._queues(site, a_lease(), ref) == []


def test_what_was_read_after_the_last_cleaning_counts() -> None:
    """The names of readers run out; the last of them may have read before the fault was taken away."""
    site, ref = with_containers(Api(), agent=told(), q1=told(NETEM), q2=told(NETEM), q3=told(NETEM))
    assert eyes_network.netems(eyes_network._queues(site, a_lease(), ref))
    site, ref = with_containers(Api(), agent=told(), q1=told(NETEM), q2=told(NETEM), q3=told(NETEM), d1=told())
    assert eyes_network._queues(site, a_lease(), ref) == []
