"""Bad input: exit code 2, exactly one clear line for each problem, nothing touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import Cli, fingerprint
from tests.domain.test_parsing import BOMB, GOOD

OK = GOOD.replace("name: serving-pod-failure", "name: mine")

FILES: dict[str, tuple[str | bytes, str]] = {
    "unknown field": (OK.replace("target:", "target_app: x\ntarget:"), "target_app: no such field."),
    "unknown fault": (OK.replace("pod_failure}", "pod_fail}"), 'fault.kind: no such fault "pod_fail". Did you mean'),
    "unknown SLI": (OK.replace("sli: availability", "sli: availabilty"), 'no such SLI "availabilty". Did you mean'),
    "unknown target": (OK.replace("target: prediction-service", "target: model"), 'target: no such target "model".'),
    "no unit": (OK.replace("10m\n", "30\n"), "duration: 30 has no unit. Allowed: ms, s, m, h, d, such as 30s."),
    "odd unit": (OK.replace("10m\n", "5 m s\n"), 'duration: "5 m s" is not a duration.'),
    "150%": (OK.replace("30%", "150%"), '"150%" is more than 100%. Allowed: 0% to 100%.'),
    "negative duration": (OK.replace("10m\n", "-10m\n"), 'duration: "-10m" is not a duration.'),
    "zero duration": (OK.replace("10m\n", "0s\n"), 'duration: "0s" is not more than zero.'),
    "endless duration": (OK.replace("10m\n", "90000d\n"), "duration: 90000d is more than a week. Allowed: at most 7d."),
    "network fault on processes": (OK.replace("kind: pod_failure", "kind: network_partition"), "is for links, and"),
    "abort when healthy": (OK.replace("sli: error_rate, above", "sli: error_rate, below"), "abort every healthy run."),
    "radius 0 %": (OK.replace("30%", "0%"), 'blast_radius.fraction: "0%" is not more than 0%.'),
    "radius above what exists": (OK.replace("fraction: 30%", "count: 9"), "count: 9 is more than exists"),
    "loose abort": (OK.replace("sli: error_rate, above: 5%", "sli: availability, below: 5%"), "looser than the steady"),
    "no backend": (OK.replace("{kind: pod_failure}", "{kind: moon_phase}"), 'no such fault "moon_phase".'),
    "empty": ("", "the file is empty."),
    "not YAML": ("a: b: c: [", "not YAML: "),
    "bomb": (BOMB, "values (aliases counted in full)."),
    "10 MB": (b"# padding\n" * 1_000_000, "larger than 1 MiB."),
    "non-UTF-8": (OK.encode() + b"# \xff\n", "byte 0xff is not UTF-8."),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["check", "run"])
def test_a_wrong_file(name: str, how: str, cli: Cli, home: Path, tmp_path: Path) -> None:
    text, expected = FILES[name]
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = fingerprint(home)
    answer = cli("check", path) if how == "check" else cli("run", "--config", path)
    assert answer.code == 2
    lines = [line for line in answer.lines if " of 1 file" not in line]
    assert len(lines) == 1
    assert expected in lines[0] and "wrong.yaml:" in lines[0]
    assert fingerprint(home) == before
    assert (answer.out == "") == (how == "run")


ARGUMENTS: list[tuple[list[str], list[str]]] = [
    # what is typed, how each line on stderr begins
    (["run", "serving-pod-failur"], ['no experiment "serving-pod-failur". Did you mean "serving-pod-failure"? Allowed: ']),
    (["run", "a", "b"], ['no experiment "a".', 'no experiment "b".']),
    (["run", "--suite", "nightli"], ['no suite "nightli". Did you mean "nightly"?']),
    (["run", "serving-pod-failure", "-e", "prod"], ['no environment "prod". Allowed: cluster, rollouts, sandbox, sandbox-10, staging.']),
    (["run"], ["run: nothing to run. Allowed: NAME…, --suite S,"]),
    (["run", "x", "--suite", "smoke"], ["run: NAME and --suite at the same time."]),
    (["run", "x", "--param", "a=1"], ["--param: goes with --type only."]),
    (["run", "--config", "x.yaml", "--duration", "30"], ["--duration: goes with NAME, --suite or --type"]),
    (["run", "serving-pod-failure", "--duration", "0"], ['--duration: "0" is not more than zero.']),
    (["run", "serving-pod-failure", "--backend", "x"], ["--backend: x is no backend of environment sandbox. Allowed: "]),
    (["run", "serving-pod-failure", "--backend", "s3"], ["--backend: s3 does not serve pod_failure in sandbox. Allowed: sandbox"]),
    (["run", "--type", "pod_kill"], ["--target: missing; --type needs it."]),
    (["run", "--type", "pod_kil", "--target", "prediction-service"], ['--type: no such fault "pod_kil". Did you mean "pod_kill"?']),
    (["run", "--type", "pod_kill", "--target", "orchestrater"], ['--target: no such target "orchestrater". Did you mean "orchestrator"?']),
    (["run", "--type", "pod_kill", "--target", "model-link", "--duration", "5 m s"], ['--duration: "5 m s" is not a duration.']),
    (["run", "--type", "pod_kill", "--target", "model-link", "--duration", "0"], ['--duration: "0" is not more than zero.']),
    (["run", "--type", "pod_kill", "--target", "model-link", "--duration", "-3"], ['--duration: "-3" is not more than zero.']),
    (["run", "--type", "pod_kill", "--target", "orchestrator", "--duration", "90000d"], ['--duration: 90000d is more than a week.']),
    (["run", "--type", "network_latency", "--target", "prediction-service"], ["adhoc-network-latency-prediction-service: fault.kind: network_latency is for links, and prediction-service selects processes"]),
    (["run", "--type", "pod_kill", "--target", "model-link"], ["adhoc-pod-delete-model-link: fault.kind: pod_delete is for processes, and model-link selects links"]),
    (["run", "--type", "pod_kill", "--target", "model-link", "--name", "A_b"], ['--name: "A_b" is not a name.']),
    (["run", "--type", "pod_kill", "--target", "model-link", "--param", "sigal=term"], ['--param: sigal: no such field. Did you mean "signal"?']),
    (["run", "--type", "pod_kill", "--target", "model-link", "--param", "x"], ['--param: "x" is not NAME=VALUE.']),
    (["run", "--type", "x", "--target", "y", "--duration", "z"], ["--type: ", "--target: ", "--duration: "]),
    (["run", "serving-pod-failure", "--safety-threshold", "2"], ['--safety-threshold: "2" is not a health score. Allowed: 0 to 1']),
    (["run", "serving-pod-failure", "--safety-threshold", "nan"], ['--safety-threshold: "nan" is not a health score.']),
    (["run", "serving-pod-failure", "--seed", "x"], ["mlchaos run: --seed: 'x' is not a valid integer"]),
    (["run", "serving-pod-failure", "--seed", "-1"], ["mlchaos run: --seed: -1 is not in the range x>=0."]),
    (["run", "/nowhere/x.yaml"], ["/nowhere/x.yaml: no such file. Allowed: a file, or a name"]),
    (["describe", "/nowhere/x.yaml"], ["/nowhere/x.yaml: no such file."]),
    (["describe", str(Path(__file__).parents[2] / "dagster.yaml")], [f"{Path(__file__).parents[2] / 'dagster.yaml'}: a file. Allowed: a name"]),
    (["run", "serving-pod-failure", "-e", "cluster", "--backend", "litmus"], ["--backend: litmus is no backend of environment cluster. Allowed: kubernetes; or name litmus in its file, under backends:"]),
    (["doctor", "--backend", "litmus"], ["--environment: environment sandbox has no cluster. Allowed: cluster, rollouts, staging."]),
    (["run", "--config", "/nowhere/x.yaml"], ["/nowhere/x.yaml: cannot be read: No such file or directory"]),
    (["run", "--config", "/"], ["/: a directory."]),
    (["list", "--output", "xml"], ['mlchaos list: --output/-o: no such format "xml". Allowed: text, json.']),
    (["-o", "xml", "list"], ['mlchaos: --output/-o: no such format "xml".']),
    (["list", "--library", "/nowhere"], ["/nowhere: no such directory."]),
    (["lst"], ['mlchaos: no such command "lst". Did you mean "list"?']),
    (["list", "--nope"], ["mlchaos list: No such option"]),
    (["check", "/nowhere.yaml", "-o", "text"], []),
    (["status", "00000000-dead-beef"], ['RUN: no run "00000000-dead-beef".']),
    (["stop", "00000000-dead-beef"], ['RUN: no run "00000000-dead-beef".']),
    (["report", "00000000-dead-beef"], ['RUN: no run "00000000-dead-beef".']),
    (["stop"], ["stop: needs exactly one of RUN, --all, --release."]),
    (["stop", "x", "--all"], ["stop: needs exactly one of RUN, --all, --release."]),
    (["recover", "nope"], ['LEASE: no open lease "nope". Allowed: none']),
    (["describe", "nope"], ['no experiment "nope".']),
    (["describe"], ["mlchaos describe: NAME is missing."]),
    (["plan", "nope"], ['no experiment "nope".']),
    (["completion", "tcsh"], ['mlchaos completion: SHELL: no such shell "tcsh".']),
    (["history", "--last", "0"], ["mlchaos history: --last: 0 is not in the range x>=1."]),
    (["sandbox", "sideways"], ["mlchaos sandbox: No such command 'sideways'"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "beginnings"), ARGUMENTS, ids=[" ".join(a[0])[:60] for a in ARGUMENTS])
def test_a_wrong_argument(words: list[str], beginnings: list[str], cli: Cli, home: Path) -> None:
    before = fingerprint(home)
    answer = cli(*words)
    assert answer.code == 2
    if beginnings:
        assert answer.out == ""
        lines = answer.err.splitlines()
        assert len(lines) == len(beginnings)
        for line, beginning in zip(lines, beginnings, strict=True):
            assert line.startswith(beginning)
    assert fingerprint(home) == before
    assert "Traceback" not in answer.err


def test_a_missing_environment_by_variable(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLCHAOS_ENVIRONMENT", "moon")
    answer = cli("run", "serving-pod-failure")
    assert (answer.code, answer.err) == (
        2,
        'no environment "moon". Allowed: cluster, rollouts, sandbox, sandbox-10, staging.\n',
    )


def test_an_experiment_that_the_environment_has_no_backend_for(cli: Cli, tmp_path: Path, home: Path) -> None:
    from mlchaos_dagster.catalog import SHIPPED

    text = (SHIPPED / "environments" / "sandbox.yaml").read_text()
    text = text.replace("name: sandbox\n", "name: poor\n").replace("[pod_delete, pod_failure, ", "[")
    path = tmp_path / "lib" / "environments" / "poor.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    before = fingerprint(home)
    answer = cli("run", "serving-pod-failure", "--library", tmp_path / "lib", "-e", "poor")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert "serving-pod-failure.yaml:" in line
    assert "no backend of environment poor serves pod_failure. Allowed: network_latency, " in line
    assert fingerprint(home) == before


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  rate: 50",
            "  rate: 4",
            "probe.rate × sampling.window is 4 requests, and no abort limit is judged on fewer",
        ),
        ("error_rate, above: 50%", "error_rate, below: 50%", "error_rate below a limit is what is wished for"),
        (
            "  rate: 50",
            "  headers: {Authorization: Bearer hunter2hunter2}\n  rate: 50",
            ":28  probe.headers.Authorization: a secret is not written here. Allowed: env:NAME or file:PATH.",
        ),
    ],
)
def test_an_environment_that_could_not_protect(old: str, new: str, expected: str, cli: Cli, tmp_path: Path) -> None:
    from mlchaos_dagster.catalog import SHIPPED

    text = (SHIPPED / "environments" / "sandbox.yaml").read_text().replace("name: sandbox\n", "name: other\n")
    path = tmp_path / "lib" / "environments" / "other.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(old, new, 1))
    answer = cli("run", "serving-pod-failure", "--library", tmp_path / "lib", "-e", "other")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert expected in line and "other.yaml:" in line and "hunter2" not in line


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["library", "check", "config"])
def test_a_pipe_is_not_waited_for(how: str, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "experiments"
    folder.mkdir(parents=True)
    pipe = folder / "pipe.yaml"
    os.mkfifo(pipe)
    words = {
        "library": ["check", "--library", tmp_path / "lib"],
        "check": ["check", pipe],
        "config": ["run", "--config", pipe],
    }
    answer = cli(*words[how])
    assert answer.code == 2
    assert "pipe.yaml" in answer.lines[0] and "no regular file. Allowed: YAML or JSON files" in answer.lines[0]


def test_a_sandbox_that_was_started_otherwise(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlchaos_dagster.sandbox.config import SandboxConfig

    def otherwise(*_: object) -> None:
        raise AssertionError("Dagster is not to be reached")

    monkeypatch.setattr("mlchaos_dagster.cli.execute.execute", otherwise)
    directory = home / "sandbox" / "sandbox"
    directory.mkdir(parents=True)
    me = {"pid": os.getpid(), "create_time": psutil.Process().create_time()}
    config = SandboxConfig(replicas=2, mechanisms={"retries": False}).to_dict()
    state = {**me, "control_url": "http://127.0.0.1:9", "token": "x", "children": {}, "config": config}
    (directory / "state.json").write_text(json.dumps(state))
    for words in (["run", "serving-pod-failure"], ["sandbox", "up"]):
        answer = cli(*words)
        assert answer.code == 2
        (line,) = answer.err.splitlines()
        assert "another configuration" in line and "`mlchaos sandbox down` first" in line
        assert "replicas is 2, not 3, mechanisms.retries is false, not true" in line


def test_duplicate_names(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "lib" / "experiments" / "again.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(GOOD)
    answer = cli("run", "serving-pod-failure", "--library", tmp_path / "lib")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert "again.yaml:2:7  name: " in line and "serving-pod-failure.yaml. Allowed: one file for a name." in line


@pytest.mark.parametrize(
    ("body", "beginning"),
    [
        ({"type": "pod_kill", "target": "orchestrator", "duration": 30}, "duration: 30 has no unit. Allowed: "),
        ({"type": "pod_kil", "target": "orchestrator"}, 'type: no such fault "pod_kil". Did you mean "pod_kill"?'),
        ({"type": "pod_kill"}, "missing field target."),
        ({"type": "pod_kill", "target": "orchestrator", "safety_threshold": 2}, "safety_threshold: 2 is more than 1."),
        ({"type": "pod_kill", "target": "orchestrator", "tpe": 2}, 'tpe: no such field. Did you mean "type"?'),
        ({"type": "pod_kill", "target": "orchestrator", "params": {"x": 1}}, "params: x: no such field."),
    ],
)
def test_a_wrong_word_in_a_config_file_has_its_place(
    body: dict[str, object], beginning: str, cli: Cli, tmp_path: Path, home: Path
) -> None:
    path = tmp_path / "words.json"
    path.write_text(json.dumps(body, indent=1))
    before = fingerprint(home)
    answer = cli("run", "--config", path)
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    place, _, what = line.partition("  ")
    assert "words.json:" in place and what.startswith(beginning)
    assert fingerprint(home) == before
