"""Chaos engineering for ML platforms as Dagster assets.

Importing this package imports nothing else: `mlchaos list`, `stop` and `recover` start fast
and work where Dagster does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlchaos_dagster.chaos_model import ChaosConfig, ChaosModelWrapper
    from mlchaos_dagster.orchestration.component import ChaosLibrary

__all__ = ["ChaosConfig", "ChaosLibrary", "ChaosModelWrapper", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "ChaosLibrary": "mlchaos_dagster.orchestration.component",  # the component for `defs.yaml`; imports Dagster
    "ChaosConfig": "mlchaos_dagster.chaos_model",
    "ChaosModelWrapper": "mlchaos_dagster.chaos_model",
}


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
