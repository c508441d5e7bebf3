"""Chaos engineering for ML platforms as Dagster assets.

Importing this package imports nothing else: `mlchaos list`, `stop` and `recover` start fast
and work where Dagster does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlchaos_dagster.orchestration.component import ChaosLibrary

__all__ = ["ChaosLibrary", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`mlchaos_dagster.ChaosLibrary`, the component for `defs.yaml`; Dagster is imported when it is asked for."""
    if name != "ChaosLibrary":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlchaos_dagster.orchestration.component import ChaosLibrary

    return ChaosLibrary
