"""Network faults on real pods, seen from a client pod and read from its netfilter by an observer of our own."""

from __future__ import annotations

import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverUnavailable, Halted, InjectFailed, LeaseRefused, RecoverFailed
from mlchaos_dagster.kube.client import Cluster
from mlchaos_dagster.kube.labels import LEASE
from tests.cluster.conftest import HELPER_IMAGE, Faulting, deploy, eventually, kubectl, objects, pods, ready

LINK = "app=client->app=web"
CONNECT = """
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for _ in range(count):
    start = time.monotonic()
    try:
        socket.create_connection((host, port), 3).close()
        print(f"{time.monotonic() - start:.4f}")
    except OSError as e:
        print("no", type(e).__name__)
    time.sleep(0.02)  # thirty at once run over the server's queue of five, and what is refused there comes again after a second
"""
KEPT_OPEN = """
import socket, sys
s = socket.create_connection((sys.argv[1], 80)); s.settimeout(3)
s.sendall(b"GET / HTTP/1.0\\r\\n"); print("open", flush=True)
sys.stdin.readline()
try:
    s.sendall(b"\\r\\n"); print("answered" if s.recv(4096) else "closed", flush=True)
except OSError as e:
    print(type(e).__name__, flush=True)
"""
"""Half a request before the cut, the other half after it."""


class Client:
    """A pod from which the observer connects, by kubectl."""

    def __init__(self, namespace: str, pod: str, host: str) -> None:
        self.namespace, self.pod, self.host = namespace, pod, host

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        return kubectl(
            "exec", "-n", self.namespace, self.pod, "-c", "web", "--", *command, check=check, timeout=timeout
        )

    def connects(self, count: int = 3, host: str = "", port: int = 80) -> list[float | None]:
        said = self.run("python3", "-c", CONNECT, host or self.host, str(port), str(count))
        return [None if line.startswith("no") else float(line) for line in said.split("\n") if line]

    def soon_connects(self, below: float = 0.3) -> None:
        """A busy machine makes some connections slow; a delay makes all of them slow."""
        eventually(lambda: all(t is not None and t < below for t in self.connects()), 60)

    def rules(self, agent: str) -> str:
        """What iptables says, from inside the pod's network."""
        return kubectl("exec", "-n", self.namespace, self.pod, "-c", agent, "--", "iptables-save", check=False)


@pytest.fixture
def client(namespace: str) -> Client:
    """A client and two servers behind a Service, on their feet."""
    with ThreadPoolExecutor(2) as two:
        limits = {"cpu": "500m", "memory": "128Mi"}  # a client that is throttled itself measures that, too
        list(two.map(lambda a: deploy(namespace, *a, limits=limits), [("web", 2), ("client", 1)]))
    host = objects("services", namespace)
    address = next(s["spec"]["clusterIP"] for s in host if s["metadata"]["name"] == "web")
    found = Client(namespace, pods(namespace, "app=client")[0]["metadata"]["name"], address)
    found.soon_connects()
    return found


def quiet() -> bool:
    """Whether the machine has a core for each that wants one, more or less: only then seconds are ours."""
    return os.getloadavg()[0] < 2 * (os.cpu_count() or 1)


def now(namespace: str, pod: str) -> dict[str, Any]:
    return json.loads(kubectl("get", "pod", "-n", namespace, pod, "-o", "json"))


def told(driver: KubernetesDriver, lease: Lease) -> Evidence:
    """What the pods say; asked again where one does not answer in time, as the engine does."""

    def ask() -> Evidence | None:
        try:
            return driver.active(lease)
        except DriverUnavailable:
            return None

    return eventually(ask, 60)


def recover(driver: KubernetesDriver, lease: Lease) -> None:
    """Until it is done, as the engine does."""

    def done() -> bool:
        try:
            driver.recover(lease)
        except (DriverUnavailable, RecoverFailed):
            return False
        return True

    eventually(done, 90)


