"""Experiments in stages: how they are written, what each stage becomes, and every way to write them wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain import schema
from mlchaos_dagster.domain.parsing import parse_any
from mlchaos_dagster.domain.spec import BlastRadius, Suite
from mlchaos_dagster.domain.stages import Progressive, StageFile
from mlchaos_dagster.errors import SpecError

pytestmark = pytest.mark.req("R3-10")

AS_USERS_WRITE_IT = """\
# Progressive experiment stages
progressive_chaos:
  stage_1:
    name: "Single Pod Failure"
    chaos_percentage: 10
    duration: "5 minutes"
    success_threshold: 0.99

  stage_2:
    name: "Multiple Pod Failures"
    chaos_percentage: 30
    duration: "10 minutes"
    success_threshold: 0.95
    depends_on: stage_1

  stage_3:
    name: "Majority Pod Failures"
    chaos_percentage: 60
    duration: "15 minutes"
    success_threshold: 0.90
    depends_on: stage_2
"""
HEAD = """\
schema: mlchaos/v1
name: pods
title: Pods may go
hypothesis: They may.
area: serving
owner: ml-platform@example.com
target: prediction-service
fault: {kind: pod_failure}
steady_state:
  - {sli: availability, at_least: 99.9%}
  - {sli: latency_p95, below: 300ms}
"""
LISTED = """\
stages:
  - {name: Few, fraction: 10%, duration: 5m}
  - {name: More, blast_radius: {count: 2}, duration: 10m, steady_state: [{sli: availability, at_least: 95%}]}
