"""What the commands print and leave behind, without running an experiment."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.cli import app as app_module
from mlchaos_dagster.cli import doctor, experiments_doc, main
from mlchaos_dagster.cli.adhoc import AdHoc, build, seconds
from mlchaos_dagster.cli.app import App
from mlchaos_dagster.cli.run import prepare
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.evidence.words import shortened_by
from tests.cli.conftest import Cli, fingerprint
from tests.domain.test_parsing import GOOD

FREE_OF_DAGSTER = [
    ["--help"],
    ["list"],
    ["check"],
    ["status"],
    ["stop", "serving-pod-failure"],
    ["recover"],
    ["history"],
    ["describe", "serving-pod-failure"],
    ["sandbox", "status"],
]


@pytest.mark.parametrize("words", FREE_OF_DAGSTER, ids=" ".join)
def test_works_without_importing_dagster_or_numbers(words: list[str], home: Path) -> None:
    code = (
        "import sys; from mlchaos_dagster.cli.main import main; main(sys.argv[1:]);"
        "print([m for m in ('dagster', 'pandas', 'scipy', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_knows_every_command_and_its_first_line(cli: Cli) -> None:
    answer = cli("--help")
    assert answer.code == 0
    for name, (module, text) in main.COMMANDS.items():
        assert f"  {name} " in answer.out and text in answer.out
        command = importlib.import_module(module).command
        assert isinstance(command, click.Command) and command.name == name and command.help
        assert cli(name, "--help").code == 0


def test_no_words_is_help_and_version_is_a_version(cli: Cli) -> None:
    assert "Commands:" in cli().out
    assert cli("--version").out.startswith("mlchaos ")


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["check"],
        ["status"],
        ["history"],
        ["recover"],
        ["recover", "--dry-run"],
        ["doctor"],
        ["stop", "--release"],
        ["describe", "serving-pod-failure"],
        ["plan", "serving-pod-failure"],
        ["sandbox", "status"],
        ["sandbox", "down"],
        ["completion", "bash"],
    ],
    ids=" ".join,
)
def test_json_is_only_json(words: list[str], cli: Cli) -> None:
    answer = cli(*words, "-o", "json")
    json.loads(answer.out)
    assert len(answer.out.splitlines()) == 1
    before = cli("-o", "json", *words)
    assert set(json.loads(before.out)) == set(json.loads(answer.out))


@pytest.mark.req("R2-01")
def test_list_and_describe(cli: Cli) -> None:
    found = json.loads(cli("list", "-o", "json").out)
    assert {e["name"] for e in found["experiments"]} >= {"serving-pod-failure", "feature-store-delay"}
    here = {e["name"]: e["runs_here"] for e in found["experiments"]}
    assert here["serving-pod-failure"] and not here["node-drain-serving"]  # nodes are to be had on a cluster only
    document = cli("describe", "serving-pod-failure").out
    for heading in ("Hypothesis", "Prerequisites", "Success criteria", "Steps", "Rollback"):
        assert heading.lower() in document.lower()


def test_check_counts_and_points(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("name: serving-pod-failure", "name: a"))
    (tmp_path / "b.yaml").write_text(GOOD.replace("10m", "30").replace("30%", "150%"))
    answer = cli("check", tmp_path)
    assert answer.code == 2
    *problems, last = answer.out.splitlines()
    assert last == "2 problems in 1 of 2 files" and len(problems) == 2
    found = json.loads(cli("check", tmp_path, "-o", "json").out)
    assert (found["files"], found["wrong_files"], len(found["problems"])) == (2, 1, 2)
    assert cli("check").out.splitlines()[-1] == f"{len(Catalog().files())} files, no problems"


@pytest.mark.req("R4-05")
def test_the_lever_is_pulled_and_released(cli: Cli, home: Path) -> None:
    answer = cli("stop", "--all", "--reason", "fire drill", "-o", "json")
    assert answer.code == 0
    assert json.loads(answer.out)["lever"] == "fire drill"
    assert json.loads(cli("status", "-o", "json").out)["lever"] == "fire drill"
    incidents = (home / "incidents.jsonl").read_text()
    assert '"emergency_stop"' in incidents and "fire drill" in incidents
    assert cli("doctor").code == 1
    assert "released" in cli("stop", "--release").out
    assert json.loads(cli("status", "-o", "json").out)["lever"] is None


def test_status_has_the_contracted_keys_when_nothing_is_up(cli: Cli, home: Path) -> None:
    before = fingerprint(home)
    found = json.loads(cli("status", "-o", "json").out)
    contract = {"open_leases", "active_runs", "lever", "health_score", "error_budget_remaining"}
    assert contract <= set(found)
    assert (found["open_leases"], found["active_runs"], found["health_score"]) == ([], [], None)
    assert fingerprint(home) == before


def test_init_writes_a_library_that_checks_and_never_overwrites(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "library"
    assert cli("init", root).code == 0
    assert cli("check", "--library", root).code == 0
    assert "my-first-experiment" in cli("list", "--library", root).out
    (root / "suites" / "my-suite.yaml").write_text("mine")
    again = cli("init", root)
    assert again.code == 2 and "is there already" in again.err
    assert (root / "suites" / "my-suite.yaml").read_text() == "mine"


def test_doctor_says_what_is_missing_and_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlchaos_dagster.cli.doctor.find_spec", lambda name: None)
    answer = cli("doctor")
    assert answer.code == 1
    assert "dagster: not installed; needed for runs" in answer.out and "→ pip install" in answer.out


def test_docs_are_up_to_date() -> None:
    assert experiments_doc.TARGET.read_text("utf-8") == experiments_doc.text(Catalog()), (
        "run: python -m mlchaos_dagster.cli.experiments_doc --write"
    )


# ---- run, as far as the moment before Dagster is imported

_NOT_GIVEN = ("suite", "kind", "name", "target", "duration", "safety_threshold", "config", "stages", "backend")
OPTIONS = dict.fromkeys(_NOT_GIVEN) | {"param": ()}


@pytest.mark.req("R4-02")
def test_the_command_of_r4_02(home: Path) -> None:
    options = OPTIONS | {
        "kind": "pod_kill",
        "name": "demo-1",
        "target": "orchestrator",
        "duration": "30",
        "safety_threshold": "0.8",
    }
    request = prepare(App({}), (), options)
    (experiment,) = request.experiments
    assert (experiment.name, experiment.fault.kind, experiment.duration) == ("demo-1", "pod_delete", 30.0)
    assert request.environment.limits.health_at_least == 0.8
    assert request.environment.scaled(experiment.duration) == 30.0


@pytest.mark.parametrize("threshold", ["0", "0.95", "1"])
def test_the_threshold_moves_the_guard_both_ways(threshold: str, home: Path) -> None:
    request = prepare(App({}), ("serving-pod-failure",), OPTIONS | {"safety_threshold": threshold})
    assert request.environment.limits.health_at_least == float(threshold)


def test_a_shorter_window_leaves_the_experiment_what_it_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = prepare(App({}), ("serving-pod-failure",), OPTIONS | {"duration": "20"})
    (experiment,) = request.experiments
    assert experiment == Catalog().experiment("serving-pod-failure") and experiment.duration == 600.0
    assert request.environment.scaled(experiment.duration) == 20.0
    assert shortened_by(experiment.duration, request.environment) == "duration_min 20 s"
    longer = prepare(App({}), ("serving-pod-failure",), OPTIONS | {"duration": "2h"})
    assert longer.environment.scaled(experiment.duration) == 600.0
    assert "serving-pod-failure lasts 10 m by itself; it is not made longer" in capsys.readouterr().err
    again = Environment.model_validate(request.environment.model_dump(mode="json", by_alias=True))
    assert again == request.environment, "a record that says so can be read again"


def test_a_suite_and_a_config_file(home: Path, tmp_path: Path) -> None:
    smoke = prepare(App({}), (), OPTIONS | {"suite": "smoke"})
    assert tuple(e.name for e in smoke.experiments) == Catalog().suite("smoke").experiments
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("name: serving-pod-failure", "name: mine"))
    assert [e.name for e in prepare(App({}), (), OPTIONS | {"config": str(path)}).experiments] == ["mine"]
    path = tmp_path / "words.json"
    path.write_text('{"type": "network_delay", "target_app": "model-link", "duration": "10s", "safety_threshold": 0.5}')
    request = prepare(App({}), (), OPTIONS | {"config": str(path)})
    assert request.experiments[0].fault.model_dump() == {
        "kind": "network_latency",
        "latency": "200ms",
        "jitter": "20ms",
    }
    assert request.environment.limits.health_at_least == 0.5


@pytest.mark.parametrize(("text", "value"), [("30", 30.0), ("0.5", 0.5), ("5m", 300.0), ("1h30m", 5400.0)])
def test_bare_seconds_are_for_the_command_line(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("kind", ["pod_delete", "pod_failure", "network_latency", "network_loss", "network_partition"])
def test_every_fault_can_be_run_from_words(kind: str) -> None:
    target = "prediction-service" if kind.startswith("pod") else "model-link"
    environment = Catalog().environment("sandbox")
    assert build(AdHoc(type=kind, target=target), environment).fault.kind == kind


# ---- ends that are not answers


def test_an_internal_error_is_one_line_a_log_and_exit_6(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("boom\nsecond line")

    monkeypatch.setattr(app_module.App, "catalog", property(broken))
    answer = cli("list")
    assert answer.code == 6 and answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("internal error ") and "RuntimeError: boom second line; details in " in line
    (log,) = home.glob("error-*.log")
    assert str(log) in line and "Traceback" in log.read_text()


def test_ctrl_c_before_anything_ran_is_4(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app_module.App, "catalog", property(interrupted))
    answer = cli("run", "serving-pod-failure")
    assert (answer.code, answer.lines) == (4, ["interrupted"])


def test_a_reader_that_goes_away_is_no_error(home: Path) -> None:
    words = [sys.executable, "-m", "mlchaos_dagster.cli.main", "completion", "bash"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0


def test_stdout_has_no_colour_codes_where_it_is_no_terminal(cli: Cli) -> None:
    assert "\x1b" not in cli("list").out


# ---- stop and recover, against a lease whose owner is real


def holder(home: Path, lease_id: str) -> subprocess.Popen[str]:
    """A process that holds a lease and never obeys."""
    code = f"""
