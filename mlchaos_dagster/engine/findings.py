"""What a backend judged by itself in its own fault: asked once, after a full window and before the fault is taken away.

The backend may need a while to come to it. Meanwhile its fault may still be there, so everything that ends a window ends
this wait as well: limits, lost measurements, somebody's word. Then nothing was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mlchaos_dagster.domain.record import AbortFacts, Finding
from mlchaos_dagster.engine.confirmation import at_once
from mlchaos_dagster.engine.degradation import Degradation
from mlchaos_dagster.engine.ports import Driver, Judging, Lease, Step
from mlchaos_dagster.engine.renewal import Renewal
from mlchaos_dagster.engine.watch import Tracker
from mlchaos_dagster.errors import Halted

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run

FINDINGS_S = 100.0
"""Bound of the wait. A ChaosResult has its verdict some seconds after its fault ended by itself, which is later than ours."""


def patience_s(driver: Driver) -> float:
    """How much longer a fault of this driver may live than its window, for the sake of what its backend says of it."""
    return FINDINGS_S if hasattr(driver, "findings") else 0.0


def take_findings(
    run: Run, lease: Lease, step: Step, renew: Renewal, trackers: Sequence[Tracker], degradation: Degradation
) -> AbortFacts | None:
    """Ask, and leave the answer in `run.findings`; returns why to stop instead. A backend that cannot say judged nothing.

    Args:
        run: the run.
        lease: of its fault.
        step: for a driver that is called in this very thread; it raises Halted to end the wait.
        renew: of the lease.
        trackers: of the abort limits, as they stood when the window ended.
        degradation: the same of the other guard.
    """
    if run.shadow or not patience_s(run.kit.driver):
        return None
    driver, over, found = cast(Judging, run.kit.driver), False, (False, cast(Any, None))

    def until_over(done: int, total: int) -> None:
        if over:
            raise Halted("nobody waits for it any more")

    if run.kit.background is not None:
        poll = run.kit.background(lambda: driver.findings(lease, until_over))
    else:
        poll = at_once(lambda: driver.findings(lease, step))

    def each(t: float) -> AbortFacts | bool | None:
        nonlocal found
        renew.look(t)
        found = poll()
        return found[0] or degradation.look(t)

    begun = run.watch.now
    abort = run.watch.until(begun + FINDINGS_S, "fault", trackers=trackers, each=each, watcher=run.watcher)
    over = True
    if abort is not None:
        return abort
    run.findings = _answer(lease, *found)
    if run.findings:
        run.mark("judged", f"by {lease.driver} after {run.watch.now - begun:.1f} s")
    return None


def _answer(lease: Lease, done: bool, result: Any) -> tuple[Finding, ...]:
    if not done:
        return (_nothing(lease, f"no judgement within {FINDINGS_S:g} s"),)
    if isinstance(result, Exception):
        return (_nothing(lease, f"could not be asked: {' '.join(str(result).split()) or type(result).__name__}"),)
    return tuple(result)


def _nothing(lease: Lease, saw: str) -> Finding:
    return Finding(name=f"{lease.driver} verdict", passed=None, saw=saw)