@pytest.mark.req("R2-03", "R1-02")
def test_latency_on_a_link_is_what_was_asked_for(client: Client, faulting: Faulting, driver: KubernetesDriver) -> None:
    lease = faulting.lease("network_latency", LINK, latency_s=0.5, jitter_s=0.1)
    start = time.monotonic()
    driver.inject(lease)
    injected = time.monotonic() - start
    during = client.connects(24)
    values = sorted(t for t in during if t is not None)
    assert len(values) == 24 and values[0] >= 0.39 and values[-1] - values[0] > 0.02, during
    # A busy machine adds to some of them; the rest tells what was asked for.
    assert 0.42 <= statistics.median(values[:12]) <= 0.6, during
    evidence = told(driver, lease)
    assert evidence.present and evidence.effective and "answered after" in evidence.lines[0], evidence
    assert "MLCHAOS-" in client.rules(agents.name_of(lease))
    assert client.connects(2, pods(client.namespace, "app=client")[0]["status"]["podIP"], 8080)[0]  # its own loopback
    start = time.monotonic()
    recover(driver, lease)
    recovered = time.monotonic() - start
    client.soon_connects(0.2)
    assert "MLCHAOS-" not in client.rules(agents.name_of(lease))
    evidence = told(driver, lease)
    assert not evidence.present and "read from the pod's netfilter" in evidence.lines[0], evidence
    print(f"\ninject {injected:.2f} s, recover {recovered:.2f} s, mean {statistics.mean(values):.4f}")


OTHER_PROCESS = """
import pickle, sys, os, signal
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.kube.address import connect
lease, options = pickle.loads(bytes.fromhex(sys.argv[2]))
getattr(KubernetesDriver.at(connect(options), options), sys.argv[1])(lease)
print("done", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def elsewhere(verb: str, lease: Lease, options: Kubernetes) -> subprocess.Popen[str]:
    """A verb in a process of its own, which is killed right after it."""
    given = pickle.dumps((lease, options)).hex()
    return subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, verb, given], stdout=subprocess.PIPE, text=True)


def observed(namespace: str, pod: str) -> str:
    """iptables-save of the pod's network, from a debug container that is none of ours."""
    name = f"look-{uuid.uuid4().hex[:6]}"
    where = ["-n", namespace, pod, "-c", name]
    kubectl("debug", *where, f"--image={HELPER_IMAGE}", "--profile=netadmin", "--", "iptables-save")
    eventually(lambda: ended(now(namespace, pod), name))
    return kubectl("logs", *where)


def ended(pod: dict[str, Any], name: str) -> bool:
    found = [s for s in pod["status"].get("ephemeralContainerStatuses", []) if s["name"] == name]
    return bool(found) and "terminated" in found[0]["state"]


