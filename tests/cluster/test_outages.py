"""Whole runs that lose something in the window of their fault: the API server, their rights, their target, their sweeper."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import machines
from tests.cluster.api_proxy import ApiProxy, api_proxy  # noqa: F401  a fixture
from tests.cluster.conftest import deploy, eventually, kubectl, objects, pods, ready
from tests.cluster.rights import Rights
from tests.cluster.surroundings import CommandLine, environment
from tests.cluster.test_sweeper import (
    TTL_S,
    all_ready,
    bind,
    open_leases,
    sweeper,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.timeout(240)
FAULTS: dict[str, dict[str, Any]] = {
    "pod_failure": {},
    "network_latency": {"latency": "100ms"},
    "cpu_stress": {"cores": 1, "load": "50%"},
}
ABORTED, UNCLEAN = 4, 70
REPLICAS = 2


def experiment(kind: str, **changes: Any) -> dict[str, Any]:
    """A fault that lasts longer than any test waits for the run."""
    return {
        "schema": "mlchaos/v1",
        "name": f"out-{kind.replace('_', '-')}",
        "title": "Something goes away in the window",
        "hypothesis": "Nothing is left.",
        "area": "bench",
        "owner": "ml-platform@example.com",
        "target": "web",
        "fault": {"kind": kind, **FAULTS[kind]},
        "blast_radius": {"count": 1},
        "duration": "60s",
        "steady_state": [{"sli": "availability", "at_least": "1%"}],
        "recovery": {"within": "20s"},
        **changes,
    }


class Stage:
    """A target and a sweeper in a namespace, and command lines on it."""

    def __init__(self, namespace: str, root: Path, context: str, kubeconfig: str) -> None:
        self.namespace, self.root, self.context, self.kubeconfig = namespace, root, context, kubeconfig
        self.select = deploy(namespace, replicas=REPLICAS)
        self.address = objects("services", namespace)[0]["spec"]["clusterIP"]

    def line(self, name: str = "a", context: str = "", kubeconfig: str = "") -> CommandLine:
        """A state directory of its own; its API server and identity are the kubeconfig's."""
        written = environment(
            self.namespace,
            context or self.context,
            kubeconfig or self.kubeconfig,
            kubernetes={"sweeper_ttl": f"{TTL_S:g}s"},
            # Not through the API server: whatever becomes of it, the target is seen.
            probe={"url": f"http://{self.address}/", "rate": 10, "timeout": "1s"},
            sampling={"baseline": "2s", "min_samples": 10},
            safety={"recover_timeout": "60s"},
        )
        return CommandLine(self.root / name, written, *map(experiment, FAULTS))

    def fault(self) -> list[str]:
        """What of a fault there is, as kubectl sees it."""
        found = [f"Lease {x}" for x in open_leases(self.namespace)]
        for pod in objects("pods", self.namespace, self.select):
            if "mlchaos.dev/lease" in pod["metadata"].get("annotations", {}):
                found.append(f"{pod['metadata']['name']} is marked")
        secrets = objects("secrets", self.namespace, "mlchaos.dev/component=undo")
        return found + [f"Secret {x['metadata']['name']}" for x in secrets]

    def helpers(self) -> list[str]:
        """Containers of ours that run in the pods; for a while after their fault they still answer."""
        return [
            f"{pod['metadata']['name']}: {status['name']} runs"
            for pod in pods(self.namespace, self.select)
            for status in pod["status"].get("ephemeralContainerStatuses", [])
            if "running" in status.get("state", {})
        ]

    def is_clean(self, within: float) -> None:
        """Nothing of the fault within so many seconds, nothing of ours a little later."""
        end = time.monotonic() + within
        while found := self.fault():
            assert time.monotonic() < end, f"left behind: {found}"
            time.sleep(0.2)
        eventually(lambda: not self.helpers(), 30)


