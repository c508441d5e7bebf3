"""Resources of Chaos Mesh (chaos-mesh.org/v1alpha1) as drafts: every kind of fault, schedules and workflows aside.

The tables say what each kind has and which fields its action needs, as the CRDs and the webhooks of Chaos Mesh 2.7 and 2.8
do: what its webhook would refuse in the middle of a run is refused here, with the line.
"""

from __future__ import annotations

import re
from typing import Any

from mlchaos_dagster.domain.faults import OBJECT_NAME
from mlchaos_dagster.domain.manifests.drafts import DEFAULT_S, Brought, Draft, Selection, name_of, spoken, tree
from mlchaos_dagster.domain.manifests.shapes import (
    TEXT_MAP,
    TEXTS,
    Each,
    Every,
    Fields,
    Looker,
    Rule,
    Words,
    entries,
    go_seconds,
    part,
    texts,
)
from mlchaos_dagster.domain.nodes import Document, Node, Path

MODES = ("one", "all", "fixed", "fixed-percent", "random-max-percent")
_SELECTOR = Fields(
    {
        "namespaces": TEXTS,
        "labelSelectors": TEXT_MAP,
        "expressionSelectors": Each(
            Fields(
                {
                    "key": "text",
                    "operator": Words(("In", "NotIn", "Exists", "DoesNotExist"), fold=True),
                    "values": TEXTS,
                },
                ("key", "operator"),
            )
        ),
        "annotationSelectors": TEXT_MAP,
        "fieldSelectors": TEXT_MAP,
        "nodeSelectors": TEXT_MAP,
        "nodes": TEXTS,
        "pods": Every(TEXTS),
        "podPhaseSelectors": TEXTS,
        "physicalMachines": Every(TEXTS),
    }
)
_CHOICE: dict[str, Rule] = {"selector": _SELECTOR, "mode": Words(MODES, fold=True), "value": "text"}
_COMMON: dict[str, Rule] = {**_CHOICE, "duration": "duration", "remoteCluster": "text"}
_PODS: dict[str, Rule] = {**_COMMON, "containerNames": TEXTS}
_CLOUD: dict[str, Rule] = {"duration": "duration", "remoteCluster": "text", "secretName": "text"}
_REORDER = Fields({"reorder": "text", "correlation": "text", "gap": "int"}, ("reorder", "gap"))
_DELAY = Fields({"latency": "duration", "jitter": "duration", "correlation": "text", "reorder": _REORDER}, ("latency",))
_BANDWIDTH = Fields(
    {"rate": "text", "limit": "int", "buffer": "int", "peakrate": "int", "minburst": "int"}, ("rate", "limit", "buffer")
)
_REPLACE = Fields(
    {"body": "text", "code": "int", "headers": TEXT_MAP, "method": "text", "path": "text", "queries": TEXT_MAP}
)
_PATCH = Fields(
    {
        "body": Fields({"type": "text", "value": "text"}, ("type", "value")),
        "headers": Each(TEXTS),
        "queries": Each(TEXTS),
    }
)
_ATTR: dict[str, Rule] = {
    **dict.fromkeys(("ino", "size", "blocks", "nlink", "uid", "gid", "rdev", "perm"), "int"),
    **dict.fromkeys(("atime", "ctime", "mtime"), "any"),
    "kind": "text",
}


def _action(*names: str) -> dict[str, Rule]:
    return {"action": Words(names, fold=True)}


