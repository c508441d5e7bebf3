"""ChaosEngines of Litmus (litmuschaos.io/v1alpha1), and lists of their `experiments`, as drafts.

Its CRD requires next to nothing, so that much is checked here which Litmus would only say in the log of a pod. Every
experiment becomes one draft: Litmus runs those of an engine one after the other, and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, cast

from mlchaos_dagster.domain.faults import OBJECT_NAME
from mlchaos_dagster.domain.manifests.drafts import DEFAULT_S, Brought, Draft, Selection, name_of, spoken, tree
from mlchaos_dagster.domain.manifests.probes import PROBE, probes
from mlchaos_dagster.domain.manifests.shapes import (
    TEXT_MAP,
    TEXTS,
    Each,
    Fields,
    Looker,
    Words,
    entries,
    go_seconds,
    part,
    text_at,
)
from mlchaos_dagster.domain.nodes import Document, Node, Path
from mlchaos_dagster.domain.parsing import nearest

_KINDS = Words(("deployment", "statefulset", "daemonset", "deploymentconfig", "rollout"), fold=True, blank=True)
_ENTRY = Fields(
    {
        "name": "text",
        "spec": Fields(
            {
                "components": Fields(
                    {
                        "env": Each(
                            Fields({"name": "text", "value": "text", "valueFrom": "any"}, ("name",), ignored=True)
                        ),
                        "configMaps": Each("any"),
                        "secrets": Each("any"),
                        "experimentAnnotations": TEXT_MAP,
                        "experimentImage": "text",
                        "experimentImagePullSecrets": Each("any"),
                        "nodeSelector": TEXT_MAP,
                        "statusCheckTimeouts": Fields({"delay": "int", "timeout": "int"}),
                        "resources": "any",
                        "securityContext": "any",
                        "tolerations": Each("any"),
                    },
                    ignored=True,
                ),
                "probe": Each(PROBE),
            },
            ignored=True,
            renamed={"probes": "probe"},
            dropped={"rank": "Litmus runs what it is given in its order, and so do we"},
        ),
    },
    ("name",),
    dropped={"rank": "Litmus runs what it is given in its order, and so do we"},
)
_SPEC = Fields(
    {
        "appinfo": Fields(
            {"appns": "text", "applabel": "text", "appkind": _KINDS},
            ignored=True,
            renamed={"appNs": "appns", "appLabel": "applabel", "appKind": "appkind"},
        ),
        "selectors": Fields(
            {
                "pods": Each(Fields({"namespace": "text", "names": "text"}, ("namespace", "names"))),
                "workloads": Each(
                    Fields(
                        {"kind": _KINDS, "namespace": "text", "names": "text", "labels": "text"}, ("kind", "namespace")
                    )
                ),
            }
        ),
        "engineState": Words(("active", "stop"), fold=True),
        "chaosServiceAccount": "text",
        "components": Fields(
            {
                "runner": Fields(
                    {
                        "image": "text",
                        "type": Words(("go",)),
                        "args": TEXTS,
                        "command": TEXTS,
                        "imagePullPolicy": Words(("Always", "IfNotPresent", "Never"), fold=True),
                        "imagePullSecrets": Each("any"),
                        "runnerAnnotations": TEXT_MAP,
                        "runnerLabels": TEXT_MAP,
                        "nodeSelector": TEXT_MAP,
                        "configMaps": Each("any"),
                        "secrets": Each("any"),
                        "tolerations": Each("any"),
                        "resources": "any",
                    },
                    ignored=True,
                    renamed={"runnerannotation": "runnerAnnotations"},
                ),
                "sidecar": Each("any"),
            },
            ignored=True,
        ),
        "defaultHealthCheck": "bool",
        "jobCleanUpPolicy": Words(("delete", "retain"), fold=True),
        "auxiliaryAppInfo": "text",
        "terminationGracePeriodSeconds": "int",
        "experiments": Each(_ENTRY),
    },
    ("experiments",),
    ignored=True,
    dropped={
        "annotationCheck": "Litmus 3 reads it nowhere; what may be hit is opted in by the label of a namespace",
        "monitoring": "Litmus 3 reads it nowhere",
        "jobCleanupPolicy": "it is called jobCleanUpPolicy, and is ours to set",
    },
)

_OF_NODES = (
    "node-drain", "node-taint", "node-cpu-hog", "node-memory-hog", "node-io-stress", "node-restart", "node-poweroff",
    "kubelet-service-kill", "docker-service-kill",
)  # fmt: skip
_OUTSIDE = {
    "aws-az-chaos": "a zone of a load balancer of AWS",
    "aws-ssm-chaos-by-id": "EC2 instances",
    "aws-ssm-chaos-by-tag": "EC2 instances",
    "ebs-loss-by-id": "EBS volumes",
    "ebs-loss-by-tag": "EBS volumes",
    "ec2-stop-by-id": "EC2 instances",
    "ec2-stop-by-tag": "EC2 instances",
    "ec2-terminate-by-id": "EC2 instances",
    "ec2-terminate-by-tag": "EC2 instances",
    "rds-instance-stop": "an RDS instance",
    "azure-disk-loss": "disks of Azure",
    "azure-instance-stop": "machines of Azure",
    "gcp-vm-disk-loss": "disks of GCP",
    "gcp-vm-disk-loss-by-label": "disks of GCP",
    "gcp-vm-instance-stop": "machines of GCP",
    "gcp-vm-instance-stop-by-label": "machines of GCP",
    "vm-poweroff": "machines of VMware",
    "vmware-vm-poweroff": "machines of VMware",
    "redfish-node-restart": "a machine, by its IPMI address",
    "k6-loadgen": "whatever its k6 script calls",
}
"""Experiment → what it hits, which is no object of the cluster."""
_OF_PODS = (
    "pod-delete", "container-kill", "disk-fill", "pod-autoscaler", "pod-cpu-hog", "pod-cpu-hog-exec", "pod-memory-hog",
    "pod-memory-hog-exec", "pod-io-stress", "pod-fio-stress", "pod-network-latency", "pod-network-loss",
    "pod-network-corruption", "pod-network-duplication", "pod-network-partition", "pod-network-rate-limit",
    "pod-dns-error", "pod-dns-spoof", "pod-http-latency", "pod-http-status-code", "pod-http-modify-header",
    "pod-http-modify-body", "pod-http-reset-peer", "spring-boot-app-kill", "spring-boot-cpu-stress",
    "spring-boot-memory-stress", "spring-boot-exceptions", "spring-boot-faults", "spring-boot-latency",
    "kafka-broker-pod-failure", "cassandra-pod-delete",
)  # fmt: skip
_KNOWN = (*_OF_PODS, *_OF_NODES, *_OUTSIDE)
_NATIVE = {
    "pod-delete": "pod_delete",
    "container-kill": "container_kill",
    "pod-cpu-hog": "cpu_stress",
    "pod-memory-hog": "memory_stress",
    "pod-network-latency": "network_latency",
    "pod-network-loss": "network_loss",
    "pod-network-partition": "network_partition",
    "pod-dns-error": "dns_failure",
    "node-drain": "node_drain",
}
"""Experiments that are a neutral fault, too."""
_NOT_OF_LITMUS = re.compile(r"(gpu|model|feature|training|inference|aws-s3|s3|data)-")
_ELSEWHERE = {
    "gpu": "gpu_memory_hog",
    "model": "model_corruption, bad_model",
    "feature": "feature_drift, feature_nulls, feature_stale",
    "s3": "s3_unavailable, s3_slow, s3_throttled, s3_object_corruption",
    "aws-s3": "s3_unavailable, s3_slow, s3_throttled, s3_object_corruption",
}
_SECONDS = ("TOTAL_CHAOS_DURATION", "CHAOS_INTERVAL", "RAMP_TIME")
_VARIABLES = (
    "TOTAL_CHAOS_DURATION", "CHAOS_INTERVAL", "RAMP_TIME", "DEFAULT_HEALTH_CHECK", "SEQUENCE", "NODE_LABEL",
    "PODS_AFFECTED_PERC", "TARGET_PODS", "TARGET_CONTAINER", "FORCE", "SIGNAL", "CONTAINER_RUNTIME", "SOCKET_PATH", "LIB_IMAGE",
    "STRESS_IMAGE", "TC_IMAGE", "CPU_CORES", "CPU_LOAD", "MEMORY_CONSUMPTION", "NUMBER_OF_WORKERS", "NETWORK_INTERFACE",
    "NETWORK_LATENCY", "JITTER", "NETWORK_PACKET_LOSS_PERCENTAGE", "DESTINATION_IPS", "DESTINATION_HOSTS",
    "DESTINATION_PORTS", "SOURCE_PORTS", "NAMESPACE_SELECTOR", "POD_SELECTOR", "POLICY_TYPES", "PORTS",
)  # fmt: skip
"""Variables of the experiments that are a neutral fault, too; others may have more."""
_SLIP = 0.85
"""Likeness of two names from which one is the other misspelt."""
_PERCENTS = ("PODS_AFFECTED_PERC", "NODES_AFFECTED_PERC")
_DAMAGE = ("random_bytes", "truncate", "bit_flip")
_KEPT_ANNOTATIONS = re.compile(r"(?!kubectl\.kubernetes\.io/last-applied-configuration)")


def engine(look: Looker, node: Node, brought: Brought, path: Path, name: str, of: str = "ChaosEngine") -> None:
    """The experiments of a ChaosEngine's `spec` at `path`, or of the template of a schedule.

    Args:
        look: reads, and keeps what is to be said.
        node: the spec.
        brought: where the drafts go.
        path: of the spec in the document.
        name: of the engine or schedule.
        of: which of both.
    """
    spec = look.look(node, path, _SPEC)
    if not isinstance(spec, dict):
        return
    spec = cast("dict[str, Any]", spec)
    listed = entries(spec.pop("experiments", None))
    if not listed and not look.problems:
        look.problem((*path, "experiments"), "empty. Allowed: at least one experiment, such as [{name: pod-delete}].")
    if spec.pop("engineState", "active") == "stop":
        look.note((*path, "engineState"), "left out: whether it runs is ours to say.")
    if not spec.get("chaosServiceAccount"):
        look.note(path, "missing field chaosServiceAccount: that of the environment is taken.", key=True)
        spec.pop("chaosServiceAccount", None)
    _is_name(look, spec.get("chaosServiceAccount"), (*path, "chaosServiceAccount"))
    meta = _metadata(look) if path in (("spec",), ("spec", "engineTemplateSpec")) else {}
    home = meta.pop("namespace", "")
    chosen = _selected(look, node, spec, path, home)
    if home and chosen.namespace not in ("", home):
        what = (
            f'"{home[:63]}" is not the namespace of its pods: for an engine, its service account and its ChaosExperiment '
            f"there, the environment needs kubernetes: {{litmus: {{namespace: {home[:63]}}}}}."
        )
        look.note(("metadata", "namespace"), what)
    for i, entry in enumerate(listed):
        suffix = str(entry.get("name", "")) if len(listed) > 1 else ""
        one = _Entry(look, entry, (*path, "experiments", i), {**spec, **meta}, chosen)
        one.draft(brought, name_of(name, suffix), f"{of} {name}")


def normalised(engine: dict[str, Any]) -> dict[str, Any]:
    """The `engine` of a fault of ours with every value of its right type. Raises ValueError with the first problem."""
    look = Looker(Document("engine", tree(engine)))
    found = look.look(
        look.document.root, (), Fields({**_SPEC.of, "labels": TEXT_MAP, "annotations": TEXT_MAP}, ("experiments",))
    )
    if look.problems:
        raise ValueError(look.problems[0].what.removesuffix("."))
    return part(found)


def fragment(look: Looker, node: Node, brought: Brought, path: Path = ()) -> None:
    """A list of entries of `experiments`, without their engine: what is hit must be said when it is run."""
    listed = entries(look.look(node, path, Each(_ENTRY)))
    missing = Selection(why_none="a list of experiments does not say what is hit")
    for i, entry in enumerate(listed):
        one = _Entry(look, entry, (*path, i), {}, missing)
        one.draft(brought, name_of("brought", str(entry.get("name", ""))), "a list of experiments of Litmus")


def _metadata(look: Looker) -> dict[str, Any]:
    pair = look.document.root.pair("metadata")
    if pair is None:
        return {}
    rule = Fields({"name": "text", "namespace": "text", "labels": TEXT_MAP, "annotations": TEXT_MAP}, extra=True)
    found = look.look(pair[1], ("metadata",), rule)
    found = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    kept: dict[str, Any] = {}
    for key in ("labels", "annotations"):
        marks = cast("dict[str, str]", found.get(key) or {})
        if kept_marks := {k: v for k, v in marks.items() if _KEPT_ANNOTATIONS.match(k)}:
            kept[key] = kept_marks
    _is_name(look, found.get("namespace"), ("metadata", "namespace"))
    return {**kept, "namespace": str(found.get("namespace") or "")}


def _is_name(look: Looker, name: Any, path: Path) -> None:
    """Names become parts of paths of the API."""
    if name not in (None, "") and not OBJECT_NAME.fullmatch(str(name)):
        look.problem(
            path, f'"{str(name)[:60]}" is not the name of an object. Allowed: lower-case letters, digits and dashes.'
        )


def _selected(look: Looker, node: Node, spec: Mapping[str, Any], path: Path, namespace: str) -> Selection:
    app, selectors = cast("dict[str, str]", spec.get("appinfo") or {}), spec.get("selectors")
    if selectors:
        return _selectors(look, cast("dict[str, Any]", selectors), (*path, "selectors"))
    label, kind = app.get("applabel", ""), app.get("appkind", "") or text_at(node, "appinfo", "appkind")
    if bool(label) != bool(kind):
        what, given = ("appkind", "applabel") if label else ("applabel", "appkind")
        look.problem(
            (*path, "appinfo"), f"{given} without {what}. Allowed: both (or neither, where nothing of it is hit)."
        )
    if not label:
        return Selection(why_none="its appinfo names no applabel")
    if not _is_selector(label):
        look.problem(
            (*path, "appinfo", "applabel"), f'"{label[:80]}" is not a label selector. Allowed: such as app=web.'
        )
        return Selection(why_none="its applabel is wrong")
    _is_name(look, app.get("appns"), (*path, "appinfo", "appns"))
    return Selection(namespace=app.get("appns") or namespace, select=label)


def _selectors(look: Looker, selectors: dict[str, Any], path: Path) -> Selection:
    pods, workloads = entries(selectors.get("pods")), entries(selectors.get("workloads"))
    if ("pods" in selectors) == ("workloads" in selectors):
        look.problem(path, "needs exactly one of pods, workloads.")
        return Selection(why_none="its selectors are wrong")
    if pods or not workloads:
        why = "its selectors name pods one by one, and a target is pods by their labels"
        look.note(
            (*path, "pods"), "pods by name are gone after their first restart; a target of ours is pods by labels."
        )
        return Selection(why_none=why)
    if len(workloads) > 1:
        why = "its selectors name several workloads, and an experiment has one target"
        return Selection(why_none=why)
    one = workloads[0]
    if not one.get("labels"):
        return Selection(why_none="its selectors name a workload by name, and a target is pods by their labels")
    if not _is_selector(str(one["labels"])):
        look.problem((*path, "workloads", 0, "labels"), "not a label selector. Allowed: such as app=web.")
    _is_name(look, one.get("namespace"), (*path, "workloads", 0, "namespace"))
    return Selection(namespace=str(one.get("namespace", "")), select=str(one["labels"]))


_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?"
_SELECTOR = re.compile(
    rf"!?{_LABEL}|{_LABEL}\s*(=|==|!=)\s*({_LABEL})?|{_LABEL}\s+(not)?in\s*\(\s*[A-Za-z0-9._, -]*\)", re.IGNORECASE
)


def _is_selector(text: str) -> bool:
    parts = re.split(r",(?![^(]*\))", text)
    return len(text) <= 1000 and all(_SELECTOR.fullmatch(p.strip()) for p in parts)


class _Entry:
    """One of an engine's experiments."""

    def __init__(
        self, look: Looker, entry: dict[str, Any], path: Path, engine: Mapping[str, Any], chosen: Selection
    ) -> None:
        self.look, self.path, self.engine, self.chosen = look, path, engine, chosen
        self.kind = str(entry.get("name", ""))
        self.spec = cast("dict[str, Any]", entry.get("spec") or {})
        self.components = cast("dict[str, Any]", self.spec.get("components") or {})
        self.env: dict[str, str] = {}
        self.at: dict[str, Path] = {}

    def draft(self, brought: Brought, name: str, of: str) -> None:
        if not self.kind:
            return
        _is_name(self.look, self.kind, (*self.path, "name"))
        self._read_env()
        native = self._native(brought)
        if native is None and _NOT_OF_LITMUS.match(self.kind):
            family = next((f for f in ("aws-s3", *_ELSEWHERE) if self.kind.startswith(f)), "")
            natively = f" Natively: {_ELSEWHERE[family]}." if family else ""
            what = f'Litmus has no experiment "{self.kind}", and we none that is the same.{natively}'
            self.look.problem((*self.path, "name"), what)
            return
        duration = self._duration()
        chosen, radius = self._hit(native is not None)
        if native is not None:
            fault, what = native, f"{native['kind']}, for {self.kind} of {of}"
        else:
            self._known(brought)
            fault, what = {"kind": "litmus_engine", "engine": self._engine()}, f"{self.kind} of {of}"
        where = self.look.document.where((*self.path, "name"))
        brought.drafts.append(Draft(name, spoken(what), fault, duration, radius, chosen, where))

    # -- what it is -------------------------------------------------------------------------------------------------

    def _native(self, brought: Brought) -> dict[str, Any] | None:
        """The neutral fault where Litmus has no such experiment, and we have."""
        if self.kind in ("gpu-memory-hog", "gpu-memory-stress"):
            share = self._percent("GPU_MEMORY_PERCENTAGE") or 80.0
            if share > 98:
                self._say("GPU_MEMORY_PERCENTAGE", f"{share:g} is more than the 98 % that are to be had: 98 is taken.")
                share = 98.0
            made: dict[str, Any] = {"kind": "gpu_memory_hog", "fraction": f"{share:g}%"}
        elif self.kind in ("model-corruption", "model-file-corruption"):
            how = self.env.get("CORRUPTION_TYPE", "random_bytes").replace("-", "_")
            if how not in _DAMAGE:
                near = nearest(how, _DAMAGE)
                hint = f' Did you mean "{near}"?' if near else ""
                self._wrong("CORRUPTION_TYPE", f'"{how[:40]}" is not known.{hint} Allowed: {", ".join(_DAMAGE)}.')
                how = "random_bytes"
            made = {"kind": "model_corruption", "how": how}
        else:
            return None
        shown = ", ".join(f"{k} {v}" for k, v in made.items() if k != "kind")
        what = f'Litmus has no experiment "{self.kind}": run natively as {made["kind"]} ({shown}).'
        self.look.note((*self.path, "name"), what)
        for i, probe in enumerate(entries(self.spec.get("probe"))):
            what = f'the probe "{probe.get("name", i)}" is Litmus\'s: natively its promise is an SLI of the environment, in steady_state.'
            self.look.note((*self.path, "spec", "probe", i), what)
        return made

    def _known(self, brought: Brought) -> None:
        if self.kind in _NATIVE:
            brought.hints.append(
                f"{self.look.document.where((*self.path, 'name'))}  {self.kind} runs through Litmus, as it was written; "
                f"the same is to be had natively, without Litmus: fault {_NATIVE[self.kind]}."
            )
        elif self.kind not in _KNOWN:
            near = nearest(self.kind, _KNOWN)
            hint = f' Did you mean "{near}"?' if near else ""
            what = f'"{self.kind}" is none of Litmus\'s own experiments.{hint} It needs a ChaosExperiment of that name.'
            self.look.note((*self.path, "name"), what)

    def _engine(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.kind}
        spec: dict[str, Any] = {}
        if self.components:
            spec["components"] = self.components
        probe = probes(self.look, cast("list[Any]", self.spec.get("probe") or []), (*self.path, "spec", "probe"))
        if probe:
            spec["probe"] = probe
        entry["spec"] = spec
        return {**self.engine, "experiments": [entry]}

    # -- env --------------------------------------------------------------------------------------------------------

    def _read_env(self) -> None:
        pairs = entries(self.components.get("env"))
        path = (*self.path, "spec", "components", "env")
        for i, pair in enumerate(pairs):
            name = str(pair.get("name", ""))
            if name in self.env:
                self.look.note((*path, i), f"{name} a second time: Kubernetes takes the last.")
            self.at[name] = (*path, i, "value")
            if self.kind in _NATIVE and name not in _VARIABLES:
                for meant in get_close_matches(name[:100], _VARIABLES, 1, _SLIP):
                    self.look.note((*path, i, "name"), f'Litmus reads no "{name[:60]}". Did you mean "{meant}"?')
            value = str(pair.get("value", ""))
            if name in _SECONDS and value:
                value = self._bare(name, value)
            elif name in _PERCENTS and value.strip().endswith("%"):
                value = value.strip()[:-1].strip()
                self._say(name, f"Litmus wants a number without %: {value} is taken.")
            if "value" in pair:
                pair["value"] = value
            self.env[name] = value

    def _bare(self, name: str, value: str) -> str:
        """Seconds without a unit, as Litmus reads them: it takes `30s` for nothing at all."""
        text = value.strip()
        if re.fullmatch(r"\d{1,9}", text) or (name == "CHAOS_INTERVAL" and re.fullmatch(r"\d{1,9}-\d{1,9}", text)):
            return text
        seconds = go_seconds(text)
        if seconds is None and re.fullmatch(r"\d{1,9}\.\d{1,6}", text):
            seconds = float(text)
        if seconds is None or seconds < 0:
            self._wrong(name, f'"{text[:60]}" is not a number of seconds. Allowed: such as "30".')
            return text
        whole = str(max(1, round(seconds)) if seconds else 0)
        self._say(name, f'Litmus reads whole seconds without a unit: "{whole}" is taken for "{text[:60]}".')
        return whole

    def _say(self, name: str, what: str) -> None:
        self.look.note(self.at.get(name, self.path), f"{name}: {what}")

    def _wrong(self, name: str, what: str) -> None:
        self.look.problem(self.at.get(name, self.path), f"{name}: {what}")

    def _duration(self) -> float:
        text = self.env.get("TOTAL_CHAOS_DURATION", "")
        if not text:
            what = f"no TOTAL_CHAOS_DURATION: {DEFAULT_S:g} s are taken."
            self.look.note((*self.path, "spec", "components", "env"), what, key=True)
            return DEFAULT_S
        seconds = float(text) if text.isdecimal() else -1.0
        if seconds == 0:
            self._wrong("TOTAL_CHAOS_DURATION", "0 is not more than zero. Allowed: a number of seconds, such as 30.")
        return seconds if seconds > 0 else DEFAULT_S

    def _percent(self, name: str) -> float | None:
        """1–100; None: not given, or 0."""
        text = self.env.get(name, "").strip()
        if not text:
            return None
        if not re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text) or float(text) > 100:
            self._wrong(name, f'"{text[:60]}" is not a percentage. Allowed: 0 to 100.')
            return None
        return float(text) or None

    # -- what is hit ------------------------------------------------------------------------------------------------

    def _hit(self, native: bool) -> tuple[Selection, dict[str, Any]]:
        if self.kind in _OUTSIDE:
            why = f"it hits {_OUTSIDE[self.kind]}, which no cluster tells us about; whose service is to be watched"
            return Selection(why_none=why), {"count": 1}
        if self.kind in _OF_NODES:
            return self._nodes()
        chosen = self.chosen
        container = self.env.get("TARGET_CONTAINER", "").split(",")[0].strip()
        path = self.env.get("FILE_PATH", "") if native else ""
        chosen = replace(chosen, container=container, path=path)
        if pods := [p for p in self.env.get("TARGET_PODS", "").split(",") if p.strip()]:
            what = f"the pods are frozen when the run begins, out of all that match: {len(pods)} of them, not these by name."
            self._say("TARGET_PODS", what)
            return chosen, {"count": len(pods)}
        share = self._percent("PODS_AFFECTED_PERC")
        return chosen, ({"count": 1} if share is None else {"fraction": f"{share:g}%"})

    def _nodes(self) -> tuple[Selection, dict[str, Any]]:
        names = [
            n.strip() for key in ("TARGET_NODE", "TARGET_NODES") for n in self.env.get(key, "").split(",") if n.strip()
        ]
        label = self.env.get("NODE_LABEL", "").strip()
        share = self._percent("NODES_AFFECTED_PERC")
        radius: dict[str, Any] = {"count": 1} if share is None else {"fraction": f"{share:g}%"}
        if names:
            for name in names:
                if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?", name):
                    self._wrong("TARGET_NODE", f'"{name[:60]}" is not the name of a node.')
            one = f"kubernetes.io/hostname={names[0]}"
            select = one if len(names) == 1 else f"kubernetes.io/hostname in ({', '.join(names)})"
            return Selection("Node", "", select), {"count": len(names)}
        if label:
            if not _is_selector(label):
                self._wrong("NODE_LABEL", f'"{label[:60]}" is not a label selector. Allowed: such as zone=a.')
            return Selection("Node", "", label), radius
        if self.chosen.select:
            what = "no TARGET_NODE or NODE_LABEL: Litmus takes the node of some pod of appinfo; a target of ours is nodes by labels."
            self.look.note((*self.path, "name"), what)
        return Selection("Node", why_none="it names no TARGET_NODE or NODE_LABEL"), radius
