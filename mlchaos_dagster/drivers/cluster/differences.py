"""How a neutral fault through another tool differs from our own of that name: the words of `docs/backends.md`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One kind through one tool."""

    by: str
    """Which resource or experiment makes it."""
    differs: str
    """What is hit, and how the effect differs from the native fault."""
    dead: str
    """What ends it when everybody of ours is dead."""
    sees: str
    """What our own eyes look at, beside the tool's word."""
    limits: str = ""
    """What is refused, or known not to work."""
