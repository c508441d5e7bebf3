"""Every exit code of `mlchaos run`, each brought about for real by a command.

    python -m benchmarks.outcomes [OUTCOME …]

On a sandbox of its own. UNCLEAN is made by freezing (SIGSTOP) the platform's supervisor during the
window: nobody can prove anything clean then; it is thawed afterwards and `mlchaos recover` clears up.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.kills import command, fast_library
from benchmarks.observer import Observer

FROZEN = {"start": "2020-01-01T00:00:00Z", "end": "2099-01-01T00:00:00Z", "reason": "the year-end freeze"}


@dataclass
class Way:
    """How one outcome is brought about."""

    code: int
    arguments: list[str]
    change: Callable[[dict], None] = lambda environment: None
    """Of the environment file."""
    meanwhile: str = ""
    """What is done once the fault is seen: `stop`, `freeze supervisor`."""
    unset: list[str] = field(default_factory=list)


def _no_breaker(environment: dict) -> None:
    environment["sandbox"]["mechanisms"] = {"breaker": False}


def _few(environment: dict) -> None:
    environment["sampling"]["min_samples"] = 150


def _freeze(environment: dict) -> None:
    environment["freezes"] = [FROZEN]


def _unclean(environment: dict) -> None:
    environment["safety"] |= {"recover_timeout": "4s"}
    # The supervisor's silence must not end the run before the window does.
    signals = ["ready_replicas", "running_replicas", "restarts", "breaker_state"]
    environment["signals"] = signals
    slis = environment["slis"].items()
    environment["slis"] = {name: sli for name, sli in slis if sli.get("signal", signals[0]) in signals}


WAYS = {
    "HELD": Way(0, ["run", "serving-pod-failure"]),
    "DEVIATED": Way(1, ["run", "feature-store-delay"], _no_breaker),
    "usage": Way(2, ["run", "serving-pod-failur"]),
    "REFUSED": Way(3, ["run", "serving-pod-failure"], _freeze),
    "ABORTED": Way(4, ["run", "serving-pod-failure"], meanwhile="stop"),
    "INCONCLUSIVE": Way(5, ["run", "serving-pod-failure", "--shadow"]),
    "ERROR": Way(6, ["run", "serving-pod-failure"], unset=["records"]),
    "UNCLEAN": Way(70, ["run", "serving-pod-failure"], _unclean, meanwhile="freeze supervisor"),
}


@dataclass
class Shown:
    """What a command gave."""

    outcome: str
    command: str
    expected: int
    code: int
    said: str
    clean: list[str]
    """What the observer still sees afterwards; empty is clean."""


def show(outcome: str) -> Shown:
    """Bring one outcome about on a home of its own."""
    way, home = WAYS[outcome], Path(tempfile.mkdtemp(prefix="mlchaos-outcome-"))
    library = fast_library(home / "library")
    path = library / "environments" / "fast.yaml"
    environment = yaml.safe_load(path.read_text())
    way.change(environment)
    path.write_text(yaml.safe_dump(environment, sort_keys=False))
    if "records" in way.unset:
        (home / "records").write_text("a file where a directory should be: nothing can be stored here")
    observer = Observer(home / "sandbox" / "fast")
    thread = threading.Thread(target=_meanwhile, args=(way.meanwhile, observer, home, library), daemon=True)
    thread.start()
    try:
        done = subprocess.run(command(home, library, *way.arguments), capture_output=True, text=True, timeout=120)
        if way.meanwhile == "freeze supervisor":
            os.kill(observer.state()["pid"], signal.SIGCONT)
            subprocess.run(command(home, library, "recover"), capture_output=True, timeout=60)
        # A replica that was let go a moment ago is still starting.
        end = time.monotonic() + 15
        while (left := observer.wrong()) and time.monotonic() < end:
            time.sleep(0.1)
        said = next((line.strip() for line in (done.stdout + done.stderr).splitlines() if outcome in line), "")
        if not said:
            said = (done.stdout + done.stderr).strip().splitlines()[-1]
        return Shown(outcome, "mlchaos " + " ".join(way.arguments), way.code, done.returncode, said, left)
    finally:
        subprocess.run(command(home, library, "sandbox", "down"), capture_output=True, timeout=60)
        shutil.rmtree(home, ignore_errors=True)


def _meanwhile(what: str, observer: Observer, home: Path, library: Path) -> None:
    if not what:
        return
    end = time.monotonic() + 60
    while not observer.fault_seen() and time.monotonic() < end:
        time.sleep(0.02)
    if what == "stop":
        subprocess.run(command(home, library, "stop", "--all"), capture_output=True, timeout=60)
    else:
        os.kill(observer.state()["pid"], signal.SIGSTOP)


def main() -> int:
    """Show all of them."""
    wrong = 0
    print("| outcome | command | exit | |\n|---|---|---|---|", flush=True)
    for outcome in sys.argv[1:] or WAYS:
        shown = show(outcome)
        wrong += shown.code != shown.expected or bool(shown.clean)
        print(f"| {shown.outcome} | `{shown.command}` | {shown.code} | {shown.said} |", flush=True)
        if shown.clean:
            print(json.dumps(shown.clean), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
