"""Interrupts are noted, never raised, from the guards to the report.

Dagster raises them in user code, and between two ops remembers them and raises as soon as the next one begins. The
fault is gone then, but nobody judges and nothing is reported: a run that was stopped would vanish from the history.
Its contexts install a handler each; while a run of ours is open they are kept from it, and the handler is ours.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from dagster._utils import interrupts

log = logging.getLogger(__name__)

_INSTALLER = "_replace_interrupt_signal"
"""What Dagster's contexts install their handlers with. Private: tests tell when a new Dagster has renamed it."""


class Noted:
    """Signals become a call. Main thread only; elsewhere, and with a Dagster that we do not know, nothing changes."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._installer: Any = None

    def begin(self) -> None:
        """From here on. Idempotent."""
        if self._installer is not None or threading.current_thread() is not threading.main_thread():
            return
        self._installer = getattr(interrupts, _INSTALLER, None)
        if self._installer is None:
            log.warning(
                "this Dagster handles interrupts in a way that is not known here; a stopped run may lack its report"
            )
            return
        setattr(interrupts, _INSTALLER, lambda _handler: None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def end(self) -> None:
        """Dagster's contexts install handlers again; those that are open put theirs back as they end. Idempotent."""
        if self._installer is not None:
            setattr(interrupts, _INSTALLER, self._installer)
            self._installer = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._note(signal.Signals(number).name)
