"""`mlchaos sandbox up|down|status|truth`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlchaos_dagster.cli.app import App, common, current, leave, table
from mlchaos_dagster.errors import ConfigError, SpecError, StoreError


@click.group("sandbox")
@common
def command() -> None:
    """Start, stop and look at the embedded ML platform of an environment."""


@command.command("up")
@click.option("--part", "parts", multiple=True, metavar="NAME", help="With this part, too (`all`: with every part).")
@common
def up(parts: tuple[str, ...]) -> None:
    """Start the platform and wait until it is ready; one that is up already is left as it is.

    Parts beyond serving are started by the first experiment that needs them, or here by --part.
    """
    from mlchaos_dagster.sandbox import api
    from mlchaos_dagster.sandbox.parts import NAMES

    app = current()
    if app.environment.sandbox is None:
        raise SpecError(
            f"the environment {app.environment.name} has no sandbox. Allowed: environments with sandbox: …",
            "--environment",
        )
    from mlchaos_dagster.wiring import sandbox_config

    wanted = NAMES if "all" in parts else parts
    if unknown := [name for name in wanted if name not in (*NAMES, "serving")]:
        allowed = ", ".join(("all", "serving", *NAMES))
        raise SpecError(f'the sandbox has no part "{unknown[0]}". Allowed: {allowed}', "--part")
    try:
        found = api.up(_directory(app), sandbox_config(app.environment), parts=wanted)
    except api.SandboxRefused as e:
        raise ConfigError(f"sandbox: {e}") from e
    except api.SandboxError as e:
        raise StoreError(f"sandbox: {e}") from e
    _show(app, found)


@command.command("down")
@common
def down() -> None:
    """Stop the platform and prove that no process of it is left. Exits with 70 when one is."""
    from mlchaos_dagster.sandbox import api

    app = current()
    try:
        found = api.down(_directory(app))
    except api.SandboxError as e:
        raise StoreError(f"sandbox: {e}") from e
    app.dump(found)
    gone = [p for p in found["processes"] if p["gone"]]
    left = [p for p in found["processes"] if not p["gone"]]
    if not found["was_up"] and not found["processes"]:
        app.out("no sandbox is up")
    else:
        app.out(f"down: {len(gone)} processes gone ({', '.join(str(p['pid']) for p in gone)}), {len(left)} left")
    for process in left:
        app.out(f"still there: {process['name']} pid {process['pid']}; kill -9 {process['pid']}")
    if not found["clean"]:
        leave(70)


@command.command("status")
@common
def status() -> None:
    """Show each process with role, pid, readiness and faults, as the processes themselves say. Exits with 1 when down."""
    from mlchaos_dagster.sandbox import api

    app = current()
    try:
        found = api.status(_directory(app))
    except api.SandboxError as e:
        raise StoreError(f"sandbox: {e}") from e
    if found is None:
        app.dump({"up": False, "processes": [], "faults": []})
        app.out("no sandbox is up; `mlchaos sandbox up` starts one, and so does `mlchaos run`")
        leave(1)
    _show(app, found)


@command.command("truth")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last N that match.")
@click.option("--what", "kinds", multiple=True, metavar="EVENT", help="Only these, such as oom_killed or scaled.")
@common
def truth(last: int | None, kinds: tuple[str, ...]) -> None:
    """Show what really happened to the platform's processes and when: its own log, kept apart from every measurement."""
    import json
    from datetime import datetime

    app = current()
    path = _directory(app) / "truth.jsonl"
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:  # the disk was full, or it is being written at this moment
            continue
        if not kinds or event["what"] in kinds:
            found.append(event)
    found = found[-last:] if last else found
    app.dump(found)
    rows: list[tuple[str, ...]] = []
    for event in found:
        moment = datetime.fromtimestamp(event["at"]).astimezone().strftime("%H:%M:%S.%f")[:-3]
        facts = {k: v for k, v in event.items() if k not in ("at", "mono", "what", "who", "pid") and v is not None}
        said = " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in facts.items())
        rows.append((moment, event["what"], event["who"] or "–", str(event["pid"] or "–"), said))
    app.out(table(("AT", "WHAT", "WHO", "PID", "FACTS"), rows) if rows else f"nothing of it in {path}")


def _directory(app: App) -> Path:
    return app.settings.home.sandbox(app.environment.name)


def _show(app: App, found: dict[str, Any]) -> None:
    app.dump({"up": True, **found})
    rows = [
        (p["name"], p.get("role", ""), str(p.get("pid") or "–"), "ready" if p["ready"] else f"not ready: {p['reason']}")
        for p in found["processes"]
    ]
    app.out(table(("PROCESS", "ROLE", "PID", "STATE"), rows))
    for fault in found.get("faults", []):
        app.out(f"fault: {fault['kind']} on {fault['target']}, lease {fault['lease_id']}")
    if not found.get("faults"):
        app.out("no fault is active")