import time, sys
from pathlib import Path
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
clock = SystemClock()
now = clock.wall()
FileLedger(Path({str(home / "ledger")!r}), clock).open(Lease(
    {lease_id!r}, "run-0001", "serving-pod-failure", "sandbox", "sandbox", "pod_failure", ("inference-1",), {{}}, {{}},
    60.0, now, now + 60.0, current_owner()))
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def deaf(home: Path, monkeypatch: pytest.MonkeyPatch):
    """A lease held by a live process, at a backend that says that nothing is there."""
    from mlchaos_dagster.domain.record import Evidence

    class Backend:
        name = "sandbox"

        def recover(self, lease: object) -> None:
            pass

        def active(self, lease: object) -> Evidence:
            return Evidence(present=False, effective=False, lines=("nothing of it is there",))

    monkeypatch.setattr("mlchaos_dagster.wiring.driver", lambda *_: Backend())
    monkeypatch.setattr("mlchaos_dagster.cli.stop.OBEY_S", 0.3)
    process = holder(home, "lease-1")
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_run_that_does_not_obey_is_fenced_killed_and_cleaned(cli: Cli, deaf: subprocess.Popen[str]) -> None:
    status = json.loads(cli("status", "serving-pod-failure", "-o", "json").out)
    assert status["active_runs"][0]["pid"] == deaf.pid and status["open_leases"][0]["owner"]["alive"]
    before = time.monotonic()
    answer = cli("stop", "run-0001", "-o", "json")
    assert answer.code == 0 and time.monotonic() - before < 5
    found = json.loads(answer.out)
    assert found["clean"] and found["stopped"][0]["lease"] == "lease-1"
    assert found["stopped"][0]["taken_away_by"] == "mlchaos stop"
    assert any("nothing of it is there" in line for line in found["stopped"][0]["evidence"])
    assert deaf.wait(5) == -signal.SIGKILL
    assert json.loads(cli("status", "-o", "json").out)["open_leases"] == []


