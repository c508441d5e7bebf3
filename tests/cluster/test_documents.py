"""The kubectl lines of the guides, run against a real API server: reading as they stand, changing as a dry run (R3-11)."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cli.test_documents import THEIRS
from tests.cluster.test_litmus import DATA, crds  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]
LINES = sorted({line for _, line in THEIRS if line.startswith("kubectl ")})
READS = frozenset({"get", "describe", "logs", "auth", "kustomize"})
ELSEWHERE = ("port-forward", "-k manifests/litmus/faults")
"""What waits for a browser, and what is fetched from Litmus's own place."""
WRONG = ("unknown", "doesn't have a resource type", "invalid", "unrecognized", "no matches for kind", "unable to match")
"""A line that is wrong; what it asks for may well not be there."""
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="Litmus's CRDs are not beside this checkout")


@pytest.mark.timeout(300)
@pytest.mark.req("R3-11", "R0-01", "R1-06")
def test_kubectl_knows_what_is_meant(crds: None, namespace: str) -> None:  # noqa: F811
    wrong = {line: said for line in LINES if (said := _wrong(line, namespace))}
    assert wrong == {}
    assert len(LINES) > 30


def _wrong(line: str, namespace: str) -> str:
    if any(word in line for word in ELSEWHERE):
        return ""
    words = shlex.split(
        line.partition(";")[0].partition(" | ")[0].replace("ml-serving", namespace).replace("NAME", "x")
    )
    if words[1] not in READS and "token" not in words:
        words.append("--dry-run=server" if words[1] != "delete" else "--dry-run=client")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    said = done.stderr.lower()
    there = (
        done.returncode == 0 or "can-i" in words or "notfound" in said.replace(" ", "") or "no resources found" in said
    )
    return "" if there and not any(word in said for word in WRONG) else said or f"exit code {done.returncode}"
