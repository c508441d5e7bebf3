"""Gauges read on a schedule, in a thread: what a platform says of itself beside the requests.

Owns the rhythm; what is read is a function given by the wiring. A failed read is a gap, not an error, and so is a value
that is no finite number.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from mlchaos_dagster.domain.record import SignalSample
from mlchaos_dagster.engine.ports import SignalSource

Read = Callable[[], Mapping[str, float]]


class PolledSignals:
    """Reads every `interval_s` until stopped; one thread per reader, so a slow one delays no other."""

    def __init__(self, readers: Sequence[tuple[Read, float]], names: Sequence[str]) -> None:
        self.readers, self.names = list(readers), frozenset(names)
        self._lock = threading.Lock()
        self._samples: list[SignalSample] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, zero: float) -> None:
        """Begin reading; times are `time.monotonic()` minus `zero`, taken when the answer arrived."""
        for read, interval_s in self.readers:
            thread = threading.Thread(target=self._loop, args=(read, interval_s, zero), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _loop(self, read: Read, interval_s: float, zero: float) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            try:
                values = read()
            except Exception:  # noqa: BLE001  whatever a reader dies of is a gap; its silence aborts the run
                values = {}
            at = time.monotonic() - zero
            # NaN compares as neither good nor bad: it would be no breach, and still count as seen.
            known = ((n, float(v)) for n, v in values.items() if n in self.names)
            found = [SignalSample(at, n, v) for n, v in known if math.isfinite(v)]
            with self._lock:
                self._samples += found
            # A read that took long does not make the next ones come in a burst.
            due = max(due + interval_s, time.monotonic())
            self._over.wait(due - time.monotonic())

    def drain(self) -> list[SignalSample]:
        """New readings since the last call."""
        with self._lock:
            taken, self._samples = self._samples, []
        return taken

    def stop(self) -> list[SignalSample]:
        """Stop reading. A reader that hangs is left behind; it is a daemon thread."""
        self._over.set()
        for thread in self._threads:
            thread.join(0.5)
        return self.drain()


class MergedSignals:
    """Several sources as one."""

    def __init__(self, sources: Sequence[SignalSource]) -> None:
        self.sources = list(sources)

    @property
    def trouble(self) -> str:
        """Why one of them tells nothing; empty while all is well, or none says."""
        return next(filter(None, (str(getattr(s, "trouble", "")) for s in self.sources)), "")

    def start(self, zero: float) -> None:
        """Begin with all."""
        for source in self.sources:
            source.start(zero)

    def drain(self) -> list[SignalSample]:
        """New readings of all since the last call."""
        return [sample for source in self.sources for sample in source.drain()]

    def stop(self) -> list[SignalSample]:
        """Stop all; the rest."""
        return [sample for source in self.sources for sample in source.stop()]


class Rate:
    """A counter's increase a second, over the last `over_s`.

    A counter that grows now and then is higher in any window than in the baseline before; its rate can be compared.
    """

    def __init__(self, over_s: float = 1.0) -> None:
        self.over_s = over_s
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, at: float, value: float) -> float | None:
        """Take a reading; None until `over_s` are covered (at the start, and after the counter began anew)."""
        if self._seen and value < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((at, value))
        while len(self._seen) > 1 and at - self._seen[1][0] >= self.over_s:
            self._seen.popleft()
        since, before = self._seen[0]
        return (value - before) / (at - since) if at - since >= self.over_s else None
