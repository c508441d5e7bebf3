"""Faults, backend-neutral: a kind and its typed parameters.

A new fault is one class here, one handler in a driver and one YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlchaos_dagster.domain.units import Duration, DurationOrZero, Fraction, Size


class FaultBase(BaseModel):
    """What every fault has: nothing but its kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def params(self) -> dict[str, Any]:
        """Parameters as SI numbers, as drivers take them (`latency_s`, `fraction`, …)."""
        return {}


class PodDelete(FaultBase):
    """Kill the targets' processes; the platform is expected to bring them back."""

    kind: Literal["pod_delete"]
    interval: Duration | None = None
    """Kill again every `interval` until the window ends; absent: once."""
    signal: Literal["kill", "term"] = "kill"
    """`kill` gives no chance to finish requests; `term` lets a graceful shutdown show itself."""
    evict: bool = False
    """Kubernetes: through the eviction API, which respects PodDisruptionBudgets."""

    def params(self) -> dict[str, Any]:
        """`interval_s` (None: once), `signal`, `evict` where it is wanted."""
        return {"interval_s": self.interval, "signal": self.signal, **({"evict": True} if self.evict else {})}


class PodFailure(FaultBase):
    """Take the targets down and hold them down for the whole window."""

    kind: Literal["pod_failure"]


class NetworkLatency(FaultBase):
    """Delay the traffic of the targets' links: round trip + `latency` ± `jitter`."""

    kind: Literal["network_latency"]
    latency: Duration
    jitter: DurationOrZero = 0.0

    def params(self) -> dict[str, Any]:
        """`latency_s`, `jitter_s`."""
        return {"latency_s": self.latency, "jitter_s": self.jitter}


class NetworkLoss(FaultBase):
    """Lose a fraction of what the targets' links carry."""

    kind: Literal["network_loss"]
    fraction: Annotated[Fraction, Field(gt=0)]

    def params(self) -> dict[str, Any]:
        """`fraction`, 0–1."""
        return {"fraction": self.fraction}


class NetworkPartition(FaultBase):
    """No byte passes the targets' links."""

    kind: Literal["network_partition"]


class ContainerKill(FaultBase):
    """Kill one process of each target with SIGKILL, once; its slot stays and the platform restarts it in place."""

    kind: Literal["container_kill"]


class CpuStress(FaultBase):
    """Burn CPU beside the targets, inside the share they live in."""

    kind: Literal["cpu_stress"]
    cores: Annotated[float, Field(gt=0, le=256)] = 1.0
    """Number of burners; a fraction is one burner that rests in between."""
    load: Annotated[Fraction, Field(gt=0)] = 1.0
    """How busy each burner is."""

    def params(self) -> dict[str, Any]:
        """`cores`, `load` 0–1."""
        return {"cores": self.cores, "load": self.load}


class MemoryStress(FaultBase):
    """Fill memory inside the targets' limits, until the platform's OOM kill where `size` exceeds what is left."""

    kind: Literal["memory_stress"]
    size: Size

    def params(self) -> dict[str, Any]:
        """`bytes`."""
        return {"bytes": self.size}


Damage = Literal["random_bytes", "truncate", "bit_flip", "swap"]
"""How content is damaged: noise over it, its second half gone, one bit in 10,000 flipped, another object's content."""


class S3ObjectCorruption(FaultBase):
    """Overwrite a fraction of the objects under a prefix, as new versions. Undone version by version."""

    kind: Literal["s3_object_corruption"]
    fraction: Annotated[Fraction, Field(gt=0)]
    prefix: str = ""
    """Under the target's own prefix."""
    how: Damage = "random_bytes"

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1, `prefix`, `how`."""
        return {"fraction": self.fraction, "prefix": self.prefix, "how": self.how}


class S3Unavailable(FaultBase):
    """The links to the store refuse connections."""

    kind: Literal["s3_unavailable"]


class S3Slow(FaultBase):
    """The links to the store delay what they carry."""

    kind: Literal["s3_slow"]
    latency: Duration
    jitter: DurationOrZero = 0.0

    def params(self) -> dict[str, Any]:
        """`latency_s`, `jitter_s`."""
        return {"latency_s": self.latency, "jitter_s": self.jitter}


class S3Throttled(FaultBase):
    """A fraction of the requests to the store is answered 503 SlowDown."""

    kind: Literal["s3_throttled"]
    fraction: Annotated[Fraction, Field(gt=0)] = 0.5

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1."""
        return {"fraction": self.fraction}


