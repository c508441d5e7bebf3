"""The ChaosEngine of a lease: one experiment, frozen targets, a name of its own. Pure.

The operator sets its finalizer only where there is none, so ours has none. It is made with `engineState: stop`, which the
operator leaves alone as long as it has never seen it run, and is set to `active` by a patch that is bound to this very
object: who wakes up late, after a recovery, finds nothing to start, and what he makes is inert.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from mlchaos_dagster.domain.environment import Litmus
from mlchaos_dagster.drivers.litmus.faults import OURS, PARTITION, Plan, Selection, entry_of, label_of
from mlchaos_dagster.kube.labels import LEASE, PREFIX, of_lease
from mlchaos_dagster.kube.lease_objects import object_name
from mlchaos_dagster.kube.objects import Object

GROUP = "litmuschaos.io"
ACTIVE, STOP = "active", "stop"
KINDS = ("deployment", "statefulset", "daemonset", "deploymentconfig", "rollout")
"""Owners that Litmus knows by name or label."""
UID = "chaosUID"
"""Label, by which Litmus knows its own: the uid of the ChaosEngine."""
_NOT_SPEC = ("annotations", "labels")


def collection(namespace: str, plural: str) -> str:
    """Path of Litmus's objects in a namespace; empty: in all."""
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{GROUP}/v1alpha1{where}/{plural}"


def name_of(lease_id: str) -> str:
    """Of a lease's ChaosEngine: its runner carries it as a label, so it must fit into one."""
    return object_name(lease_id)


def namespace_of(options: Litmus, target_namespace: str) -> str:
    """Where the ChaosEngine is."""
    return options.namespace or target_namespace


def body(
    lease_id: str, options: Litmus, namespace: str, plan: Plan, targets: Selection, params: Mapping[str, Any]
) -> Object:
    """The ChaosEngine, inert; `params` of the fault: a brought engine is in them, and keeps all that is not ours."""
    brought: dict[str, Any] = copy.deepcopy(params.get("engine") or {})
    entry = entry_of({"engine": brought}) if brought else {"name": plan.experiment}
    spec: dict[str, Any] = {k: v for k, v in brought.items() if k not in _NOT_SPEC}
    appinfo: dict[str, Any] = spec.pop("appinfo", None) or {}
    spec.pop("selectors", None)
    # Litmus's own check of what it hit would look for the deleted pods by name: it is told by their owner instead.
    checked = appinfo if spec.get("defaultHealthCheck") and plan.experiment == "pod-delete" else None
    components: dict[str, Any] = spec.get("components") or {}
    runner: dict[str, Any] = components.get("runner") or {}
    labels = of_lease(lease_id, "fault")
    grace_s = max(math.ceil(options.grace), int(spec.get("terminationGracePeriodSeconds") or 0))
    spec |= {
        "engineState": STOP,
        "chaosServiceAccount": spec.get("chaosServiceAccount") or options.service_account,
        "terminationGracePeriodSeconds": grace_s,
        "jobCleanUpPolicy": "delete",
        # Experiment and helpers get the engine's own labels, its runner only these.
        "components": {
            **components,
            "runner": {**runner, "runnerLabels": {**_theirs(runner, "runnerLabels"), **labels}},
        },
        "experiments": [_experiment(entry, {**options.env, **plan.env}, grace_s)],
        **_selected(lease_id, plan, targets, checked),
    }
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "ChaosEngine",
        "metadata": {
            "name": name_of(lease_id),
            "namespace": namespace,
            "labels": {**_theirs(brought, "labels"), **labels},
            "annotations": {**_theirs(brought, "annotations"), LEASE: lease_id},
        },
        "spec": spec,
    }


def _theirs(brought: Mapping[str, Any], key: str) -> dict[str, str]:
    """Marks that a team gave its engine, without those by which everything of a lease is found."""
    marks: dict[str, str] = brought.get(key) or {}
    return {k: v for k, v in marks.items() if k != UID and not k.startswith(PREFIX)}


def _experiment(entry: dict[str, Any], env: dict[str, str], grace_s: int) -> dict[str, Any]:
    """The entry with our variables in the place of its own; those that are read from elsewhere stay."""
    spec: dict[str, Any] = entry.get("spec") or {}
    components: dict[str, Any] = spec.get("components") or {}
    given: list[dict[str, Any]] = components.get("env") or []
    # The runner exports the engine's field under this name, but a variable of the ChaosExperiment would win over it.
    env = {**env, "TERMINATION_GRACE_PERIOD_SECONDS": str(grace_s)}
    elsewhere = [e for e in given if "valueFrom" in e and e["name"] not in OURS | env.keys()]
    own = [{"name": name, "value": value} for name, value in sorted(env.items())]
    return {**entry, "spec": {**spec, "components": {**components, "env": [*own, *elsewhere]}}}


def _selected(lease_id: str, plan: Plan, targets: Selection, checked: dict[str, Any] | None) -> dict[str, Any]:
    """`selectors` and `appinfo`: operators before 3.0 know the latter only, and take the pods from `TARGET_PODS`."""
    if targets.nodes:
        return {}
    if plan.experiment == PARTITION:
        label = label_of(lease_id)
        return {"appinfo": {"appns": targets.namespace, "applabel": label, "appkind": targets.kind}}
    if targets.workloads:
        chosen = [{"kind": k, "namespace": targets.namespace, "names": n} for k, n in targets.workloads]
        return {"selectors": {"workloads": chosen}}
    if checked is not None:
        return {"appinfo": {**checked, "appns": targets.namespace}}
    pods = {"namespace": targets.namespace, "names": ",".join(targets.pods)}
    return {"selectors": {"pods": [pods]}, "appinfo": {"appns": targets.namespace}}