_POD = ("selector", "mode")
KINDS: dict[str, Fields] = {
    "PodChaos": Fields(
        {**_action("pod-kill", "pod-failure", "container-kill"), **_PODS, "gracePeriod": "int"}, ("action", *_POD)
    ),
    "NetworkChaos": Fields(
        {
            **_action("netem", "delay", "loss", "duplicate", "corrupt", "partition", "bandwidth", "rate"),
            **_PODS,
            "direction": Words(("to", "from", "both"), fold=True),
            "target": Fields({**_CHOICE}, _POD),
            "externalTargets": TEXTS,
            "device": "text",
            "targetDevice": "text",
            "delay": _DELAY,
            "loss": Fields({"loss": "text", "correlation": "text"}, ("loss",)),
            "duplicate": Fields({"duplicate": "text", "correlation": "text"}, ("duplicate",)),
            "corrupt": Fields({"corrupt": "text", "correlation": "text"}, ("corrupt",)),
            "rate": Fields({"rate": "text"}, ("rate",)),
            "bandwidth": _BANDWIDTH,
        },
        ("action", *_POD),
    ),
    "StressChaos": Fields(
        {
            **_PODS,
            "stressors": Fields(
                {
                    "cpu": Fields({"workers": "int", "load": "int", "options": TEXTS}, ("workers",)),
                    "memory": Fields(
                        {"workers": "int", "size": "text", "oomScoreAdj": "int", "options": TEXTS, "time": "text"},
                        ("workers",),
                    ),
                }
            ),
            "stressngStressors": "text",
        },
        _POD,
    ),
    "IOChaos": Fields(
        {
            **_action("latency", "fault", "attrOverride", "mistake"),
            **_PODS,
            "volumePath": "text",
            "path": "text",
            "methods": TEXTS,
            "percent": "int",
            "delay": "duration",
            "errno": "int",
            "attr": Fields(_ATTR),
            "mistake": Fields({"filling": "text", "maxOccurrences": "int", "maxLength": "int"}),
        },
        ("action", "volumePath", *_POD),
    ),
    "TimeChaos": Fields({**_PODS, "timeOffset": "duration", "clockIds": TEXTS}, ("timeOffset", *_POD)),
    "HTTPChaos": Fields(
        {
            **_PODS,
            "target": Words(("Request", "Response"), fold=True),
            "port": "int",
            "path": "text",
            "method": "text",
            "code": "int",
            "abort": "bool",
            "delay": "duration",
            "replace": _REPLACE,
            "patch": _PATCH,
            "request_headers": TEXT_MAP,
            "response_headers": TEXT_MAP,
            "tls": "any",
        },
        ("target", "port", *_POD),
    ),
    "DNSChaos": Fields({**_action("error", "random"), **_PODS, "patterns": TEXTS}, ("action", *_POD)),
    "KernelChaos": Fields({**_PODS, "failKernRequest": "any"}, ("failKernRequest", *_POD)),
    "BlockChaos": Fields(
        {**_action("delay"), **_PODS, "volumeName": "text", "delay": _DELAY}, ("action", "volumeName", *_POD)
    ),
    "JVMChaos": Fields(
        {
            **_action("latency", "return", "exception", "stress", "gc", "ruleData", "mysql"),
            **_PODS,
            **dict.fromkeys(("class", "method", "exception", "returnValue", "ruleData", "name", "memType"), "text"),
            **dict.fromkeys(("mysqlConnectorVersion", "database", "table", "sqlType"), "text"),
            **dict.fromkeys(("port", "pid", "latency", "cpuCount"), "int"),
        },
        ("action", *_POD),
    ),
    "AWSChaos": Fields(
        {
            **_action("ec2-stop", "ec2-restart", "detach-volume"),
            **_CLOUD,
            **dict.fromkeys(("awsRegion", "ec2Instance", "endpoint", "volumeID", "deviceName"), "text"),
        },
        ("action", "awsRegion", "ec2Instance"),
    ),
    "AzureChaos": Fields(
        {
            **_action("vm-stop", "vm-restart", "disk-detach"),
            **_CLOUD,
            **dict.fromkeys(("subscriptionID", "resourceGroupName", "vmName", "diskName"), "text"),
            "lun": "int",
        },
        ("action", "subscriptionID", "resourceGroupName", "vmName"),
    ),
    "GCPChaos": Fields(
        {
            **_action("node-stop", "node-reset", "disk-loss"),
            **_CLOUD,
            **dict.fromkeys(("project", "zone", "instance"), "text"),
            "deviceNames": TEXTS,
        },
        ("action", "project", "zone", "instance"),
    ),
    # Its forty actions have a section each; chaosd itself checks what is in them.
    "PhysicalMachineChaos": Fields({"action": "text", **_COMMON, "address": TEXTS}, ("action", "mode"), extra=True),
}
"""Kind → its spec."""
_NEEDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("PodChaos", "container-kill"): ("containerNames",),
    ("IOChaos", "latency"): ("delay",),
    ("IOChaos", "fault"): ("errno",),
    ("IOChaos", "attrOverride"): ("attr",),
    ("IOChaos", "mistake"): ("mistake",),
    ("BlockChaos", "delay"): ("delay",),
    ("JVMChaos", "latency"): ("class", "method", "latency"),
    ("JVMChaos", "return"): ("class", "method", "returnValue"),
    ("JVMChaos", "exception"): ("class", "method", "exception"),
    ("JVMChaos", "ruleData"): ("ruleData",),
    ("AWSChaos", "detach-volume"): ("volumeID", "deviceName"),
    ("AzureChaos", "disk-detach"): ("diskName", "lun"),
    ("GCPChaos", "disk-loss"): ("deviceNames",),
    **{("NetworkChaos", a): (a,) for a in ("delay", "loss", "duplicate", "corrupt", "bandwidth", "rate")},
}
"""Kind and action → the fields that its webhook wants."""
_OUTSIDE = {
    "AWSChaos": "an EC2 instance",
    "AzureChaos": "a machine of Azure",
    "GCPChaos": "a machine of GCP",
    "PhysicalMachineChaos": "machines outside of the cluster",
}
NO_FAULTS = {
    "StatusCheck": "a check of Chaos Mesh, no fault",
    "RemoteCluster": "tells Chaos Mesh of another cluster, no fault",
    "PhysicalMachine": "tells Chaos Mesh of a machine, no fault",
    "WorkflowNode": "a step that Chaos Mesh made of a Workflow, no fault of its own",
    "PodNetworkChaos": "Chaos Mesh's own note of what is on in a pod, no fault",
    "PodIOChaos": "Chaos Mesh's own note of what is on in a pod, no fault",
    "PodHttpChaos": "Chaos Mesh's own note of what is on in a pod, no fault",
}
_NATIVE = {
    ("PodChaos", "pod-kill"): "pod_delete",
    ("PodChaos", "pod-failure"): "pod_failure",
    ("PodChaos", "container-kill"): "container_kill",
    ("NetworkChaos", "delay"): "network_latency",
    ("NetworkChaos", "loss"): "network_loss",
    ("NetworkChaos", "partition"): "network_partition",
    ("DNSChaos", "error"): "dns_failure",
}
_ONE_SHOTS = ("pod-kill", "container-kill", "ec2-restart", "vm-restart", "node-reset")
_WHOLE = re.compile(r"\d{1,6}")


