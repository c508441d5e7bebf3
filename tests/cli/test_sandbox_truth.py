"""`mlchaos sandbox truth`: the platform's own log for people and programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Cli

EVENTS = [
    {
        "at": 1_795_284_891.0,
        "mono": 1.0,
        "what": "started",
        "who": "inference-1",
        "pid": 41,
        "lease": None,
        "restarts": 0,
    },
    {"at": 1_795_284_895.578, "mono": 2.0, "what": "oom_killed", "who": "inference-1", "pid": 41, "lease": "l1"},
    {
        "at": 1_795_284_903.0,
        "mono": 3.0,
        "what": "scaled",
        "who": "inference",
        "pid": None,
        "lease": None,
        "replicas": 4,
    },
]


@pytest.fixture
def log(home: Path) -> Path:
    path = home / "sandbox" / "sandbox" / "truth.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in EVENTS) + '{"at": 17')
    return path


@pytest.mark.req("R1-04", "R1-05")
def test_events_can_be_chosen_and_counted_from_the_end(cli: Cli, log: Path) -> None:
    def whats(*words: str) -> list[str]:
        return [event["what"] for event in json.loads(cli("sandbox", "truth", *words, "-o", "json").out)]

    assert whats() == ["started", "oom_killed", "scaled"], "half a line is left out"
    assert whats("--last", "1") == ["scaled"]
    assert whats("--what", "oom_killed", "--what", "scaled") == ["oom_killed", "scaled"]
    assert whats("--what", "oom_killed", "--last", "5") == ["oom_killed"]


def test_people_get_the_moment_and_the_facts(cli: Cli, log: Path) -> None:
    lines = cli("sandbox", "truth", "--last", "2").out.splitlines()
    assert lines[1].split()[1:] == ["oom_killed", "inference-1", "41", "lease=l1"]
    assert lines[1].split()[0].endswith(":55.578")
    assert lines[2].split()[1:] == ["scaled", "inference", "–", "replicas=4"]


def test_no_log_is_said(cli: Cli) -> None:
    answer = cli("sandbox", "truth")
    assert answer.code == 0 and "nothing of it in" in answer.out
    assert json.loads(cli("sandbox", "truth", "-o", "json").out) == []
    assert cli("sandbox", "truth", "--last", "0").code == 2