@pytest.mark.req("R1-03")
def test_partition_cuts_what_stands_and_ends_at_its_deadline_though_the_run_is_killed(
    client: Client, faulting: Faulting, driver: KubernetesDriver, options: Kubernetes
) -> None:
    into = ["kubectl", "exec", "-i", "-n", client.namespace, client.pod, "-c", "web", "--"]
    kept = subprocess.Popen(
        [*into, "python3", "-c", KEPT_OPEN, client.host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert kept.stdout is not None and kept.stdout.readline() == "open\n"
    lease = faulting.lease("network_partition", LINK, duration_s=12.0)
    process = elsewhere("inject", lease, options)
    assert process.communicate()[0] == "done\n" and process.returncode == -signal.SIGKILL
    began = time.monotonic()
    assert client.connects(1) == [None]
    evidence = eventually(lambda: e if (e := told(driver, lease)).effective else None)
    assert "no connection from" in evidence.lines[0], evidence
    assert kept.communicate("\n", timeout=20)[0] == "TimeoutError\n"
    assert client.connects(1, "10.96.0.10", 53)[0] is not None  # another link: untouched
    assert ready(now(client.namespace, client.pod))
    eventually(lambda: client.connects(1)[0] is not None, 60)
    assert 9 <= time.monotonic() - began <= 40
    evidence = told(driver, lease)
    assert not evidence.present and "deadline" in evidence.lines[0], evidence
    eventually(lambda: ended(now(client.namespace, client.pod), agents.name_of(lease)))
    assert not told(driver, lease).present  # from its last words
    recover(driver, lease)
    assert LEASE not in now(client.namespace, client.pod)["metadata"].get("annotations", {})
    assert "MLCHAOS" not in observed(client.namespace, client.pod)


@pytest.mark.req("R3-02")
def test_loss_loses_that_fraction(client: Client, faulting: Faulting, driver: KubernetesDriver) -> None:
    lease = faulting.lease("network_loss", LINK, fraction=0.2)
    driver.inject(lease)
    evidence = eventually(lambda: e if (e := told(driver, lease)).effective else None)
    assert "packets that came in were lost" in evidence.lines[-2], evidence
    with ThreadPoolExecutor(4) as few:
        tries = [t for batch in few.map(lambda _: client.connects(30), range(4)) for t in batch]
    slow = sum(t is None or t > 0.9 for t in tries) / len(tries)  # a lost SYN-ACK comes again after a second
    assert 0.06 <= slow <= 0.36, tries
    recover(driver, lease)
    after = client.connects(30)
    assert all(t is not None and t < 0.9 for t in after), after


@pytest.mark.req("RX-01")
@pytest.mark.parametrize("kind", ["network_latency", "network_partition"])
def test_an_agent_that_is_killed_takes_its_fault_along(
    client: Client, faulting: Faulting, driver: KubernetesDriver, options: Kubernetes, kind: str
) -> None:
    params = {"latency_s": 1.0, "jitter_s": 0.0} if kind == "network_latency" else {}
    lease = faulting.lease(kind, LINK, **params)
    driver.inject(lease)
    during = client.connects(1)[0]
    assert during is None or during >= 0.99
    name = agents.name_of(lease)
    kill = "import os; os.kill(-1, 9)"
    kubectl("exec", "-n", client.namespace, client.pod, "-c", name, "--", "python3", "-c", kill, check=False)
    eventually(lambda: (client.connects(1)[0] or 9) < 0.5, 20)
    assert "MLCHAOS" in observed(client.namespace, client.pod)  # inert, and still to be removed
    evidence = told(driver, lease)
    assert evidence.present and not evidence.effective and "died" in evidence.lines[0], evidence
    process = elsewhere("recover", lease, options)
    assert process.communicate()[0] == "done\n"
    evidence = told(driver, lease)
    assert not evidence.present and f"{name}-c1" in evidence.lines[0], evidence
    assert "MLCHAOS" not in observed(client.namespace, client.pod)
    with pytest.raises(InjectFailed, match="recovered"):
        driver.inject(lease)


def test_killed_between_the_patch_and_the_start_leaves_no_effect(
    client: Client, faulting: Faulting, driver: KubernetesDriver, options: Kubernetes
) -> None:
    lease = faulting.lease("network_partition", LINK)
    process = elsewhere("inject", lease, options)
    name = agents.name_of(lease)

    def patched() -> bool:
        spec = now(client.namespace, client.pod)["spec"]
        return any(c["name"] == name for c in spec.get("ephemeralContainers", []))

    eventually(patched, every=0.01)
    process.kill()
    assert process.communicate()[0] == ""
    recover(driver, lease)
    assert client.connects(1)[0] is not None
    assert not told(driver, lease).present
    assert "MLCHAOS" not in client.rules(name)
    with pytest.raises(InjectFailed, match="recovered"):
        driver.inject(lease)


@pytest.mark.req("R1-03")
@pytest.mark.parametrize("after_s", [0.5, 1.5, 3.0])
def test_who_stops_in_the_middle_of_inject_does_not_wait_for_the_agent(
    client: Client, faulting: Faulting, driver: KubernetesDriver, after_s: float
) -> None:
    """Five seconds from the word to the proof, whether the agent's container runs already or is still being made."""
    lease = faulting.lease("network_latency", LINK, latency_s=0.5, jitter_s=0.0)
    name, start = agents.name_of(lease), time.monotonic()

    def step(done: int, total: int) -> None:
        if time.monotonic() - start >= after_s:
            raise Halted("somebody says stop")

    with pytest.raises(Halted):
        driver.inject(lease, step)
        told(driver, lease)  # on a quick machine it was made before: then the stop comes now
        raise Halted("made already")
    said = time.monotonic()
    eventually(lambda: _clean(driver, lease), 30)
    print(f"\nstopped after {after_s:g} s: clean {time.monotonic() - said:.2f} s later")
    assert time.monotonic() - said < (5 if quiet() else 25)
    eventually(lambda: agents.look(now(client.namespace, client.pod), name).state in ("running", "ended"), 60)
    assert "MLCHAOS" not in client.rules(name), "it runs, and was never told to make anything"
    client.soon_connects()
    with pytest.raises(InjectFailed, match="recovered"):
        driver.inject(lease)


def _clean(driver: KubernetesDriver, lease: Lease) -> bool:
    try:
        driver.recover(lease)
        return not driver.active(lease).present
    except (DriverUnavailable, RecoverFailed):
        return False  # the engine, too, asks again


def test_a_recovery_in_the_middle_of_inject_shuts_it_out(
    client: Client, faulting: Faulting, driver: KubernetesDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between reading the pod and writing to it, and somebody recovers right then."""
    lease = faulting.lease("network_partition", LINK)
    looks: list[int] = []

    def held(*_: Any) -> None:
        looks.append(1)
        if len(looks) > 1:
            raise LeaseRefused("closed")
        driver.recover(lease)

    monkeypatch.setattr("mlchaos_dagster.kube.leases.held", held)
    with pytest.raises(LeaseRefused):
        driver.inject(lease)
    pod = now(client.namespace, client.pod)
    assert len(looks) == 2 and not pod["spec"].get("ephemeralContainers")
    assert not [k for k in pod["metadata"].get("annotations", {}) if "mlchaos" in k]
    assert not told(driver, lease).present


@pytest.mark.req("RX-01")
def test_pods_that_are_replaced(client: Client, faulting: Faulting, driver: KubernetesDriver) -> None:
    lease = faulting.lease("network_partition", LINK)
    driver.inject(lease)
    kubectl("delete", "pod", "-n", client.namespace, "-l", "app=web", "--wait=true")
    kubectl("rollout", "status", "-n", client.namespace, "deployment/web", "--timeout=60s")
    assert client.connects(1) == [None]  # the Service's address is cut, whoever is behind it
    evidence = told(driver, lease)
    assert evidence.effective and "is hit through web only" in evidence.lines[-1], evidence
    kubectl("delete", "pod", "-n", client.namespace, client.pod, "--wait=true")
    recover(driver, lease)
    evidence = told(driver, lease)
    assert not evidence.present and "is gone" in evidence.lines[0], evidence


def test_names_do_not_resolve(client: Client, faulting: Faulting, driver: KubernetesDriver) -> None:
    asked = "import socket\ntry:\n socket.getaddrinfo('web', 80); print('yes')\nexcept OSError: print('no')"
    assert client.run("python3", "-c", asked) == "yes\n"
    lease = faulting.lease("dns_failure", "app=client")
    driver.inject(lease)
    assert client.run("python3", "-c", asked) == "no\n"
    assert client.connects(1)[0] is not None
    evidence = eventually(lambda: e if (e := told(driver, lease)).effective else None)
    assert "no answer from the name server" in evidence.lines[0], evidence
    recover(driver, lease)
    assert client.run("python3", "-c", asked) == "yes\n"


@pytest.mark.req("R0-04")
def test_a_whole_pod_is_slow_or_cut_off_and_its_node_still_reaches_it(
    client: Client, faulting: Faulting, driver: KubernetesDriver
) -> None:
    slow = faulting.lease("network_latency", "app=web", latency_s=2.0, jitter_s=0.0)
    driver.inject(slow)
    values = [t for t in client.connects(4) if t is not None]
    assert len(values) == 4 and min(values) >= 1.98 and min(values) <= 2.5, values
    evidence = eventually(lambda: e if (e := told(driver, slow)).effective else None)
    assert len([line for line in evidence.lines if "the name server" in line]) == 2, evidence  # in both pods
    assert all(
        ready(p) and not p["status"]["containerStatuses"][0]["restartCount"] for p in pods(client.namespace, "app=web")
    )
    recover(driver, slow)
    off = faulting.lease("network_isolation", "app=web")
    driver.inject(off)
    assert client.connects(1) == [None]
    eventually(lambda: told(driver, off).effective)
    time.sleep(3)  # three rounds of the kubelet's readiness probe
    assert all(ready(p) for p in pods(client.namespace, "app=web"))
    recover(driver, off)
    assert client.connects(1)[0] is not None
    assert not told(driver, off).present


@pytest.mark.req("R1-03")
def test_a_policy_cuts_where_pod_security_keeps_the_agent_out(
    client: Client, faulting: Faulting, driver: KubernetesDriver, cluster: Cluster, options: Kubernetes
) -> None:
    kubectl("label", "namespace", client.namespace, "pod-security.kubernetes.io/enforce=baseline")
    with pytest.raises(AssertionError, match="NET_ADMIN.*kubernetes.network: policy"):
        faulting.lease("network_partition", LINK)
    by_policy = KubernetesDriver.at(cluster, options.model_copy(update={"network": "policy"}))
    assert driver.self_limiting - by_policy.self_limiting == {"network_partition", "network_isolation"}
    faulting = Faulting(by_policy, faulting.tmp_path)
    with pytest.raises(AssertionError, match="cannot be made by a NetworkPolicy"):
        faulting.lease("network_latency", LINK, latency_s=0.5, jitter_s=0.0)
    for kind, select in (("network_partition", LINK), ("network_isolation", "app=client")):
        lease = faulting.lease(kind, select)
        by_policy.inject(lease)
        eventually(lambda: client.connects(1) == [None])
        assert (client.connects(1, "10.96.0.10", 53)[0] is not None) == (kind == "network_partition")
        evidence = eventually(lambda held=lease: e if (e := told(by_policy, held)).effective else None)
        assert "stands, 1 pods labelled" in evidence.lines[0], evidence
        with pytest.raises(AssertionError, match="policies only add permissions"):
            faulting.lease(kind, select)
        recover(by_policy, lease)
        assert not objects("networkpolicies", client.namespace)
        assert "mlchaos.dev/fault" not in now(client.namespace, client.pod)["metadata"]["labels"]
        assert client.connects(1)[0] is not None
        assert not told(by_policy, lease).present


def test_pods_in_the_nodes_network_are_refused(namespace: str, driver: KubernetesDriver) -> None:
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "host", "labels": {"app": "host"}},
        "spec": {
            "hostNetwork": True,
            "containers": [{"name": "c", "image": "local/pause:1", "imagePullPolicy": "IfNotPresent"}],
        },
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/host", "--timeout=30s")
    target = Target(select="app=host")
    ids = driver.resolve(target)
    refused = driver.preflight("network_isolation", ids, ids, {}, target=target)
    assert any("the fault would hit the node" in o.saw for o in refused), refused


def test_an_agent_whose_image_is_missing_fails_at_once_and_recovers(
    client: Client, faulting: Faulting, driver: KubernetesDriver
) -> None:
    lease = faulting.lease("network_partition", LINK)
    lease.undo["options"]["helper_image"] = "local/missing:1"
    start = time.monotonic()
    with pytest.raises(InjectFailed, match="local/missing:1.*does not start"):
        driver.inject(lease)
    assert time.monotonic() - start < 30
    recover(driver, lease)
    evidence = told(driver, lease)
    assert not evidence.present and "never ran" in evidence.lines[0], evidence