class ModelCorruption(FaultBase):
    """Damage the bytes of a model artifact: a file, or an object in the registry."""

    kind: Literal["model_corruption"]
    how: Literal["random_bytes", "truncate", "bit_flip"] = "random_bytes"

    def params(self) -> dict[str, Any]:
        """`how`."""
        return {"how": self.how}


class BadModel(FaultBase):
    """Promote a worse but well-formed version: in the model registry, or as the new version of an Argo Rollout."""

    kind: Literal["bad_model"]


class FeatureDrift(FaultBase):
    """Shift the features of a fraction of the entities."""

    kind: Literal["feature_drift"]
    fraction: Annotated[Fraction, Field(gt=0)] = 0.5
    shift: Annotated[float, Field(ge=-1000, le=1000)] = 3.0
    """Added to every feature, in standard deviations of that feature."""

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1, `shift`."""
        return {"fraction": self.fraction, "shift": self.shift}


class FeatureNulls(FaultBase):
    """Set the features of a fraction of the entities to null."""

    kind: Literal["feature_nulls"]
    fraction: Annotated[Fraction, Field(gt=0)] = 0.3

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1."""
        return {"fraction": self.fraction}


class FeatureStale(FaultBase):
    """Features of a fraction of the entities are no longer refreshed: they stay as they were `age` ago."""

    kind: Literal["feature_stale"]
    fraction: Annotated[Fraction, Field(gt=0)] = 1.0
    age: Duration = 3600.0

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1, `age_s`."""
        return {"fraction": self.fraction, "age_s": self.age}


class DatabaseUnavailable(FaultBase):
    """The links to the database refuse connections."""

    kind: Literal["database_unavailable"]


class DatabaseCorruption(FaultBase):
    """Give the database a copy of its file in which pages are damaged; the original is kept aside."""

    kind: Literal["database_corruption"]
    fraction: Annotated[Fraction, Field(gt=0)] = 0.3
    """Share of the pages, the first excluded."""

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1."""
        return {"fraction": self.fraction}


class QueueOverflow(FaultBase):
    """Submit jobs open loop, above what the workers can do."""

    kind: Literal["queue_overflow"]
    rate: Annotated[float, Field(gt=0, le=5000)]
    """Jobs a second, on top of the usual load."""

    def params(self) -> dict[str, Any]:
        """`rate_per_s`."""
        return {"rate_per_s": self.rate}


class CertificateRotation(FaultBase):
    """Replace the targets' TLS certificate under load."""

    kind: Literal["certificate_rotation"]


class CredentialRotation(FaultBase):
    """Replace the targets' API credential under load; the old one is refused after its overlap."""

    kind: Literal["credential_rotation"]
    overlap: DurationOrZero = 2.0
    """For how long both are accepted."""

    def params(self) -> dict[str, Any]:
        """`overlap_s`."""
        return {"overlap_s": self.overlap}


class NetworkIsolation(FaultBase):
    """Cut a process off: every link to and from the targets refuses connections, and those there are ended."""

    kind: Literal["network_isolation"]


class ScaleToZero(FaultBase):
    """Scale the targets' workloads to no replica, and hold them there for the whole window."""

    kind: Literal["scale_to_zero"]


class NodeDrain(FaultBase):
    """Cordon the targets' nodes and evict their pods; the nodes take pods again when the window ends."""

    kind: Literal["node_drain"]
    grace: Duration | None = None
    """Termination grace of the pods; absent: their own."""

    def params(self) -> dict[str, Any]:
        """`grace_s` (None: each pod's own)."""
        return {"grace_s": self.grace}


class ZoneFailure(FaultBase):
    """Cordon and drain every node of a zone at once, budgets or not: the other zones must carry the load."""

    kind: Literal["zone_failure"]


class DnsFailure(FaultBase):
    """Names do not resolve in the targets: their DNS queries are dropped."""

    kind: Literal["dns_failure"]


