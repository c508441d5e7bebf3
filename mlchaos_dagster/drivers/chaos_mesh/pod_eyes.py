"""Looks at what the API server knows of a pod: whether it is gone, which images it has, which start of a container runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.drivers.chaos_mesh import states
from mlchaos_dagster.drivers.chaos_mesh.eyes import Seen
from mlchaos_dagster.drivers.chaos_mesh.resources import is_one_shot, name_of
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.cluster.preflight import is_ready
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable
from mlchaos_dagster.kube.client import ApiRefused, Permission, Site
from mlchaos_dagster.kube.objects import Object, items, mapping, text
from mlchaos_dagster.kube.refs import Ref
from mlchaos_dagster.kube.selecting import has_ended, is_there

NAME = "chaos_mesh"
_LOOK_S = 5.0
_IN_PODS = ("HTTPChaos", "JVMChaos", "TimeChaos")
"""Unseen kinds whose effect is in the pods and nowhere else."""
_PLACES = (("containers", "normal"), ("initContainers", "init"))


class Quiet:
    """What needs no preparation in the pods."""

    verbs: tuple[str, ...] = ("get", "list")

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Pods."""
        for namespace in sorted({ref.namespace for ref in request.refs}):
            for verb in self.verbs:
                yield Permission(verb, "pods", namespace)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """None: the API server tells."""
        return iter(())

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Nothing."""
        return {}

    def open(self, site: Site, injection: Injection, step: Step) -> dict[str, str]:
        """Nothing to do."""
        return {}

    def reopen(self, site: Site, injection: Injection, step: Step) -> None:
        """Nothing to do."""

    def mend(self, site: Site, injection: Injection, step: Step) -> list[str]:
        """Nothing can be undone."""
        return []


class WordEyes(Quiet):
    """For kinds of which nothing can be seen from outside: a shifted clock, a cloud's disk. The resource alone tells.

    Its word for an injection counts only where the environment says so (`chaos_mesh.take_its_word`); its word for a
    recovery has to: there is no other.
    """

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """What Chaos Mesh says."""
        kind = injection.undo["kind"]
        on = [one for one in those if states.is_on(one) and not is_one_shot(kind, mapping(one, "spec"))]
        done = bool(those) and all(states.injected(one) for one in those)
        line = f"nothing of ours can see {kind}: " + (
            "Chaos Mesh's own word is taken" if site.options.chaos_mesh.take_its_word else "its effect is not proven"
        )
        if last and on and kind in _IN_PODS and (pods := [ref for ref in injection.refs if ref.kind == "pod"]):
            # Once the pods are over, its controller finds nothing to recover, and says for ever that it failed.
            found = frozen.read_all(site, pods)
            there = [ref for ref in pods if (pod := found[ref]) is not None and not has_ended(pod)]
            if not there:
                return Seen(False, False, ("the pods are gone, and what Chaos Mesh did to them with them",))
            names = ", ".join(f"-n {ref.namespace} {ref.name}" for ref in there)
            line += f"; what Chaos Mesh cannot take away goes with the pod: kubectl delete pod {names}"
        return Seen(bool(on), done and site.options.chaos_mesh.take_its_word, (line,))


class GoneEyes(Quiet):
    """pod-kill: the frozen pods are gone or going."""

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """By uid: what replaced them is somebody else."""
        here: list[bool] = []
        lines: list[str] = []
        for ref, found in frozen.read_all(site, injection.refs).items():
            here.append(found is not None and is_there(found))
            going = text(found, "metadata", "deletionTimestamp")
            said = "is still there" if here[-1] else f"is being deleted since {going}" if going else "is gone"
            lines.append(f"{ref.shown} {said}")
        return Seen(False, not any(here), tuple(lines))


class StartEyes(Quiet):
    """container-kill: the frozen start of the container is over."""

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """Which start of which container is meant."""
        found: dict[str, Any] = {}
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            status = status_of(pod, request.target.kubernetes.container)
            if "running" not in mapping(status, "state"):
                raise DriverError(f"the container of {ref.shown} does not run", driver=NAME, verb="undo")
            found[ref.uid] = {k: status.get(k) for k in ("name", "containerID", "restartCount")}
            step(done + 1, len(request.refs))
        return {"starts": found}

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """By container id."""
        over: list[bool] = []
        lines: list[str] = []
        for ref, pod in frozen.read_all(site, injection.refs).items():
            meant: Object = injection.undo["eyes"]["starts"][ref.uid]
            if pod is None:
                over.append(False)
                lines.append(f"{ref.shown} is gone; what replaced it is untouched")
                continue
            ended, said = _ended(status_of(pod, str(meant["name"])), meant)
            over.append(ended)
            lines.append(f"container {meant['name']} of {ref.shown} {said}")
        return Seen(False, all(over), tuple(lines))


class ImageEyes(Quiet):
    """pod-failure: the images of the frozen pods are Chaos Mesh's pause image, their own are in its annotations."""

    verbs = ("get", "list", "patch", "delete")

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """The pods' own images, and which containers run."""
        return {
            "pods": {
                ref.uid: {"images": _images(pod), "ids": _ids(pod)}
                for ref, pod in frozen.read_all(site, request.refs).items()
            }
        }

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """Present while an image or an annotation is Chaos Mesh's; effective when nothing of the service runs."""
        held: list[bool] = []
        down: list[bool] = []
        lines: list[str] = []
        for ref, pod in frozen.read_all(site, injection.refs).items():
            if pod is None or not is_there(pod):
                lines.append(f"{ref.shown} is gone, and the fault with it; what replaced it is untouched")
                continue
            known = injection.undo["eyes"]["pods"].get(ref.uid, {})
            swapped = _swapped(pod, injection, known)
            own = [n for n, i in _ids(pod, running=True).items() if i == mapping(known, "ids").get(n)]
            held.append(bool(swapped))
            down.append(bool(swapped) and not own)
            runs = f"{', '.join(own)} runs on" if own else "nothing of the service runs"
            images = f"its images are {', '.join(sorted(set(swapped.values())))}" if swapped else "has its own images"
            lines.append(
                f"{ref.shown}: {images}"
                + (f", {runs}" if swapped else "")
                + (", ready" if is_ready(pod) else ", not ready")
            )
        return Seen(any(held), bool(down) and all(down), tuple(lines))

    def mend(self, site: Site, injection: Injection, step: Step) -> list[str]:
        """Put the pods' own images back and take the annotations off, as Chaos Mesh would."""
        said: list[str] = []
        for ref in injection.refs:
            known = injection.undo["eyes"]["pods"].get(ref.uid, {})

            def put_back(pod: Object, ref: Ref = ref, known: Object = known) -> None:
                if not (swapped := _swapped(pod, injection, known)):
                    return
                body: dict[str, Any] = {"metadata": {"annotations": dict.fromkeys(_keys(pod, injection))}}
                before = mapping(known, "images")
                for place, _ in _PLACES:
                    names = [text(c, "name") for c in items(pod, "spec", place)]
                    back = [{"name": n, "image": before[n]} for n in names if n in swapped and n in before]
                    if back:
                        body.setdefault("spec", {})[place] = back
                frozen.patch(site, pod, ref.path, body, how="strategic")
                said.append(f"{ref.shown}: its own images were put back by us")

            frozen.change(site, ref, put_back)
            step(0, 0)
        return said


