"""A handful of requests, now: for guards and `doctor`, where no schedule matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from mlchaos_dagster.errors import ProbeError
from mlchaos_dagster.probes._machine import trusting


def success_ratio(
    url: str,
    count: int,
    timeout_s: float,
    *,
    method: str = "GET",
    bodies: Sequence[Any] = (),
    headers: Mapping[str, str] | None = None,
    ca_file: str = "",
) -> float:
    """Share of `count` requests, one after the other, that were answered below 400 in time; https as the probe trusts.

    Raises:
        ProbeError: not one was answered at all; nobody knows how the target is.
    """
    answered = good = 0
    error: httpx.HTTPError | None = None
    try:
        trust = trusting(ca_file) if ca_file else True
        with httpx.Client(timeout=timeout_s, trust_env=False, headers=dict(headers or {}), verify=trust) as client:
            for k in range(count):
                try:
                    response = client.request(method, url, json=bodies[k % len(bodies)] if bodies else None)
                except httpx.HTTPError as e:
                    error = e
                    if k - answered >= 3:
                        break  # three without an answer: the rest would only cost time
                    continue
                answered += 1
                good += response.status_code < 400
    except (httpx.InvalidURL, ValueError) as e:
        raise ProbeError(f"{url}: {e}") from e
    except OSError as e:
        raise ProbeError(f"{ca_file}: {e}") from e
    if not answered:
        raise ProbeError(f"{url} does not answer: {error or 'no request was sent'}")
    return good / count
