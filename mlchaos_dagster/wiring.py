"""Names → drivers, probes and readers. The only place that knows which class serves which word.

Everything is imported lazily: `mlchaos stop` must not pay for numpy.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

from mlchaos_dagster.domain.environment import ON_CLUSTERS
from mlchaos_dagster.drivers.cluster import PLACES
from mlchaos_dagster.engine.ports import (
    Budget,
    Driver,
    Health,
    Lease,
    RequestSource,
    SignalSource,
    StopSource,
    SystemClock,
    Watcher,
)
from mlchaos_dagster.errors import ConfigError, DriverError, DriverUnavailable, ProbeError, SpecError
from mlchaos_dagster.settings import Home, Settings, resolved

if TYPE_CHECKING:
    from mlchaos_dagster.domain.environment import Environment
    from mlchaos_dagster.domain.spec import Experiment
    from mlchaos_dagster.engine.paired import PairedLedger
    from mlchaos_dagster.engine.run import Run
    from mlchaos_dagster.kube.client import Cluster
    from mlchaos_dagster.kube.leases import ClusterLedger
    from mlchaos_dagster.kube.pulse import Pulse
    from mlchaos_dagster.probes.prometheus import PrometheusProbe
    from mlchaos_dagster.sandbox.client import SandboxClient
    from mlchaos_dagster.sandbox.config import SandboxConfig

DRIVERS = {
    "sandbox": "mlchaos_dagster.drivers.sandbox:SandboxDriver",
    "s3": "mlchaos_dagster.drivers.s3:S3Driver",
    "model": "mlchaos_dagster.drivers.model:ModelDriver",
    "gpu": "mlchaos_dagster.drivers.gpu:GpuDriver",
    "features": "mlchaos_dagster.drivers.features:FeaturesDriver",
    "database": "mlchaos_dagster.drivers.database:DatabaseDriver",
    **{name: f"mlchaos_dagster.drivers.{place}" for name, place in PLACES.items()},
}
"""Backend name → class. A class is built with the directory of the sandbox, or the file that says which cluster it is."""

SANDBOX_SIGNALS = (
    "ready_replicas",
    "running_replicas",
    "restarts",
    "oom_kills",
    "breaker_state",
    "in_rotation",
    "fallback_total",
    "retries_total",
    "retry_rate",
)
"""Signals the embedded platform offers. `retry_rate`: retries a second, over the last second."""
_BREAKER = {"closed": 0.0, "half_open": 1.0, "open": 2.0}
_HEALTH_REQUESTS = 20


def driver(name: str, home: Home, environment: str) -> Driver:
    """The driver of a backend, as the watchdog and the sweeper build it: from names only.

    Raises:
        DriverUnavailable: no environment (of a lease that cannot be read any more).
        SpecError: no such backend.
    """
    if not environment:
        raise DriverUnavailable(
            "the lease's environment is not known: name it with `mlchaos -e ENVIRONMENT recover LEASE`", driver=name
        )
    if name not in DRIVERS:
        raise SpecError(f'no such backend "{name}". Allowed: {", ".join(DRIVERS)}', "backends")
    module, _, attribute = DRIVERS[name].partition(":")
    build = getattr(importlib.import_module(module), attribute)
    return cast(Driver, build(home.cluster(environment) if name in ON_CLUSTERS else home.sandbox(environment)))


def ledger(home: Home, environment: Environment | None = None) -> PairedLedger:
    """The leases of a state directory, and for those of clusters the ledger there: for runs and for all who clean up.

    Nothing of a cluster is imported or asked before a lease of one is met.

    Args:
        home: State directory.
        environment: Of a run: unreadable leases in its cluster keep it out, too.
    """
    from mlchaos_dagster.engine.ledger import FileLedger
    from mlchaos_dagster.engine.paired import RENEWED_WITHIN_S, PairedLedger

    known: dict[tuple[str, str], ClusterLedger] = {}
    lock = threading.Lock()

    def there(name: str, namespace: str = "") -> ClusterLedger:
        with lock:
            if (name, namespace) not in known:
                made = cluster_ledger(home, name, namespace)
                known[name, namespace] = known.setdefault((name, made.namespace), made)
            return known[name, namespace]

    def remote(lease: Lease) -> ClusterLedger | None:
        if lease.driver not in ON_CLUSTERS:
            return None
        options: dict[str, Any] = lease.undo.get("options") or {}  # as they were when it was opened
        return there(lease.environment, str(options.get("control_namespace", "")))

    options = environment.kubernetes if environment is not None else None
    return PairedLedger(
        FileLedger(home.ledger, SystemClock()),
        remote,
        guard=lambda: there(environment.name) if environment is not None and options is not None else None,
        renewed_within_s=options.sweeper_ttl / 3 if options is not None else RENEWED_WITHIN_S,
    )


def cluster_ledger(home: Home, environment: str, namespace: str = "") -> ClusterLedger:
    """The ledger in the cluster of an environment, in `namespace` (empty: its control namespace).

    Raises:
        DriverUnavailable: no cluster is known for it, it does not answer, or it is another one now.
    """
    from mlchaos_dagster.kube.address import recall
    from mlchaos_dagster.kube.leases import ClusterLedger

    cluster, options, uid = recall(home.cluster(environment))
    found = cluster.identity()
    if found != uid:
        raise DriverUnavailable(f"context {options.context} leads to another cluster now (uid {found}, was {uid})")
    return ClusterLedger(cluster, namespace or options.control_namespace, SystemClock())


def cluster_of(environment: Environment, settings: Settings) -> ClusterLedger:
    """The ledger in the cluster of an environment, also on a machine that never ran anything there.

    Raises:
        ConfigError: no such context, or it leads to another cluster.
        DriverUnavailable: it does not answer.
    """
    from mlchaos_dagster.kube.address import remember
    from mlchaos_dagster.kube.leases import ClusterLedger

    assert environment.kubernetes is not None
    cluster = remember(settings.home.cluster(environment.name), environment.kubernetes, settings.kubeconfig)
    return ClusterLedger(cluster, environment.kubernetes.control_namespace, SystemClock())


def prepare(environment: Environment, settings: Settings, experiment: Experiment | None = None) -> None:
    """Bring up what the environment owns: the embedded sandbox, when none is up, with the parts an experiment needs.

    Raises:
        ConfigError: it cannot be started; says why.
    """
    check_surroundings(environment, settings)
    if environment.kubernetes is not None:
        from mlchaos_dagster.kube.address import other_ledger, remember

        path = settings.home.cluster(environment.name)
        try:
            remember(path, environment.kubernetes, settings.kubeconfig)
        except DriverError as e:
            raise ConfigError(f"the cluster of environment {environment.name}: {e}") from e
        if said := other_ledger(path):
            raise ConfigError(
                f"{said}, and {environment.name} in {environment.kubernetes.control_namespace}: two runs would not see each "
                f"other. Allowed: one kubernetes.control_namespace for one cluster"
            )
    if environment.sandbox is None:
        return
    from mlchaos_dagster.sandbox import api
    from mlchaos_dagster.sandbox.config import SandboxError

    try:
        parts = sandbox_parts(environment, experiment) if experiment else ()
        api.up(settings.home.sandbox(environment.name), sandbox_config(environment), parts=parts)
    except SandboxError as e:
        raise ConfigError(f"the sandbox of environment {environment.name} cannot be used: {e}") from e


def check_surroundings(environment: Environment, settings: Settings) -> None:
    """Look, before anything is started: do references to secrets lead somewhere, is what is up what was described.

    Raises:
        ConfigError: no; says what is missing or differs.
    """
    probe_headers(environment)
    if environment.sandbox is None:
        return
    from mlchaos_dagster.sandbox import api
    from mlchaos_dagster.sandbox.config import SandboxError

    try:
        api.same_config(settings.home.sandbox(environment.name), sandbox_config(environment))
    except SandboxError as e:
        raise ConfigError(f"the sandbox of environment {environment.name}: {e}") from e


def sandbox_parts(environment: Environment, experiment: Experiment) -> tuple[str, ...]:
    """The parts of the sandbox that an experiment touches or looks at. Raises ConfigError: there is no such part."""
    from mlchaos_dagster.judgement.measures import signals_needed
    from mlchaos_dagster.sandbox.parts import NAMES, parts_of_signals, with_required

    target = environment.targets.get(experiment.target)
    wanted = parts_of_signals(signals_needed(experiment, environment))
    if target is not None and target.part is not None:
        wanted.add(target.part)
    try:
        return with_required(wanted)
    except KeyError as e:
        where = f"environment {environment.name}, targets.{experiment.target}.part"
        raise ConfigError(f"{where}: no part {e}. Allowed: serving, {', '.join(NAMES)}") from e


def sandbox_config(environment: Environment) -> SandboxConfig:
    """What the environment wants its sandbox to be. Raises ConfigError: it cannot be."""
    from mlchaos_dagster.sandbox.config import SandboxConfig, SandboxConfigError

    options = environment.sandbox
    assert options is not None
    try:
        return SandboxConfig(
            replicas=options.replicas,
            mechanisms={str(k): v for k, v in options.mechanisms.items()},
            memory_limit_bytes=options.memory_limit,
            object_store=options.object_store.model_dump() if options.object_store is not None else {},
        )
    except SandboxConfigError as e:
        raise ConfigError(f"the sandbox of environment {environment.name}: {e}") from e


def build_run(
    experiment: Experiment,
    environment: Environment,
    settings: Settings,
    *,
    run_id: str,
    shadow: bool = False,
    seed: int | None = None,
    started_by: str = "",
    progress: Callable[[str, dict[str, Any]], None] | None = None,
    stops: Sequence[StopSource] = (),
) -> Run:
    """A run with everything real behind its ports. Starts the sandbox when the environment has one.

    Raises:
        SpecError: this environment has no backend for the fault.
        ConfigError: the sandbox cannot be started.
    """
    from mlchaos_dagster.engine.active import ActiveRuns
    from mlchaos_dagster.engine.incidents import IncidentLog
    from mlchaos_dagster.engine.paired import PairedWatcher
    from mlchaos_dagster.engine.processes import current_owner
    from mlchaos_dagster.engine.run import Kit, Run, quiet
    from mlchaos_dagster.engine.stops import FileStop, LeaseStop, SignalStop, StopFiles
    from mlchaos_dagster.engine.store import RecordStore
    from mlchaos_dagster.engine.watchdog import start_watchdog
    from mlchaos_dagster.judgement.measures import signals_needed

    backend = environment.backend_for(experiment.fault.kind)
    if backend is None:
        raise SpecError(
            f"{experiment.name}: environment {environment.name} has no backend for {experiment.fault.kind}",
            "fault.kind",
        )
    home = settings.home
    environment = environment.facing(experiment.target)
    prepare(environment, settings, experiment)
    clock, owner, stop_files = SystemClock(), current_owner(), StopFiles(home)
    leases = ledger(home, environment)
    pulse = _pulse(home, environment, run_id, leases)

    def start_watcher() -> Watcher:
        watchdog = start_watchdog(
            home, run_id, owner, environment=environment.name, lease_ttl_s=environment.safety.lease_ttl
        )
        return watchdog if pulse is None or backend not in ON_CLUSTERS else PairedWatcher(watchdog, pulse)

    kit = Kit(
        clock=clock,
        driver=driver(backend, home, environment.name),
        requests=request_source(environment, home),
        signals=signal_source(environment, home, experiment.target, signals_needed(experiment, environment)),
        ledger=leases,
        start_watcher=start_watcher,
        owner=owner,
        health=health_reader(environment, settings, experiment.target),
        budget=budget_reader(environment, settings),
        store=RecordStore(home.records),
        incidents=IncidentLog(home.incidents, clock),
        gate=home.gates / f"{environment.name}.json",
        active=ActiveRuns(home.active, clock),
        stop_files=stop_files,
        backups=home.backups,
        stops=[FileStop(stop_files, run_id), LeaseStop(leases, run_id), *([pulse] if pulse else []), *stops],
        signals_deferred=lambda: cast("AbstractContextManager[StopSource]", SignalStop()),
        background=in_thread,
        versions=versions(),
    )
    return Run(
        run_id,
        experiment,
        environment,
        kit,
        shadow=shadow,
        seed=seed,
        started_by=started_by or settings.user,
        progress=progress or quiet,
    )


def _pulse(home: Home, environment: Environment, run_id: str, leases: PairedLedger) -> Pulse | None:
    """What a run hears from its cluster; None without one. Asks nobody yet, but who the cluster is."""
    options = environment.kubernetes
    if options is None:
        return None
    from mlchaos_dagster.kube.pulse import Pulse

    try:
        there = cast("ClusterLedger", leases.guard())
    except DriverUnavailable as e:
        raise ConfigError(f"the cluster of environment {environment.name}: {e}") from e
    return Pulse(
        there.cluster,
        options.control_namespace,
        SystemClock(),
        options.sweeper_ttl,
        stop=lambda: there.stop_requested(run_id),
    )


def in_thread(work: Callable[[], Any]) -> Callable[[], tuple[bool, Any]]:
    """Run a slow read beside the watch loop; the result, or the exception, comes through the poll."""
    box: list[Any] = []

    def target() -> None:
        try:
            box.append(work())
        except Exception as e:  # noqa: BLE001  handed to the poller, which decides
            box.append(e)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return lambda: (bool(box), box[0] if box else None)


def request_source(environment: Environment, home: Home) -> RequestSource:
    """The open-loop HTTP probe of the environment."""
    return _LateProbe(environment, home)


class _LateProbe:
    """Finds the gateway's address when it starts: the sandbox may have been started a moment ago."""

    def __init__(self, environment: Environment, home: Home) -> None:
        self.environment, self.home = environment, home
        self._probe: Any = None

    @property
    def alive(self) -> bool:
        return self._probe is not None and self._probe.alive

    def start(self, zero: float) -> None:
        from mlchaos_dagster.probes.http import HttpProbe, HttpProbeConfig

        probe = self.environment.probe
        references = probe_references(self.environment, self.home)
        files = {n: v.partition(":")[2] for n, v in references.items() if v.startswith("file:")}
        self._probe = HttpProbe(
            HttpProbeConfig(
                url=probe_url(self.environment, self.home),
                rate_per_s=probe.rate,
                timeout_s=probe.timeout,
                method=probe.method,
                headers=probe_headers(self.environment, self.home),
                header_files={name: os.path.expanduser(path) for name, path in files.items()},
                ca_file=filled(probe.ca, self.environment, self.home),
                connection_lifetime_s=probe.connection_lifetime or 0.0,
                bodies=probe.all_bodies,
                value=probe.value or "",
            )
        )
        self._probe.start(zero)

    def drain(self) -> list[Any]:
        return self._probe.drain() if self._probe is not None else []

    def stop(self) -> list[Any]:
        return self._probe.stop() if self._probe is not None else []


