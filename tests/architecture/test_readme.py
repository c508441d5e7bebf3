"""The README tells the truth: what it says works has a test that says so, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.cli.main import mlchaos

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| (R[0-9A-Z][^ |]*) \| [^|]+ \| `([^`]+)` \|$", README, re.M)


def test_there_are_rows() -> None:
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("row", "file"), ROWS)
def test_a_row_that_works_has_a_test_that_names_it(row: str, file: str) -> None:
    assert f'"{row}"' in (ROOT / file).read_text(), f"{file} does not mark {row}"


def test_the_experiments_of_the_readme_are_those_of_the_library() -> None:
    areas = re.findall(r"^\| [a-z]+ \| [^|`]+ \| (`[^|]+`) \|$", README, re.M)
    told = re.findall(r"`([a-z-]+)`", " ".join(areas))
    assert sorted(told) == sorted(e.name for e in Catalog().written())


def test_the_commands_of_the_readme_exist() -> None:
    commands = set(re.findall(r"^mlchaos ([a-z]+)", README, re.M))
    assert len(commands) >= 7
    for command in commands:
        done = CliRunner().invoke(mlchaos, [command, "--help"])
        assert done.exit_code == 0, f"mlchaos {command}: {done.output}"


def test_links_point_at_files() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
