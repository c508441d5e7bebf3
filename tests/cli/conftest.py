"""The command line in this process: exit code, stdout and stderr apart; a home that must stay untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlchaos_dagster.cli.main import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line for line in (self.out + self.err).splitlines() if line]


Cli = Callable[..., Answer]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state directory, and a working directory without a dagster.yaml above it."""
    for name in ("MLCHAOS_HOME", "MLCHAOS_LIBRARY", "MLCHAOS_ENVIRONMENT", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "state"
    root.mkdir()
    monkeypatch.setenv("MLCHAOS_HOME", str(root))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return root


@pytest.fixture
def cli(home: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str | Path) -> Answer:
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return call


def fingerprint(root: Path) -> str:
    """Names, sizes and times of everything below: equal before and after when nothing was touched."""
    found = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))]
    return hashlib.sha256(repr(found).encode()).hexdigest()