_PLACES = {
    "{gateway}": ("gateway_url",),
    "{edge}": ("edge", "url"),
    "{edge_ca}": ("edge", "ca"),
    "{edge_credential}": ("edge", "credential_file"),
}
"""Placeholder → where the sandbox's state file has it."""
_TOLD_WITHIN_S = 2.0
"""A part that is ready is in the state file within milliseconds; a busy machine may take longer."""


def probe_url(environment: Environment, home: Home) -> str:
    """The probe's URL with `{gateway}` or `{edge}` filled in. Raises ProbeError when the sandbox is not up."""
    return filled(environment.probe.url, environment, home)


def filled(text: str, environment: Environment, home: Home) -> str:
    """Text with the places of the sandbox and of the cluster's Services filled in.

    Raises:
        ProbeError: the sandbox is not up, or not with that part; a Service cannot be reached from here.
    """
    if "{service:" in text:
        from mlchaos_dagster.probes import kubernetes_service

        text = kubernetes_service.filled(text, lambda: _cluster(environment, home))
    wanted = [place for place in _PLACES if place in text]
    end = time.monotonic() + _TOLD_WITHIN_S
    while wanted:
        from mlchaos_dagster.sandbox.client import read_state

        state = read_state(home.sandbox(environment.name))
        for place in list(wanted):
            found: Any = state
            for key in _PLACES[place]:
                found = cast("dict[str, Any]", found or {}).get(key)
            if found:
                text = text.replace(place, str(found))
                wanted.remove(place)
        if not wanted:
            break
        if state is None or wanted == ["{gateway}"] or time.monotonic() > end:
            part = "" if wanted == ["{gateway}"] else " --part edge"
            raise ProbeError(f"the sandbox of {environment.name} is not up (mlchaos sandbox up{part})")
        time.sleep(0.02)
    return text


