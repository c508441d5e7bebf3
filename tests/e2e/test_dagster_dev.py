"""A real `dagster dev` for the tests of Dagster, and that the project loads in every way that Dagster offers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills import watchdogs
from benchmarks.observer import Observer
from mlchaos_dagster.orchestration import keys

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LOCATION = {"repositoryLocationName": "mlchaos", "repositoryName": "__repository__"}
LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
    ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } ... on InvalidSubsetError { message } } }"""
TERMINATE = """mutation($r: String!, $p: TerminateRunPolicy) { terminateRun(runId: $r, terminatePolicy: $p) { __typename
    ... on TerminateRunSuccess { run { status } } ... on TerminateRunFailure { message } ... on PythonError { message } } }"""
RUN = (
    "query($r: ID!) { runOrError(runId: $r) { ... on Run { status tags { key value } stepStats { stepKey status } } } }"
)
ENDED = ("SUCCESS", "FAILURE", "CANCELED")


def wait_for(what: Callable[[], Any], bound_s: float, every_s: float = 0.02) -> Any:
    """Poll with a bound; the first true answer. Fails when none came."""
    end = time.monotonic() + bound_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(every_s)
    raise AssertionError(f"not within {bound_s:g} s: {what}")


@dataclass
class Dev:
    """`dagster dev` with one environment; the observer looks at the environment's sandbox."""

    project: Path
    environment: str
    process: subprocess.Popen[bytes]
    url: str
    env: dict[str, str]
    observer: Observer

    def gql(self, query: str, **variables: Any) -> Any:
        """`data` of an answer."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            found = json.load(answer)
        assert "errors" not in found, found
        return found["data"]

    def launch(self, experiment: str, target: str) -> str:
        """One run of an experiment, as the UI would start it; its id."""
        name = keys.python_name(experiment)
        tags = {
            keys.TAG_KIND: "experiment",
            keys.TAG_EXPERIMENT: experiment,
            keys.TAG_ENVIRONMENT: self.environment,
            keys.TAG_TARGET: f"{self.environment}.{target}",
        }
        paths = [{"path": [self.environment, name, phase]} for phase in keys.PHASES]
        parameters = {
            "selector": {**LOCATION, "jobName": "__ASSET_JOB", "assetSelection": paths},
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in tags.items()]},
        }
        said = self.gql(LAUNCH, p=parameters)["launchRun"]
        assert said["__typename"] == "LaunchRunSuccess", said
        return said["run"]["runId"]

    def launch_until_fault(self, experiment: str, target: str, tries: int = 4) -> str:
        """A run whose fault is on. On a busy machine the steady state may refuse once or twice: launched again."""
        run_id = self.launch(experiment, target)
        wait_for(lambda: self.observer.fault_seen() or self.outcome_file(run_id), 60)
        if self.observer.fault_seen():
            return run_id
        assert tries > 1, f"no fault: {self.record(run_id)['verdict']['reasons']}"
        return self.launch_until_fault(experiment, target, tries - 1)

    def terminate(self, run_id: str, policy: str = "SAFE_TERMINATE") -> dict[str, Any]:
        """What Dagster says to it."""
        return self.gql(TERMINATE, r=run_id, p=policy)["terminateRun"]

    def run(self, run_id: str) -> dict[str, Any]:
        """Status, tags and steps."""
        return self.gql(RUN, r=run_id)["runOrError"]

    def ended(self, run_id: str, bound_s: float = 60.0) -> dict[str, Any]:
        """The run, once it has ended."""
        wait_for(lambda: self.run(run_id)["status"] in ENDED, bound_s, 0.3)
        return self.run(run_id)

    def outcome(self, run_id: str) -> str:
        """The tag that one filters by."""
        return next((t["value"] for t in self.run(run_id)["tags"] if t["key"] == keys.TAG_OUTCOME), "")

    def outcome_file(self, run_id: str) -> bool:
        """Whether the verdict is on disk: cheaper to poll than GraphQL."""
        path = self.project / f".mlchaos/reports/{run_id}.html"
        return path.is_file()

    def record(self, run_id: str) -> dict[str, Any]:
        """Record and verdict, from the state directory."""
        return json.loads((self.project / f".mlchaos/records/{run_id}.json").read_text())

    def mlchaos(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """The command line in the same project."""
        command = [str(BIN / "mlchaos"), *arguments]
        return subprocess.run(
            command, cwd=self.project, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def processes(self) -> dict[int, tuple[int, str]]:
        """pid → (parent, command line) of everything in the session of `dagster dev`, or that its runs spawned."""
        found: dict[int, tuple[int, str]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if int(stat[3]) == self.process.pid and stat[0] not in "ZX":
                found[int(entry.name)] = (int(stat[1]), command)
        return found

    def code_server(self) -> int:
        """Pid of the gRPC server that holds our code and launches runs."""
        pids = [pid for pid, (_, words) in self.processes().items() if " api grpc " in words]
        assert len(pids) == 1, self.processes()
        return pids[0]

    def worker(self) -> int:
        """Pid of the process of the one run that is running: Python's spawn, child of the code server."""
        server = self.code_server()
        pids = [p for p, (up, words) in self.processes().items() if up == server and "spawn_main" in words]
        assert len(pids) == 1, self.processes()
        return pids[0]

    def faults_added(self) -> int:
        """How often a fault was made, by the truth log."""
        return sum(e["what"] == "fault_added" for e in self.observer.truth())

    def open_leases(self) -> list[Any]:
        """By our own status; whether a fault is live is the observer's to say."""
        return json.loads(self.mlchaos("status", "-o", "json").stdout)["open_leases"]


