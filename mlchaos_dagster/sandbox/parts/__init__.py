"""Parts of the platform beyond serving. Each is a module here; it is started when an experiment first needs it.

A part module holds one ``PART``. It is imported by the command line, too, so it imports nothing heavy: what its processes
do is in role modules (``sandbox/<role>.py``), what the supervisor does for it in functions that import when called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.slots import Slot
    from mlchaos_dagster.sandbox.supervisor import Supervisor

NAMES: tuple[str, ...] = (
    "storage",
    "training",
    "features",
    "model_health",
    "models",
    "scaling",
    "tracking",
    "queue",
    "edge",
)
"""All parts, in the order in which they can be started: each after those it requires."""


@dataclass(frozen=True)
class Process:
    """One process of a part."""

    name: str
    role: str
    """Module under ``sandbox/`` with ``main(lifeline)``; ``proxy`` for a network proxy."""


@dataclass(frozen=True)
class View:
    """What a part's signals are made of, read just now."""

    slots: Mapping[str, Slot]
    states: Mapping[str, Mapping[str, Any]]
    """Process name → its last GET /state, at most a second old; absent: it did not answer."""
    directory: Path
    """The sandbox's."""


@dataclass(frozen=True)
class Part:
    """Processes that come up together, how they are linked, and what can be seen of them."""

    name: str
    describe: str
    requires: tuple[str, ...] = ()
    processes: tuple[Process, ...] = ()
    links: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Link (``trainer->object-store``) → (proxy process it runs through, process it leads to)."""
    peers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Glob over process names (also of other parts) → {key: link or process}; told as {key: URL} by PUT /peers, with
    an empty URL while there is none. See ``Service.peers``."""
    signals: tuple[str, ...] = ()
    """Names of the gauges that ``read`` can give."""
    read: Callable[[View], dict[str, float]] | None = None
    """Gauges now. What is not known now is left out; a process that is down is no excuse for what can be counted."""
    watches: tuple[str, ...] = ()
    """Globs over processes of serving whose GET /state ``read`` needs, too."""
    settings: Callable[[Supervisor, str], dict[str, Any]] | None = None
    """Further settings of a child by process name; secrets go here (a child's standard input), never into argv."""
    task: Callable[[Supervisor], Coroutine[Any, Any, None]] | None = None
    """Runs in the supervisor as long as the part is there; its failure ends the sandbox."""
    facts: Callable[[Supervisor], dict[str, Any]] | None = None
    """What the state file tells of this part (addresses, credentials); the file is for its owner's eyes."""


def part(name: str) -> Part:
    """The part of this name.

    Raises:
        KeyError: there is none.
    """
    if name not in NAMES:
        raise KeyError(name)
    return importlib.import_module(f".{name}", __package__).PART


def with_required(names: Iterable[str]) -> tuple[str, ...]:
    """These parts and all they require, in starting order.

    Raises:
        KeyError: there is no such part.
    """
    wanted: set[str] = set()

    def add(name: str) -> None:
        for required in part(name).requires:
            add(required)
        wanted.add(name)

    for name in names:
        if name != "serving":
            add(name)
    return tuple(name for name in NAMES if name in wanted)


def parts_of_signals(signals: Iterable[str]) -> set[str]:
    """The parts that must be up for these gauges to have a value; gauges of serving need none."""
    wanted = set(signals)
    return {name for name in NAMES if wanted & set(part(name).signals)}
