"""A resource of ours whose lease is lost, taken away from what it says itself: for `mlchaos clean`.

Nobody knows any more what the pods were like before, so Chaos Mesh's own word counts: each record injected as often as
recovered. Finalizers are left alone: what does not go may be on.
"""

from __future__ import annotations

from mlchaos_dagster.drivers.chaos_mesh import leavings, life, states
from mlchaos_dagster.drivers.chaos_mesh.resources import FORCED, shown
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.errors import RecoverFailed
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.objects import Object, mapping, text, words
from mlchaos_dagster.kube.refs import Ref

_GONE_S = 15.0


def take_away(site: Site, path: str, lease: Lease, step: Step) -> str:
    """Pause, wait for the recovery, delete: the resource at `path`. What was done.

    Raises:
        RecoverFailed: it is not recovered, or does not go.
        DriverUnavailable: the cluster did not answer.
    """
    found = site.cluster.get(path)
    if found is None:
        return ""
    said = [why for why in [life.pause(site, found)] if why]
    now, failed = life.rested(site, [found], site.options.chaos_mesh.recover_within, step)
    if failed:
        life.delete(site, now)
        undo = {"kind": text(found, "kind"), "namespace": text(found, "metadata", "namespace")}
        said += failed + leavings.take_back(site, Injection(lease, _pods(found), undo), now, step)
    life.delete(site, now)
    left = [
        one for one in life.gone(site, now, _GONE_S, step) if failed or not (life.inert(one) and states.at_rest(one))
    ]
    if left:
        forced = f"kubectl annotate {text(found, 'kind').lower()} {text(found, 'metadata', 'name')} {FORCED}=forced"
        where = f"-n {text(found, 'metadata', 'namespace')}"
        why = "; ".join([f"{shown(found)} does not go", *said, f"once its pods are clean: {forced} {where}"])
        raise RecoverFailed(why, driver=life.NAME, verb="recover")
    return "; ".join(["recovered by its own word, and removed", *said])


def _pods(found: Object) -> tuple[Ref, ...]:
    """Those that it names: ours name all they hit."""
    named = mapping(found, "spec", "selector", "pods")
    return tuple(Ref("pod", space, name, "lost") for space in sorted(named) for name in words(named, space))
