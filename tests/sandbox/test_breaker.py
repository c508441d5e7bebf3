"""The circuit breaker on a clock that stands still until told otherwise."""

from __future__ import annotations

from mlchaos_dagster.sandbox.breaker import Breaker


class Hand:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _opened(clock: Hand) -> Breaker:
    breaker = Breaker(failures=5, window=10, open_s=2.0, clock=clock)
    for ok in (True, False, False, True, False, False, False):
        assert breaker.state == "closed"
        breaker.record(ok)
    return breaker


def test_opens_after_five_failures_of_the_last_ten() -> None:
    breaker = _opened(Hand())
    assert (breaker.state, breaker.opened_total, breaker.allow()) == ("open", 1, False)


def test_old_failures_are_forgotten() -> None:
    breaker = Breaker(failures=5, window=10)
    for ok in [False] * 4 + [True] * 7 + [False] * 4:
        breaker.record(ok)
    assert breaker.state == "closed"


def test_one_trial_closes_or_opens_again() -> None:
    clock = Hand()
    breaker = _opened(clock)
    clock.now = 2.0
    assert breaker.state == "half_open"
    assert breaker.would_allow() and breaker.allow()
    assert not breaker.would_allow() and not breaker.allow()
    breaker.record(False)
    assert (breaker.state, breaker.opened_total) == ("open", 2)
    clock.now = 4.0
    assert breaker.allow()
    breaker.record(True)
    assert (breaker.state, breaker.allow()) == ("closed", True)


def test_a_straggler_does_not_decide_and_a_lost_trial_is_replaced() -> None:
    clock = Hand()
    breaker = _opened(clock)
    breaker.record(True)
    assert breaker.state == "open"
    clock.now = 2.0
    assert breaker.allow()
    clock.now = 4.0
    assert breaker.allow()


def test_switched_off_lets_everything_pass() -> None:
    breaker = Breaker(failures=1, window=1, enabled=False)
    for _ in range(9):
        breaker.record(False)
    assert (breaker.state, breaker.opened_total, breaker.allow()) == ("closed", 0, True)
