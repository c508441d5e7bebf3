"""Our own look at the targets of an experiment: whether its effect is there, and whether it is gone.

Litmus's own word is never enough for either. Where an experiment is none that we know, there is nothing else to go by:
then its word counts for the effect, and the evidence says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.litmus import faults, states
from mlchaos_dagster.drivers.litmus.tracks import Tracks, events
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, RecoverFailed
from mlchaos_dagster.kube.client import NAME, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.selecting import has_ended, is_there


@dataclass(frozen=True)
class Sight:
    """What was seen at the targets."""

    effective: bool
    present: bool = False
    """Something of the fault is at a target, whoever says what."""
    lines: tuple[str, ...] = ()

    @classmethod
    def of(cls, evidence: Evidence) -> Sight:
        """From evidence of a native look."""
        return cls(evidence.effective, evidence.present, evidence.lines)


class Eyes(Protocol):
    """How one experiment's effect is seen. May leave something of ours in the targets while it looks."""

    def permissions(self, request: Request) -> Iterable[Permission]:
        """What the looks ask of the API server."""
        ...

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """Why nothing could be seen here."""
        ...

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """What it was like before, for comparison. Changes nothing."""
        ...

    def open(self, site: Site, injection: Injection, step: Step) -> None:
        """Get ready, right before the fault. Raises InjectFailed, LeaseRefused."""
        ...

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """See. Raises DriverUnavailable: the targets could not be asked."""
        ...

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        """Prove, once nothing of Litmus runs any more, that its fault is gone; mend what it left where that can be done.

        `tracks`: what is left of Litmus, its results among them.

        Raises:
            RecoverFailed: it is not gone.
            DriverUnavailable: the targets could not be asked.
        """
        ...

    def close(self, site: Site, injection: Injection, step: Step) -> None:
        """Take away what `open` left. Idempotent, from any process. Raises DriverError."""
        ...


class _Plain:
    """Eyes that need nothing in the targets."""

    def permissions(self, request: Request) -> Iterable[Permission]:
        for namespace in sorted({ref.namespace for ref in request.refs if ref.namespace}):
            yield Permission("get", "pods", namespace)
            yield Permission("list", "pods", namespace)

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        return ()

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        return {}

    def open(self, site: Site, injection: Injection, step: Step) -> None:
        pass

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        pass

    def close(self, site: Site, injection: Injection, step: Step) -> None:
        pass


class Gone(_Plain):
    """`pod-delete`: every frozen pod is gone or going, by uid."""

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """A pod that vanished before the experiment ran did not fall to it."""
        here, lines = 0, list[str]()
        for ref, found in frozen.read_all(site, injection.refs).items():
            if found is not None and is_there(found):
                here += 1
                lines.append(f"{ref.shown} is still there")
            elif found is not None:
                lines.append(f"{ref.shown} is being deleted since {text(found, 'metadata', 'deletionTimestamp')}")
            else:
                lines.append(f"{ref.shown} is gone")
        ran = bool(tracks.results)
        if tracks.engine and not ran and here < len(injection.refs):  # after the clean-up there is no result, either
            lines.append("no experiment of this ChaosEngine ran: it was not by this run")
        return Sight(effective=not here and ran, lines=tuple(lines))


