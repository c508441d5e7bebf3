"""Signals that pods tell of themselves: each pod is asked, and their answers become one number.

The pods are known from a watch. They are asked directly; only where none of them has ever answered that way (no route to
pod addresses from here) through the API server's proxy, and then once a second at most, since its other clients need it,
too. Answers are text of Prometheus or JSON; a series that is not there is a gap, never a zero.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

import httpx

from mlchaos_dagster.domain.environment import Kubernetes, MetricSignal, PodMetrics
from mlchaos_dagster.domain.record import SignalSample
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.objects import Object, text
from mlchaos_dagster.kube.refs import collection
from mlchaos_dagster.probes.kubernetes_pods import is_running
from mlchaos_dagster.probes.kubernetes_watch import Api, Mirror
from mlchaos_dagster.probes.signals import PolledSignals, Rate

_DIRECT_S = 0.5
"""Bound of one direct answer; a pod that takes longer is a gap."""
_PROXY_EVERY_S = 1.0
_TRIES = 3
"""Rounds without a single direct answer before the API server is asked to pass it on."""
_THREADS = 8
_QUICK_S = 0.1
_SLOW_S = 1.0


class ProxyApi(Api, Protocol):
    """What is needed of `kube.client.Cluster`."""

    def get_text(self, path: str) -> str:
        """A body as it is."""
        ...


class MetricsReader:
    """Reads the pods of one entry of `kubernetes.metrics`; a reader for `PolledSignals`, from one thread.

    Args:
        api: The cluster.
        entry: What the environment says.
        namespace: Of the environment, where the entry names none.
        names: Signals that are wanted; the others are not read.
    """

    def __init__(self, api: ProxyApi, entry: PodMetrics, namespace: str, names: Iterable[str]) -> None:
        self.api, self.entry = api, entry
        self.namespace = entry.namespace or namespace
        wanted = frozenset(names)
        self.signals = {name: how for name, how in entry.signals.items() if name in wanted}
        self.mirror = Mirror(api, collection("pod", self.namespace), labels=entry.select)
        self._series = {name: how.metric or name for name, how in self.signals.items()}
        self._totals = {name: _Total() for name, how in self.signals.items() if how.kind != "value"}
        self._rates = {name: Rate() for name, how in self.signals.items() if how.kind == "rate"}
        self._client = httpx.Client(timeout=_DIRECT_S, trust_env=False)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="pod metrics")
        self._rounds = 0
        self._direct = True
        self._answered = False
        """Whether any pod ever answered directly: then silence is the pod's, or the fault's."""
        self._asked_at = -math.inf

    def start(self) -> None:
        """Find the pods."""
        self.mirror.start()

    def stop(self) -> None:
        """Release the connections."""
        self.mirror.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def read(self) -> dict[str, float]:
        """The signals now. What no pod tells is left out."""
        pods = [pod for pod in self.mirror.objects() if is_running(pod) and text(pod, "status", "podIP")]
        now = time.monotonic()
        if not pods or (not self._direct and now - self._asked_at < _PROXY_EVERY_S):
            return {}
        self._asked_at = now
        told = dict(zip((text(p, "metadata", "uid") for p in pods), self._pool.map(self._ask, pods), strict=True))
        self._choose_way(any(answer is not None for answer in told.values()))
        found: dict[str, float] = {}
        for name, how in self.signals.items():
            values = {uid: (answer or {}).get(self._series[name]) for uid, answer in told.items()}
            value = self._one(name, how, values)
            if value is not None:
                found[name] = value
        return found

    def _choose_way(self, answered: bool) -> None:
        if self._direct and not self._answered:
            self._answered, self._rounds = answered, self._rounds + 1
            self._direct = answered or self._rounds < _TRIES

    def _ask(self, pod: Object) -> dict[str, float] | None:
        """Series of one pod; None: it does not answer."""
        try:
            if self._direct:
                response = self._client.get(f"http://{_host(pod)}:{self.entry.port}{self.entry.path}")
                response.raise_for_status()
                body = response.text
            else:
                name = f"{text(pod, 'metadata', 'name')}:{self.entry.port}"
                body = self.api.get_text(f"{collection('pod', self.namespace)}/{name}/proxy{self.entry.path}")
            return series(body, set(self._series.values()))
        except (httpx.HTTPError, DriverError, ValueError):
            return None

    def _one(self, name: str, how: MetricSignal, values: Mapping[str, float | None]) -> float | None:
        if how.kind != "value":
            total = self._totals[name].add(values)
            return total if total is None or how.kind == "total" else self._rates[name].add(time.monotonic(), total)
        known = [v for v in values.values() if v is not None]
        if not known or (how.reduce in ("sum", "mean") and len(known) < len(values)):
            return None
        reduce: dict[str, Callable[[list[float]], float]] = {"max": max, "min": min, "sum": sum}
        return sum(known) / len(known) if how.reduce == "mean" else reduce[how.reduce](known)


class _Total:
    """A counter over pods that come, go and begin anew: never falls."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._sum = 0.0

    def add(self, values: Mapping[str, float | None]) -> float | None:
        """Readings by pod; None while no pod answers now."""
        known = {uid: value for uid, value in values.items() if value is not None}
        for uid, value in known.items():
            before = self._last.get(uid, 0.0)
            self._sum += value - before if value >= before else value
            self._last[uid] = value
        return self._sum if known else None