class Running:
    """A run whose fault is on."""

    def __init__(self, stage: Stage, line: CommandLine, kind: str) -> None:
        self.stage, self.line, self.kind = stage, line, kind
        self.process = line.start("run", f"out-{kind.replace('_', '-')}")
        eventually(self._confirmed, 60)
        assert open_leases(stage.namespace)

    def _confirmed(self) -> bool:
        assert self.process.poll() is None, self.said
        return " confirmed" in self.said

    @property
    def said(self) -> str:
        """All words so far, on one line."""
        return " ".join((self.line.home / "run.log").read_text().split())

    def over(self, within: float) -> int:
        """Its exit code; it must come in time."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run hangs: {self.said[-600:]}") from None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def stage(sweeper: str, tmp_path: Path, context: str, kubeconfig: str) -> Stage:  # noqa: F811
    return Stage(sweeper, tmp_path, context, kubeconfig)


@pytest.fixture
def runs() -> Iterator[list[Running]]:
    """Ended with the test."""
    found: list[Running] = []
    yield found
    for run in found:
        run.end()


def one_clear_line(run: Running, *parts: str) -> None:
    """The report's reason has these words, and nobody saw a traceback."""
    assert "Traceback" not in run.said, run.said
    for part in parts:
        assert re.search(part, run.said), f"{part!r} not in: {run.said[-1500:]}"


# -- the API server ----------------------------------------------------------------------------------------------------


@pytest.mark.req("R0-10", "R0-04")
@pytest.mark.parametrize("kind", FAULTS)
def test_the_api_server_is_out_of_reach_for_twenty_seconds(
    stage: Stage,
    runs: list[Running],
    api_proxy: ApiProxy,  # noqa: F811
    kind: str,
) -> None:
    line = stage.line(context=api_proxy.context, kubeconfig=str(api_proxy.kubeconfig))
    run = Running(stage, line, kind)
    runs.append(run)
    api_proxy.cut()
    time.sleep(20)  # the length of the outage is the test's subject
    assert run.process.poll() is None, run.said[-800:]
    api_proxy.restore()
    back = time.monotonic()
    code = run.over(40)
    print(f"{kind}: over {time.monotonic() - back:.1f} s after the return, exit {code}")  # noqa: T201
    assert code == ABORTED, run.said[-1500:]
    one_clear_line(run, "ABORTED", r"proven clean")
    stage.is_clean(5)
    eventually(lambda: all_ready(stage.namespace, stage.select, REPLICAS), 40)


