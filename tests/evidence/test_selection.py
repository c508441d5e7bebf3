"""Which SLIs are shown, what had to be seen, and when the validated mechanism is named."""

from __future__ import annotations

from typing import Any

import pytest

from mlchaos_dagster.domain.record import ExpectationResult, RunRecord, SliResult, Verdict
from mlchaos_dagster.evidence import words
from mlchaos_dagster.evidence.document import experiment_document
from mlchaos_dagster.evidence.json_output import run_json
from mlchaos_dagster.evidence.report import backlog_entry, render_html
from mlchaos_dagster.evidence.rows import sli_rows
from mlchaos_dagster.evidence.selection import shown_slis
from mlchaos_dagster.evidence.terminal import end_block
from mlchaos_dagster.orchestration.metadata import sli_table
from tests.evidence.builders import deviated, environment, experiment, held

SLIS: dict[str, Any] = {
    "training_loss": {"signal": "training_loss"},
    "job_wait": {"signal": "job_wait", "reduce": "max", "unit": "s"},
    "queue_loss": {"signal": "queue_loss"},
    "fallback_rate": {"measure": "fallback_rate"},
    "error_rate": {"measure": "error_rate"},
    "ready": {"signal": "ready_replicas", "reduce": "min"},
    "latency_p95": {"measure": "latency_p95"},
    "availability": {"measure": "availability"},
}
PLACE = environment(slis=SLIS, signals=["training_loss", "job_wait", "queue_loss", "ready_replicas"])
SIGNAL = {"reliable": False, "why": "a signal has no interval", "samples": 300}


def result(*values: float | None, unit: str = "", **more: Any) -> SliResult:
    before, during, after = values
    effect = None if before is None or during is None else during - before
    return SliResult(unit=unit, baseline=before, during=during, after=after, effect=effect, **more)


def run_of(**changes: SliResult) -> tuple[RunRecord, Verdict]:
    """The held run where many SLIs are declared; `queue_loss` was never read."""
    run = held()
    slis = {
        "training_loss": result(0.5, 0.51, 0.5, **SIGNAL),
        "job_wait": result(0.1, 0.9, 0.1, unit="s", **SIGNAL),
        "queue_loss": result(None, None, None),
        "fallback_rate": result(0.0, 0.0, 0.0, unit="ratio", ci_low=0.0, ci_high=0.0, samples=750),
        "error_rate": result(0.0, 0.006, 0.0, unit="ratio", ci_low=0.001, ci_high=0.012, samples=750),
        "ready": result(3.0, 2.0, 3.0, **SIGNAL),
        **run.verdict.slis,
    }
    expectations = (
        ExpectationResult(
            expected="ready_replicas drops",
            seen=True,
            saw="ready_replicas was 3 before and 2 to 3 during the fault",
        ),
    )
    record = run.record.model_copy(update={"environment": PLACE})
    return record, run.verdict.model_copy(update={"slis": slis | changes, "expectations": expectations})


SHOWN = ["availability", "latency_p95", "error_rate", "ready", "fallback_rate", "job_wait"]


def test_objectives_limits_expectations_then_every_service_then_what_moved() -> None:
    assert shown_slis(*run_of()) == SHOWN


def test_the_report_dagster_and_the_document_follow_the_same_rule() -> None:
    record, verdict = run_of()
    assert [r.name for r in sli_rows(record, verdict)] == [
        "availability", "p95", "error rate", "ready (min)", "fallback rate", "job wait (max)",
    ]  # fmt: skip
    table = sli_table(record, verdict)
    assert table is not None
    shown = [str(row.data["SLI"]).replace("\u00a0", " ") for row in table.records]
    assert shown == [r.name for r in sli_rows(record, verdict)]
    # Nothing is measured yet: what the experiment speaks of, each once, by its source.
    text = experiment_document(record.experiment, PLACE).split("## Metrics")[1].split("##")[0]
    assert [line.split(" | ")[0] for line in text.strip().splitlines()[2:]] == [
        "| availability", "| p95", "| error rate", "| ready (min)", "| fallback rate",
    ]  # fmt: skip


def test_an_expected_signal_that_is_no_sli_stands_once_among_the_metrics() -> None:
    text = experiment_document(experiment(), environment())
    assert text.count("| ready replicas | signal: ready_replicas | – |") == 1
    assert "breaker state" not in text


