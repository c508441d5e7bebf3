"""The contract of `mlchaos run --output json` (DESIGN.md section 4), key by key."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.evidence.json_output import run_json, unjudged_json

from .builders import aborted, all_runs, deviated, held

RUNS = all_runs()
KEYS = {
    "run_id", "experiment", "environment", "outcome", "reasons", "started_at", "durations_s", "targets", "fault", "slis",
    "abort", "recovery", "clean", "record_path", "report_path",
}  # fmt: skip
INSIDE = {
    "durations_s": {"guards", "baseline", "window", "recovery", "overhead"},
    "fault": {"kind", "backend", "confirmed"},
    "recovery": {"detect_s", "reschedule_s", "ready_s", "steady_s", "censored"},
    "clean": {"proven", "evidence"},
}


def of(name: str, **more: Any) -> dict[str, Any]:
    run = RUNS[name]
    return json.loads(json.dumps(run_json(run.record, run.verdict, "rec.json", "rep.html", **more), allow_nan=False))


@pytest.mark.parametrize("name", RUNS)
def test_every_contracted_key(name: str) -> None:
    body = of(name)
    assert body.keys() >= KEYS
    for part, keys in INSIDE.items():
        assert body[part].keys() >= keys, part
    for sli in body["slis"].values():
        assert sli.keys() >= {"baseline", "during", "after", "effect", "ci_low", "ci_high", "samples"}
    assert body["record_path"] == "rec.json"
    assert body["reasons"]
    assert all(isinstance(r, str) for r in body["reasons"])
    assert datetime.fromisoformat(body["started_at"].replace("Z", "+00:00")).timestamp() == RUNS[name].record.zero_wall
    assert all(v is not None and v >= 0 for v in body["durations_s"].values())


def test_a_run_without_a_verdict_has_every_key_and_claims_nothing() -> None:
    record = RUNS["held"].record
    body = unjudged_json("r-1", record.experiment, record.environment, Outcome.ERROR, "token=hunter2hunter2 is wrong")
    whole = of("held")
    assert body.keys() == whole.keys()
    for part in ("durations_s", "fault", "recovery", "clean"):
        assert body[part].keys() == whole[part].keys(), part
    assert (body["outcome"], body["exit_code"]) == ("ERROR", 6)
    assert not body["clean"]["proven"] and not body["fault"]["confirmed"] and body["started_at"] is None
    assert "hunter2" not in json.dumps(body, allow_nan=False)


def test_abort_is_null_or_whole() -> None:
    assert of("held")["abort"] is None
    abort = of("aborted")["abort"]
    assert abort.keys() >= {"reason", "breach_at", "clean_at", "seconds"}
    assert abort["seconds"] == 0.42
    breach, clean = (datetime.fromisoformat(abort[k].replace("Z", "+00:00")) for k in ("breach_at", "clean_at"))
    assert (clean - breach).total_seconds() == pytest.approx(0.42)
    assert aborted().record.abort


def test_shadow_is_never_held() -> None:
    assert of("shadow")["outcome"] == "SHADOW-HELD"
    assert of("held")["outcome"] == "HELD"


def test_infinite_values_are_null() -> None:
    sli = of("deviated")["slis"]["latency_p95"]
    assert sli["during"] is None
    assert sli["effect"] is None
    assert sli["met"] is False
    assert deviated().verdict.slis["latency_p95"].during == float("inf")


def test_durations_add_up_and_know_the_wall_clock() -> None:
    assert of("held")["durations_s"] == {
        "guards": 0.21, "baseline": 10.0, "window": 15.0, "recovery": 5.68, "overhead": 0.11,
    }  # fmt: skip
    assert of("held", wall_s=33.0)["durations_s"]["overhead"] == pytest.approx(33 - 0.21 - 10 - 15 - 5.68)


def test_clean_is_proven_only_by_reading_or_by_never_injecting() -> None:
    assert of("held")["clean"]["proven"] is True
    assert of("refused_guard")["clean"] == {"proven": True, "evidence": ["nothing was injected"], "command": ""}
    unclean = of("unclean")["clean"]
    assert unclean["proven"] is False
    assert unclean["command"] == "mlchaos recover --environment sandbox"
    run = held()
    lost = run_json(run.record.model_copy(update={"clean": None}), run.verdict)
    assert lost["clean"]["proven"] is False
    assert lost["clean"]["command"].startswith("mlchaos recover")


def test_refused_still_names_fault_and_backend() -> None:
    body = of("refused_guard")
    assert body["fault"]["kind"] == "pod_failure"
    assert body["fault"]["backend"] == "sandbox"
    assert body["fault"]["confirmed"] is False
    assert body["targets"] == []
    assert body["guards"][1]["passed"] is False


def test_censored_parts_are_listed() -> None:
    assert of("deviated")["recovery"]["censored"] == ["detect", "steady"]


def test_secrets_are_masked() -> None:
    run = held()
    record = run.record.model_copy(update={"error": "probe: 401 with s3cr3t-value-42"})
    assert "s3cr3t" not in json.dumps(run_json(record, run.verdict))
