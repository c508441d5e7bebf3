"""Services as pods: configuration from the environment, replicas by DNS, what Prometheus scrapes, how a pod leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mlchaos_dagster.sandbox import discovery
from mlchaos_dagster.sandbox.config import SandboxConfigError
from mlchaos_dagster.sandbox.pod import PodLifeline, settings
from mlchaos_dagster.sandbox.scrape_targets import targets
from mlchaos_dagster.sandbox.service import Service


def test_environment_becomes_settings(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t0\n")
    found = settings(
        {
            "PLATFORM_NAME": "gateway-1",
            "PLATFORM_TOKEN_FILE": str(tmp_path / "token"),
            "PLATFORM_PEER_FEATURE_STORE": "http://feature-store",
            "PLATFORM_WITHOUT": "breaker, retries",
            "PLATFORM_REPLICA_TIMEOUT_S": "0.3",
            "HOME": "/root",
        }
    )
    assert (found["name"], found["token"], found["replica_timeout_s"]) == ("gateway-1", "t0", 0.3)
    assert found["peers"] == {"feature_store": "http://feature-store"}
    assert sorted(name for name, on in found["mechanisms"].items() if not on) == ["breaker", "retries"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PLATFORM_REPLICA_TIMEOUT", "1", "replica_timeout"),
        ("PLATFORM_ENTITIES", "many", "PLATFORM_ENTITIES"),
        ("PLATFORM_WITHOUT", "braker", "'braker'"),
        ("PLATFORM_TOKEN_FILE", "/nowhere", "PLATFORM_TOKEN_FILE"),
    ],
)
def test_wrong_environment_is_refused_by_name(name: str, value: str, said: str) -> None:
    with pytest.raises(SandboxConfigError, match=said):
        settings({name: value})


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ([(0, 0, 0, "", ("10.0.0.1", 80)), (0, 0, 0, "", ("10.0.0.2", 80))], {"10.0.0.1", "10.0.0.2"}),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), set()),
        (socket.gaierror(socket.EAI_AGAIN, "the name server does not answer"), None),
    ],
)
def test_only_a_name_server_that_says_so_empties_the_rotation(
    answer: Any, known: set[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> set[str] | None:
        async def asked(*_: Any, **__: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", asked)
        return await discovery.addresses("inference-pods", 80)

    assert asyncio.run(look()) == known


def pod(name: str, phase: str = "Running", ip: str = "10.0.0.1", **annotations: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": "mlplatform", "labels": {"app": name}, "annotations": annotations or None}
    return {"metadata": meta, "status": {"phase": phase, **({"podIP": ip} if ip else {})}}


def test_only_living_pods_that_ask_are_scraped() -> None:
    asked = {"prometheus.io/scrape": "true", "prometheus.io/port": "8080"}
    found = targets([pod("a", **asked), pod("b"), pod("c", "Succeeded", **asked), pod("d", "Pending", "", **asked)])
    assert [(group["targets"], group["labels"]["app"]) for group in found] == [(["10.0.0.1:8080"], "a")]


def test_a_pod_that_is_told_to_go_says_so_and_answers_on() -> None:
    async def leave() -> tuple[int, str, int]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        service = Service(PodLifeline({"name": "x", "token": "t", "port": port, "drain_s": 0.3}))
        up = asyncio.Event()

        async def started() -> None:
            service.set_ready()
            up.set()

        serving = asyncio.create_task(service.serve(started))
        await up.wait()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/readyz") as before:
                assert before.status == 200 and before.headers.get("Connection") != "close"
            os.kill(os.getpid(), signal.SIGTERM)
            while not service.draining:
                await asyncio.sleep(0)
            service.set_ready()  # what a service says while it goes does not bring it back
            async with session.get("/readyz") as ready, session.get("/healthz") as alive:
                said = ready.status, str(ready.headers.get("Connection")), alive.status
        await asyncio.wait_for(serving, 2.0)
        return said

    assert asyncio.run(leave()) == (503, "close", 200)
