"""The environment: where logical targets, SLIs and limits become real.

Secrets are referenced (`env:NAME`, `file:PATH`), never written here.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mlchaos_dagster.domain.spec import AbortCondition, Mechanism, Model, Name
from mlchaos_dagster.domain.units import Duration, DurationOrZero, Fraction, Size

RequestMeasure = Literal[
    "availability",
    "error_rate",
    "latency_p50",
    "latency_p95",
    "latency_p99",
    "latency_mean",
    "fallback_rate",
    "golden_error_rate",
    "prediction_psi",
    "prediction_ks",
]
"""SLIs that the built-in probe measures on its own requests."""
MIN_WINDOW_REQUESTS = 5
"""Fewer requests in the sliding window say nothing: no abort limit is judged on them."""
RATIO_MEASURES = ("availability", "error_rate", "fallback_rate", "golden_error_rate")
SHIFT_MEASURES = ("prediction_psi", "prediction_ks")
"""Distances between the predictions of a phase and those of the baseline: plain numbers."""
VALUE_MEASURES = ("golden_error_rate", *SHIFT_MEASURES)
"""Measures of the number in the answer: they need `probe.value`."""
MOST_ITEMS = 10_000
"""Longest range of bodies: each is kept as bytes by the load generator."""


SERVICE_PLACE = re.compile(r"\{service:(?P<namespace>[a-z0-9-]+)/(?P<name>[a-z0-9-]+):(?P<port>[A-Za-z0-9-]+)\}")
"""Stands for a Service of the cluster in a URL; the port by number or name."""


ON_CLUSTERS = ("kubernetes", "litmus", "chaos_mesh")
"""Backends that work on the cluster of `kubernetes:`; one target's faults may come from any of them."""


class ItemRange(Model):
    """Bodies `{name: from}`, `{name: from + step}`, … up to and with `to`, in the place of a list."""

    name: Annotated[str, Field(min_length=1)]
    """Field of the JSON body."""
    first: Annotated[int, Field(alias="from", ge=0)]
    last: Annotated[int, Field(alias="to", ge=0)]
    step: Annotated[int, Field(gt=0)] = 1

    @model_validator(mode="after")
    def _order(self) -> ItemRange:
        if self.last < self.first:
            raise ValueError(f"to ({self.last}) is below from ({self.first}). Allowed: to of at least {self.first}")
        if len(self.numbers) > MOST_ITEMS:
            raise ValueError(
                f"it is {len(self.numbers)} items. Allowed: at most {MOST_ITEMS}; a larger step gives fewer"
            )
        return self

    @property
    def numbers(self) -> range:
        """The values, in turn."""
        return range(self.first, self.last + 1, self.step)


