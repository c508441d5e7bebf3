"""What the benchmarks share: a sandbox of their own, a run watched from outside, the peer's harness, table cells.

The peer is Chaos Toolkit in a virtual environment of its own (`--chaos DIR`); `--harness DIR` is a folder of scripts
that measure it (`abort.py`, `overhead.py`, `recovery.py`, `api.py`, with their `target.py` and `faults.py`). Neither
is part of this project; rows that need one are left out with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.observer import Observer
from mlchaos_dagster.catalog import SHIPPED

ROOT = Path(__file__).resolve().parent.parent

# ---- the peer


@dataclass
class Peer:
    """Chaos Toolkit and the scripts that measure it."""

    harness: Path | None
    venv: Path | None

    @property
    def chaos(self) -> str | None:
        """The `chaos` command, or None."""
        found = self.venv / "bin" / "chaos" if self.venv else None
        return str(found) if found and found.exists() else shutil.which("chaos")

    @property
    def python(self) -> str:
        """The interpreter that has it."""
        return str(Path(self.chaos or sys.executable).with_name("python"))

    @property
    def environ(self) -> dict[str, str]:
        """Variables with which `chaos` and the harness's modules are found."""
        path = f"{Path(self.chaos).parent}{os.pathsep}{os.environ['PATH']}" if self.chaos else os.environ["PATH"]
        return os.environ | {"PATH": path, "PYTHONPATH": str(self.harness or "")}

    def missing(self, *, harness: bool = True) -> str:
        """Why its rows are left out; empty when they are not."""
        if not self.chaos:
            return (
                "Chaos Toolkit's rows are left out: no `chaos` command; give its virtual environment with --chaos DIR."
            )
        if harness and not (self.harness and (self.harness / "target.py").is_file()):
            return "Chaos Toolkit's rows are left out: the scripts that measure it are not here; give them with --harness DIR."
        return ""

    def script(self, name: str, *arguments: str, timeout: float = 1200) -> str:
        """Run one of the harness's scripts; its stdout."""
        assert self.harness is not None
        done = subprocess.run(
            [self.python, str(self.harness / name), *arguments],
            env=self.environ, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=timeout, check=True,
        )  # fmt: skip
        return done.stdout


def parser(doc: str | None, n: int) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--n", type=int, default=n, help=f"repeats (default {n})")
    made.add_argument("--harness", type=Path, help="folder with the scripts that measure Chaos Toolkit")
    made.add_argument("--chaos", type=Path, help="virtual environment with Chaos Toolkit (default: chaos on PATH)")
    return made


def peer_of(args: argparse.Namespace) -> Peer:
    """The peer that the options name."""
    return Peer(args.harness and args.harness.resolve(), args.chaos and args.chaos.resolve())


# ---- a sandbox of one's own


def environment(name: str, **changes: Any) -> dict[str, Any]:
    """The shipped sandbox environment with short phases, no scaling, and `changes` merged in (one level deep)."""
    made = yaml.safe_load((SHIPPED / "environments" / "sandbox.yaml").read_text())
    made |= {"name": name, "duration_scale": 1.0, "duration_min": "0s", "limits": {"health_at_least": "60%"}}
    made["sampling"] |= {"baseline": "1s", "min_samples": 25}
    made.pop("error_budget")  # breaches on purpose, by the dozen, would spend any budget
    for key, value in changes.items():
        made[key] = made.get(key, {}) | value if isinstance(value, dict) else value
    return made


def experiment(name: str, target: str, fault: dict[str, Any], duration: str, **more: Any) -> dict[str, Any]:
    """An experiment for a bench: little steady state, short dwell."""
    return {
        "schema": "mlchaos/v1", "name": name, "title": name, "hypothesis": "It is measured.", "area": "bench",
        "owner": "bench@example.com", "target": target, "fault": fault, "blast_radius": {"count": 1},
        "duration": duration, "steady_state": [{"sli": "availability", "at_least": "95%"}],
        "recovery": {"within": "30s", "dwell": "500ms"}, **more,
    }  # fmt: skip


def write_library(directory: Path, environments: Iterable[dict], experiments: Iterable[dict]) -> Path:
    """A library directory of these."""
    for kind, found in (("environments", environments), ("experiments", experiments)):
        (directory / kind).mkdir(parents=True, exist_ok=True)
        for value in found:
            (directory / kind / f"{value['name']}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    return directory


class Lab:
    """A home, a library and a running sandbox, gone afterwards."""

    def __init__(self, environments: Sequence[dict], experiments: Sequence[dict]) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="mlchaos-bench-"))
        self.library = write_library(self.home / "library", environments, experiments)
        self.name = environments[0]["name"]
        self.observer = Observer(self.home / "sandbox" / self.name)

    def command(self, *arguments: str) -> list[str]:
        """The real command line, on this home."""
        return [
            sys.executable, "-m", "mlchaos_dagster.cli.main", "--home", str(self.home), "--library", str(self.library),
            "--environment", self.name, *arguments,
        ]  # fmt: skip

    def __enter__(self) -> Lab:
        try:
            up = subprocess.run(self.command("sandbox", "up"), capture_output=True, text=True, cwd=ROOT)
            if up.returncode:
                raise RuntimeError(f"the sandbox did not start: {up.stderr.strip()}")
            self.settle()
        except BaseException:  # also Ctrl-C: no sandbox is left up
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        subprocess.run(self.command("sandbox", "down"), capture_output=True, timeout=120, cwd=ROOT)
        shutil.rmtree(self.home, ignore_errors=True)

    def settle(self, within_s: float = 90.0) -> None:
        """Wait until every replica is ready, nothing is wrong, and the gateway answers."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if not self.observer.wrong() and self._ready() and predict(self.gateway) == 200:
                return
            time.sleep(0.1)
        raise TimeoutError(f"the sandbox is not well after {within_s:g} s: {self.observer.wrong()}")

    @property
    def gateway(self) -> str:
        """The gateway's address."""
        return self.observer.state()["gateway_url"]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.gateway}/state", timeout=1) as answer:
                state = json.load(answer)
        except (OSError, ValueError, KeyError):
            return False
        return state["ready_replicas"] == self.observer.state()["config"]["replicas"]


