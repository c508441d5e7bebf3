"""SLIs by PromQL: instant and range queries that give one series or say why not.

Owns the mapping from Prometheus' answers and the client's errors to readings, gaps and `ProbeError`. Knows nothing of
SLOs. The client (`prometheus-api-client`) is imported at the first query, so that loading a library of experiments does
not pay for it. NaN is a gap (0/0: nobody asked, so there is nothing to say); infinity is a value (a quantile above the
highest bucket). An empty answer is an error, not a zero: a misspelt metric would otherwise look like perfect health.
"""

from __future__ import annotations

import ast
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from mlchaos_dagster.errors import ConfigError, ProbeError

_MAX_ABANDONED = 3
"""Queries that may hang in the background at a time; beyond that we say so instead of adding threads."""


class Reading(NamedTuple):
    """One value of a series."""

    wall_s: float
    """Evaluation time, seconds since the epoch, by Prometheus' clock."""
    value: float


@dataclass(frozen=True)
class PrometheusConfig:
    """Where Prometheus is.

    Raises:
        ConfigError: the URL or the deadline cannot work.
    """

    url: str
    """Such as http://prometheus.monitoring:9090; a path prefix is kept."""
    timeout_s: float = 2.0
    """Total deadline of one query. Short: the watch loop would rather have a gap than wait."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    verify_tls: bool = True
    ca_file: str = ""
    """Certificates to trust instead of the usual ones."""

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.url)
            good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            good = False
            url = urlsplit("")
        if url.username or url.password:
            raise ConfigError("Prometheus: the URL holds credentials. Allowed: an Authorization header by reference")
        if not good:
            raise ConfigError(f"Prometheus: {self.url!r} is not a URL. Allowed: http://host[:port] or https")
        if not (math.isfinite(self.timeout_s) and 0 < self.timeout_s <= 300):
            raise ConfigError(f"Prometheus: timeout_s is {self.timeout_s}. Allowed: more than 0, at most 300")


class PrometheusProbe:
    """Asks one Prometheus. Not for use by several threads at a time."""

    def __init__(self, config: PrometheusConfig) -> None:
        self.config = config
        self._client: Any = None
        self._abandoned: list[threading.Thread] = []

    def instant(self, query: str, at_wall_s: float | None = None) -> Reading | None:
        """The one value of `query` now, or at a time (seconds since the epoch). None is a gap: the value is NaN.

        Raises:
            ProbeError: no answer in time, a refused query, or not exactly one series.
            ConfigError: the client library is missing.
        """
        params = {"timeout": self._timeout()}
        if at_wall_s is not None:
            params["time"] = f"{at_wall_s:.3f}"
        result = self._ask(query, lambda client: client.custom_query(query=query, params=params))
        if result and not isinstance(result[0], Mapping):  # a scalar, such as `scalar(x)`: [time, value]
            return _reading(query, result)
        return _reading(query, _only_series(query, result).get("value"))

    def _timeout(self) -> str:
        """In whole milliseconds: Prometheus knows no fractions of a unit."""
        return f"{max(1, round(self.config.timeout_s * 1000))}ms"

    def range(self, query: str, start_wall_s: float, end_wall_s: float, step_s: float) -> list[Reading]:
        """The one series of `query` from start to end (seconds since the epoch), both included, every `step_s`.

        Steps without a value, or with NaN, are missing from the list: they are gaps.

        Raises:
            ProbeError: no answer in time, a refused query (Prometheus gives at most 11,000 steps), or not exactly one
                series.
            ConfigError: the client library is missing.
        """
        if not (math.isfinite(step_s) and step_s > 0 and start_wall_s <= end_wall_s):
            raise ProbeError(f"Prometheus: cannot ask from {start_wall_s} to {end_wall_s} every {step_s} s")
        # The client rounds both ends to whole seconds; explicit parameters win over its own.
        params = {
            "start": f"{start_wall_s:.3f}",
            "end": f"{end_wall_s:.3f}",
            "timeout": self._timeout(),
        }
        start = datetime.fromtimestamp(start_wall_s, timezone.utc)
        end = datetime.fromtimestamp(end_wall_s, timezone.utc)
        result = self._ask(
            query,
            lambda client: client.custom_query_range(
                query=query, start_time=start, end_time=end, step=f"{step_s:g}", params=params
            ),
        )
        values = _only_series(query, result).get("values")
        if not isinstance(values, list):
            raise ProbeError(f"Prometheus: {query}: the answer has no values")
        readings = [_reading(query, pair) for pair in cast("list[Any]", values)]
        return [reading for reading in readings if reading is not None]

    def close(self) -> None:
        """Release the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> PrometheusProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, query: str, send: Callable[[Any], Any]) -> list[Any]:
        """Send in a thread: the client's timeout is per read, so an answer that drips would hold the watch loop."""
        client = self._connected()
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= _MAX_ABANDONED:
            raise ProbeError(f"Prometheus: {len(self._abandoned)} earlier queries still hang at {self.config.url}")
        outcome: list[Any] = []
        failure: list[Exception] = []

        def work() -> None:
            try:
                outcome.append(send(client))
            except Exception as error:  # noqa: BLE001  (handed to the caller's thread, which sorts it)
                failure.append(error)

        thread = threading.Thread(target=work, name="prometheus-query", daemon=True)
        thread.start()
        thread.join(self.config.timeout_s)
        if thread.is_alive():
            self._abandoned.append(thread)
            self._client = None  # its connection belongs to the hanging query
            wait = f"{self.config.timeout_s:g} s"
            raise ProbeError(f"Prometheus: {query}: no answer within {wait} from {self.config.url}")
        if failure:
            self._raise(query, failure[0])
        if not isinstance(outcome[0], list):
            raise ProbeError(f"Prometheus: {query}: the answer is not a list of series")
        return cast("list[Any]", outcome[0])

    def _raise(self, query: str, error: Exception) -> None:
        from http.client import HTTPException

        from prometheus_api_client.exceptions import PrometheusApiClientException
        from requests.exceptions import RequestException
        from urllib3.exceptions import HTTPError

        if isinstance(error, PrometheusApiClientException):
            raise ProbeError(f"Prometheus: {query}: {_refusal(str(error))}") from error
        if _timed_out(error):
            wait = f"{self.config.timeout_s:g} s"
            raise ProbeError(f"Prometheus: {query}: no answer within {wait} from {self.config.url}") from error
        if isinstance(error, (KeyError, TypeError, ValueError)) and not isinstance(error, OSError):
            raise ProbeError(f"Prometheus: {query}: {self.config.url} does not answer like Prometheus") from error
        if isinstance(error, (RequestException, HTTPError, HTTPException, OSError)):
            if "JSON" in type(error).__name__:
                raise ProbeError(f"Prometheus: {query}: {self.config.url} does not answer like Prometheus") from error
            raise ProbeError(f"Prometheus: {self.config.url} cannot be reached: {type(error).__name__}") from error
        raise error  # a bug of ours must not look like a gap

    def _connected(self) -> Any:
        if self._client is None:
            try:
                import requests
                from prometheus_api_client.prometheus_connect import PrometheusConnect
                from urllib3.util.retry import Retry
            except ImportError as error:
                raise ConfigError("Prometheus: the client is missing: pip install prometheus-api-client") from error
            session = requests.Session()
            session.verify = (self.config.ca_file or True) if self.config.verify_tls else False
            if urlsplit(self.config.url).hostname in ("localhost", "127.0.0.1", "::1"):
                session.trust_env = False  # a company proxy cannot reach this machine's loopback
            self._client = PrometheusConnect(
                url=self.config.url.rstrip("/"),
                headers=dict(self.config.headers),
                session=session,
                retry=Retry(total=0),  # the client's own three retries with back-off take seconds
                timeout=cast("int", self.config.timeout_s),
            )
        return self._client


