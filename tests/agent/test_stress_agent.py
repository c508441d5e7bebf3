"""The program that stresses a container, on this machine: its processes, its line, the cgroup's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlchaos_dagster.agent import stress
from mlchaos_dagster.drivers.kubernetes.faults.stress_agent import MARKER, Agent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs in Linux containers")
AGENT = Agent.of("mlchaos_dagster.agent:stress.py")


class Holder:
    """The program as an exec session starts it."""

    def __init__(self, lease: str, **order: object) -> None:
        command = [sys.executable, *AGENT.command("hold", {"seconds": 20, "silence": 20, **order}, MARKER + lease)[1:]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.write("".join(AGENT.sources))

    def write(self, text: str) -> None:
        self.stdin.write(text.encode())
        self.stdin.flush()

    def said(self) -> dict[str, object]:
        return json.loads(self.stdout.readline())


@pytest.fixture
def lease() -> Iterator[str]:
    name = f"test-{os.urandom(6).hex()}"
    yield name
    stress.end({"lease": name})


def gone(lease: str, within: float = 3.0) -> bool:
    end = time.monotonic() + within
    while stress.marked(lease) and time.monotonic() < end:
        time.sleep(0.01)
    return not stress.marked(lease)


def test_nothing_happens_before_the_word_and_nothing_stays_after_the_line(lease: str) -> None:
    holder = Holder(lease, cores=1.5, load=0.1)
    with holder.process, holder.stdin, holder.stdout:
        assert holder.said()["state"] == "armed"
        assert stress.marked(lease) == [holder.process.pid], "armed: found by its marker, no burner yet"
        holder.write("go\n")
        burners = holder.said()["pids"]
        assert isinstance(burners, list) and len(burners) == 2
        assert stress.look({"lease": lease})["burners"] == burners
        holder.stdin.close()
        assert gone(lease)
        assert holder.process.wait(3) == 0


def test_without_the_word_nothing_is_begun(lease: str) -> None:
    holder = Holder(lease, cores=1, load=0.1)
    with holder.process, holder.stdin, holder.stdout:
        assert holder.said()["state"] == "armed"
        holder.stdin.close()
        assert holder.stdout.read() == b"" and holder.process.wait(3) == 0


def test_burners_end_with_a_supervisor_that_is_killed(lease: str) -> None:
    holder = Holder(lease, cores=2, load=0.1)
    with holder.process, holder.stdin, holder.stdout:
        holder.said()
        holder.write("go\n")
        holder.said()
        holder.process.kill()
        assert gone(lease)


@pytest.mark.parametrize("order", [{"seconds": 0.3}, {"silence": 0.3}])
def test_it_ends_at_its_deadline_and_in_silence(lease: str, order: dict[str, float]) -> None:
    holder = Holder(lease, cores=1, load=0.1, **order)
    with holder.process, holder.stdin, holder.stdout:
        holder.said()
        holder.write("go\n")
        assert gone(lease) and holder.process.wait(3) == 0, "by itself, not by the kernel's alarm a second later"


def test_memory_is_held_outside_of_the_process_and_given_back(lease: str) -> None:
    size = 8 << 20
    holder = Holder(lease, bytes=size)
    with holder.process, holder.stdin, holder.stdout:
        holder.said()
        holder.write("go\n")
        assert holder.said()["state"] == "filling"
        assert holder.said() == {"state": "holding", "bytes": size}
        assert stress.look({"lease": lease})["held"] >= size
        assert stress.end({"lease": lease})["pids"] == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {
                "cgroup.controllers": "cpu memory",
                "cpu.max": "20000 100000\n",
                "cpu.stat": "usage_usec 1500000\nthrottled_usec 250000\n",
                "memory.max": "67108864\n",
                "memory.current": "1048576\n",
                "memory.stat": "anon 5\ninactive_file 4096\n",
                "memory.events": "oom 2\noom_kill 1\n",
                "memory.oom.group": "1\n",
            },
            (2, 0.2, 1.5, 0.25, 67108864, 1048576, 4096, 1, True),
        ),
        (
            {"cgroup.controllers": "", "cpu.max": "max 100000\n", "memory.max": "max\n"},
            (2, None, None, 0.0, None, None, 0, None, False),
        ),
        (
            {
                "cpu/cpu.cfs_quota_us": "20000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.stat": "nr_throttled 3\nthrottled_time 250000000\n",
                "cpuacct/cpuacct.usage": "1500000000\n",
                "memory/memory.limit_in_bytes": "67108864\n",
                "memory/memory.usage_in_bytes": "1048576\n",
                "memory/memory.stat": "cache 1\ntotal_inactive_file 4096\n",
                "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            },
            (1, 0.2, 1.5, 0.25, 67108864, 1048576, 4096, 1, False),
        ),
        (
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (1, None, None, 0.0, None, None, 0, None, False),
        ),
    ],
    ids=["v2", "v2 without limits", "v1", "v1 without limits"],
)
def test_both_kinds_of_cgroup_are_read(tmp_path: Path, files: dict[str, str], expected: tuple[object, ...]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = stress.cgroup(str(tmp_path))
    keys = ("version", "cpu_limit", "cpu_s", "throttled_s", "memory_limit", "memory", "cache", "oom_kills", "oom_group")
    assert tuple(found[key] for key in keys) == expected


def test_a_fraction_of_a_core_is_a_burner_that_rests() -> None:
    assert stress.shares(2.5, 0.8) == [0.8, 0.8, 0.4]
    assert stress.shares(0.3, 1.0) == [0.3]
