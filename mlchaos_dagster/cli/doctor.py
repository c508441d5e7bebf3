"""`mlchaos doctor`: what is missing, and how to get it. Looks only; starts and writes nothing."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import click

from mlchaos_dagster.cli.app import App, Word, common, current, leave
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.targets import listed

_FREE_MIB = 200
_BACKENDS = ("litmus", "chaos_mesh")
_MARK = {"ok": "✔ ok      ", "missing": "✘ missing ", "optional": "– optional"}
_FOUND = "✘ found   "
"""In place of `missing`, of what should not be there."""
_SHOULD_NOT_BE = ("left behind", "lease", "lever")
PARTS = re.compile(r"; (?=kubectl |helm |mlchaos |or )")
"""Between commands, and before what may be done instead: each is told on a line of its own, to be pasted."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    """`ok`, `missing` (runs will fail), or `optional`."""
    saw: str
    help: str = ""


@click.command("doctor")
@click.option(
    "--backend",
    type=Word("backend", _BACKENDS),
    help="Only what this tool needs in the environment's cluster, also before the environment names it.",
)
@common
def command(backend: str | None) -> None:
    """Say what is missing and how to get it; exits with 1 when something that runs need is."""
    app = current()
    found: list[Finding] = []
    for finding in (
        findings(app) if backend is None else of_backend(app, backend)
    ):  # told as they come: a cluster is looked at for many seconds
        told = found[-1].help if found and found[-1].what == finding.what else ""
        found.append(finding)
        mark = _FOUND if finding.state == "missing" and finding.what in _SHOULD_NOT_BE else _MARK[finding.state]
        app.out(f"{mark}  {finding.what}: {finding.saw}")
        if finding.help not in ("", told) and finding.state != "ok":
            for remedy in PARTS.split(finding.help):
                app.out(f"              {'' if remedy.startswith('or ') else '→ '}{remedy}")
    broken = [f for f in found if f.state == "missing"]
    app.dump({"ok": not broken, "findings": [asdict(f) for f in found]})
    app.out(f"\n{'everything that runs need is there' if not broken else f'{len(broken)} to mend'}")
    if broken:
        leave(1)


def findings(app: App) -> Iterator[Finding]:
    """All findings; one that fails is a finding, too."""
    yield _python()
    yield from _packages()
    yield _home(app.settings.home.root)
    yield from _library(app)
    yield from _leases(app)
    yield from _sandbox(app)
    yield from _cluster(app)
    yield from _tools()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 10) <= sys.version_info[:2] < (3, 14)
    return Finding("Python", "ok" if good else "missing", version, "Python 3.10 to 3.13")


def _packages() -> Iterator[Finding]:
    for package, use in (("dagster", "runs"), ("dagster_webserver", "the UI"), ("sklearn", "the sandbox's model")):
        there = find_spec(package) is not None
        yield Finding(
            package,
            "ok" if there else "missing",
            "installed" if there else f"not installed; needed for {use}",
            "pip install mlchaos-dagster",
        )


def _home(root: Path) -> Finding:
    folder = next(p for p in (root, *root.parents) if p.exists())
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        return Finding("state directory", "missing", f"{root} is not writable", "set MLCHAOS_HOME or give --home")
    free = shutil.disk_usage(folder).free >> 20
    if free < _FREE_MIB:
        return Finding("state directory", "missing", f"{free} MiB free at {root}", f"free {_FREE_MIB} MiB")
    return Finding("state directory", "ok", f"{root}, {free} MiB free")


def _library(app: App) -> Iterator[Finding]:
    from mlchaos_dagster.errors import SpecError

    try:
        environment = app.environment
    except SpecError as e:
        yield Finding("environment", "missing", str(e.problems[0]), "mlchaos list; --library DIR for one of your own")
        return
    try:
        checked = app.catalog.check(environment)
    except SpecError as e:
        yield Finding("library", "missing", str(e.problems[0]), "mlchaos check")
        return
    if checked.problems:
        yield Finding("library", "missing", str(checked.problems[0]), "mlchaos check")
    else:
        yield Finding("library", "ok", f"{checked.files} files, environment {environment.name}")
        yield Finding("backends", "ok", _serving(environment))


def _serving(environment: Environment) -> str:
    """The backends, and which of them makes the faults that several could."""
    backends = environment.backends
    shared = {k for kinds in backends.values() for k in kinds if sum(k in others for others in backends.values()) > 1}
    names = ", ".join(backends)
    return f"{names}; {environment.prefer} makes {', '.join(sorted(shared))}" if shared else names


def _leases(app: App) -> Iterator[Finding]:
    from mlchaos_dagster.engine.ledger import FileLedger
    from mlchaos_dagster.engine.ports import SystemClock
    from mlchaos_dagster.engine.processes import is_running
    from mlchaos_dagster.engine.stops import StopFiles

    ledger = FileLedger(app.settings.home.ledger, SystemClock())
    for path in ledger.unreadable():
        yield Finding("lease", "missing", f"{path} cannot be read: a fault may be live", "mlchaos recover")
    leases = ledger.leases()
    for lease in leases:
        if is_running(lease.owner):
            yield Finding("lease", "ok", f"{lease.id} is held by a live run of {lease.experiment}")
        else:
            saw = f"{lease.id} ({lease.kind} on {listed(lease.targets)}): its run is gone"
            yield Finding("lease", "missing", saw, f"mlchaos recover {lease.id}")
    if not leases:
        yield Finding("leases", "ok", "none open: nothing left behind")
    lever = StopFiles(app.settings.home).lever()
    if lever is not None:
        yield Finding(
            "lever",
            "missing",
            f"pulled ({lever}): no run may start",
            f"mlchaos stop --release -e {app.settings.environment}",
        )


def _sandbox(app: App) -> Iterator[Finding]:
    from mlchaos_dagster.errors import SpecError

    try:
        environment = app.environment
    except SpecError:
        return
    if environment.sandbox is None:
        return
    from mlchaos_dagster.sandbox import api

    directory = app.settings.home.sandbox(environment.name)
    try:
        up = api.status(directory)
    except api.SandboxError as e:
        yield Finding("sandbox", "missing", str(e), "mlchaos sandbox down && mlchaos sandbox up")
        return
    if up is None:
        yield Finding("sandbox", "optional", "not up", "`mlchaos run` starts it; or mlchaos sandbox up")
    else:
        yield Finding("sandbox", "ok", f"up, {len(up['processes'])} processes")


def _cluster(app: App) -> Iterator[Finding]:
    from mlchaos_dagster.errors import SpecError

    try:
        environment = app.environment
    except SpecError:
        return
    if environment.kubernetes is None:
        return
    from mlchaos_dagster.drivers.kubernetes.checkup import points

    reached = False
    for point in points(environment):
        reached = reached or (point.what, point.state) == ("cluster", "ok")
        yield Finding(point.what, point.state, point.saw, point.help)
    if reached:
        yield from _addresses(environment)


def of_backend(app: App, backend: str) -> Iterator[Finding]:
    """What one other tool needs. Raises SpecError: the environment is no cluster."""
    from mlchaos_dagster.drivers.kubernetes.checkup import backend_points, reached
    from mlchaos_dagster.errors import SpecError
    from mlchaos_dagster.kube.client import Site

    environment = app.environment
    if environment.kubernetes is None:
        clusters = ", ".join(e.name for e in app.catalog.environments() if e.kubernetes is not None)
        raise SpecError(
            f"environment {environment.name} has no cluster. Allowed: {clusters or 'one with kubernetes:'}.",
            "--environment",
        )
    for point in reached(environment):
        for one in backend_points(point, environment, backend) if isinstance(point, Site) else (point,):
            yield Finding(one.what, one.state, one.saw, one.help)


def _addresses(environment: Environment) -> Iterator[Finding]:
    """Where the probe and the queries go, as far as they name Services: whether there is a way from here."""
    from mlchaos_dagster.errors import MlChaosError
    from mlchaos_dagster.kube.address import connect
    from mlchaos_dagster.probes.kubernetes_service import filled

    options = environment.kubernetes
    assert options is not None
    urls = {"probe.url": environment.probe.url, "prometheus.url": getattr(environment.prometheus, "url", "")}
    for what, url in urls.items():
        if "{service:" not in url:
            continue
        try:
            yield Finding(what, "ok", filled(url, lambda: connect(options)))
        except MlChaosError as e:
            yield Finding(what, "missing", str(e), "docs/kubernetes.md, A way in for the probe")


def _tools() -> Iterator[Finding]:
    for names, use in ((("prometheus",), "PromQL SLIs"), (("chromium", "google-chrome"), "screenshots of the UI")):
        path = next((p for p in map(shutil.which, names) if p), None)
        yield Finding(names[0], "ok" if path else "optional", path or f"not found; {use}", f"apt install {names[0]}")
