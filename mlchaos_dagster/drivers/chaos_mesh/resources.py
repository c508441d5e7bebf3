"""The resources of Chaos Mesh that carry our faults: where they are, what is on them, which act once. Pure.

Selectors name the frozen pods and nothing else: what else a selector says is dropped, since Chaos Mesh selects when it
gets to it, and replacement pods or a label that somebody set meanwhile are nobody's target.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mlchaos_dagster.agent.network_plan import short_name
from mlchaos_dagster.kube.labels import PREFIX, of_lease
from mlchaos_dagster.kube.objects import Object, part, text
from mlchaos_dagster.kube.refs import Ref

GROUP = "chaos-mesh.org"
API = f"/apis/{GROUP}/v1alpha1"
PAUSE = "experiment.chaos-mesh.org/pause"
"""Annotation: `true` stops the fault and keeps the status; acts that are done at once ignore it."""
FORCED = "chaos-mesh.chaos-mesh.org/cleanFinalizer"
"""Annotation: `forced` lets a resource go whatever its records say."""
FAULT = "fault"
"""Component of our resources (label)."""
_ONE_SHOTS = {
    "PodChaos": ("pod-kill", "container-kill"),
    "AWSChaos": ("ec2-restart",),
    "AzureChaos": ("vm-restart",),
    "GCPChaos": ("node-reset",),
}
WITHOUT_PODS = ("AWSChaos", "AzureChaos", "GCPChaos", "PhysicalMachineChaos")
"""Kinds that select no pods: machines and disks outside of the cluster."""
PLURALS = ("podnetworkchaos", "podiochaos", "podhttpchaos")
"""One object a pod, named as the pod, in which Chaos Mesh notes what of each resource is on in it."""


def collection(kind: str, namespace: str) -> str:
    """Path of all resources of a kind in a namespace. (The plural is the kind in lower case.)"""
    return f"{API}/namespaces/{namespace}/{kind.lower()}"


def path_of(found: Mapping[str, Any]) -> str:
    """Where a resource is."""
    return f"{collection(text(found, 'kind'), text(found, 'metadata', 'namespace'))}/{text(found, 'metadata', 'name')}"


def shown(found: Mapping[str, Any]) -> str:
    """For people."""
    return f"{text(found, 'kind')} {text(found, 'metadata', 'namespace')}/{text(found, 'metadata', 'name')}"


def source(found: Mapping[str, Any]) -> str:
    """How Chaos Mesh calls a resource in what it notes at the pods."""
    return f"{text(found, 'metadata', 'namespace')}/{text(found, 'metadata', 'name')}"


def name_of(lease_id: str, extra: str = "") -> str:
    """Of a lease's resource. Short: Chaos Mesh builds the names of chains and annotations from it."""
    return f"mlchaos-{short_name(lease_id)}{extra}"


def is_one_shot(kind: str, spec: Mapping[str, Any]) -> bool:
    """Done at once, never recovered by Chaos Mesh, deaf to a pause."""
    return text(spec, "action") in _ONE_SHOTS.get(kind, ())


def frozen_selector(refs: Iterable[Ref]) -> Object:
    """Those pods, all of them."""
    pods: dict[str, list[str]] = {}
    for ref in refs:
        pods.setdefault(ref.namespace, []).append(ref.name)
    return {"mode": "all", "selector": {"pods": pods}}


def lasting(seconds: float) -> str:
    """A duration as Chaos Mesh takes it, never shorter."""
    return f"{math.ceil(seconds)}s"


def resource(
    lease_id: str, kind: str, namespace: str, spec: Mapping[str, Any], *, name: str = "", marks: Mapping[str, Any] = {}
) -> Object:
    """A resource as it is created: paused where it can be, so that nothing is injected before it was looked at.

    `marks` are `labels` and `annotations` of a team's own resource; pause and forced clean-up are ours to say.
    """
    pause = {} if is_one_shot(kind, spec) else {PAUSE: "true"}
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": kind,
        "metadata": {
            "name": name or name_of(lease_id),
            "namespace": namespace,
            "labels": {**_theirs(marks, "labels"), **of_lease(lease_id, FAULT)},
            "annotations": {**_theirs(marks, "annotations"), **pause},
        },
        "spec": dict(spec),
    }


def _theirs(marks: Mapping[str, Any], key: str) -> dict[str, Any]:
    given: dict[str, Any] = part(marks, key) or {}
    return {k: v for k, v in given.items() if f"{GROUP}/" not in k and not k.startswith(PREFIX)}


def chain_names(name: str) -> tuple[str, str]:
    """The iptables chains that a NetworkChaos of this name makes in a pod, for what comes in and what goes out."""
    return f"INPUT/{_compressed(name, 21)}", f"OUTPUT/{_compressed(name, 20)}"


def set_prefix(name: str) -> str:
    """How the names of its ipsets begin."""
    return f"{name[:5]}_{hashlib.sha256(name[5:].encode()).hexdigest()[:8]}"


def _compressed(name: str, length: int) -> str:
    """As `netutils.CompressName` of Chaos Mesh, without a suffix."""
    if len(name) < 6:
        return f"{name}_"
    return f"{name[:5]}_{hashlib.sha256(name[5:].encode()).hexdigest()[: length - 7]}_"
