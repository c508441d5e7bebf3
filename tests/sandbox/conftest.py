"""Sandbox tests use real processes and look at them from outside: sockets, pids and the clock, not the sandbox's word.

One sandbox is shared by the session (with the tests of the driver, too); tests leave it without faults. Tests that break or configure a whole sandbox start
their own, with one replica where that is enough. Nothing is mocked.
"""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlchaos_dagster.sandbox.api import SandboxClient, SandboxConfig, down, up

leases = (f"lease-{number}" for number in itertools.count(1))


class Answer(NamedTuple):
    """One reply of the gateway as a caller sees it."""

    status: int
    path: str
    replica: str | None
    seconds: float


class Platform:
    """A sandbox under test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = SandboxClient(directory, timeout_s=30.0)

    def ask(self, entity: int = 7, timeout_s: float = 3.0) -> Answer:
        """One prediction over a new connection."""
        url = self.client.status()["gateway_url"]
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
        began = time.perf_counter()
        try:
            connection.request("POST", "/predict", json.dumps({"entity_id": entity}))
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        path = response.headers["X-Answered-By"]
        return Answer(response.status, path, response.headers["X-Replica"], time.perf_counter() - began)

    def process(self, name: str) -> dict[str, Any]:
        """One process's entry in the live status."""
        return next(entry for entry in self.client.status()["processes"] if entry["name"] == name)

    def inject(self, kind: str, target: str, deadline_s: float = 120.0, **params: Any) -> str:
        """Inject under a fresh lease; return the lease id."""
        lease = next(leases)
        # Tokens only ever grow, as the ledger's do: a target refuses an older one, whichever test comes first.
        token = time.monotonic_ns()
        self.client.add_fault(
            lease_id=lease, token=token, kind=kind, target=target, params=params, deadline_s=deadline_s
        )
        return lease

    def wait_ready(self, bound_s: float = 60.0) -> None:
        """Wait until every process is ready."""
        # Each look asks every process: more often, and it is us that they wait for.
        eventually(lambda: self.client.status()["ready"], bound_s, every_s=0.1)

    def truth(self) -> list[dict[str, Any]]:
        """The truth log."""
        return [json.loads(line) for line in (self.directory / "truth.jsonl").read_text().splitlines()]


def eventually(condition: Callable[[], Any], bound_s: float = 30.0, every_s: float = 0.02) -> Any:
    """Poll until the condition holds; return its value, fail after ``bound_s`` seconds: far more than it takes anywhere."""
    end = time.monotonic() + bound_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {bound_s} s: {condition}")
        time.sleep(every_s)


@contextmanager
def shared_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The one sandbox of this test process, with all mechanisms on and two replicas; up for whoever asks first."""
    directory = tmp_path_factory.getbasetemp() / "shared-sandbox"
    try:
        # Repeated kills of one replica must not make the later tests wait for its back-off.
        up(directory, SandboxConfig(replicas=2, backoff_max_s=0.3, breaker_open_s=0.5), timeout_s=150)
        yield Platform(directory)
    finally:
        evidence = down(directory)
    assert evidence["clean"], evidence


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The sandbox that tests share."""
    with shared_sandbox(tmp_path_factory) as platform:
        yield platform


@pytest.fixture
def platform(shared: Platform) -> Iterator[Platform]:
    """The shared sandbox, whole before the test and without faults after it."""
    shared.wait_ready()
    yield shared
    for fault in shared.client.faults():
        shared.client.remove_fault(fault["lease_id"])


@pytest.fixture(scope="session")
def training_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A second sandbox, with object store and trainers: the shared one is to stay as small as its tests expect it."""
    directory = tmp_path_factory.getbasetemp() / "training-sandbox"
    try:
        up(directory, SandboxConfig(replicas=1, backoff_max_s=0.3), parts=["storage"], timeout_s=150)
        yield Platform(directory)
    finally:
        evidence = down(directory)
    assert evidence["clean"], evidence


@pytest.fixture
def training(training_sandbox: Platform) -> Iterator[Platform]:
    """The sandbox with object store and trainers, whole before the test and without faults after it."""
    training_sandbox.wait_ready()
    yield training_sandbox
    for fault in training_sandbox.client.faults():
        training_sandbox.client.remove_fault(fault["lease_id"])


@pytest.fixture(scope="session")
def jobs_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A sandbox with the tracking server, the workflow runner and the batch queue."""
    directory = tmp_path_factory.getbasetemp() / "jobs-sandbox"
    try:
        config = SandboxConfig(replicas=1, backoff_initial_s=0.1, backoff_max_s=0.3, breaker_open_s=0.3)
        up(directory, config, parts=["tracking", "queue"], timeout_s=150)
        yield Platform(directory)
    finally:
        evidence = down(directory)
    assert evidence["clean"], evidence


@pytest.fixture
def jobs(jobs_sandbox: Platform) -> Iterator[Platform]:
    """That sandbox, whole before the test and without faults after it."""
    jobs_sandbox.wait_ready()
    yield jobs_sandbox
    for fault in jobs_sandbox.client.faults():
        jobs_sandbox.client.remove_fault(fault["lease_id"])