def test_recover_leaves_live_runs_alone_unless_their_lease_is_named(
    cli: Cli, deaf: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlchaos_dagster.cli.recover._HUNG_S", 30.0)
    dry = json.loads(cli("recover", "--dry-run", "lease-1", "-o", "json").out)
    assert dry["recovered"][0]["action"] == "would recover" and deaf.poll() is None
    named = cli("recover", "lease-1", "-o", "json")
    assert named.code == 0 and json.loads(named.out)["recovered"][0]["clean"]
    assert deaf.wait(5) == -signal.SIGKILL


def test_recover_takes_away_what_a_dead_run_left(cli: Cli, deaf: subprocess.Popen[str]) -> None:
    os.kill(deaf.pid, signal.SIGKILL)
    deaf.wait(5)
    assert "GONE" in cli("status").out
    assert "mlchaos recover lease-1" in cli("doctor").out
    answer = cli("recover")
    assert answer.code == 0 and "nothing of it is there" in answer.out
    assert "nothing to recover" in cli("recover").out


def test_ctrl_c_while_a_fault_may_be_live_says_where_to_look(
    cli: Cli, deaf: subprocess.Popen[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app_module.App, "catalog", property(interrupted))
    answer = cli("run", "serving-pod-failure", "--home", home)
    assert (answer.code, answer.lines) == (4, ["interrupted; open leases: 1, see `mlchaos status`"])


def test_what_cannot_be_cleaned_is_70_with_the_command(
    cli: Cli, deaf: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlchaos_dagster.engine import sweep
    from mlchaos_dagster.errors import DriverUnavailable

    def unreachable(*_: object) -> None:
        raise DriverUnavailable("no route", driver="sandbox", verb="recover")

    monkeypatch.setattr("mlchaos_dagster.wiring.driver", unreachable)
    monkeypatch.setattr(sweep.sweep, "__kwdefaults__", {**sweep.sweep.__kwdefaults__, "proof_s": 0.2})
    answer = cli("stop", "--all")
    assert answer.code == 70
    assert "UNCLEAN" in answer.out and "type: mlchaos recover lease-1" in answer.out
    assert cli("recover", "lease-1").code == 70


def test_where_it_looked_is_said(cli: Cli, home: Path) -> None:
    assert f"state         {home}" in cli("status").out
    assert f"state  {home}" in cli("recover").out
    assert json.loads(cli("status", "-o", "json").out)["home"] == str(home)
    wrong = home.parent / "elsewhere"
    sentence = f"no state directory at {wrong}: nothing was ever run from here (MLCHAOS_HOME, --home)"
    assert sentence in cli("status", "--home", wrong).out
    assert sentence in cli("recover", "--home", wrong).out
    for words in (["--all"], ["--release"], ["x"]):
        answer = cli("stop", *words, "--home", wrong)
        assert answer.code == 2
        assert sentence in answer.err
    assert not wrong.exists()


def test_a_table_cuts_its_last_column_between_words() -> None:
    rows = [("a", "one two three four five six"), ("b", "short")]
    assert app_module.table(("X", "WHY"), rows, 20).splitlines()[1:] == ["a  one two three…", "b  short"]
    assert app_module.table(("X", "WHY"), rows).splitlines()[1] == "a  one two three four five six"
    assert len(app_module.table(("X", "WHY"), [("a", "y" * 90)], 40).splitlines()[1]) == 40


def test_a_lease_that_nobody_can_prove_clean_is_written_off_with_a_reason_and_a_trace(
    cli: Cli, home: Path, deaf: subprocess.Popen[str]
) -> None:
    os.kill(deaf.pid, signal.SIGKILL)
    deaf.wait(5)
    assert cli("recover", "--write-off", "no lease named").code == 2
    assert cli("recover", "lease-1", "--write-off", " ").code == 2
    assert len(json.loads(cli("status", "-o", "json").out)["open_leases"]) == 1
    answer = json.loads(cli("recover", "lease-1", "--write-off", "the bucket was deleted", "-o", "json").out)
    assert answer["written_off"] == ["lease-1"] and answer["clean"] is False
    assert json.loads(cli("status", "-o", "json").out)["open_leases"] == []
    assert "the bucket was deleted" in (home / "incidents.jsonl").read_text()


def test_a_list_for_a_narrow_terminal_keeps_names_and_titles() -> None:
    from mlchaos_dagster.cli.list import _fitting  # pyright: ignore[reportPrivateUsage]

    headers = ("EXPERIMENT", "AREA", "FAULT", "TARGET", "WINDOW", "TITLE")
    rows = [
        [
            "serving-pod-failure-of-half",
            "serving",
            "certificate_rotation",
            "prediction-service",
            "10 m → 15 s",
            "word " * 12,
        ]
    ]
    for width in (60, 80, 120, 160):
        head, line = _fitting(headers, rows, width).splitlines()
        assert len(line) <= width and line.startswith("serving-pod-failure") and "word word" in line
        assert ("TARGET" in head) == (width >= 120) and ("AREA" in head) == (width == 160)
    assert "AREA" in _fitting(headers, rows, 0)


def test_doctor_calls_found_what_should_not_be_there_and_says_a_remedy_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [doctor.Finding("left behind", "missing", pod, "mlchaos clean") for pod in ("a", "b")]
    both = "kubectl get pods -l 'a; b'; kubectl get nodes; or another target"
    found.append(doctor.Finding("target x", "missing", "none", both))
    monkeypatch.setattr(doctor, "findings", lambda _: found)
    answer = cli("doctor")
    assert answer.code == 1
    assert answer.lines == [
        "✘ found     left behind: a", "              → mlchaos clean", "✘ found     left behind: b",
        "✘ missing   target x: none", "              → kubectl get pods -l 'a; b'",
        "              → kubectl get nodes", "              or another target", "3 to mend",
    ]  # fmt: skip