class GpuMemoryHog(FaultBase):
    """Hold a share of a GPU's memory by a CUDA allocation in a process of its own."""

    kind: Literal["gpu_memory_hog"]
    fraction: Annotated[Fraction, Field(gt=0, le=0.98)] = 0.8
    """Of the device's whole memory."""

    def params(self) -> dict[str, Any]:
        """`fraction` 0–1."""
        return {"fraction": self.fraction}


class ModelChaos(FaultBase):
    """Serve through a `ChaosModelWrapper`: the target becomes a chaotic version of itself."""

    kind: Literal["model_chaos"]
    exceptions: Fraction = 0.05
    timeouts: Fraction = 0.02
    timeout: Duration = 2.0
    """How long a call that times out takes."""
    wrong: Fraction = 0.01
    """Share of predictions that are wrong."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    def params(self) -> dict[str, Any]:
        """`exceptions`, `timeouts`, `wrong` 0–1, `timeout_s`, `seed`."""
        return {
            "exceptions": self.exceptions,
            "timeouts": self.timeouts,
            "timeout_s": self.timeout,
            "wrong": self.wrong,
            "seed": self.seed,
        }


OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""Name of an object of Kubernetes."""


class LitmusEngine(FaultBase):
    """A team's own ChaosEngine of one experiment, run by Litmus (`mlchaos import` writes it)."""

    kind: Literal["litmus_engine"]
    engine: dict[str, Any]
    """The `spec` of the ChaosEngine, plus its `annotations` and `labels`. Name, targets and duration are set by us."""

    @field_validator("engine")
    @classmethod
    def _one(cls, engine: dict[str, Any]) -> dict[str, Any]:
        entries = engine.get("experiments")
        if not isinstance(entries, list):
            raise ValueError("experiments is missing. Allowed: a list of one experiment, such as [{name: pod-delete}]")
        found = cast("list[Any]", entries)
        if len(found) != 1:
            raise ValueError(f"experiments has {len(found)} entries. Allowed: one; `mlchaos import` splits an engine")
        if not isinstance(found[0], dict) or not isinstance(cast("dict[str, Any]", found[0]).get("name"), str):
            raise ValueError("experiments[0].name is missing. Allowed: a name of Litmus, such as pod-delete")
        # both become part of a path of the API
        names: tuple[tuple[str, Any], ...] = (
            ("experiments[0].name", cast("dict[str, Any]", found[0])["name"]),
            ("chaosServiceAccount", engine.get("chaosServiceAccount")),
        )
        for field, name in names:
            if name is not None and not (isinstance(name, str) and OBJECT_NAME.fullmatch(name)):
                raise ValueError(f"{field} is not the name of an object. Allowed: lower-case letters, digits, dashes")
        from mlchaos_dagster.domain.manifests.litmus import normalised  # it reads faults, too

        return normalised(engine)

    def params(self) -> dict[str, Any]:
        """`engine`: plain JSON."""
        return {"engine": self.engine}


class ChaosMeshResource(FaultBase):
    """A team's own Chaos Mesh resource, run by Chaos Mesh (`mlchaos import` writes it)."""

    kind: Literal["chaos_mesh_resource"]
    resource: dict[str, Any]
    """Its `kind`, such as NetworkChaos, and its `spec`. Name, selected pods and duration are set by us."""

    @field_validator("resource")
    @classmethod
    def _shape(cls, resource: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(resource) - {"kind", "spec", "annotations", "labels"}):
            raise ValueError(f"{unknown[0]} is no such field. Allowed: kind, spec, annotations, labels")
        kind = resource.get("kind")
        if not isinstance(kind, str) or not re.fullmatch("[A-Z][A-Za-z]{1,40}Chaos", kind):
            raise ValueError("kind is not that of a fault of Chaos Mesh. Allowed: such as NetworkChaos")
        if not isinstance(resource.get("spec"), dict):
            raise ValueError("spec is missing. Allowed: the spec of the resource")
        from mlchaos_dagster.domain.manifests.chaos_mesh import normalised  # it reads faults, too

        return normalised(resource)

    def params(self) -> dict[str, Any]:
        """`resource`: plain JSON."""
        return {"resource": self.resource}


