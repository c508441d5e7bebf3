"""Cuts by a NetworkPolicy, where pod security does not let the agent in: partition and isolation only.

The frozen pods get a label of the lease, the policy selects that label. Policies only ever add permissions: a pod that
another policy selects cannot be cut by ours (and ours might let in what the other keeps out), so that is refused.
Nothing in the cluster ends a NetworkPolicy at a deadline: the sweeper must. The effect is measured by the same agent,
without any capability, which only looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import selects
from mlchaos_dagster.drivers.kubernetes import agents
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.errors import DriverError, InjectFailed
from mlchaos_dagster.kube import leases
from mlchaos_dagster.kube.client import NAME, Conflict, Site
from mlchaos_dagster.kube.labels import of_lease
from mlchaos_dagster.kube.objects import Object, mapping, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import far

LABEL = "mlchaos.dev/fault"
"""On the frozen pods while a policy cuts them: the lease's id."""
CAN = ("network_partition", "network_isolation")
_SET = re.compile(r"(?P<key>[^\s,!=()]+)\s+(?P<how>in|notin)\s+\((?P<values>[^)]*)\)")


def collection(namespace: str) -> str:
    """Path of a namespace's policies."""
    return f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"


def objections(site: Site, request: Request, pods: Iterable[Object]) -> Iterator[Objection]:
    """What a policy cannot do."""
    if request.kind not in CAN:
        yield Objection(
            f"{request.kind} cannot be made by a NetworkPolicy (kubernetes.network: policy)",
            f"kubernetes.network: agent; or one of {', '.join(CAN)}",
        )
        return
    if request.target.kubernetes.ports:
        yield Objection("a NetworkPolicy of ours cuts all ports", "no kubernetes.ports; or kubernetes.network: agent")
    if far(request.target.select):
        try:
            others(far(request.target.select))
        except DriverError as e:
            yield Objection(str(e), "a selector of labels, such as app=feature-store; or kubernetes.network: agent")
    pods = list(pods)
    for namespace in sorted({ref.namespace for ref in request.refs}):
        for policy in site.cluster.list(collection(namespace)):
            if any(selects(mapping(policy, "spec", "podSelector"), mapping(p, "metadata", "labels")) for p in pods):
                name = text(policy, "metadata", "name")
                yield Objection(
                    f"NetworkPolicy {namespace}/{name} selects the target already: policies only add permissions, "
                    "another one cannot cut",
                    "kubernetes.network: agent",
                )
                return


def make(site: Site, injection: Injection) -> None:
    """Label the frozen pods, then cut what carries the label. Raises InjectFailed, LeaseRefused."""
    lease = injection.lease
    for ref in injection.refs:

        def act(found: Object) -> None:
            if frozen.marked_by(found) != lease.id:  # the agent's container marked it
                raise InjectFailed(f"{text(found, 'metadata', 'name')} was recovered meanwhile", driver=NAME)
            frozen.patch(site, found, Ref.of("pod", found).path, {"metadata": {"labels": {LABEL: lease.id}}})

        if not frozen.change(site, ref, act, lease):
            raise InjectFailed(f"{ref.shown} is gone", driver=NAME)
    for namespace in sorted({ref.namespace for ref in injection.refs}):
        leases.held(site, lease)
        # A process that is stopped right here for longer than a recovery makes a policy that selects no pod: inert,
        # and found by its label.
        try:
            site.cluster.create(collection(namespace), policy(injection, namespace))
        except Conflict as e:
            raise InjectFailed(f"policy {agents.name_of(lease)} exists already", driver=NAME) from e


def remove(site: Site, injection: Injection) -> None:
    """Delete the policy; the labels go with the agents' marks. Idempotent."""
    for namespace in sorted({ref.namespace for ref in injection.refs}):
        site.cluster.delete(f"{collection(namespace)}/{agents.name_of(injection.lease)}")


def standing(site: Site, injection: Injection) -> tuple[bool, list[str]]:
    """Whether a policy is there, and how many frozen pods carry its label."""
    there, lines = False, list[str]()
    for namespace in sorted({ref.namespace for ref in injection.refs}):
        name = agents.name_of(injection.lease)
        found = site.cluster.get(f"{collection(namespace)}/{name}")
        labelled = 0
        for ref in injection.refs:
            pod = frozen.read(site, ref) if ref.namespace == namespace else None
            labelled += text(pod, "metadata", "labels", LABEL) == injection.lease.id
        there = there or found is not None or labelled > 0
        lines.append(
            f"NetworkPolicy {namespace}/{name} {'stands' if found else 'is not there'}, {labelled} pods labelled"
        )
    return there, lines


def policy(injection: Injection, namespace: str) -> Object:
    """Nothing passes; or, for a link, everything but what its right side sends and gets."""
    rules: list[Object] = []
    if injection.lease.kind == "network_partition" and injection.undo["far"]:
        rules = [*others(injection.undo["far"]), _other_namespaces(namespace), *_outside(injection.undo["peers"])]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": agents.name_of(injection.lease),
            "labels": of_lease(injection.lease.id, "fault"),
        },
        "spec": {
            "podSelector": {"matchLabels": {LABEL: injection.lease.id}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": rules}] if rules else [],
            "egress": [{"to": rules}] if rules else [],
        },
    }


def others(selector: str) -> list[Object]:
    """Peers that are all pods of the namespace but those that a label selector means.

    What matches all of `a, b` is left out by: not a, or not b. Raises DriverError: the selector is none.
    """
    rest, expressions = selector, list[Object]()
    for found in _SET.finditer(selector):
        values = [v.strip() for v in found["values"].split(",")]
        expressions.append(_expression(found["key"], "NotIn" if found["how"] == "in" else "In", values))
        rest = rest.replace(found[0], "")
    for word in filter(None, (w.strip() for w in rest.split(","))):
        key, sign, value = next((word.partition(s) for s in ("!=", "==", "=") if s in word), (word, "", ""))
        if sign:
            expressions.append(_expression(key.strip(), "In" if sign == "!=" else "NotIn", [value.strip()]))
        else:
            bare = key.strip()
            how = "Exists" if bare.startswith("!") else "DoesNotExist"
            expressions.append({"key": bare.lstrip("! "), "operator": how})
    if not expressions or any(not e["key"] or " " in e["key"] for e in expressions):
        raise DriverError(f'"{selector}" is no label selector. Allowed: such as app=feature-store', driver=NAME)
    return [{"podSelector": {"matchExpressions": [e]}} for e in expressions]


def _expression(key: str, operator: str, values: list[str]) -> Object:
    return {"key": key, "operator": operator, "values": values}


def _other_namespaces(namespace: str) -> Object:
    return {
        "namespaceSelector": {"matchExpressions": [_expression("kubernetes.io/metadata.name", "NotIn", [namespace])]}
    }


def _outside(peers: list[str]) -> list[Object]:
    """Everything that is no pod; the right side's addresses are left out for network plug-ins that count pods in."""
    blocks: list[Object] = []
    for everything, size, colon in (("0.0.0.0/0", 32, False), ("::/0", 128, True)):
        but = [f"{p}/{size}" for p in peers if (":" in p) == colon]
        blocks.append({"ipBlock": {"cidr": everything, **({"except": but} if but else {})}})
    return blocks
