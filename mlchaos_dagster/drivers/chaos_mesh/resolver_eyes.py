"""dns_failure: the target container's list of name servers, and whether they answer.

Chaos Mesh puts its own DNS server into `/etc/resolv.conf` of the container and keeps the old file beside it. Read by `cat`
in the container itself; without it nothing can be seen, so its absence is an objection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlchaos_dagster.drivers.chaos_mesh.eye import running
from mlchaos_dagster.drivers.chaos_mesh.eyes import Seen
from mlchaos_dagster.drivers.chaos_mesh.pod_eyes import container_of, read_file
from mlchaos_dagster.drivers.cluster import frozen
from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import is_running
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import permissions as to_exec
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.errors import DriverError, DriverUnavailable
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object
from mlchaos_dagster.kube.refs import Ref

NAME = "chaos_mesh"
_FILE = "/etc/resolv.conf"
_LOOK_S = 5.0
_PUT_BACK = f"""
if test -s {_FILE}.chaos.bak; then own=$(cat {_FILE}.chaos.bak)
else own=$(for server; do echo "nameserver $server"; done; grep -v "^nameserver" {_FILE}); fi
printf '%s\\n' "$own" > {_FILE}
"""
SERVER = "chaos-mesh-dns-server"
"""Service of Chaos Mesh's own DNS server, which its chart installs only when it is asked to (`dnsServer.create`)."""


class ResolverEyes:
    """By the container's own file."""

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Commands in pods; Chaos Mesh's DNS server."""
        yield from to_exec(request.refs)
        yield Permission("list", "services", site.options.chaos_mesh.system_namespace)

    def objections(self, site: Site, request: Request) -> Iterator[Objection]:
        """No DNS server of Chaos Mesh; a container without `cat`."""
        system = site.options.chaos_mesh.system_namespace
        names = [s["metadata"]["name"] for s in site.cluster.list(f"/api/v1/namespaces/{system}/services")]
        if SERVER not in names:
            yield Objection(
                f"Chaos Mesh's DNS server is not installed in namespace {system}",
                "its chart with dnsServer.create=true; or the backend kubernetes",
            )
        for ref, pod in frozen.read_all(site, request.refs).items():
            container = container_of(pod, request.target.kubernetes.container)
            try:
                _servers(site, ref, container)
            except DriverError as e:
                yield Objection(str(e), "a container with `cat`; or the backend kubernetes")
                return

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """The pods' name servers."""
        pods: dict[str, Any] = {}
        for done, (ref, pod) in enumerate(frozen.read_all(site, request.refs).items()):
            container = container_of(pod, request.target.kubernetes.container)
            pods[ref.uid] = {"container": container, "servers": _servers(site, ref, container)}
            step(done + 1, len(request.refs))
        return {"pods": pods}

    def open(self, site: Site, injection: Injection, step: Step) -> dict[str, str]:
        """Nothing to do."""
        return {}

    def reopen(self, site: Site, injection: Injection, step: Step) -> None:
        """Nothing to do."""

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """Present while the name servers are others than they were; effective where Chaos Mesh's stand there."""
        held: list[bool] = []
        lines: list[str] = []
        for ref, pod in frozen.read_all(site, injection.refs).items():
            known = injection.undo["eyes"]["pods"][ref.uid]
            if not running(pod):
                lines.append(f"{ref.shown} is gone, and its file with it")
                continue
            if not is_running(pod, ref, known["container"]):  # the file is the pod's, and outlives its containers
                said = f"{ref.shown}: container {known['container']} does not run: its name servers cannot be read"
                raise DriverUnavailable(said, driver=NAME)
            now = _servers(site, ref, known["container"])
            held.append(now != known["servers"])
            lines.append(f"{ref.shown}: its name servers are {', '.join(now)} (before: {', '.join(known['servers'])})")
        return Seen(any(held), bool(held) and all(held), tuple(lines))

    def mend(self, site: Site, injection: Injection, step: Step) -> list[str]:
        """Put the copy that Chaos Mesh keeps back, as its daemon would; needs a shell in the container.

        The copy goes with the container; where it has gone, the name servers are put back as we knew them.
        """
        said: list[str] = []
        for ref in injection.refs:
            known = injection.undo["eyes"]["pods"][ref.uid]
            if not is_running(frozen.read(site, ref), ref, known["container"]):
                continue
            command = ["sh", "-c", _PUT_BACK, "sh", *known["servers"]]
            done = site.cluster.exec(ref.namespace, ref.name, known["container"], command, timeout_s=_LOOK_S)
            if not done.code:
                said.append(f"{ref.shown}: its own {_FILE} was put back by us")
            step(0, 0)
        return said


def _servers(site: Site, ref: Ref, container: str) -> list[str]:
    """Name servers in a container. Raises DriverUnavailable: it could not be read."""
    words = (line.split() for line in read_file(site, ref, container, _FILE).splitlines())
    return [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]
