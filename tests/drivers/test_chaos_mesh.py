"""The pure parts of the Chaos Mesh backend, and its order of things against an API server of a page."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any, cast

import pytest

from mlchaos_dagster.agent import eye as inside
from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.drivers.chaos_mesh import inside_eyes, leavings, life, lost, specs, states
from mlchaos_dagster.drivers.chaos_mesh.brought import Brought
from mlchaos_dagster.drivers.chaos_mesh.eyes import Seen
from mlchaos_dagster.drivers.chaos_mesh.handler import Fault
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import Quiet
from mlchaos_dagster.drivers.chaos_mesh.resolver_eyes import ResolverEyes
from mlchaos_dagster.drivers.chaos_mesh.resources import PAUSE, chain_names, name_of, resource, set_prefix
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.engine.ports import no_step
from mlchaos_dagster.errors import DriverUnavailable, InjectFailed, LeaseRefused, RecoverFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import Cluster, ExecResult, Site
from mlchaos_dagster.kube.refs import Ref
from tests.kube.fake_api import Api
from tests.kube.test_leases import a_lease

REFS = (Ref("pod", "shop", "web-1", "u-1"), Ref("pod", "shop", "web-2", "u-2"))


def record(
    phase: str, injected: int, recovered: int, pod: str = "web-1", *events: tuple[str, str, str]
) -> dict[str, Any]:
    said = [{"type": t, "operation": o, "message": m, "timestamp": "2026-01-01T00:00:00Z"} for t, o, m in events]
    return {
        "id": f"shop/{pod}",
        "selectorKey": ".",
        "phase": phase,
        "injectedCount": injected,
        "recoveredCount": recovered,
        "events": said,
    }


def with_records(*those: dict[str, Any]) -> dict[str, Any]:
    return {"status": {"experiment": {"containerRecords": list(those)}}}


def test_recovered_is_not_the_same_as_never_injected() -> None:
    """`AllRecovered` is True of both; a proof of recovery must not be."""
    fresh, back = with_records(record("Not Injected", 0, 0)), with_records(record("Not Injected", 1, 1))
    assert states.untouched(fresh) and not states.recovered(fresh) and states.at_rest(fresh)
    assert states.recovered(back) and not states.untouched(back) and states.at_rest(back)
    for on in (
        record("Injected", 1, 0),
        record("Injected/Wait", 1, 0),
        record("Not Injected/Wait", 0, 0),
        record("Not Injected", 2, 1),
    ):
        found = with_records(record("Not Injected", 1, 1), on)
        assert not states.recovered(found) and not states.at_rest(found)


def test_injected_stays_true_after_the_recovery_and_needs_every_target() -> None:
    done = record("Not Injected", 1, 1, "web-1", ("Succeeded", "Apply", ""), ("Succeeded", "Recover", ""))
    assert states.injected(with_records(done))
    assert not states.injected(with_records(done, record("Not Injected", 0, 0, "web-2")))
    assert not states.injected(with_records())


def test_only_the_newest_event_says_that_something_fails() -> None:
    failing = record("Not Injected", 0, 0, "web-1", ("Failed", "Apply", "no such\nqdisc"))
    mended = record("Injected", 1, 0, "web-2", ("Failed", "Apply", "not yet"), ("Succeeded", "Apply", ""))
    assert states.failures(with_records(failing, mended), "Apply") == ["shop/web-1: no such qdisc"]
    assert states.failures(with_records(failing, mended), "Recover") == []


def test_a_selection_is_compared_with_the_frozen_pods() -> None:
    wanted = {("shop", "web-1")}
    assert states.stray(with_records(record("Not Injected", 0, 0)), wanted) == ""
    both = with_records(record("Not Injected", 0, 0), record("Not Injected", 0, 0, "web-9"))
    assert "shop/web-9" in states.stray(both, wanted)
    assert "did not select shop/web-1" in states.stray(with_records(), wanted)


def test_resources_are_born_paused_except_acts_that_ignore_it() -> None:
    held = resource("mlchaos-x-0123456789", *_made("PodChaos", "pod-failure"))
    assert held["metadata"]["annotations"] == {PAUSE: "true"}
    assert held["metadata"]["name"] == name_of("mlchaos-x-0123456789") == "mlchaos-0123456789"
    assert held["metadata"]["labels"]["mlchaos.dev/lease"] == "mlchaos-x-0123456789"
    assert resource("mlchaos-x-0123456789", *_made("PodChaos", "pod-kill"))["metadata"]["annotations"] == {}


def test_a_brought_resource_cannot_ask_to_go_unrecovered() -> None:
    marks = {"chaos-mesh.chaos-mesh.org/cleanFinalizer": "forced", "mlchaos.dev/before": "{}", "team": "ml"}
    made = resource("mlchaos-x-0123456789", *_made("TimeChaos", ""), marks={"annotations": marks, "labels": marks})
    assert made["metadata"]["annotations"] == {"team": "ml", PAUSE: "true"}
    assert made["metadata"]["labels"].keys() & marks.keys() == {"team"}


@pytest.mark.parametrize(
    ("direction", "selector", "closed"),
    [
        ("to", {"namespaces": ["bank"]}, 0),
        ("both", {"namespaces": ["shop"]}, 0),
        ("both", {"namespaces": ["bank"]}, 1),
        ("from", {"pods": {"bank": ["a"]}}, 1),
        ("from", {"namespaces": ["kube-system", "bank"]}, 2),
    ],
)
def test_rules_at_the_other_end_only_where_faults_are_let_in(
    mesh: Mesh, site: Site, direction: str, selector: dict[str, Any], closed: int
) -> None:
    """Of these directions Chaos Mesh makes rules in the pods at the other end, too."""
    mesh.objects["/api/v1/namespaces/shop"] = {"metadata": {"labels": {"mlchaos.dev/allow": "true"}}}
    mesh.objects["/api/v1/namespaces/bank"] = {"metadata": {}}
    spec = {"action": "loss", "direction": direction, "target": {"mode": "all", "selector": selector}}
    params = {"resource": {"kind": "NetworkChaos", "spec": spec}}
    target = Target.model_validate({"select": "app=web", "kubernetes": {"namespace": "shop"}})
    request = Request("chaos_mesh_resource", REFS, REFS, params, target)
    said = [o.saw for o in Brought().objections(site, request) if o.saw.startswith("namespace ")]
    assert len(said) == closed


def _made(kind: str, action: str) -> tuple[str, str, dict[str, Any]]:
    return kind, "shop", {"action": action}


def test_a_selector_names_the_frozen_pods_and_a_duration_is_never_shorter() -> None:
    _, spec = specs.pod_failure(REFS)
    assert spec["mode"] == "all" and spec["selector"] == {"pods": {"shop": ["web-1", "web-2"]}}
    assert specs.held_for(spec, 65.2)["duration"] == "66s"


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("network_latency", {"latency_s": 0.3, "jitter_s": 0.05}, {"delay": {"latency": "300ms", "jitter": "50ms"}}),
        ("network_loss", {"fraction": 0.25}, {"loss": {"loss": "25"}}),
    ],
)
def test_network_faults_as_chaos_mesh_writes_them(kind: str, params: dict[str, Any], expected: dict[str, Any]) -> None:
    made, spec = specs.network(kind, REFS, params, ["10.0.0.1"])
    assert made == "NetworkChaos" and spec["direction"] == "to" and spec.items() >= expected.items()


def test_a_cut_is_in_both_directions_and_with_ports_in_the_one_that_has_them() -> None:
    _, cut = specs.network("network_partition", REFS, {}, ["10.0.0.1"])
    assert cut["direction"] == "both" and "target" not in cut, "no rule in the pods at the other end"
    assert specs.network("network_partition", REFS, {}, ["10.0.0.1:80"])[1]["direction"] == "to"
    assert specs.with_ports(["10.0.0.1", "fd00::1"], [80, 81]) == ["10.0.0.1:80", "10.0.0.1:81"]


def test_isolation_spares_the_node_and_nobody_else() -> None:
    nets = [ipaddress.IPv4Network(n) for n in specs.everything_but(["10.98.0.1", "10.244.0.1", "fd00::1"])]
    inside_of = lambda a: any(ipaddress.IPv4Address(a) in n for n in nets)  # noqa: E731
    assert not inside_of("10.98.0.1") and not inside_of("10.244.0.1")
    assert all(map(inside_of, ("10.98.0.2", "10.98.0.0", "10.244.0.2", "0.0.0.1", "255.255.255.255")))
    assert sum(n.num_addresses for n in nets) == 2**32 - 2
    assert min(n.prefixlen for n in nets) >= 1, "an ipset takes no /0"


def test_cpu_stress_spreads_a_fraction_over_its_workers() -> None:
    _, spec = specs.cpu_stress(REFS, ["web"], {"cores": 1.5, "load": 1.0})
    assert spec["stressors"] == {"cpu": {"workers": 2, "load": 75}}


# -- what is read in a pod ------------------------------------------------------------------------------------------------

SAVED = """*filter
:INPUT ACCEPT [0:0]
:CHAOS-OUTPUT - [0:0]
:{chain} - [0:0]
[5:300] -A OUTPUT -j CHAOS-OUTPUT
{jump}
[2:120] -A {chain} -o eth0 -m set --match-set {sets}_net_tgt_ dst,dst -j DROP
COMMIT
"""


def test_rules_count_only_where_packets_reach_them() -> None:
    """Chaos Mesh leaves its chains behind, and takes the jump to them away."""
    name = "mlchaos-0123456789"
    chains, sets = list(chain_names(name)), set_prefix(name)
    on = SAVED.format(chain=chains[1], jump=f"[3:180] -A CHAOS-OUTPUT -j {chains[1]}", sets=sets)
    off = SAVED.format(chain=chains[1], jump="", sets=sets)
    assert len(inside.rules_of(on, chains, sets)) == 1
    assert inside.rules_of(off, chains, sets) == []
    other = list(chain_names("somebody-else"))
    assert inside.rules_of(on, other, set_prefix("somebody-else")) == []


def test_queues_that_shape_are_found_and_others_are_not() -> None:
    shown = (
        "qdisc noqueue 0: dev lo root refcnt 2 \n Sent 0 bytes\n"
        "qdisc netem 1: dev eth0 root refcnt 2 limit 1000 delay 100ms\n Sent 9 bytes 1 pkt (dropped 0)\n"
    )
    assert [q.split()[0] for q in inside.queues_of(shown)] == ["netem"]


# -- the order of things ----------------------------------------------------------------------------------------------------


class Mesh(Api):
    """Chaos Mesh's controller, as far as these tests need it: selects at once, injects what is not paused."""

    def __init__(self) -> None:
        super().__init__()
        self.selects = ["web-1", "web-2"]
        self.log: list[str] = []
        self.timeout_s = 5.0
        for ref in REFS:
            self.objects[ref.path] = {"metadata": {"uid": ref.uid, "name": ref.name, "resourceVersion": "1"}}

    def create(self, path: str, body: Any, **query: str) -> dict[str, Any]:  # type: ignore[override]
        self.log.append(f"create {'paused' if body['metadata']['annotations'].get(PAUSE) else 'live'}")
        made = super().create(path, body)
        self._reconcile()
        return made

    def patch(self, path: str, body: Any, *, how: str = "merge", **query: str) -> dict[str, Any]:
        said = body["metadata"].get("annotations", {})
        self.log.append("pause" if said.get(PAUSE) else "let go" if PAUSE in said else f"patch {sorted(body)}")
        done = super().patch(path, body, how=how)
        self._reconcile()
        return done

    def delete(self, path: str, **query: Any) -> bool:
        self.log.append("delete")
        return super().delete(path, **query)

    def _reconcile(self) -> None:
        for path, found in self.objects.items():
            if "chaos-mesh.org" not in path:
                continue
            paused = found["metadata"].get("annotations", {}).get(PAUSE) == "true"
            there = (
                found.setdefault("status", {})
                .setdefault("experiment", {})
                .setdefault("containerRecords", [record("Not Injected", 0, 0, pod) for pod in self.selects])
            )
            for one in there:
                if not paused and one["phase"] == "Not Injected":
                    one |= record("Injected", one["injectedCount"] + 1, one["recoveredCount"], one["id"][5:])
                elif paused and one["phase"] == "Injected":
                    one |= record("Not Injected", one["injectedCount"], one["recoveredCount"] + 1, one["id"][5:])