class RequestProbe(Model):
    """The open-loop HTTP probe: real requests on a fixed schedule."""

    url: str
    """`{gateway}` stands for the sandbox's gateway, `{edge}` for the HTTPS face before it; `{service:NAMESPACE/NAME:PORT}`
    for a Service of the cluster, from inside it or through its NodePort or load balancer."""
    ca: str = ""
    """https: PEM file of the certificates to trust, with a list of revoked ones (CRL) if there is one; `{edge_ca}`: that
    of the sandbox's edge. Empty: what this machine trusts. Read again within half a second of being replaced."""
    connection_lifetime: Duration | None = None
    """A connection older than this is not used again, so that a new certificate is seen; absent: no limit."""
    method: Literal["GET", "POST"] = "POST"
    rate: Annotated[float, Field(gt=0, le=5000)] = 50
    """Requests per second. 50: a p95 from 50 requests a second, light on two cores."""
    timeout: Duration = 2.0
    """A request without an answer after this is a failure."""
    bodies: tuple[dict[str, Any], ...] = ()
    """JSON bodies, sent in turn; empty: none."""
    items: ItemRange | None = None
    """The same as a range of one number, such as `{name: entity_id, from: 0, to: 499}`; instead of `bodies`. Each body
    is an item with an answer of its own: the baseline should see every one twice (rate × baseline ≥ 2 × items)."""
    headers: dict[str, str] = {}
    """A value `env:NAME` or `file:PATH` is read when the probe starts, a file again within half a second of being replaced;
    records hold the reference only. `file:{edge_credential}`: what clients of the sandbox's edge send."""
    value: Annotated[str, Field(pattern=r"^[^.\s]+(\.[^.\s]+)*$")] | None = None
    """Where the number is in the JSON answer: names and list positions with dots between, such as `score` or
    `predictions.0`. Absent: answers are not read."""
    golden: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    """The right number for each body, in their order. Empty: what the baseline answered (its median by item)."""
    golden_tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Largest absolute difference from the golden number that is no error. 1e-6: float noise, not a prediction."""

    @model_validator(mode="after")
    def _values(self) -> RequestProbe:
        if self.items is not None and self.bodies:
            raise ValueError("bodies and items are both given. Allowed: one of them")
        if self.all_bodies and self.method == "GET":
            raise ValueError("method: GET carries no body. Allowed with bodies or items: POST")
        if self.golden and self.value is None:
            raise ValueError("golden needs value: where the number is in the answer")
        wanted = max(1, len(self.all_bodies))
        if self.golden and len(self.golden) != wanted:
            raise ValueError(f"golden has {len(self.golden)} numbers. Allowed: {wanted}, one for each body")
        return self

    @property
    def all_bodies(self) -> tuple[dict[str, Any], ...]:
        """The JSON bodies, sent in turn, however they were written."""
        if self.items is None:
            return self.bodies
        return tuple({self.items.name: n} for n in self.items.numbers)


class S3Location(Model):
    """A bucket of an S3 API. Credentials by reference."""

    endpoint: str = "{object_store}"
    """URL; `{object_store}` stands for the sandbox's own."""
    bucket: Annotated[str, Field(min_length=1)]
    prefix: str = ""
    region: str = "us-east-1"
    access_key: str = ""
    """`env:NAME` or `file:PATH`; empty: the sandbox's own, or what the AWS chain of this process finds."""
    secret_key: str = ""

    @field_validator("endpoint")
    @classmethod
    def _no_credentials(cls, endpoint: str) -> str:
        url = urlsplit(endpoint)
        if "@" in url.netloc or url.query:
            raise ValueError(
                "it carries a user name, a password or a query, and leases keep it. Allowed: https://HOST:PORT; "
                "credentials go to access_key and secret_key, as references"
            )
        return endpoint


class KubernetesObjects(Model):
    """Where a target's objects are in the cluster; `select` is their label selector."""

    kind: Literal["Pod", "Deployment", "StatefulSet", "Job", "Node", "Secret", "Rollout"] = "Pod"
    """What is hit. `scale_to_zero` wants workloads, drains want nodes, rotations want secrets, `bad_model` wants Argo
    Rollouts, all others pods."""
    namespace: str = ""
    """Empty: `kubernetes.namespace` of the environment. Nodes have none."""
    container: str = ""
    """Of the pods; empty: the first."""
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    """Of links and network faults: only traffic to these ports; empty: all."""
    path: str = ""
    """`model_corruption`: the file inside the container."""
    key: str = ""
    """`credential_rotation`: the key of the Secret whose value is replaced. Who verifies accepts `KEY.previous`, too."""
    ca: str = ""
    """`certificate_rotation`: name of the Secret with the CA that signs (`ca.crt` and `ca.key`, or `tls.crt` and `tls.key`)."""
    version_variable: str = ""
    """`bad_model`: the variable in the Rollout's container that says which model version is served."""
    bad_version: str = ""
    """`bad_model`: its value that brings the worse version."""
    replicas: str = ""
    """Label selector of the pods whose number is told (`ready_replicas` and its like). Empty: the target's own pods; of
    nodes and secrets, which have none, all pods of the namespace but those of jobs."""