def probe_references(environment: Environment, home: Home) -> dict[str, str]:
    """The probe's headers, as references; of places of the sandbox, to where they are. Raises ProbeError: not up."""
    return {name: filled(value, environment, home) for name, value in environment.probe.headers.items()}


def probe_headers(environment: Environment, home: Home | None = None) -> dict[str, str]:
    """The probe's headers with references read; what is secret lives in the probe alone.

    Without `home` those that the sandbox itself makes are left out.

    Raises:
        ConfigError: a reference leads nowhere; names it.
        ProbeError: the sandbox that makes one is not up.
    """
    given = environment.probe.headers
    if home is not None:
        given = probe_references(environment, home)
    found: dict[str, str] = {}
    for name, value in given.items():
        if home is None and any(place in value for place in _PLACES):
            continue
        try:
            found[name] = resolved(value)
        except ConfigError as e:
            raise ConfigError(f"environment {environment.name}, probe.headers.{name}: {e}") from e
    return found


def signal_source(environment: Environment, home: Home, target: str = "", needed: Collection[str] = ()) -> SignalSource:
    """Gauges of the sandbox or of the cluster, and one per PromQL SLI.

    Args:
        environment: Where.
        home: State of this machine.
        target: Name of what the experiment hits; on a cluster its replicas are the ones that are told.
        needed: Signals that the experiment rests on; on a cluster pods are asked for the others once a second only.
    """
    from mlchaos_dagster.probes.signals import MergedSignals, PolledSignals

    interval = environment.sampling.signal_interval
    readers: list[tuple[Callable[[], Mapping[str, float]], float]] = []
    names = set(environment.signals)
    if environment.sandbox is not None:
        client = _client(environment, home)
        readers += [(lambda: _platform(client), interval), (_gateway(client), interval)]
    if environment.prometheus is not None:
        for name, sli in environment.slis.items():
            if sli.query is not None:
                names.add(f"sli:{name}")
                readers.append((_promql(environment, home, name, sli.query), max(1.0, interval)))
    polled = PolledSignals(readers, sorted(names))
    if environment.kubernetes is None:
        return polled
    return MergedSignals([polled, *_cluster_signals(environment, home, target, needed)])