class Looking(Quiet):
    """Sees what it is told to."""

    def __init__(self, *sights: bool) -> None:
        self.sights, self.mended = list(sights), 0

    def look(self, site: Site, injection: Injection, those: Any, *, last: bool = False) -> Seen:
        return Seen(self.sights.pop(0) if len(self.sights) > 1 else self.sights[0], False, ("seen",))

    def mend(self, site: Site, injection: Injection, step: Any) -> list[str]:
        self.mended += 1
        return ["mended"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "LOOK_S", 0.001)
    for name in ("_SELECTED_S", "_GONE_S", "_FORCED_S", "_TRIES_AGAIN_S"):
        monkeypatch.setattr(life, name, 0.01)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


@pytest.fixture
def site(mesh: Mesh) -> Site:
    return Site(cast(Cluster, mesh), Kubernetes(namespace="shop"))


@pytest.fixture
def injection() -> Injection:
    _, spec = specs.pod_failure(REFS)
    undo = {"kind": "PodChaos", "spec": spec, "namespace": "shop", "eyes": {}, leases.KEPT: leases.NOWHERE}
    lease = replace(a_lease("mlchaos-x-0123456789"), undo=undo, targets=tuple(map(str, REFS)), params={})
    return Injection(lease, REFS, undo)


def _fault(*sights: bool) -> tuple[Fault, Looking]:
    eyes = Looking(*sights)
    return Fault("PodChaos", lambda *_: specs.pod_failure(REFS), eyes), eyes