@pytest.mark.parametrize(
    ("loss", "moved"),
    [
        (result(0.5, 0.54, 0.5, **SIGNAL), False),
        (result(0.5, 0.56, 0.5, **SIGNAL), True),
        (result(0.5, 0.5, 0.7, **SIGNAL), True),
        (result(0.001, 0.002, 0.001, **SIGNAL), False),
        (result(0.0, 4.0, 0.0, **SIGNAL), True),
        (result(0.5, 0.5, None, **SIGNAL), False),
        (result(0.5, 0.51, 0.5, ci_low=0.005, ci_high=0.02, samples=300), True),
        (result(0.5, 0.7, 0.5, ci_low=-0.1, ci_high=0.5, samples=300), False),
    ],
)
def test_of_the_others_only_what_moved_visibly(loss: SliResult, moved: bool) -> None:
    assert ("training_loss" in shown_slis(*run_of(training_loss=loss))) == moved


def test_what_has_no_sample_is_left_out_but_an_objective_in_a_window_never() -> None:
    record, verdict = run_of(latency_p95=result(None, None, None, unit="s", slo="latency_p95 < 300 ms"))
    assert "latency_p95" in shown_slis(record, verdict)
    assert "latency_p95" not in shown_slis(record.model_copy(update={"window": None}), verdict)
    said = run_json(record, verdict)["slis"]
    assert set(said) == set(SLIS) - {"queue_loss"}


def test_signals_without_interval_are_one_line_and_what_is_particular_stays() -> None:
    odd = result(
        0.1,
        0.9,
        0.1,
        unit="s",
        reliable=False,
        samples=9,
        why="an infinite reading is no number; a signal has no interval",
    )
    record, verdict = run_of(job_wait=odd)
    notes = words.measurement_notes(record, verdict)
    assert [n for n in notes if "interval" in n] == ["Signals have no interval: they are read, not sampled"]
    assert "job wait: an infinite reading is no number" in notes
    page = render_html(record, held().samples, verdict)
    assert page.count("no interval") == 1
    assert "queue loss" not in page


def test_what_must_be_seen_stands_under_the_objectives() -> None:
    record, verdict = run_of()
    lines = end_block(record, verdict, width=110).splitlines()
    at = next(i for i, line in enumerate(lines) if "must be seen" in line)
    assert lines[at].split() == "must be seen ready replicas drops: 3 → 2 to 3 ✔".split()
    assert "p95" in lines[at - 1] and "recovery" in lines[at + 1]
    shadow = record.model_copy(update={"shadow": True})
    assert "must be seen" not in end_block(shadow, verdict, width=110)
    assert all(len(line) <= 60 for line in lines_of(record, verdict, 60))


def lines_of(record: RunRecord, verdict: Verdict, width: int) -> list[str]:
    return [x for x in end_block(record, verdict, width=width).splitlines() if "must" in x or "drops" in x]


def test_an_expected_sli_is_shown_in_its_unit_and_a_broken_expectation_by_its_mark() -> None:
    run = deviated()
    lines = end_block(run.record, run.verdict, width=110).splitlines()
    seen = [line.split() for line in lines if "reaches open:" in line or "rises:" in line]
    assert seen == [
        "must be seen breaker state reaches open: stayed closed for 15 s ✘".split(),
        "error rate rises: 0.0 % → 40.9 % → 5.8 % ✔".split(),
    ]


@pytest.mark.parametrize(
    ("breaks", "named"),
    [
        ("breaker_state", True),
        ("availability", True),
        ("recovery", True),
        ("error_rate", False),  # an expectation on it was seen
        ("fallback_rate", False),
    ],
)
def test_the_mechanism_is_named_only_where_what_it_guards_broke(breaks: str, named: bool) -> None:
    run = deviated()
    teeth = run.record.experiment.teeth
    assert teeth is not None
    spec = run.record.experiment.model_copy(update={"teeth": teeth.model_copy(update={"breaks": breaks})})
    record = run.record.model_copy(update={"experiment": spec})
    said = " ".join(words.explanation(record, run.verdict))
    assert ("mechanism “breaker”" in said) == named
    assert ("Look at: breaker" in backlog_entry(record, run.verdict)) == named
    nothing = run.verdict.model_copy(update={"expectations": (), "slis": {}, "recovery": held().verdict.recovery})
    assert words.suspect(record, nothing) == ""


def test_the_setting_that_shortened_the_window_is_the_one_that_is_named() -> None:
    lifted = environment(duration_scale=0.001, duration_min="15s")
    assert "15 s here (asked for 10 m; duration_min 15 s)" in experiment_document(experiment(), lifted)
    scaled = environment(duration_scale=0.05, duration_min="15s")
    assert "30 s here (asked for 10 m; duration_scale 0.05)" in experiment_document(experiment(), scaled)
    run = held()
    record = run.record.model_copy(update={"environment": lifted})
    assert any("(duration_min 15 s)" in n for n in words.measurement_notes(record, run.verdict))
