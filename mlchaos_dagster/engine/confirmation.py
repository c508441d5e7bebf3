"""Whether the fault has its effect: asked of the target beside the watch loop, soon after the fault and at the window's end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.ports import Lease
from mlchaos_dagster.errors import DriverError

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run

LAST_LOOK_S = 2.5
"""Bound of the last look; a target that says nothing for so long cannot be said to be under the fault."""
LOOK_AHEAD_S = 1.0
"""How long before the window's end the last look at the fault begins: a slow link answers slowly."""


class Confirmation:
    """Asks the target, beside the loop, until the fault's effect is seen."""

    def __init__(self, run: Run, lease: Lease) -> None:
        self.run, self.lease = run, lease
        self.until = run.watch.now + run.environment.safety.confirm_within
        self.poll: Callable[[], tuple[bool, Any]] | None = None
        self.over = run.shadow

    def look(self, t: float) -> None:
        """One look; starts the next read of the target when the last one is back."""
        if self.over:
            return
        if self.poll is None:
            self.poll = self._begin()
        done, result = self.poll()
        if not done:
            return
        self.poll = None
        if isinstance(result, Evidence):
            if result.effective:
                self.over = True
                self._keep(True, result)
                self.run.mark("confirmed", result.lines[0] if result.lines else "")
                return
            self._keep(False, result)
        if t > self.until:
            self.over = True

    def _read(self) -> Evidence:
        return self.run.kit.driver.active(self.lease)

    def _keep(self, confirmed: bool, evidence: Evidence) -> None:
        assert self.run.fault is not None
        self.run.fault = self.run.fault.model_copy(update={"confirmed": confirmed, "evidence": evidence.lines})

    def at_the_end(self, t: float, end: float) -> None:
        """Begin the last look a little before the window ends, so that the fault need not wait for its answer."""
        if self.held and self.over and self.poll is None and t >= end - LOOK_AHEAD_S:
            self.poll = self._begin()

    def still_there(self, renew: Callable[[], None]) -> None:
        """At the end of a full window: a fault that vanished early, or lost its effect, did not test the window."""
        assert self.run.fault is not None
        if not self.held or not self.run.fault.confirmed:
            return
        poll, clock = self.poll or self._begin(), self.run.kit.clock
        until = clock.monotonic() + LAST_LOOK_S
        while not (found := poll())[0] and clock.monotonic() < until:
            self.run.watch.pump()
            renew()
            clock.sleep(0.02)
        evidence = found[1]
        if not isinstance(evidence, Evidence):
            said = f"at the window's end: {evidence or 'the target did not say'}"
            self._keep(False, Evidence(present=False, effective=False, lines=(said,)))
        elif not (evidence.present and evidence.effective):
            what = "lost its effect" if evidence.present else "was gone"
            lines = (f"the fault {what} before the window ended", *evidence.lines)
            self._keep(False, Evidence(present=False, effective=False, lines=lines))

    @property
    def held(self) -> bool:
        """Whether the fault lasts as long as its window; a single kill is over when it fired."""
        return is_held(self.lease.kind, self.lease.params) and not self.run.shadow

    def _begin(self) -> Callable[[], tuple[bool, Any]]:
        background = self.run.kit.background
        return background(self._read) if background else at_once(self._read)


def at_once(read: Callable[[], Any]) -> Callable[[], tuple[bool, Any]]:
    """A background that works at once: for simulations."""

    def poll() -> tuple[bool, Any]:
        try:
            return True, read()
        except DriverError as e:
            return True, e

    return poll