def test_nothing_is_let_go_before_the_selection_was_looked_at(mesh: Mesh, site: Site, injection: Injection) -> None:
    fault, _ = _fault(False)
    fault.inject(site, injection, no_step)
    assert mesh.log == ["create paused", "let go"]
    fault.recover(site, injection, no_step)
    assert mesh.log[2:] == ["pause", "delete"], "paused first, so that its status can be read"
    assert not any("chaos-mesh" in path for path in mesh.objects)


def test_a_resource_that_selects_another_pod_injects_nothing(mesh: Mesh, site: Site, injection: Injection) -> None:
    mesh.selects = ["web-1", "web-2", "web-9"]
    with pytest.raises(InjectFailed, match="web-9"):
        _fault(False)[0].inject(site, injection, no_step)
    assert mesh.log == ["create paused"]


def test_a_pod_of_the_same_name_is_not_the_frozen_one(mesh: Mesh, site: Site, injection: Injection) -> None:
    mesh.objects[REFS[1].path]["metadata"]["uid"] = "u-3"
    with pytest.raises(InjectFailed, match="web-2 is gone"):
        _fault(False)[0].inject(site, injection, no_step)
    assert mesh.log == ["create paused"]


def test_a_lease_lost_between_creation_and_start_leaves_nothing(
    mesh: Mesh, site: Site, injection: Injection, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, LeaseRefused("taken over")])

    def held(*_: Any) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(leases, "held", held)
    with pytest.raises(LeaseRefused):
        _fault(False)[0].inject(site, injection, no_step)
    assert mesh.log == ["create paused", "delete"]