def series(body: str, wanted: set[str]) -> dict[str, float]:
    """The wanted series of an answer: text of Prometheus (`name`, `name{label="x"}`) or JSON (`name.of.field`).

    Raises:
        ValueError: it is neither.
    """
    if body.lstrip().startswith("{"):
        answer = json.loads(body)
        found = {name: _field(answer, name) for name in wanted}
        return {name: value for name, value in found.items() if value is not None}
    from prometheus_client.parser import text_string_to_metric_families

    names = {key.partition("{")[0] for key in wanted}
    # Of a long page only the lines that matter are parsed: this runs ten times a second.
    lines = [line for line in body.splitlines() if line.partition(" ")[0].partition("{")[0] in names]
    samples = [s for family in text_string_to_metric_families("\n".join(lines) + "\n") for s in family.samples]
    sums: dict[str, float] = {}
    for key in wanted:
        name, labels = _parsed(key)
        matching = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        if matching:
            sums[key] = float(sum(matching))
    return sums


def _parsed(key: str) -> tuple[str, dict[str, str]]:
    if "{" not in key:
        return key, {}
    from prometheus_client.parser import text_string_to_metric_families

    sample = next(s for family in text_string_to_metric_families(f"{key} 0\n") for s in family.samples)
    return sample.name, dict(sample.labels)


def _field(answer: Any, name: str) -> float | None:
    for key in name.split("."):
        answer = cast("dict[str, Any]", answer).get(key) if isinstance(answer, dict) else None
    return float(answer) if isinstance(answer, (int, float)) else None


def _host(pod: Object) -> str:
    address = text(pod, "status", "podIP")
    return f"[{address}]" if ":" in address else address


class PodSignals:
    """All entries of `kubernetes.metrics` as one source of signals.

    Args:
        api: The cluster.
        options: Of the environment.
        names: Signals that are wanted.
        needed: Those of them that matter to the experiment; pods that tell none of them are asked once a second only, so
            that looking does not become a load.
        interval_s: Between two readings of what is needed.
    """

    def __init__(
        self, api: ProxyApi, options: Kubernetes, names: Iterable[str], needed: Collection[str], interval_s: float
    ) -> None:
        wanted = frozenset(names)
        readers = [MetricsReader(api, entry, options.namespace, wanted) for entry in options.metrics]
        self.readers = [reader for reader in readers if reader.signals]
        quick, slow = max(_QUICK_S, interval_s), max(_SLOW_S, interval_s)
        polled = [(r.read, slow if r.signals.keys().isdisjoint(needed) else quick) for r in self.readers]
        self._polled = PolledSignals(polled, sorted(wanted))

    def start(self, zero: float) -> None:
        """Begin reading."""
        for reader in self.readers:
            reader.start()
        self._polled.start(zero)

    def drain(self) -> list[SignalSample]:
        """New readings since the last call."""
        return self._polled.drain()

    def stop(self) -> list[SignalSample]:
        """Stop reading; the rest."""
        rest = self._polled.stop()
        for reader in self.readers:
            reader.stop()
        return rest
