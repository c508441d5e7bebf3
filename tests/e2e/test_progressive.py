"""Stages on the real sandbox: without what the experiment validates the first stage fails, and the second never starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.kills import fast_library
from benchmarks.observer import Observer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]


@pytest.mark.req("R3-10")
def test_after_a_first_stage_that_fails_no_second_starts(tmp_path: Path) -> None:
    home, library = tmp_path / "home", fast_library(tmp_path / "library")
    path = library / "environments" / "fast.yaml"
    environment = yaml.safe_load(path.read_text())
    environment["sandbox"]["mechanisms"] = {"readiness": False, "retries": False, "breaker": False}
    path.write_text(yaml.safe_dump(environment, sort_keys=False))

    def mlchaos(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["--home", str(home), "--library", str(library), "-e", "fast", *words]
        program = [sys.executable, "-m", "mlchaos_dagster.cli.main"]
        return subprocess.run([*program, *command], capture_output=True, text=True, timeout=120)

    try:
        done = mlchaos("run", "serving-progressive", "-o", "json")
        assert len(done.stdout.splitlines()) == 1, done.stderr
        (first,) = map(json.loads, done.stdout.splitlines())
        assert (first["outcome"], done.returncode) in (("DEVIATED", 1), ("ABORTED", 4)), first["reasons"]
        because = f"serving-progressive-1 {first['outcome']}"
        assert first["not_started"] == [{"experiment": f"serving-progressive-{i}", "because": because} for i in (2, 3)]
        assert len(list((home / "records").glob("*.json"))) == 1, "nor has it a record"
        # By hand it is the guard that refuses, and the platform itself saw one fault, not two.
        again = mlchaos("run", "serving-progressive-2", "-o", "json")
        assert again.returncode == 3 and because in " ".join(json.loads(again.stdout)["reasons"]), again.stdout
        truth = Observer(home / "sandbox" / "fast").truth()
        assert sum(e["what"] == "fault_added" for e in truth) == 1
    finally:
        mlchaos("sandbox", "down")
