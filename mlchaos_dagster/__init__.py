"""Chaos engineering for ML platforms as Dagster assets.

Importing this package imports nothing else: `mlchaos list`, `stop` and `recover` start fast
and work where Dagster does not.
"""

from __future__ import annotations

__version__ = "0.1.0"