class Target(Model):
    """What a logical target is here."""

    select: Annotated[str, Field(min_length=1)]
    """Sandbox: globs over process names (`inference-*`) or links (`gateway->feature-store`), comma between them.
    Kubernetes: a label selector (`app=inference`), or two for a link: from these pods to those
    (`app=gateway->app=feature-store`); the fault is made in the pods on the left.
    S3: a glob over keys under the prefix. Files and databases: their name. GPU: the device's number."""
    kubernetes: KubernetesObjects = KubernetesObjects()
    """Kubernetes: what kind of objects, and where."""
    describe: str = ""
    part: str | None = None
    """Sandbox: the part of the platform it belongs to, started when an experiment first needs it; absent: serving."""
    s3: S3Location | None = None
    """Where objects are, for faults on objects."""
    probe: RequestProbe | None = None
    """How this target is called, where the environment's probe would not reach it."""

    @property
    def is_link(self) -> bool:
        """True when it selects links between processes (`a->b`), not processes."""
        return "->" in self.select


class Sli(Model):
    """A named series: measured on the probe's requests, read as a signal, or asked of Prometheus."""

    measure: RequestMeasure | None = None
    signal: str | None = None
    query: str | None = None
    """PromQL that yields exactly one series."""
    unit: Literal["ratio", "s", ""] = ""
    reduce: Literal["mean", "min", "max"] = "mean"
    """How a signal or query becomes one number over a phase."""

    @model_validator(mode="after")
    def _one_source(self) -> Sli:
        given = [n for n in ("measure", "signal", "query") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of measure, signal, query; it has {', '.join(given) or 'none'}")
        return self

    @property
    def good_side(self) -> Literal["above", "below", ""]:
        """Where a healthy service is, seen from any sensible limit; empty where only its author knows."""
        if self.measure is None:
            return ""
        return "above" if self.measure == "availability" else "below"

    @property
    def shown_unit(self) -> str:
        """Unit for people: that of the measure, else the declared one."""
        if self.measure is None:
            return self.unit
        if self.measure in SHIFT_MEASURES:
            return ""
        return "ratio" if self.measure in RATIO_MEASURES else "s"


class Sampling(Model):
    """How often we look, how long, and when a measurement counts as lost."""

    baseline: Duration = 10.0
    interval: Duration = 0.1
    """Seconds between two looks of the watch loop; bounds breach → decision. 100 ms."""
    signal_interval: Duration = 0.1
    """Seconds between two reads of each signal. 100 ms."""
    window: Duration = 1.0
    """Sliding window on which abort conditions are evaluated."""
    blind_for: Duration = 3.0
    """Without a new measurement for this long the run aborts."""
    max_lateness: Duration = 0.05
    """A request sent later than this after its time is excluded and counted. 50 ms."""
    max_late_fraction: Fraction = 0.2
    """More late requests than this in the window: INCONCLUSIVE."""
    min_samples: Annotated[int, Field(gt=0)] = 100
    """Fewer requests than this in a phase: INCONCLUSIVE."""
    recovery_timeout: Duration = 60.0
    """Sampling ends this long after the fault is gone, steady or not; recovery is then censored."""


class Limits(Model):
    """Guards and limits that hold for every experiment here."""

    health_at_least: Fraction = 0.8
    """System health score below which nothing starts (R4-03)."""
    budget_at_least: Fraction = 0.1
    """Error budget left below which nothing starts and what runs is aborted."""
    max_fraction: Annotated[Fraction, Field(gt=0)] = 1.0
    """No experiment may hit a larger share of a target."""
    abort: tuple[AbortCondition, ...] = ()
    """In force during every fault window."""


class ErrorBudget(Model):
    """The objective of the service over a rolling window."""

    objective: Annotated[Fraction, Field(gt=0, lt=1)] = 0.95
    window: Duration = 3600.0
    source: Literal["requests", "prometheus"] = "requests"
    """`requests`: what the platform's own gateway counted; `prometheus`: `total` and `bad` queries."""
    total: str | None = None
    bad: str | None = None

    @model_validator(mode="after")
    def _queries(self) -> ErrorBudget:
        if self.source == "prometheus" and not (self.total and self.bad):
            raise ValueError("source prometheus needs the queries total and bad")
        return self


class Freeze(Model):
    """A span in which nothing is injected."""

    start: datetime
    end: datetime
    reason: str

    @model_validator(mode="after")
    def _order(self) -> Freeze:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise ValueError("start and end need a time zone, such as 2026-12-20T00:00:00+01:00")
        if self.end <= self.start:
            raise ValueError("end is not after start")
        return self


class Safety(Model):
    """Timing of the rings that take a fault away."""

    lease_ttl: Duration = 5.0
    """No renewal seen by the watchdog for this long: the owner hangs and is fenced. 5 s: ten missed renewals."""
    recover_timeout: Duration = 15.0
    """Bound of one shielded recovery; after it the run is UNCLEAN and the watchdog goes on."""
    confirm_within: Duration = 5.0
    """The fault's effect must be seen this soon, else the run cannot be HELD."""
    deadline_grace: DurationOrZero = 5.0
    """Added to the window for the backend's own deadline, so that it never ends a healthy window early."""


class ExternalStore(Model):
    """An S3 endpoint that the sandbox uses in place of its own store. Its buckets are made where they are missing."""

    endpoint: Annotated[str, Field(pattern="^https?://")]
    access_key: Annotated[str, Field(pattern="^(env|file):.")]
    """`env:NAME` or `file:PATH`."""
    secret_key: Annotated[str, Field(pattern="^(env|file):.")]
    region: str = "us-east-1"


class SandboxOptions(Model):
    """Configuration of the embedded platform."""

    replicas: Annotated[int, Field(ge=1, le=50)] = 3
    mechanisms: dict[Mechanism, bool] = {}
    """Resilience mechanisms switched off with `false`."""
    memory_limit: Annotated[Size, Field(ge=64 * 2**20)] = 400 * 2**20
    """Of each inference replica; above it the platform kills what runs inside. It needs about 160Mi itself."""
    object_store: ExternalStore | None = None
    """Absent: an S3 API of its own, in memory."""


class Prometheus(Model):
    """Where PromQL is asked."""

    url: str
    """`{service:NAMESPACE/NAME:PORT}` stands for a Service of the cluster."""
    timeout: Duration = 2.0


class MetricSignal(Model):
    """How one signal is read from what pods tell of themselves."""

    metric: str = ""
    """Name of the series, or with some of its labels (`gateway_requests_total{code="500"}`: the sum of all that match);
    in a JSON answer names with dots between (`queue.backlog`). Empty: the signal's own name."""
    reduce: Literal["max", "min", "sum", "mean"] = "max"
    """Several pods as one. `sum` and `mean` want an answer of all that run, the others of one."""
    kind: Literal["value", "total", "rate"] = "value"
    """`total`: a counter, added up over pods and never falling, also when one begins anew. `rate`: its increase a second,
    over the last second."""


class PodMetrics(Model):
    """Signals that pods tell of themselves over HTTP."""

    select: Annotated[str, Field(min_length=1)]
    """Label selector of the pods."""
    namespace: str = ""
    """Empty: `kubernetes.namespace`."""
    port: Annotated[int, Field(ge=1, le=65535)]
    path: Annotated[str, Field(pattern=r"^/[!-~]*$")] = "/metrics"
    """What answers there in the text format of Prometheus, or as JSON."""
    signals: Annotated[dict[str, MetricSignal], Field(min_length=1)]
    """Name among the environment's `signals` → how it is read; `{}` where the series has the same name."""


class ChaosMesh(Model):
    """How the backend `chaos_mesh` works here."""

    system_namespace: str = "chaos-mesh"
    """Where its controller and its daemons run. Its chart is often installed into `chaos-testing`."""
    inject_within: Duration = 20.0
    """From our resource to the last target that Chaos Mesh says it has injected. Longer: the inject failed. 20 s: a daemon
    that must start a helper takes seconds, and Chaos Mesh tries again for ever."""
    recover_within: Duration = 6.0
    """For so long Chaos Mesh may take the fault away itself; then we do what can be done at the target. It takes a second
    or two; `safety.recover_timeout` (15 s) bounds the whole."""
    take_its_word: bool = False
    """Of a team's own resource whose effect nothing of ours can see (TimeChaos, HTTPChaos, JVMChaos, KernelChaos,
    BlockChaos, clouds and physical machines): whether Chaos Mesh's record of the injection counts as seen. `false`: such a
    run can deviate, and never be HELD."""


class Litmus(Model):
    """How the backend `litmus` works here."""

    namespace: str = ""
    """Where our ChaosEngines are, and with them the ChaosExperiments and the service account; empty: the target's own."""
    service_account: Annotated[str, Field(min_length=1)] = "litmus-admin"
    """As which experiments run. A brought ChaosEngine keeps its own `chaosServiceAccount`."""
    operator_namespace: str = ""
    """Where the chaos operator runs; empty: it is looked for in all namespaces."""
    inject_within: Duration = 120.0
    """From our ChaosEngine to the effect at every target. Longer: the inject failed. Litmus itself needs ten seconds, the
    first pull of its images more. `RAMP_TIME` of a brought engine is added."""
    recover_within: Duration = 4.0
    """For so long the operator may do what a stop or a deletion asks for; then we do it. It takes a second."""
    grace: Annotated[Duration, Field(ge=30)] = 30.0
    """`terminationGracePeriodSeconds` of experiments and helpers, which undo their fault in it. Litmus's own default for
    helpers is 0 seconds, which leaves faults behind."""
    env: dict[str, str] = {}
    """Further variables of every experiment, such as CONTAINER_RUNTIME, SOCKET_PATH or LIB_IMAGE."""


class Kubernetes(Model):
    """The cluster of an environment. Nothing but this context, and in it only namespaces that opted in, is touched."""

    context: str = ""
    """Of the kubeconfig; empty: the service account of the pod that this runs in."""
    uid: str = ""
    """Of the cluster, as `kubectl get namespace kube-system -o jsonpath={.metadata.uid}` prints it. With it no other
    cluster is ever touched, whatever a context leads to, and the same file serves in a pod of that cluster."""
    kubeconfig: str = ""
    """`file:PATH`; empty: `KUBECONFIG`, else `~/.kube/config`."""
    namespace: Annotated[str, Field(min_length=1)]
    """Where targets are that name no other. Opts in by the label `mlchaos.dev/allow=true`."""
    control_namespace: str = "mlchaos-system"
    """Where leases, the lever and the sweeper are."""
    helper_image: str = "local/mlchaos:1"
    """Image of the containers that make network faults and of helper jobs."""
    network: Literal["agent", "policy"] = "agent"
    """`agent`: netfilter rules in the pod's own network, from an ephemeral container with NET_ADMIN. `policy`: a
    NetworkPolicy, where pod security refuses that; it can only cut."""
    min_ready: Annotated[int, Field(ge=0)] = 1
    """Ready pods of the target that must be left untouched when an experiment hits less than all of it."""
    ignore_budgets: bool = False
    """Take pods away though their PodDisruptionBudget would be violated."""
    sweeper_ttl: Duration = 15.0
    """The in-cluster sweeper takes a lease over after this long without a renewal; runs abort when its heart stops that long."""
    spare_sweeper_node: bool = True
    """Node faults never hit the node that carries the sweeper."""
    request_timeout: Duration = 5.0
    """Bound of one call to the API server."""
    metrics: tuple[PodMetrics, ...] = ()
    """Signals beyond what the cluster itself tells, read from the pods."""
    chaos_mesh: ChaosMesh = ChaosMesh()
    """Of the backend of that name."""
    litmus: Litmus = Litmus()
    """Of the backend of that name."""


class Environment(Model):
    """Where experiments run."""

    schema_: Annotated[Literal["mlchaos/v1"], Field(alias="schema")]
    name: Name
    title: str = ""
    backends: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    """Driver name → the fault kinds it serves here."""
    prefer: str | None = None
    """The backend that serves the kinds that it shares with another: one line moves them all."""
    targets: Annotated[dict[Name, Target], Field(min_length=1)]
    probe: RequestProbe
    slis: Annotated[dict[str, Sli], Field(min_length=1)]
    signals: tuple[str, ...] = ()
    """Signals read beside the probe, by name, as the backend offers them."""
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    error_budget: ErrorBudget | None = None
    freezes: tuple[Freeze, ...] = ()
    safety: Safety = Safety()
    duration_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Multiplies every experiment's duration; the record says so."""
    duration_min: DurationOrZero = 0.0
    """A scaled duration is never shorter than this (nor longer than asked for)."""
    sandbox: SandboxOptions | None = None
    kubernetes: Kubernetes | None = None
    prometheus: Prometheus | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Environment:
        served: dict[str, list[str]] = {}
        if self.kubernetes is None and (there := [b for b in ON_CLUSTERS if b in self.backends]):
            raise ValueError(f"backends: {there[0]} needs kubernetes: {{context: …, namespace: …}}")
        if self.prefer is not None and self.prefer not in self.backends:
            raise ValueError(f"prefer: {self.prefer} is not among backends. Allowed: {', '.join(self.backends)}")
        urls = {"prometheus.url": self.prometheus.url if self.prometheus else "", "probe.url": self.probe.url}
        urls |= {f"targets.{n}.probe.url": t.probe.url for n, t in self.targets.items() if t.probe is not None}
        for where, url in urls.items():
            if "{service:" in url and (self.kubernetes is None or not SERVICE_PLACE.search(url)):
                raise ValueError(
                    f"{where}: {url} stands for a Service of a cluster. Allowed: {{service:NAMESPACE/NAME:PORT}}, with "
                    "kubernetes: {context: …, namespace: …}"
                )
        for i, metrics in enumerate(self.kubernetes.metrics if self.kubernetes else ()):
            if unknown := sorted(set(metrics.signals) - set(self.signals)):
                raise ValueError(f"kubernetes.metrics[{i}].signals: {unknown[0]} is not among signals")
        for backend, kinds in self.backends.items():
            for kind in kinds:
                served.setdefault(kind, []).append(backend)
        for kind, several in served.items():
            if len(several) > 1 and self.prefer not in several:
                both = f"{', '.join(several[:-1])} and {several[-1]}"
                raise ValueError(
                    f"backends: {kind} is served by both {both}. Allowed: one of them, or prefer: {several[-1]}"
                )
        for name, sli in self.slis.items():
            if sli.query and self.prometheus is None:
                raise ValueError(f"slis.{name}: a query needs prometheus: {{url: …}}")
            if sli.signal and sli.signal not in self.signals:
                raise ValueError(f"slis.{name}: signal {sli.signal} is not among signals")
            if sli.measure in VALUE_MEASURES and not any(p.value for p in self._probes()):
                raise ValueError(
                    f"slis.{name}: {sli.measure} is measured on the number in the answer, and probe.value does not say "
                    'where that is. Allowed: probe: {value: score}, for an answer such as {"score": 0.7}'
                )
        for i, condition in enumerate(self.limits.abort):
            if condition.sli not in self.slis:
                raise ValueError(f"limits.abort[{i}].sli: no such SLI {condition.sli}")
            side = "above" if condition.above is not None else "below"
            if self.slis[condition.sli].good_side == side:
                raise ValueError(
                    f"limits.abort[{i}].{side}: {condition.sli} {side} a limit is what is wished for: it would abort "
                    f"every healthy run. Allowed: {'below' if side == 'above' else 'above'}"
                )
        return self

    def _probes(self) -> list[RequestProbe]:
        return [self.probe, *(t.probe for t in self.targets.values() if t.probe is not None)]

    @model_validator(mode="after")
    def _enough_requests(self) -> Environment:
        seen = self.probe.rate * self.sampling.window
        if seen < MIN_WINDOW_REQUESTS:
            raise ValueError(
                f"sampling.window: probe.rate × sampling.window is {seen:g} requests, and no abort limit is judged on "
                f"fewer than {MIN_WINDOW_REQUESTS}. Allowed: rate × window of at least {MIN_WINDOW_REQUESTS} requests"
            )
        return self

    def facing(self, target: str) -> Environment:
        """The environment as an experiment on `target` measures it: through the target's own probe, if it has one."""
        known = self.targets.get(target)
        return self if known is None or known.probe is None else self.model_copy(update={"probe": known.probe})

    def backend_for(self, kind: str) -> str | None:
        """The driver that serves a fault kind here, or None."""
        serving = [name for name, kinds in self.backends.items() if kind in kinds]
        return self.prefer if self.prefer in serving else next(iter(serving), None)

    def scaled(self, duration_s: float) -> float:
        """The duration as it runs here."""
        return min(duration_s, max(duration_s * self.duration_scale, self.duration_min))
