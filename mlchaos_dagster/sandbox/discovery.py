"""Which replicas there are, by DNS: a headless service has one address for each of its pods that is ready.

A name has the addresses that the platform believes in. That it forgets a dead one takes as long as the name server
remembers (5 s here); until then ejection and a try at another replica are what protects the caller.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

_LOOK_S = 0.5
_NOBODY = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
"""The name server knows: there is no address. Anything else it says, or its silence, leaves what was known before."""

Tell = Callable[[Mapping[str, Mapping[str, Any]]], None]


async def follow(url: str, tell: Tell) -> None:
    """Task: look the host of ``url`` up again and again, and tell all there are (see ``Gateway.use_replicas``)."""
    split = urlsplit(url)
    host, port = split.hostname or "", split.port or 80
    before: set[str] | None = None
    while True:
        found = await addresses(host, port)
        if found is not None and found != before:
            tell({a: {"url": f"http://{a}:{port}", "ready": True, "isolated": False} for a in sorted(found)})
            before = found
        await asyncio.sleep(_LOOK_S)


async def addresses(host: str, port: int) -> set[str] | None:
    """All IPv4 addresses of a name; None when nobody can tell."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return set() if error.errno in _NOBODY else None
    except OSError:
        return None
    return {str(where[4][0]) for where in found}
