"""One request as the probe saw it. Moves to `domain/record.py` when that has its `RequestSample`."""

from __future__ import annotations

from typing import NamedTuple


class Sample(NamedTuple):
    """One request of the fixed schedule; times in seconds after the caller's zero on `time.monotonic()`."""

    due_s: float
    """When the schedule wanted it sent. `done_s - due_s` is the latency free of coordinated omission."""
    sent_s: float
    """When work on it began (connecting included). `sent_s - due_s` is the probe's own lateness."""
    done_s: float
    """When the last byte of the answer was read, or the failure was known."""
    status: int
    """HTTP status; 0 connection or protocol error, -1 total deadline exceeded, -2 never sent (the probe's own limit)."""
    ok: bool
    path: str
    """Which path answered (a response header); '' when the answer does not say, 'error' when there was none."""
    replica: str