def test_what_our_eyes_still_see_is_mended_and_otherwise_the_resource_stays(
    mesh: Mesh, site: Site, injection: Injection
) -> None:
    """Chaos Mesh's word that it recovered is no proof."""
    fault, eyes = _fault(True, False)
    fault.inject(site, injection, no_step)
    fault.recover(site, injection, no_step)
    assert eyes.mended == 1 and mesh.log[-1] == "delete"
    fault, eyes = _fault(True)
    fault.inject(site, injection, no_step)
    with pytest.raises(RecoverFailed, match="seen"):
        fault.recover(site, injection, no_step)
    assert mesh.log[-1] == "pause" and eyes.mended == 1


def _halted(mesh: Mesh, site: Site, injection: Injection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let go, and nothing said by a controller that is slow: somebody says stop."""
    monkeypatch.setattr(mesh, "_reconcile", lambda: None)
    _, spec = specs.pod_failure(REFS)
    made = resource("mlchaos-x-0123456789", "PodChaos", "shop", spec)
    del made["metadata"]["annotations"][PAUSE]
    mesh.create("/apis/chaos-mesh.org/v1alpha1/namespaces/shop/podchaos", {**made, **with_records(record(*_FRESH))})


_FRESH = ("Not Injected", 0, 0)


def test_what_is_injected_while_it_is_taken_away_is_seen(
    mesh: Mesh, site: Site, injection: Injection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record without a count may have an injection under way: one look before the resource goes is too early."""
    _halted(mesh, site, injection, monkeypatch)
    fault, _ = _fault(False, True)
    with pytest.raises(RecoverFailed, match="seen"):
        fault.recover(site, injection, no_step)


def test_no_finalizer_is_taken_off_what_was_injected_after_our_look(
    mesh: Mesh, site: Site, injection: Injection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _halted(mesh, site, injection, monkeypatch)
    found = next(o for p, o in mesh.objects.items() if "podchaos" in p)
    found["metadata"]["finalizers"] = ["chaos-mesh/records"]

    def late(path: str, **query: Any) -> bool:
        found["metadata"]["deletionTimestamp"] = "now"
        found.update(with_records(record("Injected", 1, 0)))
        return True

    monkeypatch.setattr(mesh, "delete", late)
    with pytest.raises(RecoverFailed, match="injected after our look"):
        _fault(False)[0].recover(site, injection, no_step)
    assert found["metadata"]["finalizers"] and mesh.log[-1] == "pause"


def test_an_eye_that_never_started_does_not_keep_its_pod_unclean(
    mesh: Mesh, site: Site, injection: Injection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of Chaos Mesh before every eye runs; with a wrong image none does, and no second one either."""
    eyes = inside_eyes.StressEyes()
    known = {ref.uid: {"container": "web", "cpu": 0.0} for ref in REFS}
    injection = replace(injection, undo={**injection.undo, "kind": "StressChaos", "eyes": {"pods": known}})
    for ref in REFS:
        name = agents.name_of(injection.lease, "-e0")
        mesh.objects[ref.path] |= {
            "spec": {"ephemeralContainers": [{"name": name}]},
            "status": {
                "ephemeralContainerStatuses": [{"name": name, "state": {"waiting": {"reason": "ErrImagePull"}}}]
            },
        }
    stuck = lambda pod, name: agents.look(pod, name)  # noqa: E731
    monkeypatch.setattr(
        agents, "wait", lambda site, ref, name, until, s: (pod := site.cluster.get(ref.path), stuck(pod, name))
    )
    fault = Fault("StressChaos", lambda *_: specs.pod_failure(REFS), eyes)
    fault.recover(site, injection, no_step)
    assert not fault.active(site, injection).present
    assert all(len(mesh.objects[ref.path]["spec"]["ephemeralContainers"]) == 1 for ref in REFS)


def test_name_servers_outlive_their_container(mesh: Mesh, site: Site, injection: Injection) -> None:
    """The file is the pod's: while its container is down nobody knows, and when it is back the same is in it."""
    known = {ref.uid: {"container": "web", "servers": ["10.96.0.10"]} for ref in REFS}
    injection = replace(injection, undo={**injection.undo, "kind": "DNSChaos", "eyes": {"pods": known}})
    eyes, asked = ResolverEyes(), list[list[str]]()

    def states_of(state: dict[str, Any], phase: str = "Running") -> None:
        for ref in REFS:
            status = {"phase": phase, "containerStatuses": [{"name": "web", "state": state}]}
            mesh.objects[ref.path] |= {"spec": {"containers": [{"name": "web"}]}, "status": status}

    def run(space: str, pod: str, container: str, command: list[str], **_: Any) -> ExecResult:
        asked.append(command)
        return ExecResult(0, "nameserver 10.0.0.66\n", "")

    mesh.exec = run  # type: ignore[attr-defined]
    states_of({"waiting": {"reason": "CrashLoopBackOff"}})
    with pytest.raises(DriverUnavailable, match="web-1.*web does not run"):
        eyes.look(site, injection, [])
    states_of({"running": {"startedAt": "now"}})
    assert eyes.look(site, injection, []).present
    assert len(eyes.mend(site, injection, no_step)) == 2 and asked[-1][-1] == "10.96.0.10", "the copy went with it"
    states_of({"terminated": {}}, "Failed")
    assert not eyes.look(site, injection, []).present


def test_a_lost_resource_that_is_still_on_is_not_called_removed(
    mesh: Mesh, site: Site, injection: Injection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost, "_GONE_S", 0.01)
    _halted(mesh, site, injection, monkeypatch)
    path, found = next((p, o) for p, o in mesh.objects.items() if "podchaos" in p)

    def late(path: str, **query: Any) -> bool:
        found["metadata"]["deletionTimestamp"] = "now"
        found.update(with_records(record("Injected", 1, 0)))
        return True

    monkeypatch.setattr(mesh, "delete", late)
    with pytest.raises(RecoverFailed, match="does not go"):
        lost.take_away(site, path, injection.lease, no_step)


def test_a_deleted_resource_is_inert_only_when_no_target_is_halfway() -> None:
    gone = {"metadata": {"deletionTimestamp": "now"}}
    assert life.inert({**gone, **with_records(record("Injected", 1, 0))})
    assert not life.inert({**gone, **with_records(record("Not Injected/Wait", 0, 0))})
    assert not life.inert({"metadata": {}, **with_records(record("Not Injected", 1, 1))})


def test_our_rules_are_taken_out_of_a_note_and_others_stay(mesh: Mesh, site: Site, injection: Injection) -> None:
    path = "/apis/chaos-mesh.org/v1alpha1/namespaces/shop/podnetworkchaos/web-1"
    rules = [{"name": "ours", "source": "shop/mlchaos-0123456789"}, {"name": "theirs", "source": "shop/other"}]
    spec = {"tcs": list(rules), "ipsets": rules[:1]}
    mesh.objects[path] = {"metadata": {"uid": "n", "resourceVersion": "1"}, "spec": spec, "status": {}}
    ours = resource("mlchaos-x-0123456789", "NetworkChaos", "shop", {})
    said = leavings.take_back(
        site, replace(injection, undo={**injection.undo, "kind": "NetworkChaos"}), [ours], no_step
    )
    assert mesh.objects[path]["spec"] == {"tcs": rules[1:], "ipsets": []}
    assert len(said) == 1
