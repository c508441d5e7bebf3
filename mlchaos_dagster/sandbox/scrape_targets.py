"""Which pods Prometheus scrapes: those of this namespace that ask for it by annotation, written as a file it watches.

For builds of Prometheus without Kubernetes discovery, such as Debian's. A pod asks with ``prometheus.io/scrape: "true"``
and ``prometheus.io/port``. Needs a service account that may list pods. ``PLATFORM_DATA`` is shared with Prometheus.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp

from .lifeline import Lifeline
from .model import replace
from .service import Service

FILE = "targets.json"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_API = "https://kubernetes.default.svc"
_EVERY_S = 2.0
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Target groups (``file_sd``) of pods as the API tells them; what has ended or has no address is left out."""
    found: list[dict[str, Any]] = []
    for pod in pods:
        meta, address = pod["metadata"], pod["status"].get("podIP")
        asked = meta.get("annotations") or {}
        if asked.get("prometheus.io/scrape") != "true" or not address:
            continue
        if pod["status"].get("phase") in ("Succeeded", "Failed"):
            continue
        labels = {
            "app": (meta.get("labels") or {}).get("app", ""),
            "pod": meta["name"],
            "namespace": meta["namespace"],
            "__metrics_path__": asked.get("prometheus.io/path", "/metrics"),
        }
        found.append({"targets": [f"{address}:{asked.get('prometheus.io/port', '80')}"], "labels": labels})
    return sorted(found, key=lambda group: group["targets"])


async def main(lifeline: Lifeline) -> None:
    """Keep the file true until told to stop."""
    service = Service(lifeline)
    path = Path(service.config["data"]) / FILE
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        before = None
        url = f"{_API}/api/v1/namespaces/{(_ACCOUNT / 'namespace').read_text()}/pods"
        trusted = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            while True:
                try:
                    # Read anew each time: the kubelet renews it.
                    headers = {"Authorization": f"Bearer {(_ACCOUNT / 'token').read_text()}"}
                    async with session.get(url, headers=headers, ssl=trusted) as response:
                        response.raise_for_status()
                        found = targets((await response.json())["items"])
                except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                    # What was known goes on being scraped.
                    service.set_ready(before is not None, f"the API server does not tell: {error}")
                else:
                    if found != before:
                        replace(path, json.dumps(found).encode())
                        before = found
                    service.set_ready()
                await asyncio.sleep(_EVERY_S)

    async def started() -> None:
        watching.append(asyncio.get_running_loop().create_task(watch()))

    await service.serve(started)