def resource(
    look: Looker,
    kind: str,
    node: Node,
    path: Path,
    brought: Brought,
    *,
    name: str,
    of: str = "",
    within: float | None = None,
) -> None:
    """The draft of one fault's `spec` at `path`.

    Args:
        look: reads, and keeps what is to be said.
        kind: such as NetworkChaos.
        node: the spec.
        path: of the spec in the document.
        brought: where the draft goes.
        name: of the draft.
        of: in whose name: `Workflow x`; empty: its own.
        within: seconds after which whoever started it would have ended it (a workflow's deadline).
    """
    spec = look.look(node, path, KINDS[kind])
    if not isinstance(spec, dict):
        return
    spec = part(spec)
    action = str(spec.get("action", ""))
    _coherent(look, kind, action, spec, path)
    if spec.get("remoteCluster"):
        what = "it acts in another cluster, in which neither our guards nor our proofs are. Allowed: an environment of that cluster."
        look.problem((*path, "remoteCluster"), what)
    chosen, radius = _hit(look, kind, spec, path)
    duration = _duration(look, kind, action, spec, path, within)
    meta = _marks(look) if path == ("spec",) else {}
    words = f"{kind}{f' {action}' if action else ''} of {of or f'{kind} {name}'}" if of else f"{kind} {name}"
    if kind not in ("StressChaos",) and (native := _NATIVE.get((kind, action))) or (native := _stress(kind, spec)):
        brought.hints.append(
            f"{look.document.where(path)}  {kind}{f' {action}' if action else ''} runs through Chaos Mesh, as it was written; "
            f"the same is to be had natively, without it: fault {native}."
        )
    fault = {"kind": "chaos_mesh_resource", "resource": {"kind": kind, **meta, "spec": spec}}
    brought.drafts.append(
        Draft(name_of(name), spoken(words), fault, duration, radius, chosen, look.document.where(path))
    )


