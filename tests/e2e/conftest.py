"""A home with a fast environment for real runs of the real command line."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills import command, fast_library
from benchmarks.observer import Observer


@dataclass
class Place:
    """One home, one sandbox, one observer."""

    home: Path
    library: Path
    observer: Observer

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command in a session of its own, as a terminal would start it."""
        return subprocess.Popen(
            command(self.home, self.library, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        """A command, to its end."""
        return subprocess.run(
            command(self.home, self.library, *arguments), capture_output=True, text=True, timeout=timeout
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    made = Place(home, fast_library(home / "library"), Observer(home / "sandbox" / "fast"))
    try:
        assert made.run("sandbox", "up").returncode == 0
        yield made
    finally:
        made.run("sandbox", "down")


def wait_for(what: Any, bound_s: float = 30.0) -> bool:
    """Poll a condition with a bound; False when it never came."""
    import time

    end = time.monotonic() + bound_s
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.01)
    return False
