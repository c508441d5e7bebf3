"""Files of Litmus and Chaos Mesh at `check`, `run` and `import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlchaos_dagster.catalog import SHIPPED, Catalog
from mlchaos_dagster.cli.app import App
from mlchaos_dagster.cli.run import Request, prepare
from mlchaos_dagster.domain.parsing import parse_experiment
from tests.cli.conftest import Cli, fingerprint
from tests.domain.test_manifests import ENGINE
from tests.domain.test_manifests_chaos_mesh import DELAY, SCHEDULE

WORDS: dict[str, Any] = dict.fromkeys(
    ("suite", "kind", "name", "target", "duration", "param", "safety_threshold", "stages", "config", "backend")
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "engine.yaml"
    path.write_text(ENGINE)
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """One with an environment whose cluster has both tools."""
    text = (SHIPPED / "environments" / "cluster.yaml").read_text().replace("\nname: cluster\n", "\nname: both\n")
    text = text.replace(
        "\nbackends:\n", "\nbackends:\n  litmus: [litmus_engine]\n  chaos_mesh: [chaos_mesh_resource]\n"
    )
    path = tmp_path / "lib" / "environments" / "both.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return tmp_path / "lib"


def prepared(library: Path, *names: Path | str, **options: Any) -> Request:
    app = App({"library": [str(library)], "environment": "both"})
    return prepare(app, tuple(str(n) for n in names), {**WORDS, **options})


@pytest.mark.req("R3-01")
def test_check_takes_an_engine_says_what_is_changed_and_refuses_with_line_and_column(cli: Cli, engine: Path) -> None:
    assert cli("check", engine).out.splitlines()[-1] == "1 file, no problems"
    engine.write_text(ENGINE.replace('"60"', '"60s"'))
    answer = cli("check", engine)
    assert answer.code == 0 and answer.out.startswith(
        f"warning  {engine}:12:51  spec.experiments[0].spec.components.env[0].value"
    )
    assert len(json.loads(cli("check", engine, "-o", "json").out)["warnings"]) == 1
    engine.write_text(ENGINE.replace("experiments:", "experiment:"))
    answer = cli("check", engine)
    assert answer.code == 2 and answer.out.splitlines()[0].startswith(
        f"{engine}:7:3  spec.experiment: no such field. Did you"
    )


def test_check_against_a_cluster_without_the_tool_says_what_to_add(cli: Cli, engine: Path, library: Path) -> None:
    answer = cli("check", engine, "-e", "cluster")
    assert answer.code == 2 and "add to its file: backends: {litmus: [litmus_engine]}" in answer.out
    assert cli("check", engine, "-e", "both", "--library", library).code == 0
    spaced = engine.rename(engine.with_name("my engine.yaml"))
    named = cli("check", spaced, "-e", "both", "--library", library, "--target", "prediction-service").out
    assert f"mlchaos run '{spaced}' -e both --target prediction-service;" in named, "as it can be pasted"


def test_check_of_a_folder_counts_both_kinds_and_broken_second_documents(cli: Cli, engine: Path) -> None:
    (engine.parent / "mesh.yaml").write_text(f"{DELAY}---\na: [\n")
    answer = cli("check", engine.parent, "--alone")
    assert answer.code == 2
    assert answer.out.splitlines()[-1] == "1 problem in 1 of 2 files" and "mesh.yaml:13:1  not YAML" in answer.out


@pytest.mark.req("R3-01")
def test_run_takes_files_with_their_own_durations_and_targets(
    engine: Path, library: Path, tmp_path: Path, home: Path
) -> None:
    (tmp_path / "mesh.yaml").write_text(DELAY)
    request = prepared(library, engine, tmp_path / "mesh.yaml")
    assert [(e.name, e.duration) for e in request.experiments] == [("web-chaos", 60.0), ("slow-web", 40.0)]
    assert all(e.target in request.environment.targets for e in request.experiments)
    assert [request.environment.scaled(e.duration) for e in request.experiments] == [60.0, 40.0]
    named = prepared(library, engine, target="prediction-service")
    assert named.experiments[0].target == "prediction-service"
    assert prepared(library, config=str(engine)).experiments[0].name == "web-chaos"


REFUSED = [
    (["engine.yaml"], "it is for a cluster, and environment sandbox has none. Allowed: -e of one with kubernetes:."),
    (["engine.yaml", "-e", "cluster"], "To allow it, add to its file: backends: {litmus: [litmus_engine]}."),
    (
        ["engine.yaml", "serving-pod-failure"],
        "serving-pod-failure: does not go together with files of Litmus or Chaos Mesh.",
    ),
    (
        ["--type", "litmus_engine", "--target", "model-link"],
        "litmus_engine is what a file brings. Allowed: mlchaos run FILE",
    ),
    (
        ["engine.yaml", "--target", "prediction-servic", "-e", "both"],
        'no such target "prediction-servic". Did you mean',
    ),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_run_refuses_in_one_line(
    words: list[str], line: str, cli: Cli, engine: Path, library: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(engine.parent)
    before = fingerprint(home)
    answer = cli("run", *words, "--library", library)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert line in answer.err and fingerprint(home) == before


@pytest.mark.req("R3-05")
def test_import_writes_what_the_library_then_reads_and_never_overwrites(
    cli: Cli, library: Path, tmp_path: Path
) -> None:
    nightly = tmp_path / "nightly.yaml"
    nightly.write_text(SCHEDULE % "{repeat: {timeRange: {startTime: '02:00', endTime: '04:00'}, minChaosInterval: 8h}}")
    words = ("import", nightly, "--to", library, "-e", "both", "--library", library)
    answer = cli(*words)
    assert answer.code == 0 and "warning" in answer.err and "wrote" in answer.out
    environment = library / "environments" / "both.yaml"
    added = yaml.safe_load((library / "add-to-environment-nightly.txt").read_text())
    whole = yaml.safe_load(environment.read_text())
    environment.write_text(yaml.safe_dump({**whole, "targets": {**whole["targets"], **added["targets"]}}))
    catalog = Catalog([library])
    assert catalog.check(catalog.environment("both"), [*library.rglob("nightly.yaml")]).problems == []
    experiment = catalog.ready("nightly", catalog.environment("both"))
    assert (experiment.fault.kind, experiment.duration) == ("litmus_engine", 60.0)
    suite = catalog.suite("brought-nightly")  # one of that name is shipped
    assert suite.schedule is not None and (suite.schedule.window, suite.experiments) == ("02:00-04:00", ("nightly",))
    before = fingerprint(library)
    again = cli(*words)
    assert again.code == 2 and "is there already. Allowed: another folder, or --force." in again.err
    assert fingerprint(library) == before and cli(*words, "--force").code == 0


def test_import_prints_what_the_environment_needs(cli: Cli, engine: Path) -> None:
    found = json.loads(cli("import", engine, "-o", "json").out)
    assert list(found["files"]) == ["experiments/brought/web-chaos.yaml"]
    needed = yaml.safe_load(found["environment"])
    assert needed["backends"] == {"litmus": ["litmus_engine"]}
    assert needed["targets"]["shop-web"]["kubernetes"] == {"namespace": "shop"}


def test_words_of_a_file_cannot_become_lines_of_ours(cli: Cli, engine: Path) -> None:
    engine.write_text(ENGINE.replace("name: web-chaos", r'name: "x\nname: ../../evil\r[31m\n---"'))
    found = json.loads(cli("import", engine, "-o", "json").out)
    ((path, text),) = found["files"].items()
    assert path == "experiments/brought/x-name-evil-31m.yaml"
    assert [line for line in text.splitlines() if line.startswith(("#", "name:", "---"))][1:] == [
        "name: x-name-evil-31m"
    ]
    assert parse_experiment(text).name == "x-name-evil-31m"