Fault = Annotated[
    PodDelete
    | PodFailure
    | ContainerKill
    | CpuStress
    | MemoryStress
    | NetworkLatency
    | NetworkLoss
    | NetworkPartition
    | NetworkIsolation
    | S3ObjectCorruption
    | S3Unavailable
    | S3Slow
    | S3Throttled
    | ModelCorruption
    | BadModel
    | ModelChaos
    | FeatureDrift
    | FeatureNulls
    | FeatureStale
    | DatabaseUnavailable
    | DatabaseCorruption
    | QueueOverflow
    | CertificateRotation
    | CredentialRotation
    | ScaleToZero
    | NodeDrain
    | ZoneFailure
    | DnsFailure
    | GpuMemoryHog
    | LitmusEngine
    | ChaosMeshResource,
    Field(discriminator="kind"),
]

FAULTS: dict[str, type[FaultBase]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(Fault)[0])
}
"""Kind → class."""

ON_OBJECTS: dict[str, tuple[str, ...]] = {
    "scale_to_zero": ("Deployment", "StatefulSet"),
    "node_drain": ("Node",),
    "zone_failure": ("Node",),
    "credential_rotation": ("Secret",),
    "certificate_rotation": ("Secret",),
    "gpu_memory_hog": ("Pod", "Node"),
    "bad_model": ("Rollout",),
    "litmus_engine": ("Pod", "Node"),
}
"""Kind → kinds of Kubernetes objects that it hits; all others hit pods."""

ACTS_ON: dict[str, tuple[str, ...]] = {
    "scale_up": ("Deployment", "StatefulSet"),
    "restart_unhealthy": ("Pod",),
    "abort_rollout": ("Rollout",),
    "resume_rollout": ("Rollout",),
}
"""Rollback action → kinds of Kubernetes objects that it is for."""

ON_LINKS = frozenset(
    {
        "network_latency",
        "network_loss",
        "network_partition",
        "database_unavailable",
        "s3_unavailable",
        "s3_slow",
        "s3_throttled",
    }
)
"""Faults that, in the sandbox, are on links between processes; all others are on what is at their ends."""

MOMENTARY = frozenset({"bad_model", "container_kill", "certificate_rotation", "credential_rotation"})
"""Acts, over when they fired, however long their window is and whatever the platform does about them meanwhile;
`pod_delete` without an interval is one, too."""


BROUGHT = {"litmus_engine": "litmus", "chaos_mesh_resource": "chaos_mesh"}
"""Faults that a team brings along as another tool's resource → the backend that runs it."""

_ONE_SHOTS = frozenset({"pod-kill", "container-kill", "ec2-restart", "vm-restart", "node-reset"})
"""Actions of Chaos Mesh that are done at once and never taken back."""


def is_held(kind: str, params: Mapping[str, Any]) -> bool:
    """Whether the fault lasts as long as its window (else: an act, over when it fired)."""
    if kind == "pod_delete":
        return bool(params.get("interval_s"))
    if kind == "litmus_engine":
        return not _kills_once(params["engine"]["experiments"][0])
    if kind == "chaos_mesh_resource":
        return params["resource"]["spec"].get("action") not in _ONE_SHOTS
    return kind not in MOMENTARY


def _kills_once(entry: Mapping[str, Any]) -> bool:
    """Litmus kills again every `CHAOS_INTERVAL`, and where none is given by its own default: 5 s or 10 s."""
    if entry["name"] not in ("pod-delete", "container-kill"):
        return False
    given: dict[str, str] = {}
    components = cast("dict[str, Any]", cast("dict[str, Any]", entry.get("spec") or {}).get("components") or {})
    for pair in cast("list[dict[str, Any]]", components.get("env") or []):
        given[str(pair.get("name"))] = str(pair.get("value"))
    interval, duration = given.get("CHAOS_INTERVAL", ""), given.get("TOTAL_CHAOS_DURATION", "")
    return interval.isdecimal() and duration.isdecimal() and int(interval) >= int(duration)


ALIASES = {
    "pod_kill": "pod_delete",
    "network_delay": "network_latency",
    "pod_cpu_hog": "cpu_stress",
    "pod_memory_hog": "memory_stress",
    "memory_pressure": "memory_stress",
    "pod_network_latency": "network_latency",
    "pod_network_loss": "network_loss",
}
"""Other tools' words, accepted by `mlchaos run --type` (R4-02)."""
