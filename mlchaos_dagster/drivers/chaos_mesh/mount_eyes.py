"""IOChaos: the file system that Chaos Mesh puts over a volume of the container, read from its list of mounts by `cat`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.drivers.chaos_mesh.eyes import Seen
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import Quiet, container_of, read_file
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import is_running
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import permissions as to_exec
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object, text

_FILE = "/proc/mounts"


class MountEyes(Quiet):
    """By the container's mounts."""

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Commands in pods."""
        yield from super().permissions(site, request)
        yield from to_exec(request.refs)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """A container without `cat`."""
        for ref, pod in frozen.read_all(site, request.refs).items():
            try:
                read_file(site, ref, container_of(pod, request.target.kubernetes.container), _FILE)
            except DriverError as e:
                yield Objection(str(e), "a container with `cat`")
                return

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """What is mounted where the fault will be."""
        pods: dict[str, Any] = {}
        path = text(request.params, "resource", "spec", "volumePath").rstrip("/")
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            container = container_of(pod, request.target.kubernetes.container)
            pods[ref.uid] = {"container": container, "mounts": _at(read_file(site, ref, container, _FILE), path)}
            step(done + 1, len(request.refs))
        return {"pods": pods, "path": path}

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """Present while there is another file system than before."""
        held: list[bool] = []
        lines: list[str] = []
        path = injection.undo["eyes"]["path"]
        for ref, pod in frozen.read_all(site, injection.refs).items():
            known = injection.undo["eyes"]["pods"][ref.uid]
            if not is_running(pod, ref, known["container"]):
                lines.append(f"{ref.shown}: container {known['container']} does not run, and its mounts went with it")
                continue
            now = _at(read_file(site, ref, known["container"], _FILE), path)
            held.append(now != known["mounts"])
            lines.append(f"{ref.shown}: at {path}: {', '.join(now) or 'no mount of its own'}")
        return Seen(any(held), bool(held) and all(held), tuple(lines))


def _at(mounts: str, path: str) -> list[str]:
    """File systems at a path, the uppermost last: what it is and its type."""
    rows = (line.split() for line in mounts.splitlines())
    return [f"{r[0]} ({r[2]})" for r in rows if len(r) > 2 and r[1].rstrip("/") == path]