def _cluster_signals(environment: Environment, home: Home, target: str, needed: Collection[str]) -> list[SignalSource]:
    """What the cluster tells of the target, and what pods tell of themselves."""
    from mlchaos_dagster.probes.kubernetes import KubernetesSignals
    from mlchaos_dagster.probes.kubernetes_metrics import PodSignals

    options, interval = environment.kubernetes, environment.sampling.signal_interval
    assert options is not None
    cluster, pulse = _cluster(environment, home), _cluster(environment, home, timeout_s=1.0)
    told = {name for entry in options.metrics for name in entry.signals}
    found: list[SignalSource] = [
        KubernetesSignals(
            cluster, pulse, options, environment.targets.get(target), set(environment.signals) - told, interval
        )
    ]
    if options.metrics:
        found.append(PodSignals(cluster, options, environment.signals, needed, interval))
    return found


def _cluster(environment: Environment, home: Home, timeout_s: float | None = None) -> Cluster:
    """A connection to the environment's cluster, the remembered one if there is one. Raises ProbeError: there is none."""
    from mlchaos_dagster.kube.address import connect, recall

    if environment.kubernetes is None:
        raise ProbeError(f"environment {environment.name} has no cluster (kubernetes: {{context: …, namespace: …}})")
    try:
        path = home.cluster(environment.name)
        options = recall(path)[1] if path.exists() else environment.kubernetes
        return connect(options if timeout_s is None else options.model_copy(update={"request_timeout": timeout_s}))
    except (DriverUnavailable, ConfigError) as e:
        raise ProbeError(f"the cluster of environment {environment.name}: {e}") from e


