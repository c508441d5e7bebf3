"""Rollback actions on Argo Rollouts: what `kubectl argo rollouts abort`, `promote` and `retry` do, fenced and under a lease.

They are acts. The Rollouts controller goes on from there by itself, and nothing is kept that could be put back: to take an
abort away is to ship the version again, to put a pause back is to pause somebody else's step. So nothing is ever left of
them, and `recover` only sees that a late one comes to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.kube import rollouts
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object, part
from mlchaos_dagster.kube.selecting import is_there

_MANAGER = "mlchaos"


class _Act:
    """One or two patches of a Rollout."""

    kinds = frozenset({"rollout"})
    self_limiting = False
    kind: str

    def permissions(self, site: Site, request: Request) -> Iterator[Permission]:
        """Read the Rollouts, patch their status; `spec.paused` and the fence are in the Rollout itself."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            for verb, what in (("get", "rollouts"), ("patch", "rollouts"), ("patch", "rollouts/status")):
                yield Permission(verb, what, namespace, rollouts.GROUP)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """None of its own: whether it is needed is asked when it is."""
        yield from ()

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Nothing can be put back."""
        return {}

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """Those that need it still."""
        for done, ref in enumerate(injection.refs):

            def act(found: Object, path: str = ref.path) -> None:
                if is_there(found) and needs(self.kind, found, injection.params):
                    self.patch(site, found, path)

            frozen.change(site, ref, act, injection.lease)
            step(done + 1, len(injection.refs))

    def patch(self, site: Site, found: Object, path: str) -> None:
        """Make it so. Raises Conflict: the Rollout changed meanwhile."""
        raise NotImplementedError

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """A late `inject` is shut out."""
        for done, ref in enumerate(injection.refs):
            frozen.shut_out(site, ref)
            step(done + 1, len(injection.refs))

    def active(self, site: Site, injection: Injection) -> Evidence:
        """Nothing is left to be undone; how the Rollouts are now."""
        found = [(ref, frozen.read(site, ref)) for ref in injection.refs]
        lines = tuple(f"{ref.shown} is {'gone' if one is None else rollouts.shown_phase(one)}" for ref, one in found)
        return Evidence(present=False, effective=False, lines=lines)


class AbortRollout(_Act):
    """`status.abort`: the canary goes, the stable version serves everything. The template stays, so it stays Degraded."""

    kind = "abort_rollout"

    def patch(self, site: Site, found: Object, path: str) -> None:
        """One patch of the status."""
        frozen.patch(site, found, f"{path}/status", {"status": {"abort": True}}, fieldManager=_MANAGER)


class ResumeRollout(_Act):
    """No pause any more; with `retry` no abort either."""

    kind = "resume_rollout"

    def patch(self, site: Site, found: Object, path: str) -> None:
        """The status first: `spec.paused` without it would let the controller wait at its step again."""
        if part(found, "status", "pauseConditions") or part(found, "status", "abort"):
            status = {"pauseConditions": None, "abort": False}
            found = frozen.patch(site, found, f"{path}/status", {"status": status}, fieldManager=_MANAGER)
        if part(found, "spec", "paused"):
            frozen.patch(site, found, path, {"spec": {"paused": False}}, fieldManager=_MANAGER)


def needs(kind: str, rollout: Object, params: dict[str, Any]) -> bool:
    """Whether an action would change anything of a Rollout now."""
    if kind == "abort_rollout":
        return rollouts.is_under_way(rollout)
    if rollouts.is_aborted(rollout):
        return bool(params.get("retry"))
    return rollouts.is_paused(rollout)
