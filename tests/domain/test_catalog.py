"""Library directories: names, duplicates, wrong files beside good ones, speed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mlchaos_dagster.catalog import SHIPPED, Catalog
from mlchaos_dagster.domain.faults import BROUGHT, ON_OBJECTS
from mlchaos_dagster.drivers.kubernetes.faults import PLACES, handler
from mlchaos_dagster.errors import SpecError

from .test_parsing import GOOD


def library(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "experiments" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_shipped_library_parses_cross_checks_and_names_a_mechanism_each() -> None:
    catalog = Catalog()
    checked = catalog.check(catalog.environment("sandbox"))
    assert checked.problems == [] and checked.files == len(catalog.files())
    assert {e.name for e in catalog.experiments()} >= {
        "serving-pod-failure",
        "serving-pod-delete",
        "feature-store-delay",
        "feature-store-partition",
        "gateway-to-model-latency",
        "serving-packet-loss",
    }
    # The embedded platform computes on the CPU: nothing of it could be switched off to make that one fail.
    sandbox = catalog.environment("sandbox")
    here = [e for e in catalog.experiments() if sandbox.backend_for(e.fault.kind) and e.target in sandbox.targets]
    assert [e.name for e in here if e.teeth is None] == ["gpu-memory-hog"]
    assert {s.name for s in catalog.suites()} >= {"smoke", "nightly", "weekly", "full"}


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_files_are_named_as_their_experiment(path: Path) -> None:
    assert f"\nname: {path.stem}\n" in path.read_text()


def test_the_nightly_schedule_says_window_days_interval_and_zone() -> None:
    schedule = Catalog().suite("nightly").schedule
    assert schedule is not None
    assert (schedule.window, schedule.days, schedule.min_interval, schedule.timezone) == (
        "02:00-04:00",
        ("mon", "tue", "wed", "thu", "fri"),
        8 * 3600,
        "UTC",
    )


def test_the_smoke_suite_fits_in_two_minutes_on_paper() -> None:
    catalog = Catalog()
    environment = catalog.environment("sandbox")
    seconds = 0.0
    for name in catalog.suite("smoke").experiments:
        e = catalog.experiment(name)
        seconds += environment.sampling.baseline + environment.scaled(e.duration) + e.recovery.dwell + 4
    assert seconds <= 120


def test_an_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(SpecError, match='no experiment "serving-pod-failur". Did you mean "serving-pod-failure"?'):
        Catalog().experiment("serving-pod-failur")
    with pytest.raises(SpecError, match='no suite "smok". Did you mean "smoke"?'):
        Catalog().suite("smok")
    with pytest.raises(SpecError, match='no environment "prod". Allowed: cluster, rollouts, sandbox'):
        Catalog().environment("prod")


def test_a_name_in_two_files_is_an_error_that_names_both(tmp_path: Path) -> None:
    root = library(tmp_path, mine=GOOD)
    catalog = Catalog([root])
    with pytest.raises(SpecError) as caught:
        catalog.experiments()
    assert 'the experiment "serving-pod-failure" is already in ' in str(caught.value)
    assert "mine.yaml:2:7  name: " in str(caught.value) and "serving/serving-pod-failure.yaml" in str(caught.value)
    with pytest.raises(SpecError, match="already in"):
        catalog.experiment("serving-pod-failure")
    assert catalog.experiment("serving-pod-delete").area == "serving"


def test_a_wrong_file_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    root = library(tmp_path, wrong="a: [", fine=GOOD.replace("name: serving-pod-failure", "name: fine"))
    catalog = Catalog([root])
    assert catalog.experiment("fine").name == "fine"
    with pytest.raises(SpecError, match="not YAML"):
        catalog.experiment("wrong")
    with pytest.raises(SpecError, match="not YAML"):
        catalog.experiments()
    assert catalog.check().wrong_files == 1


def test_what_only_another_environment_runs_is_no_problem_here_and_what_none_runs_is(tmp_path: Path) -> None:
    drain = GOOD.replace("pod_failure", "node_drain")
    there = drain.replace("name: serving-pod-failure", "name: there").replace("prediction-service", "prediction-nodes")
    nowhere = drain.replace("name: serving-pod-failure", "name: nowhere").replace("prediction-service", "nodes")
    root = library(tmp_path, there=there, nowhere=nowhere)
    catalog = Catalog([root])
    checked = catalog.check(catalog.environment("sandbox"))
    assert {p.where.split(":")[0].rsplit("/", 1)[-1] for p in checked.problems} == {"nowhere.yaml"}
    assert any("there" in note and note.startswith("for other environments") for note in checked.notes)
    named = catalog.check(catalog.environment("sandbox"), [root / "experiments" / "there.yaml"])
    assert len(named.problems) == 2  # who names the file means it here: the target and the fault


@pytest.mark.parametrize("change", ["sli: latency_p95", "signal: ready_replicas"])
def test_what_is_measured_only_elsewhere_is_a_note_and_what_nobody_measures_a_problem(
    tmp_path: Path, change: str
) -> None:
    word, _, old = change.partition(" ")
    elsewhere = {"sli:": "audit_intact", "signal:": "isolated_replicas"}[word]
    texts = {n: GOOD.replace("name: serving-pod-failure", f"name: {n}") for n in ("there", "nowhere")}
    there = texts["there"].replace(f"{word} {old}, below: 300ms", f"{word} {elsewhere}, at_least: 1")
    root = library(
        tmp_path,
        there=there.replace(change, f"{word} {elsewhere}"),
        nowhere=texts["nowhere"].replace(change, f"{word} zebra"),
    )
    catalog = Catalog([root])
    checked = catalog.check(catalog.environment("cluster"))
    assert {p.where.split(":")[0].rsplit("/", 1)[-1] for p in checked.problems} == {"nowhere.yaml"}
    assert any("there" in note and note.startswith("for other environments") for note in checked.notes)


def test_a_fault_that_is_not_for_that_kind_of_object_is_found_without_asking_the_cluster() -> None:
    catalog = Catalog()
    (path,) = [p for p in catalog.files() if p.name == "zone-failure.yaml"]
    (problem,) = catalog.check(catalog.environment("cluster"), [path]).problems
    assert "pod_failure is not for a Node, which zone-b is in environment cluster" in str(problem)


def test_which_objects_a_fault_hits_is_what_its_handler_says() -> None:
    for kind in PLACES:
        assert {k.lower() for k in ON_OBJECTS.get(kind, ("Pod",))} == handler(kind).kinds, kind
    assert ON_OBJECTS.keys() <= PLACES.keys() | BROUGHT


def test_a_library_that_is_not_there() -> None:
    with pytest.raises(SpecError, match="no such directory"):
        Catalog([Path("/nowhere")])


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "huge.yaml"
    path.parent.mkdir(parents=True)
    with path.open("wb") as f:
        f.truncate(10 * 1024**3)  # sparse: reading it would take minutes
    before = time.perf_counter()
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        Catalog([tmp_path], shipped=False).experiment("huge")
    assert time.perf_counter() - before < 20


def test_a_thousand_files(tmp_path: Path) -> None:
    texts = {f"e{i}": GOOD.replace("name: serving-pod-failure", f"name: e{i}") for i in range(1000)}
    catalog = Catalog([library(tmp_path, **texts)])
    before = time.process_time()
    checked = catalog.check(catalog.environment("sandbox"))
    assert checked.files > 1000 and checked.problems == []
    assert time.process_time() - before < 3.0