def predict(gateway: str, entity: int = 17) -> int:
    """Status of one prediction; 0 when there is no answer."""
    try:
        with urllib.request.urlopen(f"{gateway}/predict?entity_id={entity}", timeout=2) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


# ---- a run seen from outside


@dataclass
class Mark:
    """A line of progress, when it was seen and what CPU time the processes of the run had used by then."""

    at: float
    cpu_s: float
    text: str


@dataclass
class Watched:
    """A run of `mlchaos run -o json`, timed from outside by what it says on stderr."""

    command: list[str]
    tree: bool = True
    begun: float = 0.0
    ended: float = 0.0
    cpu_s: float = 0.0
    """The run and every child it waited for, by the kernel's account at its end."""
    marks: list[Mark] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = None

    def start(self) -> Watched:
        """Start it; returns at once."""
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
        )
        self._watched = psutil.Process(self.process.pid)
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._err, self._out)]
        for thread in self._threads:
            thread.start()
        return self

    def wait(self, timeout_s: float = 180.0) -> Watched:
        """Until it has ended."""
        waiter = threading.Timer(timeout_s, self.process.kill)
        waiter.start()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.ended = time.monotonic()
        waiter.cancel()
        self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime
        for thread in self._threads:
            thread.join(5)
        return self

    @property
    def over(self) -> bool:
        """Whether it has ended (its account is still to be had by `wait`)."""
        try:
            return self._watched.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def at(self, words: str, after: float = 0.0, within_s: float = 0.0) -> Mark | None:
        """The first line with these words after a moment; waits for it when asked to."""
        end = time.monotonic() + within_s
        while True:
            for mark in list(self.marks):
                if mark.at >= after and words in mark.text:
                    return mark
            if time.monotonic() >= end:
                return None
            time.sleep(0.005)

    def _err(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.marks.append(Mark(time.monotonic(), self._cpu(), line.rstrip()))

    def _out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.results.append(json.loads(line))
                self.marks.append(Mark(time.monotonic(), self._cpu(), f"{self.results[-1]['experiment']}  result"))

    def _cpu(self) -> float:
        """CPU seconds of the run, its living descendants, and those it has waited for."""
        if not self.tree:
            return 0.0
        try:
            times = self._watched.cpu_times()
            used = times.user + times.system + times.children_user + times.children_system
        except psutil.Error:
            return float("nan")
        for child in _descendants(self._watched):
            try:
                own = child.cpu_times()
                used += own.user + own.system
            except psutil.Error:
                continue
        return used


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@contextmanager
def every(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """Call `do` beside what is inside, at this rhythm."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(seconds):
            do()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


# ---- whole commands


@dataclass(frozen=True)
class Cost:
    """What one whole process took, by the kernel's account."""

    wall_s: float
    cpu_s: float
    rss_mib: float


_SMALL = """
import json, os, sys, time
words, nothing = sys.argv[1:], os.open(os.devnull, os.O_RDWR)
begun = time.perf_counter()
to_nothing = [(os.POSIX_SPAWN_DUP2, nothing, n) for n in (1, 2)]
pid = os.posix_spawn(words[0], words, os.environ, file_actions=to_nothing)
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - begun
print(json.dumps([os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""
"""The kernel counts what the parent had before `exec` as the child's peak: so the parent is a small one."""


def cost(command: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> Cost:
    """Run a command (with its full path) to its end. Raises RuntimeError when it fails."""
    small = [sys.executable, "-I", "-S", "-c", _SMALL, *command]
    code, *took = json.loads(subprocess.run(small, cwd=cwd, env=env, capture_output=True, check=True).stdout)
    if code:
        raise RuntimeError(f"exit {code}: {shlex.join(command)}")
    return Cost(*took)


# ---- words and numbers


def machine() -> str:
    """One line: what the numbers were taken on, and how busy it was."""
    loads = " ".join(f"{x:.1f}" for x in os.getloadavg())
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB; load average {loads}"
    )


def heading(title: str) -> None:
    """A section of the document, with the machine's state when it was measured."""
    print(f"\n## {title}\n\n_{machine()}_\n", flush=True)


def quantile(values: Iterable[float | None], q: float) -> float:
    """The smallest value that a share `q` of them does not exceed; nan when there are none."""
    found = sorted(v for v in values if v is not None)
    return found[min(len(found) - 1, max(0, -(-int(q * 1000) * len(found) // 1000) - 1))] if found else float("nan")


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """`median [min to max]`."""
    found = sorted(v for v in values if v is not None)
    if not found:
        return "–"
    return f"{statistics.median(found):.{digits}f} [{found[0]:.{digits}f} to {found[-1]:.{digits}f}]"


def tails(values: Iterable[float | None], digits: int = 3) -> str:
    """`p50 | p95 | max`, as cells."""
    found = [v for v in values if v is not None]
    if not found:
        return "– | – | –"
    return f"{statistics.median(found):.{digits}f} | {quantile(found, 0.95):.{digits}f} | {max(found):.{digits}f}"


def table(head: str) -> None:
    """The head of a table, from `a | b | c`."""
    print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}", flush=True)


def row(*cells: object) -> None:
    """One row."""
    print(f"| {' | '.join(str(c) for c in cells)} |", flush=True)