def _client(environment: Environment, home: Home) -> SandboxClient:
    from mlchaos_dagster.sandbox.client import SandboxClient

    return SandboxClient(home.sandbox(environment.name), timeout_s=0.5)


def _platform(client: SandboxClient) -> dict[str, float]:
    from mlchaos_dagster.sandbox.config import SandboxError

    try:
        return client.signals()
    except SandboxError as e:
        raise ProbeError(str(e)) from e


def _gateway(client: SandboxClient) -> Callable[[], dict[str, float]]:
    from mlchaos_dagster.probes.signals import Rate
    from mlchaos_dagster.sandbox.config import SandboxError

    retries = Rate()

    def read() -> dict[str, float]:
        try:
            state = client.gateway_state()
        except SandboxError as e:
            raise ProbeError(str(e)) from e
        values = {
            "breaker_state": _BREAKER[state["breaker"]],
            "in_rotation": float(state["in_rotation"] - len(state["ejected_replicas"])),
            "fallback_total": float(state["fallback_total"]),
            "retries_total": float(state["retries_total"]),
        }
        rate = retries.add(time.monotonic(), values["retries_total"])
        return values if rate is None else {**values, "retry_rate": rate}

    return read


def _promql(environment: Environment, home: Home, name: str, query: str) -> Callable[[], dict[str, float]]:
    probes: list[PrometheusProbe] = []

    def read() -> dict[str, float]:
        if not probes:  # not before the run has begun: Prometheus may be found through the cluster
            probes.append(_prometheus(environment, home))
        reading = probes[0].instant(query)
        return {} if reading is None else {f"sli:{name}": reading.value}

    return read


