"""A handler's verb in a thread of its own, while the engine's `step` goes on in the caller's.

One call to an API server that answers slowly takes seconds, and a handler makes several between two steps: meanwhile the
run would neither measure, nor hear a stop, nor renew its lease, and its watchdog would kill it for hung.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from mlchaos_dagster.engine.ports import Step, no_step

T = TypeVar("T")
TICK_S = 0.2
STUCK_S = 60.0
"""A handler that has not stepped for so long hangs: then nobody steps, and the watchdog has it. (Calls are bounded.)"""


def beside(work: Callable[[Step], T], step: Step) -> T:
    """`work(step)`, and its result or exception.

    What `step` raises is raised once the work has ended, which hears of it at its own next step: nothing is taken away
    while something still is being made.
    """
    if step is no_step:  # nobody to keep alive
        return work(step)
    return _Beside(work, step).result()


class _Beside(Generic[T]):
    def __init__(self, work: Callable[[Step], T], step: Step) -> None:
        self.work, self.step = work, step
        self.at, self.progress = time.monotonic(), (0, 0)
        self.out: BaseException | None = None
        """What `step` raised first."""
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.over = False
        self.asked, self.answered = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="mlchaos-verb", daemon=True).start()

    def result(self) -> T:
        """Wait for it, stepping."""
        while True:
            asked = self.asked.wait(TICK_S)
            if self.over:
                break
            if not asked and time.monotonic() - self.at > STUCK_S:
                continue
            if asked:
                self.asked.clear()
            try:
                self.step(*self.progress)
            except BaseException as e:  # noqa: BLE001  raised in the work, and below when it has ended
                self.out = self.out or e
            if asked:
                self.answered.set()
        if self.out is not None:
            raise self.out
        if self.error is not None:
            raise self.error
        return self.results[0]

    def _run(self) -> None:
        try:
            self.results.append(self.work(self._told))
        except BaseException as e:  # noqa: BLE001  raised in the caller's thread
            self.error = e
        self.over = True
        self.asked.set()

    def _told(self, done: int, total: int) -> None:
        """The work's own step is made in the caller's thread, and waited for: who is held up there makes nothing here."""
        self.at, self.progress = time.monotonic(), (done, total)
        self.answered.clear()
        self.asked.set()
        self.answered.wait()
        if self.out is not None:
            raise self.out
