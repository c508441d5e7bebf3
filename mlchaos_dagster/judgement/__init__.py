"""What the numbers of a run say: pure functions from arrays to frozen dataclasses.

No I/O, no clock, no dagster; randomness only from a seed argument. Times are seconds on one
monotonic clock, latencies seconds, shares 0 to 1. An unknown value is `None`, never zero.
"""

from __future__ import annotations
