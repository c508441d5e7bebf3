"""The supervisor's book where targets refuse, or have what the book does not mean. Targets are stood for by this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlchaos_dagster.sandbox.chaotic import ModelChaos
from mlchaos_dagster.sandbox.fault_book import FaultBook
from mlchaos_dagster.sandbox.faults import Fault, Refused
from mlchaos_dagster.sandbox.handlers import Handler
from mlchaos_dagster.sandbox.truth import TruthLog


class Stubborn:
    """Targets a, b and c; those in `refuses` do not give a fault up."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.refuses: set[str] = set()

    def targets(self) -> list[str]:
        return ["a", "b", "c"]

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return dict(given)

    async def inject(self, fault: Fault) -> None:
        self.there.add(fault.target)

    async def clear(self, fault: Fault) -> None:
        if fault.target in self.refuses:
            raise Refused(503, f"{fault.target} says no")
        self.there.discard(fault.target)

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        return fault.target in self.there, [], {}


async def _nobody(*_: Any) -> tuple[int, Any]:
    raise OSError


def _book(directory: Path, handler: Handler) -> FaultBook:
    truth = TruthLog(directory / "truth.jsonl")
    return FaultBook({}, dict, _nobody, truth, directory, lambda kind: handler)


def _request(kind: str, target: str, token: int, **params: Any) -> dict[str, Any]:
    return {"lease_id": "l", "token": token, "kind": kind, "target": target, "params": params, "deadline_s": 60}


def test_one_target_that_refuses_does_not_keep_the_fault_on_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        targets = Stubborn()
        book = _book(tmp_path, targets)
        for token, target in enumerate(targets.targets(), 1):
            await book.add(_request("cpu_stress", target, token))
        targets.refuses = {"a", "c"}
        with pytest.raises(Refused, match="a says no; c says no") as refused:
            await book.remove("l")
        assert refused.value.status == 503
        assert targets.there == {"a", "c"}
        assert [fault["target"] for fault in (await book.present())["faults"]] == ["a", "c"]
        targets.refuses = set()
        assert [gone["target"] for gone in await book.remove("l")] == ["a", "c"]
        assert targets.there == set() and (await book.present())["faults"] == []

    asyncio.run(scenario())


class Replicas:
    """What `ModelChaos` needs of a supervisor, with two replicas that say what lease they have."""

    def __init__(self) -> None:
        self.slots = {
            name: SimpleNamespace(name=name, role="inference", running=True, port=1, pid=1) for name in ("one", "two")
        }
        self.lease: dict[str, str] = dict.fromkeys(self.slots, "")

    async def call(self, slot: Any, method: str, path: str, body: Any, _: float) -> tuple[int, Any]:
        if method == "PUT":
            self.lease[slot.name] = body["lease_id"]
        elif method == "DELETE":
            self.lease[slot.name] = ""
        has = self.lease[slot.name]
        counts = {"lease_id": has, "exceptions": 0, "timeouts": 0, "wrong": 0, "calls": 0}
        return 200, {"chaos": counts if has else None}


@pytest.mark.req("R2-05")
def test_a_wrapper_that_comes_after_its_removal_is_seen_and_taken_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        replicas: Any = Replicas()
        book = _book(tmp_path, ModelChaos(replicas))
        await book.add(_request("model_chaos", "one", 1, exceptions=1.0))
        assert [fault["target"] for fault in (await book.present())["faults"]] == ["one"], "told once"
        await book.remove("l")
        assert (await book.present())["faults"] == []
        replicas.lease["two"] = "l"  # a request that was given up arrives
        [stray] = (await book.present())["faults"]
        assert (stray["lease_id"], stray["target"], stray["effective"]) == ("l", "two", True)
        await book.remove("l")
        assert replicas.lease == {"one": "", "two": ""} and (await book.present())["faults"] == []

    asyncio.run(scenario())
