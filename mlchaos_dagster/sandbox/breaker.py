"""A circuit breaker: closed → open after too many failures → one trial after a while → closed or open again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Breaker:
    """Opens after ``failures`` of the last ``window`` results; lets one trial through after ``open_s``.

    ``enabled=False`` makes it a mere counter that lets everything pass (the mechanism is switched off).
    """

    def __init__(
        self,
        failures: int = 5,
        window: int = 10,
        open_s: float = 2.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures = failures
        self._open_s = open_s
        self._enabled = enabled
        self._clock = clock
        self._results: deque[bool] = deque(maxlen=window)
        self._opened_at: float | None = None
        self._trial_at: float | None = None
        self.opened_total = 0

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half_open`` (time for a trial, or one is under way)."""
        if self._opened_at is None:
            return "closed"
        return "open" if self._clock() - self._opened_at < self._open_s else "half_open"

    def would_allow(self) -> bool:
        """True when ``allow`` would let a call through now; takes no trial."""
        if self._opened_at is None:
            return True
        now = self._clock()
        if now - self._opened_at < self._open_s:
            return False
        # A trial whose caller vanished (cancelled) must not keep the breaker half open for ever.
        return self._trial_at is None or now - self._trial_at >= self._open_s

    def allow(self) -> bool:
        """True when the caller may try; while half open that is one caller, whose result decides."""
        if not self.would_allow():
            return False
        if self._opened_at is not None:
            self._trial_at = self._clock()
        return True

    def record(self, ok: bool) -> None:
        """Take the result of a try."""
        if not self._enabled:
            return
        if self._opened_at is not None:
            if self._trial_at is None:
                return  # a straggler from before it opened says nothing about now
            self._trial_at = None
            if ok:
                self._opened_at = None
                self._results.clear()
            else:
                self._opened_at = self._clock()
                self.opened_total += 1
            return
        self._results.append(ok)
        if self._results.count(False) >= self._failures:
            self._opened_at = self._clock()
            self._trial_at = None
            self.opened_total += 1
