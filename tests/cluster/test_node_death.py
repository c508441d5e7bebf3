"""A node dies or is cut off in the window of a fault in one of its pods, and comes back.

While nobody can look at the node, nothing may be called clean that could come back with it. What there really is on the node
is read on the node itself: command lines of its processes, netfilter rules of every network namespace.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from mlchaos_dagster.domain.environment import KubernetesObjects
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverError
from tests.cluster import machines
from tests.cluster.conftest import Faulting, eventually, kubectl, objects, pods, ready
from tests.cluster.machines import added, found, placed

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(300)]

NODE, ZONE = "node-3", "local-c"
MIB = 1 << 20
MODEL = "/scratch/model.bin"
FAULTS: dict[str, dict[str, object]] = {
    "pod_failure": {},
    "network_isolation": {},
    "dns_failure": {},
    "cpu_stress": {"cores": 0.1, "load": 1.0},
    "memory_stress": {"bytes": 20 * MIB},
    "model_corruption": {"how": "random_bytes"},
}
LEFT = """
for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null; echo; done | grep -v grep
for n in $(for p in /proc/[0-9]*; do echo $(readlink $p/ns/net) ${p#/proc/}; done | sort -u -k1,1 | cut -d' ' -f2); do
  nsenter --net=/proc/$n/ns/net iptables-save 2>/dev/null
done
"""


@dataclass
class Faulted:
    """A Deployment of one pod on the node, and a fault in it."""

    kind: str
    select: str
    uid: str
    lease: Lease


@pytest.fixture(scope="module", autouse=True)
def _another_node() -> Iterator[None]:
    added(NODE, ZONE)
    yield
    machines.node("remove", NODE)


@pytest.fixture
def faulted(faulting: Faulting, namespace: str) -> list[Faulted]:
    """Every fault at once, each seen to be there: one death serves all."""
    added(NODE, ZONE)
    names = {kind: kind.replace("_", "-") for kind in FAULTS}
    for name in names.values():
        placed(namespace, name, NODE, only=True, wait=False)
    for name in names.values():
        kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=60s", timeout=70)
    every: list[Faulted] = []
    for kind, params in FAULTS.items():
        select = f"deployment={names[kind]}"
        (pod,) = pods(namespace, select)
        where = KubernetesObjects()
        if kind == "model_corruption":
            write = f"head -c 100000 /dev/urandom > {MODEL}; sha256sum {MODEL}"
            kubectl("exec", "-n", namespace, pod["metadata"]["name"], "--", "sh", "-c", write)
            where = KubernetesObjects(path=MODEL)
        lease = faulting.lease(kind, select, objects=where, duration_s=250.0, **params)
        faulting.driver.inject(lease)
        eventually(lambda lease=lease: faulting.driver.active(lease).effective, 20, 0.5)
        every.append(Faulted(kind, select, pod["metadata"]["uid"], lease))
    return every


def left_on_the_node(leases: list[str]) -> set[str]:
    """Ids of leases that the node's own processes and netfilter rules name."""
    done = subprocess.run(
        [machines.command(), "exec", NODE, "bash", "-c", LEFT], capture_output=True, text=True, check=False, timeout=60
    )
    return {lease for lease in leases if re.search(re.escape(lease.removeprefix("mlchaos-")), done.stdout)}


def claim(driver: KubernetesDriver, lease: Lease) -> str:
    """What `recover` and `active` say now: `clean: …`, `present: …` or `unknown: …`."""
    try:
        driver.recover(lease)
        evidence = driver.active(lease)
    except DriverError as e:
        return f"unknown: {e}"
    return f"{'present' if evidence.present else 'clean'}: {'; '.join(evidence.lines)}"


def claims(driver: KubernetesDriver, faulted: list[Faulted], when: str) -> dict[str, str]:
    """All at once, for each may wait for its time limit."""

    def ask(f: Faulted) -> tuple[str, float]:
        begun = time.monotonic()
        return claim(driver, f.lease), time.monotonic() - begun

    with ThreadPoolExecutor(len(faulted)) as pool:
        answers = dict(zip([f.kind for f in faulted], pool.map(ask, faulted), strict=True))
    for kind, (words, took) in answers.items():
        print(f"{when}: {kind} ({took:.1f} s) {words}")  # noqa: T201  shown with pytest -s
        assert took < 60, f"{kind} hung"
    return {kind: words for kind, (words, _) in answers.items()}


ON_THE_NODE = {"network_isolation", "dns_failure", "cpu_stress", "memory_stress", "model_corruption"}
"""Those that are in the pod itself: only it can say that they are gone. `pod_failure` is in the API server."""


def test_a_node_is_killed_in_the_window_and_comes_back(
    faulting: Faulting, faulted: list[Faulted], namespace: str
) -> None:
    leases = [f.lease.id for f in faulted]
    assert left_on_the_node(leases), "the observer sees nothing"
    machines.node("kill", NODE)
    said = claims(faulting.driver, faulted, "dead")
    assert not [k for k in ON_THE_NODE if said[k].startswith("clean")], said
    machines.node("revive", NODE)
    eventually(lambda: ready(found(NODE)), 60)
    _clean_at_last(faulting.driver, faulted, namespace)
    assert left_on_the_node(leases) == set()


def test_a_node_is_cut_off_until_its_pods_are_terminating_and_comes_back(
    faulting: Faulting, faulted: list[Faulted], namespace: str
) -> None:
    leases = [f.lease.id for f in faulted]
    there = left_on_the_node(leases)
    machines.node("partition", NODE)
    try:
        eventually(
            lambda: all(p["metadata"].get("deletionTimestamp") for p in objects("pods", namespace) if _on_node(p)), 90
        )
        said = claims(faulting.driver, faulted, "cut off, Terminating")
        assert left_on_the_node(leases) & there, "the faults ended by themselves: nothing is shown"
        assert not [k for k in ON_THE_NODE if said[k].startswith("clean")], said
    finally:
        machines.node("heal", NODE)
    eventually(lambda: ready(found(NODE)), 60)
    _clean_at_last(faulting.driver, faulted, namespace)
    eventually(lambda: not left_on_the_node(leases), 30, 1)
    uids = {p["metadata"]["uid"] for p in objects("pods", namespace)}
    assert not uids & {f.uid for f in faulted}  # the pods that were hit are really gone


def _on_node(pod: dict[str, object]) -> bool:
    return pod["spec"].get("nodeName") == NODE  # type: ignore[attr-defined,index]


def _clean_at_last(driver: KubernetesDriver, faulted: list[Faulted], namespace: str) -> None:
    """Recovery is asked for until it is proven, as the engine, the watchdog and the sweeper do."""
    end, said = time.monotonic() + 90, dict[str, str]()
    while time.monotonic() < end and len(said) < len(faulted):
        now = claims(driver, [f for f in faulted if f.kind not in said], "back")
        said.update({kind: words for kind, words in now.items() if words.startswith("clean")})
        time.sleep(1)
    assert {*said} == {f.kind for f in faulted}
    for f in faulted:
        eventually(lambda f=f: [ready(p) for p in pods(namespace, f.select)] == [True], 60)