@pytest.mark.nodes
@pytest.mark.req("R0-10")
@pytest.mark.skipif(
    "MLCHAOS_TEST_API_SERVER" not in os.environ,
    reason="kills the API server under every other test of the cluster: MLCHAOS_TEST_API_SERVER=1 when nothing else runs",
)
def test_the_api_server_is_killed_and_comes_back(stage: Stage, runs: list[Running]) -> None:
    up = Path(machines.command()).with_name("up")
    pid = _api_server()
    run = Running(stage, stage.line(), "network_latency")
    runs.append(run)
    os.kill(pid, 9)
    time.sleep(8)
    subprocess.run([str(up)], check=False, capture_output=True, timeout=150)  # it also waits for what follows
    eventually(lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok", 60)
    back = time.monotonic()
    code = run.over(60)
    print(f"over {time.monotonic() - back:.1f} s after the return, exit {code}")  # noqa: T201
    assert code == ABORTED, run.said[-1500:]
    one_clear_line(run, "ABORTED", "proven clean")
    stage.is_clean(10)


def _api_server() -> int:
    """Its pid, where it runs on this machine."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"kube-apiserver" in words[:2] or words[0].endswith(b"/kube-apiserver"):
            return int(entry.parent.name)
    pytest.skip("the API server does not run on this machine")


# -- rights ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def identity(stage: Stage) -> Iterator[str]:
    """A kubeconfig of the shipped runner's account in the stage's namespace."""
    namespace = stage.namespace
    secret = {
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": {"name": "bound", "namespace": namespace},
    }  # fmt: skip
    kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    token = kubectl(
        "create", "token", "mlchaos-runner", "-n", namespace, "--bound-object-kind=Secret", "--bound-object-name=bound"
    ).strip()
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    config["users"] = [{"name": "u", "user": {"token": token}}]
    config["contexts"] = [{"name": "runner", "context": {"cluster": config["clusters"][0]["name"], "user": "u"}}]
    config["current-context"] = "runner"
    path = stage.root / "runner.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield str(path)


def _left_to_the_sweeper(stage: Stage, run: Running, code: int) -> None:
    """It could not prove anything itself, and says so; or the sweeper was first and it says that."""
    assert code in (ABORTED, UNCLEAN), run.said[-1500:]
    if code == UNCLEAN:
        one_clear_line(run, "UNCLEAN", "mlchaos recover")
    stage.is_clean(30)
    eventually(lambda: all_ready(stage.namespace, stage.select, REPLICAS), 40)


@pytest.mark.req("R0-10", "RX-06")
@pytest.mark.parametrize("kind", ["pod_failure", "network_latency"])
def test_the_token_is_revoked(stage: Stage, runs: list[Running], identity: str, kind: str) -> None:
    run = Running(stage, stage.line(context="runner", kubeconfig=identity), kind)
    runs.append(run)
    kubectl("delete", "secret", "bound", "-n", stage.namespace)
    gone = time.monotonic()
    stage.is_clean(60)
    print(f"{kind}: clean {time.monotonic() - gone:.1f} s after")  # noqa: T201
    code = run.over(90)
    print(f"exit {code} after {time.monotonic() - gone:.1f} s: {run.said[-700:]}")  # noqa: T201
    _left_to_the_sweeper(stage, run, code)
    one_clear_line(run, "(?i)unauthorized|401")


@pytest.mark.req("R0-10", "RX-06")
@pytest.mark.parametrize("kind", ["pod_failure", "network_latency"])
def test_the_rights_are_withdrawn(stage: Stage, runs: list[Running], identity: str, kind: str) -> None:
    run = Running(stage, stage.line(context="runner", kubeconfig=identity), kind)
    runs.append(run)
    bound = [
        x["metadata"]["name"]
        for x in objects("rolebindings", stage.namespace)
        if any(s["name"] == "mlchaos-runner" for s in x.get("subjects", []))
    ]
    everywhere = [
        x["metadata"]["name"]
        for x in objects("clusterrolebindings", "")
        if any((s["name"], s.get("namespace")) == ("mlchaos-runner", stage.namespace) for s in x.get("subjects", []))
    ]
    kubectl("delete", "rolebinding", "-n", stage.namespace, *bound)
    kubectl("delete", "clusterrolebinding", *everywhere)
    gone = time.monotonic()
    stage.is_clean(60)
    print(f"{kind}: clean {time.monotonic() - gone:.1f} s after")  # noqa: T201
    code = run.over(90)
    print(f"exit {code} after {time.monotonic() - gone:.1f} s: {run.said[-700:]}")  # noqa: T201
    _left_to_the_sweeper(stage, run, code)
    one_clear_line(run, "(?i)forbidden|not allowed|missing")


# -- the target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
def test_the_targets_deployment_is_deleted(stage: Stage, runs: list[Running], kind: str) -> None:
    run = Running(stage, stage.line(), kind)
    runs.append(run)
    kubectl("delete", "deployment", "web", "-n", stage.namespace)
    eventually(lambda: not pods(stage.namespace, stage.select), 60)
    run.line("stop", f"out-{kind.replace('_', '-')}")
    code = run.over(90)
    print(f"{kind}: exit {code}: {run.said[-500:]}")  # noqa: T201
    assert code in (1, ABORTED, 5), run.said[-1500:]
    assert "HELD" not in run.said
    one_clear_line(run)
    stage.is_clean(5)


@pytest.mark.req("RX-04")
@pytest.mark.parametrize("kind", FAULTS)
def test_the_pods_are_replaced(stage: Stage, runs: list[Running], kind: str) -> None:
    line = stage.line()
    short = experiment(kind, duration="15s")
    (line.library / "experiments/test" / f"{short['name']}.yaml").write_text(yaml.safe_dump(short))
    run = Running(stage, line, kind)
    runs.append(run)
    kubectl("rollout", "restart", "deployment/web", "-n", stage.namespace)
    code = run.over(90)
    print(f"{kind}: exit {code}: {run.said[-500:]}")  # noqa: T201
    assert code in (1, ABORTED, 5), run.said[-1500:]
    one_clear_line(run, "gone|replaced")
    stage.is_clean(5)
    eventually(lambda: all_ready(stage.namespace, stage.select, REPLICAS), 60)


def test_the_namespace_is_deleted(
    stage: Stage,
    runs: list[Running],
    rights: Rights | None,
    cluster: Any,
    context: str,
    kubeconfig: str,
    tmp_path: Path,
) -> None:
    """The target's own, while leases and the sweeper are elsewhere."""
    target = f"{stage.namespace}-t"
    kubectl("create", "namespace", target)
    try:
        kubectl("label", "namespace", target, "mlchaos.dev/allow=true", "mlchaos.dev/test=true")
        if rights:
            rights.admit(target)
        bind(target, stage.namespace)
        deploy(target, replicas=REPLICAS)
        address = objects("services", target)[0]["spec"]["clusterIP"]
        written = environment(
            target,
            context,
            kubeconfig,
            kubernetes={"sweeper_ttl": f"{TTL_S:g}s", "control_namespace": stage.namespace},
            probe={"url": f"http://{address}/", "rate": 10, "timeout": "1s"},
            sampling={"baseline": "2s", "min_samples": 10},
        )
        short = experiment("pod_failure", duration="15s")
        run = Running(stage, CommandLine(tmp_path / "ns", written, short), "pod_failure")
        runs.append(run)
        kubectl("delete", "namespace", target, "--wait=false")
        code = run.over(90)
        print(f"exit {code}: {run.said[-500:]}")  # noqa: T201
        assert code in (1, ABORTED, 5), run.said[-1500:]
        one_clear_line(run)
        eventually(lambda: not open_leases(stage.namespace), 5)
        eventually(lambda: target not in [x["metadata"]["name"] for x in objects("namespaces", "")], 60)
    finally:
        kubectl("delete", "namespace", target, "--wait=false", "--ignore-not-found", check=False)


# -- two at once, and the sweeper --------------------------------------------------------------------------------------


@pytest.mark.req("R0-02")
def test_of_two_runs_for_one_target_one_is_refused(stage: Stage) -> None:
    """Both pods are wanted, so that they want the same whatever they choose."""
    both = experiment("pod_failure", duration="10s", blast_radius={"fraction": "100%"})
    lines = [stage.line("a"), stage.line("b")]
    for line in lines:
        (line.library / "experiments/test" / f"{both['name']}.yaml").write_text(yaml.safe_dump(both))
    processes = [line.start("run", both["name"]) for line in lines]
    try:
        codes = [p.wait(120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    said = [" ".join((line.home / "run.log").read_text().split()) for line in lines]
    print(codes, [s[-400:] for s in said])  # noqa: T201
    assert codes.count(3) == 1, said
    refused = said[codes.index(3)]
    assert "Nothing was injected" in refused
    assert re.search(r"mlchaos-out-pod-failure-[0-9a-f]+", refused), refused
    assert [bool(re.search(r"\d s injected", s)) for s in said].count(True) == 1
    stage.is_clean(2)


@pytest.mark.req("R0-10")
def test_the_sweeper_is_killed_and_the_run_goes_on(stage: Stage, runs: list[Running]) -> None:
    """Or aborts, should the next one take longer than the time to live; in no case anything is left."""
    run = Running(stage, stage.line(), "network_latency")
    runs.append(run)
    name = "app.kubernetes.io/name=mlchaos-sweeper"
    kubectl("delete", "pod", "-n", stage.namespace, "-l", name, "--grace-period=0", "--force")
    eventually(lambda: any(ready(p) for p in pods(stage.namespace, name)), 60)
    if run.process.poll() is None and "ABORTED" not in run.said:
        code, said, _ = run.line("stop", "out-network-latency")
        assert code == 0, said
    assert run.over(60) == ABORTED
    one_clear_line(run, "stop request|heartbeat")
    stage.is_clean(5)


@pytest.mark.req("R0-10")
def test_the_sweeper_stays_away_and_the_run_aborts(stage: Stage, runs: list[Running]) -> None:
    run = Running(stage, stage.line(), "network_latency")
    runs.append(run)
    kubectl("scale", "-n", stage.namespace, "deployment/mlchaos-sweeper", "--replicas=0")
    gone = time.monotonic()
    assert run.over(60) == ABORTED
    print(f"over {time.monotonic() - gone:.1f} s after")  # noqa: T201
    one_clear_line(run, "a heartbeat was lost: the sweeper in namespace", "kubectl apply -k", "proven clean")
    stage.is_clean(5)
