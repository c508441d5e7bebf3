"""Guards that hold for every fault kind on a cluster; all read-only."""

from __future__ import annotations

from collections.abc import Iterator

from mlchaos_dagster.drivers.kubernetes.handler import Handler, Request
from mlchaos_dagster.engine.ports import Objection
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.labels import OPT_IN
from mlchaos_dagster.kube.objects import text


def objections(site: Site, request: Request, handler: Handler) -> Iterator[Objection]:
    """Everything that speaks against making this fault now."""
    yield from _opted_in(site, request)
    yield from _kind_fits(request, handler)
    yield from _permitted(site, request, handler)
    yield from handler.objections(site, request)


def _opted_in(site: Site, request: Request) -> Iterator[Objection]:
    for name in sorted({ref.namespace for ref in request.refs if ref.namespace}):
        if text(site.cluster.get(f"/api/v1/namespaces/{name}"), "metadata", "labels", OPT_IN) != "true":
            yield Objection(
                f"namespace {name} has not opted in to faults", f"kubectl label namespace {name} {OPT_IN}=true"
            )


def _kind_fits(request: Request, handler: Handler) -> Iterator[Objection]:
    wrong = sorted({ref.kind for ref in request.refs} - handler.kinds)
    if wrong:
        yield Objection(
            f"{request.kind} is not for a {wrong[0]}",
            f"a target of kind {', '.join(sorted(handler.kinds))} (targets.….kubernetes.kind)",
        )


def _permitted(site: Site, request: Request, handler: Handler) -> Iterator[Objection]:
    for permission in sorted(set(handler.permissions(site, request))):
        if not site.cluster.allowed(permission):
            yield Objection(f"no permission to {permission.verb} {permission.resource}", permission.rule)
