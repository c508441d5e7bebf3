"""Fixtures of the probe tests; the servers themselves are in `probe_servers.py`."""

from __future__ import annotations

from probe_servers import prometheus_process, serve

__all__ = ["prometheus_process", "serve"]