"""
PASTED = AS_USERS_WRITE_IT.replace("progressive_chaos", "stages")


def progressive(text: str) -> Progressive:
    value = parse_any(text, "pods.yaml").value
    assert isinstance(value, Progressive)
    return value


def wrong(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_any(text, "pods.yaml")
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value)


def objectives(spec: Progressive, index: int) -> dict[str, float]:
    return {o.sli: o.limit.value for o in spec.stage(index).steady_state}


def test_the_block_that_users_write_can_be_pasted_under_stages() -> None:
    spec = progressive(HEAD + PASTED)
    ones = spec.experiments()
    assert [e.name for e in ones] == ["pods-1", "pods-2", "pods-3"]
    assert [e.depends_on for e in ones] == [None, "pods-1", "pods-2"]
    assert [e.blast_radius.fraction for e in ones] == [0.1, 0.3, 0.6]
    assert [e.duration for e in ones] == [300.0, 600.0, 900.0]
    assert [objectives(spec, i) for i in range(3)] == [
        {"availability": share, "latency_p95": 0.3} for share in (0.99, 0.95, 0.9)
    ]
    assert ones[1].title == "Pods may go (stage 2 of 3: Multiple Pod Failures)"


def test_a_list_of_stages() -> None:
    spec = progressive(HEAD + LISTED)
    first, second = spec.experiments()
    assert (first.blast_radius.fraction, second.blast_radius.count) == (0.1, 2)
    assert second.depends_on == "pods-1", "each stage waits for the one before"
    assert [objectives(spec, i)["availability"] for i in range(2)] == [0.999, 0.95]


def test_a_stage_may_wait_for_an_earlier_one_than_the_last_and_the_first_for_another_experiment() -> None:
    text = PASTED.replace("depends_on: stage_2", "depends_on: stage_1") + "depends_on: smaller\n"
    assert [e.depends_on for e in progressive(HEAD + text).experiments()] == ["smaller", "pods-1", "pods-1"]


def test_a_title_that_is_too_long_is_cut_where_the_stage_is_said() -> None:
    spec = progressive(HEAD.replace("Pods may go", "x" * 200) + PASTED)
    assert len(spec.stage(2).title) == 200 and spec.stage(2).title.endswith("… (stage 3 of 3: Majority Pod Failures)")


@pytest.mark.parametrize(
    ("old", "new", "where", "says"),
    [
        ("chaos_percentage: 10", "chaos_percentage: 0.1", "5:23", "0.1 is not a percentage from 1 to 100"),
        ("chaos_percentage: 10", "chaos_percentage: 0", "5:23", "0 is not a percentage from 1 to 100"),
        ("chaos_percentage: 10", 'chaos_percentage: "101%"', "5:23", "is more than 100%"),
        ("chaos_percentage: 10", "chaos_percentag: 10", "5:5", 'Did you mean "chaos_percentage"?'),
        ("success_threshold: 0.95", "success_threshold: 95", "13:24", "95 is not a share from 0 to 1"),
        ('"10 minutes"', '"10 moons"', "12:15", '"10 moons" is not a duration'),
        ('"10 minutes"', '"10000 hours"', "12:15", "is more than a week"),
        ("depends_on: stage_1", "depends_on: stage_3", "14:17", '"stage_3" is no earlier stage. Allowed: stage_1.'),
        ("depends_on: stage_2", "depends_on: stage_9", "21:17", '"stage_9" is no earlier stage'),
        ("chaos_percentage: 30", "fraction: 30%\n    chaos_percentage: 30", "10:5", "exactly one of fraction, blast"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(old: str, new: str, where: str, says: str) -> None:
    """In a file of stages, and at the same line of the same block in an experiment."""
    assert old in AS_USERS_WRITE_IT
    told = wrong(AS_USERS_WRITE_IT.replace(old, new))
    assert told.startswith(f"pods.yaml:{where}  progressive_chaos.stage_") and says in told
    line, column = where.split(":")
    told = wrong(HEAD + PASTED.replace(old, new))
    assert told.startswith(f"pods.yaml:{int(line) + HEAD.count(chr(10))}:{column}  stages.stage_") and says in told


def test_wrong_in_a_list() -> None:
    told = wrong(HEAD + LISTED.replace("duration: 10m,", "duration: 10m, depends_on: more,"))
    assert told == 'pods.yaml:14:71  stages[1].depends_on: "more" is no earlier stage. Allowed: stage_1.'
    assert "stages: empty" in wrong(HEAD + "stages: []\n")
    assert "blast_radius: no such field" in wrong(HEAD + LISTED + "blast_radius: {fraction: 30%}\n")


def test_an_abort_limit_that_a_stage_makes_absurd_is_told_at_the_stage() -> None:
    told = wrong(HEAD.replace("99.9%", "90%") + PASTED + "abort:\n  - {sli: availability, below: 92%}\n")
    assert told.startswith("pods.yaml:15:5  stages.stage_1: abort[0]: the limit on availability is looser")


def test_what_an_environment_lacks_is_told_at_the_stage_once(tmp_path: Path) -> None:
    catalog = Catalog()
    path = tmp_path / "pods.yaml"
    body = (HEAD + PASTED).replace("    success_threshold: 0.95", "    steady_state: [{sli: nope, above: 1%}]")
    path.write_text(body.replace("target: prediction-service", "target: nowhere"))
    told = [str(p).removeprefix(str(tmp_path)) for p in catalog.check(catalog.environment("sandbox"), [path]).problems]
    assert [t.split("  ")[0] for t in told] == ["/pods.yaml:7:9", "/pods.yaml:24:26"]
    assert "stages.stage_2.steady_state[0].sli: no such SLI" in told[1]


def test_names_in_a_library(tmp_path: Path) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "pods.yaml").write_text(HEAD + PASTED)
    catalog = Catalog([tmp_path], shipped=False)
    assert [e.name for e in catalog.experiments()] == ["pods-1", "pods-2", "pods-3"]
    assert catalog.names("experiment") == ["pods", "pods-1", "pods-2", "pods-3"]
    assert catalog.expand("pods") == ("pods-1", "pods-2", "pods-3") and catalog.expand("pods-2") == ("pods-2",)
    assert catalog.source("pods-2") == catalog.source("pods") == folder / "pods.yaml"
    with pytest.raises(SpecError, match='"pods" has stages, each of which is an experiment. Allowed here: pods-1, '):
        catalog.experiment("pods")
    single = HEAD.replace("name: pods", "name: pods-2") + "blast_radius: {fraction: 10%}\nduration: 5m\n"
    (folder / "single.yaml").write_text(single)
    for told in (Catalog([tmp_path], shipped=False).experiments, Catalog([tmp_path], shipped=False).check):
        try:
            problems = told().problems  # type: ignore[union-attr]
        except SpecError as e:
            problems = e.problems
        assert [p.what for p in problems] == [
            'name: its stage "pods-2" is the name of another experiment. Allowed: a name whose stages are free.'
        ]


@pytest.mark.parametrize(
    ("depends", "says"),
    [
        ({"a": "b"}, 'depends_on: no such experiment "b"'),
        ({"a": "a"}, "depends_on: an experiment cannot wait for itself"),
        ({"a": "c", "c": "a"}, "a waits for c waits for a: none of them could ever start"),
    ],
)
def test_what_can_never_start_is_told(tmp_path: Path, depends: dict[str, str], says: str) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name, before in depends.items():
        text = HEAD.replace("name: pods", f"name: {name}") + "blast_radius: {fraction: 10%}\nduration: 5m\n"
        (folder / f"{name}.yaml").write_text(f"{text}depends_on: {before}\n")
    catalog = Catalog([tmp_path])
    told = catalog.check(catalog.environment("sandbox")).problems
    assert len(told) == len(depends) and says in told[0].what
    with pytest.raises(SpecError, match="depends_on"):
        catalog.ready("a", catalog.environment("sandbox"))


def test_a_file_of_stages_is_checked_and_says_how_to_use_it(tmp_path: Path) -> None:
    path = tmp_path / "progressive.yaml"
    path.write_text(AS_USERS_WRITE_IT)
    checked = Catalog().check(paths=[path])
    assert checked.problems == [] and len(checked.notes) == 1
    assert "3 stages" in checked.notes[0] and f"--stages {path}" in checked.notes[0]


def test_a_share_that_cannot_be_had_is_never_called_by_its_name() -> None:
    def words(percent: int, existing: int) -> str:
        radius = BlastRadius.model_validate({"fraction": f"{percent}%"})
        return radius.words(radius.take(existing), existing)

    assert words(10, 3) == "1 of 3 (33 %) for 10 % asked, at least one"
    assert words(60, 3) == "1 of 3 (33 %) for 60 % asked, rounded down"
    assert [words(p, 10) for p in (10, 30, 60)] == ["1 of 10 (10 %)", "3 of 10 (30 %)", "6 of 10 (60 %)"]
    assert BlastRadius(count=2).words(2, 3) == "2 of 3 (67 %)"


def test_the_shipped_one_is_what_users_asked_for() -> None:
    spec = Catalog().progressive("serving-progressive")
    stages = parse_any(AS_USERS_WRITE_IT).value
    assert spec is not None and isinstance(stages, StageFile)
    for i, asked in enumerate(stages.progressive_chaos):
        shipped = spec.stage(i)
        assert shipped.blast_radius.fraction == asked.chaos_percentage and shipped.duration == asked.duration
        assert objectives(spec, i)["availability"] == asked.success_threshold
        assert asked.name is not None and asked.name in shipped.title


def test_schemas_know_both_forms() -> None:
    validator = Draft202012Validator(schema.schema_of("experiment"))

    def errors(text: str, **more: Any) -> list[str]:
        return [e.json_path for e in validator.iter_errors({**yaml.safe_load(text), **more})]

    assert errors(HEAD + PASTED) == [] and errors(HEAD + LISTED) == []
    assert errors(HEAD + LISTED, duration="5m") == ["$"], "the stages say how long"
    stages = Draft202012Validator(schema.schema_of("stages"))
    assert list(stages.iter_errors(yaml.safe_load(AS_USERS_WRITE_IT))) == []


def test_suites_of_stages_and_of_everything(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "suites").mkdir()
    (tmp_path / "experiments" / "pods.yaml").write_text(HEAD + PASTED)
    for name, members in (("some", "[serving-pod-failure, pods]"), ("lot", "all"), ("bad", "[pods-4]")):
        text = f"schema: mlchaos/v1\nname: {name}\ntitle: t\nexperiments: {members}\n"
        (tmp_path / "suites" / f"{name}.yaml").write_text(text)
    catalog = Catalog([tmp_path])
    assert catalog.suite("some").experiments == ("serving-pod-failure", "pods-1", "pods-2", "pods-3")
    single = HEAD.replace("name: pods", "name: a") + "blast_radius: {fraction: 10%}\nduration: 5m\ndepends_on: pods-3\n"
    (tmp_path / "experiments" / "a.yaml").write_text(single)
    catalog = Catalog([tmp_path])
    lot = catalog.suite("lot").experiments
    assert sorted(lot) == [e.name for e in catalog.experiments()]
    assert lot.index("a") == lot.index("pods-3") + 1, "each comes after what it waits for"
    assert 'no such experiment "pods-4". Did you mean "pods-' in catalog.check().problems[0].what
    assert len(catalog.check().problems) == 1
    with pytest.raises(SpecError, match='"all" means every experiment in a suite'):
        parse_any(HEAD.replace("name: pods", "name: all") + PASTED)


def test_every_shipped_experiment_is_in_the_suite_full_and_every_suite_in_the_document() -> None:
    catalog = Catalog()
    assert catalog.suite("full", expanded=False).everything, "nobody has to remember it"
    assert set(catalog.suite("full").experiments) == {e.name for e in catalog.experiments()}
    document = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text("utf-8")
    suites: list[Suite] = catalog.suites()
    assert {s.name for s in suites} >= {"smoke", "nightly", "weekly", "full"}
    assert all(f"| `{s.name}` |" in document for s in suites)
