"""A rollout that begins anew beside a registry that is filled: what was agreed on is in the registry, not in its memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mlchaos_dagster.sandbox import rollout as module
from mlchaos_dagster.sandbox.registry import CURRENT, GOLDEN
from mlchaos_dagster.sandbox.rollout import Rollout


class Registry:
    """As `RegistryClient`, in memory."""

    def __init__(self, **held: Any) -> None:
        self.held = {GOLDEN: {"rows": [[1.0]], "scores": [0.5], "tolerance": 0.2}, **held}

    async def current(self) -> Any:
        return self.held.get(CURRENT)

    async def golden(self) -> Any:
        return self.held.get(GOLDEN)

    async def card(self, version: str) -> dict[str, Any]:
        return {"version": version, "sha256": f"sum-{version}"}

    async def write(self, key: str, value: dict[str, Any]) -> None:
        self.held[key] = value


class Canary:
    """Answers every try-out with one score; as an `aiohttp` session."""

    def __init__(self, score: float) -> None:
        self.score, self.asked = score, list[Any]()

    def post(self, url: str, *, json: Any, **_: Any) -> Canary:
        self.asked.append(json)
        return self

    async def __aenter__(self) -> Canary:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def json(self) -> dict[str, Any]:
        return {"scores": [self.score]}


@pytest.fixture
def begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rollout:
    monkeypatch.setattr(module, "_CANARY_S", 0.0)
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "model.json").write_text(json.dumps({"version": "1", "sha256": "sum-1", "golden_rows": [[1.0]]}))
    config = {"mechanisms": {"canary": True}, "token": "t", "model_dir": str(tmp_path)}
    service: Any = SimpleNamespace(config=config, peers={}, registry=CollectorRegistry(), set_ready=lambda *_: None)
    return Rollout(service)


@pytest.mark.req("R3-04")
@pytest.mark.parametrize(("score", "serves"), [(0.6, "2"), (0.9, "1")])
def test_the_next_candidate_is_held_against_what_was_agreed_before_the_restart(
    begun_anew: Rollout, score: float, serves: str
) -> None:
    registry, canary = Registry(**{CURRENT: {"version": "1"}}), Canary(score)
    begun_anew.registry, begun_anew.session = registry, canary  # type: ignore[assignment]
    asyncio.run(begun_anew.look())
    registry.held[CURRENT] = {"version": "2", "previous": "1"}
    asyncio.run(begun_anew.look())
    assert canary.asked[0]["rows"] == [[1.0]]
    assert (begun_anew.stable, registry.held[CURRENT]["version"]) == (serves, serves)


def test_a_candidate_that_it_finds_at_once_and_rejects_gives_way_to_the_version_of_the_replicas(
    begun_anew: Rollout,
) -> None:
    registry = Registry(**{CURRENT: {"version": "2", "previous": "1"}})
    begun_anew.registry, begun_anew.session = registry, Canary(0.9)  # type: ignore[assignment]
    asyncio.run(begun_anew.look())
    assert registry.held[CURRENT]["version"] == "1" and "2" in begun_anew.rejected
    asyncio.run(begun_anew.look())
    assert begun_anew.stable == "1"