@contextmanager
def dagster_dev(project: Path, library: Path, environment: str) -> Iterator[Dev]:
    """`dagster dev` on a free port, with its daemon and a sandbox. At the end nothing of it is left.

    Ended by SIGINT to its own group, then by force: nobody's Dagster but ours is touched.
    """
    for name in ("definitions.py", "dagster.yaml", "pyproject.toml"):
        (project / name).write_text((ROOT / name).read_text())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "DAGSTER_HOME"} | {
        "MLCHAOS_HOME": str(project / ".mlchaos"),
        "MLCHAOS_LIBRARY": str(library),
        "MLCHAOS_ENVIRONMENT": environment,
        "MLCHAOS_USER": "test",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    # Started from a shell's background it would inherit an ignored SIGINT, and never end.
    command = ["env", "--default-signal=INT,TERM", str(BIN / "dagster"), "dev", "-h", "127.0.0.1", "-p", str(port)]
    with (project / "dev.log").open("w") as log:
        process = subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log, start_new_session=True)
        observer = Observer(project / ".mlchaos" / "sandbox" / environment)
        dev = Dev(project, environment, process, f"http://127.0.0.1:{port}/graphql", env, observer)
        try:
            up = dev.mlchaos("sandbox", "up")
            assert up.returncode == 0, up.stderr
            _wait_until_loaded(dev)
            yield dev
        finally:
            _end(dev)
            dev.mlchaos("sandbox", "down")


def _wait_until_loaded(dev: Dev) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and dev.process.poll() is None:
        try:
            if dev.gql("{ assetNodes { id } }")["assetNodes"]:
                return
        except (OSError, ValueError, AssertionError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"dagster dev did not come up:\n{(dev.project / 'dev.log').read_text()[-3000:]}")


def _end(dev: Dev) -> None:
    if dev.process.poll() is None:
        os.killpg(dev.process.pid, signal.SIGINT)
    try:
        dev.process.wait(15)
    except subprocess.TimeoutExpired:
        pass
    end = time.monotonic() + 5
    while (left := dev.processes()) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    dev.process.wait(5)


def nothing_left(dev: Dev, bound_s: float = 15.0) -> None:
    """Clean from outside, and no lease open after `mlchaos recover` at the latest."""
    wait_for(lambda: not dev.observer.wrong(), bound_s)
    if dev.open_leases():
        dev.mlchaos("recover")
        assert not dev.open_leases()
    wait_for(lambda: not watchdogs(dev.project / ".mlchaos"), 10.0, 0.2)


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def loads(command: list[str], project: Path, home: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("DAGSTER_HOME", "VIRTUAL_ENV")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "MLCHAOS_HOME": str(home),
    }
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("command", ["dg check defs", "dagster definitions validate"])
def test_the_project_loads(command: str, tmp_path: Path) -> None:
    loads(command.split(), ROOT, tmp_path)


def test_the_component_in_a_project_of_its_own(tmp_path: Path) -> None:
    """As the README says: `type: mlchaos_dagster.ChaosLibrary`."""
    defs = tmp_path / "ours" / "defs" / "chaos"
    defs.mkdir(parents=True)
    for package in (defs.parents[1], defs.parent):
        (package / "__init__.py").touch()
    (defs / "defs.yaml").write_text("type: mlchaos_dagster.ChaosLibrary\nattributes: {environments: [sandbox]}\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "ours"\n'
        'code_location_target_module = "top"\n'
    )
    (tmp_path / "top.py").write_text((ROOT / "definitions.py").read_text())
    loads(["dagster", "definitions", "validate", "-m", "top"], tmp_path, tmp_path / "home")


def test_the_package_imports_nothing_until_asked() -> None:
    lazy = "import sys, mlchaos_dagster as m; assert 'dagster' not in sys.modules; m.ChaosLibrary.__mro__; m.sys"
    done = subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True, timeout=60, check=False)
    assert "has no attribute 'sys'" in done.stderr, done.stderr