def status_of(pod: Object | None, name: str) -> Object:
    """Status of a container; of the first in the spec where no name is given."""
    first = next(iter(items(pod, "spec", "containers")), Object())
    wanted = name or text(first, "name")
    return next((s for s in items(pod, "status", "containerStatuses") if text(s, "name") == wanted), Object())


def container_of(pod: Object | None, name: str) -> str:
    """Name of the container that is meant; empty: the pod has none of that name."""
    names = [text(c, "name") for c in items(pod, "spec", "containers")]
    return next((n for n in names if not name or n == name), "")


def _ended(status: Object, meant: Object) -> tuple[bool, str]:
    for state in ("state", "lastState"):
        over = mapping(status, state, "terminated")
        if over and text(over, "containerID") == meant["containerID"]:
            times = int(status.get("restartCount") or 0) - int(meant["restartCount"] or 0)
            return True, f"ended with exit code {text(over, 'exitCode')}, {times} restarts since"
    if text(status, "containerID") not in ("", meant["containerID"]):
        return True, f"was started again, {text(status, 'restartCount')} restarts (before: {meant['restartCount']})"
    return False, "runs on" if "running" in mapping(status, "state") else "is not to be seen"


def _images(pod: Object | None) -> dict[str, str]:
    return {text(c, "name"): text(c, "image") for place, _ in _PLACES for c in items(pod, "spec", place)}


def _ids(pod: Object | None, *, running: bool = False) -> dict[str, str]:
    found = items(pod, "status", "containerStatuses")
    return {text(s, "name"): text(s, "containerID") for s in found if not running or "running" in mapping(s, "state")}


def _keys(pod: Object, injection: Injection) -> list[str]:
    """Annotations of Chaos Mesh in which a container's own image is kept.

    Where the whole key would be too long for an annotation, the container's name with a suffix is all there is of it.
    """
    there = mapping(pod, "metadata", "annotations")
    ours: list[str] = []
    for place, suffix in _PLACES:
        for container in items(pod, "spec", place):
            short = f"{text(container, 'name')}-{suffix}"
            long = f"chaos-mesh-{name_of(injection.lease.id)}-pod-failure-{short}-image"
            ours += [key for key in (long, short) if key in there]
    return ours


def _swapped(pod: Object, injection: Injection, known: Object) -> dict[str, str]:
    """Containers whose image is not their own, and what it is; whatever has a note of Chaos Mesh counts."""
    before = mapping(known, "images")
    changed = {n: i for n, i in _images(pod).items() if n in before and i != before[n]}
    if not changed and (keys := _keys(pod, injection)):
        return dict.fromkeys(keys, "(a note of Chaos Mesh)")
    return changed


def read_file(site: Site, ref: Ref, container: str, path: str) -> str:
    """A file as the container sees it, by its `cat`. Raises DriverUnavailable: it could not be read."""
    try:
        done = site.cluster.exec(ref.namespace, ref.name, container, ["cat", path], timeout_s=_LOOK_S)
    except ApiRefused as e:
        raise DriverUnavailable(f"{ref.shown}: {e}", driver=NAME, verb="exec") from e
    if done.code:
        raise DriverUnavailable(f"{ref.shown}: {path} cannot be read in container {container}: {done.err}", driver=NAME)
    return done.out