def _prometheus(environment: Environment, home: Home) -> PrometheusProbe:
    from mlchaos_dagster.probes.prometheus import PrometheusConfig, PrometheusProbe

    assert environment.prometheus is not None
    url = filled(environment.prometheus.url, environment, home)
    return PrometheusProbe(PrometheusConfig(url=url, timeout_s=environment.prometheus.timeout))


def health_reader(environment: Environment, settings: Settings, target: str = "") -> Callable[[], Health]:
    """System health score 0–1: the worse of answered requests and ready replicas, seen just now.

    On a cluster replicas are those of `target`, or of all targets where none is named.

    The reader raises ProbeError when nothing can be asked; the guard then refuses.
    """

    def read() -> Health:
        from mlchaos_dagster.probes.once import success_ratio

        url = probe_url(environment, settings.home)
        probe = environment.probe
        answered = success_ratio(
            url,
            _HEALTH_REQUESTS,
            probe.timeout,
            method=probe.method,
            bodies=probe.all_bodies,
            headers=probe_headers(environment, settings.home),
            ca_file=filled(probe.ca, environment, settings.home),
        )
        score, detail = answered, f"{answered:.0%} of {_HEALTH_REQUESTS} requests answered"
        if environment.sandbox is not None:
            signals = _platform(_client(environment, settings.home))
            wanted = environment.sandbox.replicas
            ready = min(1.0, signals["ready_replicas"] / wanted)
            score = min(score, ready)
            detail += f", {signals['ready_replicas']:g} of {wanted} replicas ready"
        if environment.kubernetes is not None:
            from mlchaos_dagster.probes.kubernetes_health import replicas_ready

            chosen = [t for name, t in environment.targets.items() if target in ("", name)]
            ready, said = replicas_ready(_cluster(environment, settings.home), environment.kubernetes, chosen)
            score, detail = min(score, ready), f"{detail}, {said}"
        return Health(score, detail)

    return read


def budget_reader(environment: Environment, settings: Settings) -> Callable[[], Budget] | None:
    """Error budget left over its rolling window; None when the environment declares none.

    The reader raises ProbeError when its source cannot be asked; the guard then refuses.
    """
    declared = environment.error_budget
    if declared is None:
        return None

    def read() -> Budget:
        from mlchaos_dagster.domain.budget import remaining
        from mlchaos_dagster.domain.units import show_duration

        if declared.source == "prometheus":
            assert declared.total is not None and declared.bad is not None
            probe = _prometheus(environment, settings.home)
            readings = [probe.instant(declared.total), probe.instant(declared.bad)]
            if readings[0] is None or readings[1] is None:
                raise ProbeError("error budget: Prometheus has no value for it now")
            total, bad = readings[0].value, readings[1].value
        elif environment.sandbox is None:
            raise ProbeError("error budget: only the sandbox counts requests itself. Allowed here: source: prometheus")
        else:
            from mlchaos_dagster.sandbox.config import SandboxError

            try:
                counts = _client(environment, settings.home).requests(declared.window)
            except SandboxError as e:
                raise ProbeError(f"error budget: {e}") from e
            total, bad = counts["total"], counts["bad"]
        left = remaining(total, bad, declared.objective)
        return Budget(left, f"{bad:g} bad of {total:g} requests in {show_duration(declared.window)}")

    return read


def versions() -> dict[str, str]:
    """What a record says about the software that made it."""
    import platform

    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("mlchaos-dagster", "dagster", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