def _only_series(query: str, result: list[Any]) -> Mapping[str, Any]:
    """The one series of an answer; an SLI is one number, and choosing among several would be a guess."""
    if not result:
        raise ProbeError(
            f"Prometheus: {query}: no series. Either the name or a label is wrong, or nothing was scraped lately"
        )
    if len(result) > 1:
        shown = ", ".join(_labels(series) for series in result[:3]) + (", …" if len(result) > 3 else "")
        raise ProbeError(
            f"Prometheus: {query}: {len(result)} series, exactly one is needed: {shown}. "
            "Choose one by labels, or aggregate with sum(), max() or avg()"
        )
    if not isinstance(result[0], Mapping):
        raise ProbeError(f"Prometheus: {query}: the answer is not a series")
    return cast("Mapping[str, Any]", result[0])


def _refusal(text: str) -> str:
    """What the server said; the client wraps its JSON into the `repr` of bytes."""
    try:
        answer = ast.literal_eval(text[text.index("(") + 1 : text.rindex(")")])
        return str(json.loads(answer)["error"])
    except (ValueError, SyntaxError, KeyError, TypeError):
        return text[:300]


def _labels(series: Any) -> str:
    metric = cast("Mapping[str, str]", series.get("metric", {})) if isinstance(series, Mapping) else {}
    return "{" + ", ".join(f'{name}="{value}"' for name, value in sorted(metric.items())) + "}"


def _reading(query: str, pair: Any) -> Reading | None:
    try:
        wall_s, text = pair
        reading = Reading(float(wall_s), float(text))
    except (TypeError, ValueError) as error:
        raise ProbeError(f"Prometheus: {query}: the answer holds no number") from error
    return None if math.isnan(reading.value) else reading


def _timed_out(error: BaseException | None) -> bool:
    """Also where the client wraps it: a read that ends late in the body comes as a lost connection."""
    from requests.exceptions import Timeout
    from urllib3.exceptions import ReadTimeoutError

    while error is not None:
        if isinstance(error, (Timeout, ReadTimeoutError, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False
