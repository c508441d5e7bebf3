"""Ids of targets, as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UID = re.compile(r"@[0-9A-Za-z-]{8,}$")
"""What ends an id that is frozen by uid (Kubernetes): it tells objects of one name apart, and people nothing."""


def plain(target: str) -> str:
    """One id without its uid: `pod/NAMESPACE/NAME`."""
    return _UID.sub("", target)


def listed(targets: Iterable[str], most: int | None = None) -> str:
    """Ids with commas between; those above `most` are counted."""
    shown = [plain(t) for t in targets]
    if most is None or len(shown) <= most:
        return ", ".join(shown)
    return f"{', '.join(shown[:most])} and {len(shown) - most} more"
