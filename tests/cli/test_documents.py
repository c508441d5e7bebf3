"""Commands of the guides are commands: ours parse as they stand, files that others are given are there, versions agree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mlchaos_dagster.cli.main import mlchaos
from mlchaos_dagster.drivers.chaos_mesh import checkup as chaos_mesh
from mlchaos_dagster.drivers.litmus import checkup as litmus

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "docs" / f"{name}.md" for name in ("troubleshooting", "litmus", "chaos-mesh", "backends", "kubernetes")),
    *(ROOT / "manifests" / name / "README.md" for name in ("litmus", "chaos_mesh")),
]


def commands(page: Path, program: str) -> Iterator[str]:
    """Whole commands: lines of shell blocks, and code in the text that has more than the program's name."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^[ ]*```sh\n(.*?)^[ ]*```", text, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = [code for code in re.findall(r"`([^`\n]+)`", rest) if code.startswith(f"{program} ")]
    for line in (*lines, *inline):
        if line.startswith(f"{program} "):
            yield line.partition(" #")[0].rstrip()


OURS = sorted({(page.name, line) for page in PAGES for line in commands(page, "mlchaos")})
THEIRS = sorted({(page, line) for page in PAGES for p in ("kubectl", "helm") for line in commands(page, p)})


def parsed(words: list[str]) -> None:
    """As the command line would; nothing is run. Raises click.UsageError: no such command or option."""
    with mlchaos.make_context("mlchaos", words) as context:
        name, command, rest = mlchaos.resolve_command(context, [*context._protected_args, *context.args])
        while isinstance(command, click.Group):
            with command.make_context(name, rest, parent=context) as inner:
                name, command, rest = command.resolve_command(inner, [*inner._protected_args, *inner.args])
        assert command is not None
        with command.make_context(name, rest, parent=context):
            pass


@pytest.mark.req("R3-11")
@pytest.mark.parametrize(("page", "line"), OURS)
def test_our_commands_are_commands(page: str, line: str) -> None:
    parsed(shlex.split(line)[1:])


def test_a_command_that_is_none_is_found() -> None:
    for line in ("doctor --backends litmus", "clear -e staging", "doctor --backend litmuss"):
        with pytest.raises(click.UsageError):
            parsed(line.split())
    assert len(OURS) > 40 and len(THEIRS) > 40


@pytest.mark.req("R0-01", "R1-06", "R3-11")
def test_files_that_are_applied_are_there() -> None:
    for page, line in THEIRS:
        for path in re.findall(r"manifests/[\w./-]+", line):
            assert (ROOT / path).exists(), (page.name, line)
            if " -k " in line:
                assert (ROOT / path / "kustomization.yaml").is_file(), (page.name, line)


@pytest.mark.req("R0-01", "R1-06")
def test_versions_and_namespaces_of_the_charts_agree_with_doctor() -> None:
    said = {line for _, line in THEIRS if line.startswith("helm upgrade")}
    assert said == {litmus.INSTALL, chaos_mesh.install("chaos-testing")}
    for name, line in (("litmus", litmus.INSTALL), ("chaos_mesh", chaos_mesh.install("chaos-testing"))):
        assert line in (ROOT / "manifests" / name / "values.yaml").read_text()