def normalised(resource: dict[str, Any]) -> dict[str, Any]:
    """The `resource` of a fault of ours with every value of its right type. Raises ValueError with the first problem."""
    kind = str(resource["kind"])
    if kind not in KINDS:
        raise ValueError(f"kind: {kind} is no fault of Chaos Mesh. Allowed: {', '.join(KINDS)}")
    look = Looker(Document("resource", tree(resource)))
    marks: dict[str, Rule] = {"labels": TEXT_MAP, "annotations": TEXT_MAP}
    found = part(look.look(look.document.root, (), Fields({"kind": "text", "spec": KINDS[kind], **marks})))
    spec = part(found.get("spec"))
    if not look.problems:
        _coherent(look, kind, str(spec.get("action", "")), spec, ("spec",))
    if look.problems:
        raise ValueError(look.problems[0].what.removesuffix("."))
    return found


def _stress(kind: str, spec: dict[str, Any]) -> str | None:
    given = list(part(spec.get("stressors"))) if kind == "StressChaos" else []
    return {"cpu": "cpu_stress", "memory": "memory_stress"}.get(given[0]) if len(given) == 1 else None


def _marks(look: Looker) -> dict[str, Any]:
    pair = look.document.root.pair("metadata")
    rule = Fields({"labels": TEXT_MAP, "annotations": TEXT_MAP}, extra=True)
    meta = part(look.look(pair[1], ("metadata",), rule)) if pair else {}
    found: dict[str, Any] = {}
    for key in ("labels", "annotations"):
        # pause, abort and forced clean-up are ours to say
        marks = {k: v for k, v in part(meta.get(key)).items() if "chaos-mesh.org/" not in k and "kubectl" not in k}
        if marks:
            found[key] = marks
    return found


def _coherent(look: Looker, kind: str, action: str, spec: dict[str, Any], path: Path) -> None:
    """What the webhooks of Chaos Mesh look at."""
    needed = (n for n in _NEEDS.get((kind, action), ()) if spec.get(n) in (None, "", [], {}))
    missing = [n for n in needed if not look.refused((*path, n))]
    if missing:
        hint = ""
        if kind == "JVMChaos" and "returnValue" in missing and spec.get("value"):
            hint = ' Did you mean "returnValue" by "value", which belongs to mode?'
        look.problem(path, f"action {action} needs {', '.join(missing)}.{hint}")
    if kind == "StressChaos" and not part(spec.get("stressors")) and not spec.get("stressngStressors"):
        look.problem(path, "needs stressors: {cpu: …}, {memory: …} or both.")
    if kind == "NetworkChaos":
        far = spec.get("direction") in ("from", "both") and action != "partition"
        if far and spec.get("externalTargets"):
            look.problem((*path, "externalTargets"), "only traffic to them can be told apart. Allowed: direction: to.")
        elif far and not spec.get("target"):
            look.problem((*path, "direction"), f"{spec['direction']} needs target. Allowed: target, or direction: to.")
        elif action == "partition" and not (spec.get("target") or spec.get("externalTargets")):
            look.note(path, "a partition without target or externalTargets cuts off all that the pods send.")
    if kind == "HTTPChaos" and not any(spec.get(n) for n in ("abort", "delay", "replace", "patch")):
        look.problem(path, "does nothing. Allowed: at least one of abort, delay, replace, patch.")
    if kind == "JVMChaos" and action == "stress" and bool(spec.get("cpuCount")) == bool(spec.get("memType")):
        look.problem(path, "action stress needs exactly one of cpuCount, memType.")
    if kind == "JVMChaos" and action == "mysql" and str(spec.get("mysqlConnectorVersion")) not in ("5", "8"):
        look.problem(path, 'action mysql needs mysqlConnectorVersion. Allowed: "5", "8".')
    if kind == "PhysicalMachineChaos":
        if not spec.get("selector") and not spec.get("address"):
            look.problem(path, "missing field selector (or address).")
        if action and not part(spec.get(action)) and action not in ("file-create", "jvm-gc", "redis-stop"):
            look.problem(path, f"action {action[:40]} needs its section {action[:40]}.")
    _value(look, spec, path)


def _value(look: Looker, spec: dict[str, Any], path: Path) -> None:
    mode, value = spec.get("mode"), str(spec.get("value", ""))
    most = {"fixed": 1_000_000, "fixed-percent": 100, "random-max-percent": 100}.get(str(mode))
    if most is not None and not (_WHOLE.fullmatch(value) and 1 <= int(value) <= most):
        allowed = "1 to 100" if most == 100 else "1 or more"
        look.problem((*path, "value"), f'mode {mode} with value "{value[:40]}". Allowed: {allowed}, such as "50".')


