"""The verbs of the Kubernetes driver against an API server that is slow, lies, or serves others meanwhile."""

from __future__ import annotations

import threading

import pytest

from mlchaos_dagster.drivers.kubernetes import beside as module
from mlchaos_dagster.drivers.kubernetes.beside import beside
from mlchaos_dagster.engine.ports import Step
from mlchaos_dagster.errors import Halted, InjectFailed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.005)


class Loop:
    """The engine's side: counts, and wants out at the `out`-th step."""

    def __init__(self, out: int = 10**9) -> None:
        self.out, self.steps, self.enough = out, 0, threading.Event()
        self.threads: set[int] = set()

    def __call__(self, done: int, total: int) -> None:
        self.steps += 1
        self.threads.add(threading.get_ident())
        if self.steps >= 5:
            self.enough.set()
        if self.steps >= self.out:
            raise Halted("stop")


def test_a_call_that_takes_long_neither_stops_the_measurements_nor_the_renewals() -> None:
    loop = Loop()
    assert beside(lambda _: loop.enough.wait(5.0), loop), "steps go on while one call is under way"
    assert loop.threads == {threading.get_ident()}


def test_who_wants_out_is_let_out_when_nothing_is_being_made_any_more() -> None:
    loop, made = Loop(out=1), list[str]()

    def work(step: Step) -> None:
        loop.enough.wait(5.0)
        made.append("first")
        step(1, 2)
        made.append("second")

    with pytest.raises(Halted):
        beside(work, loop)
    assert made == ["first"]


def test_what_the_work_raises_is_raised_and_a_stop_comes_before_it() -> None:
    def fails(step: Step) -> None:
        raise InjectFailed("no")

    with pytest.raises(InjectFailed):
        beside(fails, Loop())

    late = Loop(out=1)

    def fails_late(step: Step) -> None:
        late.enough.wait(5.0)
        raise InjectFailed("no")

    with pytest.raises(Halted):
        beside(fails_late, late)


def test_work_that_hangs_looks_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STUCK_S", 0.05)
    loop, never = Loop(), threading.Event()
    threading.Timer(0.3, never.set).start()
    beside(lambda _: never.wait(5.0), loop)
    assert 0 < loop.steps < 20