class Restarted(_Plain):
    """`container-kill`: that start of the container is over."""

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which start of which container is meant."""
        kept: dict[str, Any] = {}
        for ref in request.refs:
            status = _status(frozen.read(site, ref), _container(request))
            if "running" not in mapping(status, "state"):
                raise DriverError(f"the container of {ref.shown} does not run", driver=NAME, verb="undo")
            kept[ref.uid] = {k: status.get(k) for k in ("name", "containerID", "restartCount")}
            step(len(kept), len(request.refs))
        return {"containers": kept}

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """A container may end by itself in the same minute: it counts only after the experiment ran."""
        ended, lines = 0, list[str]()
        for ref in injection.refs:
            meant: dict[str, Any] = injection.undo["before"]["containers"][ref.uid]
            found = frozen.read(site, ref)
            if found is None:
                lines.append(f"{ref.shown} is gone")
                continue
            status = _status(found, str(meant["name"]))
            over = text(status, "containerID") != meant["containerID"] or "running" not in mapping(status, "state")
            ended += over
            times = int(status.get("restartCount") or 0) - int(meant["restartCount"] or 0)
            lines.append(
                f"container {meant['name']} of {ref.shown} "
                + (f"ended, {times} restarts since" if over else "runs on, as it was started before")
            )
        return Sight(effective=ended == len(injection.refs) and bool(tracks.results), lines=tuple(lines))


class Told(_Plain):
    """Any other experiment: what its ChaosResult says of each pod, and its event where it hits nodes."""

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """Litmus's own word, and it says so."""
        names = [ref.name for ref in injection.refs]
        if injection.refs[0].kind == "node":  # of nodes the result tells after the fault only
            return self._began(site, tracks, names)
        found = states.targets(tracks)
        hit = [name for name in names if name in found]
        # One after the other: those that had it are reverted while the others still wait for it.
        on = [name for name in hit if found[name] != "reverted" or _is_serial(injection)]
        lines = [f"{name}: {found[name]} by Litmus's own word alone" for name in hit]
        lines += [f"{name}: Litmus does not say that it was injected" for name in names if name not in found]
        return Sight(effective=bool(names) and len(on) == len(names), lines=tuple(lines))

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        """A pod that Litmus still calls injected, with nothing left that could revert it. Raises RecoverFailed.

        (Of nodes its word is not kept up to date when an experiment is stopped.)
        """
        standing = states.still_injected(tracks)
        refs = [ref for ref in injection.refs if ref.kind == "pod" and ref.name in standing]
        left = [ref for ref, pod in frozen.read_all(site, refs).items() if pod is not None and not has_ended(pod)]
        if left:
            names = ", ".join(ref.shown for ref in left)
            raise RecoverFailed(
                f"{names}: injected by Litmus's own word, what made it was ended without reverting it, and nothing of ours "
                "can see it; it goes with the pod (kubectl delete pod)",
                driver=NAME,
                verb="recover",
            )

    def _began(self, site: Site, tracks: Tracks, names: list[str]) -> Sight:
        began = tracks.engine is not None and states.fired(events(site, tracks.engine))
        said = "says that it makes its fault" if began else "does not say that it made its fault"
        return Sight(effective=began, lines=(f"Litmus {said} on {', '.join(names)}; by its own word alone",))


class Standing(Told):
    """`pod-network-partition` that leaves something open: its NetworkPolicy stands."""

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """What it shuts out, only its author knows."""
        names = [text(p, "metadata", "name") for p in tracks.policies]
        lines = [f"NetworkPolicy {name} stands" for name in names] or ["no NetworkPolicy of the experiment stands"]
        return Sight(bool(names), bool(names), tuple(lines))

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        """The policy is seen, and taken away by who recovers."""


class Node(_Plain):
    """`node-drain`: the node takes no pods, and gave away those it had; other faults on nodes: Litmus's word."""

    def permissions(self, request: Request) -> Iterable[Permission]:
        """Nodes are read, and patched where Litmus left one cordoned."""
        yield Permission("get", "nodes")
        yield Permission("patch", "nodes")

    def look(self, site: Site, injection: Injection, tracks: Tracks) -> Sight:
        """Whether the nodes are cordoned; by this run only as long as something of its experiment is there."""
        ours, lines = bool(tracks.engine or tracks.results or tracks.at_work), list[str]()
        closed = 0
        for ref in injection.refs:
            found = frozen.read(site, ref)
            cordoned = text(found, "spec", "unschedulable") == "True"
            closed += cordoned
            lines.append(f"{ref.shown} {'is cordoned' if cordoned else 'takes pods' if found else 'is gone'}")
        if closed and not ours:
            lines.append("nothing of an experiment of this run is there: not cordoned by it")
        return Sight(ours and closed == len(injection.refs), ours and closed > 0, tuple(lines))

    def clean(self, site: Site, injection: Injection, tracks: Tracks, step: Step) -> None:
        """A node that is cordoned still takes pods again: Litmus's experiment died before it did that.

        Engine and result are there from before the fault until all is clean; where neither is, or the operator never
        began, somebody else cordoned the node.
        """
        began = tracks.results or text(tracks.engine, "status", "engineStatus")
        for ref in injection.refs if began else ():
            frozen.change(site, ref, lambda found, ref=ref: _uncordon(site, found, ref.path))


def _uncordon(site: Site, found: Object, path: str) -> None:
    if text(found, "spec", "unschedulable") == "True":
        frozen.patch(site, found, path, {"spec": {"unschedulable": None}})


def _is_serial(injection: Injection) -> bool:
    kind, params = injection.lease.kind, injection.params
    return kind == faults.BROUGHT and faults.env_of(faults.entry_of(params)).get("SEQUENCE", "") == "serial"


def _container(request: Request) -> str:
    return request.target.kubernetes.container


def _status(pod: Object | None, name: str) -> Object:
    """Status of a container; of the first in the spec where no name is given."""
    first = next(iter(items(pod, "spec", "containers")), Object())
    wanted = name or text(first, "name")
    return next((s for s in items(pod, "status", "containerStatuses") if text(s, "name") == wanted), Object())