def _duration(look: Looker, kind: str, action: str, spec: dict[str, Any], path: Path, within: float | None) -> float:
    seconds = go_seconds(str(spec.pop("duration"))) if spec.get("duration") else None
    if seconds is not None and seconds <= 0:
        look.problem((*path, "duration"), "not more than zero. Allowed: such as 30s.")
        return DEFAULT_S
    if action in _ONE_SHOTS:  # over at once: that long is looked at what comes of it
        return min(seconds or DEFAULT_S, within or DEFAULT_S)
    if look.refused((*path, "duration")):
        return DEFAULT_S
    if seconds is None and within is None:
        look.note(path, f"no duration, and Chaos Mesh would never end it: {DEFAULT_S:g} s are taken.")
        return DEFAULT_S
    return min(x for x in (seconds, within) if x is not None)


def _hit(look: Looker, kind: str, spec: dict[str, Any], path: Path) -> tuple[Selection, dict[str, Any]]:
    if kind in _OUTSIDE:
        why = f"it hits {_OUTSIDE[kind]}, which no cluster tells us about; whose service is to be watched"
        return Selection(why_none=why), {"count": 1}
    mode, value = spec.get("mode", "one"), str(spec.get("value", ""))
    number = int(value) if _WHOLE.fullmatch(value) and int(value) > 0 else 1
    radius: dict[str, Any] = {"count": 1}
    if mode == "fixed":
        radius = {"count": number}
    elif mode in ("all", "fixed-percent", "random-max-percent"):
        radius = {"fraction": f"{100 if mode == 'all' else min(number, 100)}%"}
        if mode == "random-max-percent":
            look.note((*path, "mode"), f"a number of pods drawn anew each time: {number} % of them are taken.")
    return _selection(look, spec, (*path, "selector")), radius


def _selection(look: Looker, spec: dict[str, Any], path: Path) -> Selection:
    selector = part(spec.get("selector"))
    container = next(iter(texts(spec.get("containerNames"))), "")
    if texts(selector.get("podPhaseSelectors")) == ["Running"]:
        selector.pop("podPhaseSelectors")  # pods that run are what we take
    for field, what in (
        ("pods", "pods by name; after their first restart they are gone"),
        ("annotationSelectors", "annotations"),
        ("fieldSelectors", "fields"),
        ("nodeSelectors", "the labels of their nodes"),
        ("nodes", "their nodes"),
        ("podPhaseSelectors", "their phase"),
        ("physicalMachines", "machines"),
    ):
        if selector.get(field):
            why = f"its selector chooses by {what}, and a target of ours is pods of one namespace by their labels"
            return Selection(why_none=why)
    spaces = texts(selector.get("namespaces"))
    if len(spaces) > 1:
        return Selection(why_none=f"its selector takes pods of {len(spaces)} namespaces, and a target is pods of one")
    for space in (*spaces, *(s for s in (_own_namespace(look),) if s)):
        if not OBJECT_NAME.fullmatch(space):
            look.problem(path, f'"{space[:60]}" is not a namespace. Allowed: lower-case letters, digits and dashes.')
            return Selection(why_none="its namespace is wrong")
    wanted = [f"{key}={value}" for key, value in part(selector.get("labelSelectors")).items()]
    wanted += [_expression(e) for e in entries(selector.get("expressionSelectors"))]
    if not wanted:
        where = f"namespace {spaces[0]}" if spaces else "the namespace"
        return Selection(why_none=f"its selector names no labels, which is every pod of {where}")
    return Selection(
        namespace=spaces[0] if spaces else _own_namespace(look), select=",".join(wanted), container=container
    )


def _own_namespace(look: Looker) -> str:
    pair = look.document.root.pair("metadata")
    node = pair[1].pair("namespace") if pair else None
    return node[1].value if node and isinstance(node[1].value, str) else ""


def _expression(one: dict[str, Any]) -> str:
    key, values = str(one.get("key", "")), ", ".join(texts(one.get("values")))
    forms = {"In": f"{key} in ({values})", "NotIn": f"{key} notin ({values})", "DoesNotExist": f"!{key}"}
    return forms.get(str(one.get("operator")), key)
