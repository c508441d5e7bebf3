"""What people read at the end of a run: every outcome says what LOOKS.md demands, and nothing unmeasured shows as a number."""

from __future__ import annotations

import html
import re

import pytest

from mlchaos_dagster.domain.environment import SandboxOptions
from mlchaos_dagster.domain.record import ActionFacts, Finding, RecoveryResult, SliResult
from mlchaos_dagster.domain.spec import Objective, Quantity
from mlchaos_dagster.evidence import words
from mlchaos_dagster.evidence.json_output import run_json
from mlchaos_dagster.evidence.report import render_html, render_markdown
from mlchaos_dagster.evidence.rows import effect_texts, limit_text, quantity_text, signed, sli_rows
from mlchaos_dagster.evidence.terminal import end_block

from .builders import all_runs, deviated, held, unclean

RUNS = all_runs()
NOTHING = re.compile(r"\b(nan|None|inf|null)\b")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("width", [50, 80, 110, 160])
def test_block_fits_the_terminal_and_shows_no_missing_value(name: str, width: int) -> None:
    run = RUNS[name]
    block = end_block(run.record, run.verdict, width=width, report_path=".mlchaos/reports/7f3a91c2.html")
    assert not NOTHING.search(block), block
    assert "\x1b" not in block
    first = block.splitlines()[0]
    assert first.startswith(words.shown_outcome(run.record, run.verdict) + "  " + run.record.experiment.name)
    # Commands stay whole on their line, to be copied.
    loose = [
        x for x in block.splitlines() if len(x) > width and "mlchaos " not in x and ".html" not in x and x != first
    ]
    assert not loose


def test_held_block_says_numbers_with_units_and_intervals() -> None:
    run = held()
    block = end_block(run.record, run.verdict, width=120, report_path="r.html")
    assert "The fault fired (inference-1 gone after 0.04 s) and every SLO held." in block
    assert re.search(r"availability +100\.0 % +99\.4 % +100\.0 % +−0\.6 pp +\[−1\.2, −0\.1\] +≥ 99 % +✔", block), block
    assert re.search(r"p95 +31 ms +44 ms +32 ms +\+13 ms +\[\+6, \+24\] +< 300 ms +✔", block)
    assert re.search(r"recovery +detect 0\.3 s · reschedule 0\.8 s · ready 2\.1 s · steady 2\.6 s +≤ 30 s +✔", block)
    assert re.search(r"clean +read back clean 0\.02 s after recover \(lease mlchaos-\S+ closed\)\n", block)
    assert "With this window the smallest drop of availability that would have been seen is 0.9 pp." in block
    assert "report r.html" in block
    assert "again: mlchaos run serving-pod-failure  " in block


@pytest.mark.req("R3-09")
def test_every_rollback_action_is_told_wherever_a_run_is_told() -> None:
    run = held()
    undone = ActionFacts(
        kind="scale_up", target="workers", why="error_rate above 5 %", t=12.0, lines=("wants 4",), undone_at=20.0
    )
    stuck = undone.model_copy(
        update={"undone_at": None, "error": "not undone: no answer", "command": "mlchaos recover x"}
    )
    record = run.record.model_copy(update={"actions": (undone, stuck)})
    told = [
        "scale_up on workers at 12 s (error_rate above 5 %): wants 4; undone at 20 s",
        "scale_up on workers at 12 s (error_rate above 5 %): not undone: no answer; `mlchaos recover x` undoes it",
    ]
    assert words.action_lines(record) == told
    block = " ".join(end_block(record, run.verdict, width=160).split())
    assert all(line in block for line in told), block
    assert all(line in html.unescape(render_html(record, run.samples, run.verdict)) for line in told)
    assert [a["command"] for a in run_json(record, run.verdict, "", "")["actions"]] == ["", "mlchaos recover x"]


@pytest.mark.req("R3-01")
def test_what_the_backend_judged_is_told_wherever_a_run_is_told() -> None:
    run = deviated()
    findings = (
        Finding(name="probe check-login", passed=False, saw="expected 200, <b>found</b> 503"),
        Finding(name="verdict", passed=None, saw="Awaited"),
    )
    record = run.record.model_copy(update={"findings": findings})
    block = end_block(record, run.verdict, width=120)
    assert re.search(r"^  sandbox +probe check-login: expected 200, <b>found</b> 503 +✘$", block, re.M), block
    assert re.search(r"^ +verdict: Awaited +\?$", block, re.M), block
    page = render_html(record, run.samples, run.verdict)
    assert "sandbox itself: probe check-login" in page and "&lt;b&gt;found" in page and "? no judgement" in page
    assert "**sandbox** ✘ probe check-login" in render_markdown(record, run.samples, run.verdict, picture=False)
    told = run_json(record, run.verdict)["findings"]
    assert [(f["name"], f["passed"]) for f in told] == [("probe check-login", False), ("verdict", None)]


def test_held_marks_stand_in_one_column() -> None:
    run = held()
    lines = end_block(run.record, run.verdict, width=120).splitlines()
    marks = {line.index("✔") for line in lines if "✔" in line}
    assert len(marks) == 1


def test_deviated_says_which_promise_and_what_is_missing() -> None:
    run = deviated()
    said = words.explanation(run.record, run.verdict)
    assert said[0] == "availability was 59.1 % during the fault; promised: ≥ 95 %."
    text = " ".join(said)
    assert "latency_p95 broke" in text
    assert "breaker_state reaches open; stayed closed for 15 s" in text
    assert "mechanism “breaker”" in text
    block = end_block(run.record, run.verdict, width=120)
    assert "✘" in block
    assert "detect > 15 s (not seen)" in block
    assert "steady > 30 s (not seen)" in block
    assert "no answer" in block


def test_refusal_says_guard_what_it_saw_and_what_it_needs() -> None:
    run = RUNS["refused_guard"]
    said = words.explanation(run.record, run.verdict)
    assert "error budget" in said[0]
    assert "4 % left" in said[0]
    assert "at least 10 % left" in said[0]
    assert said[-1] == "Nothing was injected."


def test_refusal_without_needs_has_no_empty_wish() -> None:
    run = RUNS["refused_guard"]
    guards = tuple(g.model_copy(update={"needs": ""}) for g in run.record.guards)
    said = words.explanation(run.record.model_copy(update={"guards": guards}), run.verdict)
    assert "needs" not in " ".join(said)


def test_unsteady_baseline_says_so_and_gives_advice() -> None:
    run = RUNS["refused_unsteady"]
    block = end_block(run.record, run.verdict, width=200)
    assert "availability ≥ 99 % does not hold: 94.2 %" in block
    assert "lets the run through" in block
    assert "Nothing was injected." in block


def test_abort_says_what_tripped_and_breach_to_clean() -> None:
    run = RUNS["aborted"]
    text = " ".join(words.explanation(run.record, run.verdict))
    assert "error_rate was 31 %, above 5 % for 3 s" in text
    assert "breach → clean in 0.42 s" in text


def test_abort_whose_fault_was_not_proven_gone_never_gives_a_time() -> None:
    run = RUNS["aborted"]
    assert run.record.abort
    abort = run.record.abort.model_copy(update={"clean_at": None})
    text = " ".join(words.explanation(run.record.model_copy(update={"abort": abort}), run.verdict))
    assert "not proven gone" in text
    assert "breach → clean in" not in text


def test_inconclusive_says_what_was_not_seen_and_how_to_see_it() -> None:
    run = RUNS["inconclusive"]
    said = words.explanation(run.record, run.verdict)
    assert "was not seen" in said[0]
    assert "a window of 90 s would do" in said[1]


def test_only_unclean_shouts_with_lease_target_command_and_owner() -> None:
    for name, run in RUNS.items():
        block = end_block(run.record, run.verdict, width=100)
        assert ("MAY STILL BE LIVE" in block) == (name == "unclean")
        assert ("█" in block) == (name == "unclean")
    run = unclean()
    block = end_block(run.record, run.verdict, width=60)
    for needed in (
        "mlchaos-7f3a91c2",
        "inference-1",
        "mlchaos recover --environment sandbox",
        "ml-platform@example.com",
    ):
        assert any(needed in line for line in block.splitlines())


def test_shadow_never_reads_as_held() -> None:
    run = RUNS["shadow"]
    block = end_block(run.record, run.verdict, width=100)
    assert block.startswith("SHADOW-HELD  ")
    assert "nothing was injected" in block.lower()
    assert words.again_command(run.record).endswith("--shadow")


def test_colour_adds_codes_and_no_words() -> None:
    run = held()
    plain = end_block(run.record, run.verdict, width=100)
    coloured = end_block(run.record, run.verdict, color=True, width=100)
    assert "\x1b[" in coloured
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [x.rstrip() for x in stripped.splitlines()] == plain.splitlines()


def test_secret_of_a_header_never_reaches_the_terminal() -> None:
    run = held()
    verdict = run.verdict.model_copy(update={"reasons": ("401 for Bearer s3cr3t-value-42",)})
    assert "s3cr3t" not in end_block(run.record, verdict, width=100)


def test_censored_recovery_is_a_lower_bound() -> None:
    run = held()
    recovery = RecoveryResult(steady_s=30.0, censored=("steady",), within_s=30.0)
    line = words.recovery_line(run.verdict.model_copy(update={"recovery": recovery}))
    assert line == "steady > 30 s (not seen)"


@pytest.mark.parametrize(
    ("effect", "low", "high", "unit", "expected"),
    [
        (-0.006, -0.012, -0.001, "ratio", ("−0.6 pp", "[−1.2, −0.1]")),
        (0.0, -0.001, 0.001, "ratio", ("0.0 pp", "[−0.1, +0.1]")),
        (0.013, 0.006, 0.024, "s", ("+13 ms", "[+6, +24]")),
        (1.95, 0.5, 2.0, "s", ("+1.95 s", "[+0.50, +2.00]")),
        (-2.0, None, None, "", ("−2", "")),
        (float("inf"), None, None, "s", ("–", "")),
        (0.0001, -0.0001, 0.0002, "ratio", ("+0.010 pp", "[−0.010, +0.020]")),
    ],
)
def test_effects(effect: float, low: float, high: float, unit: str, expected: tuple[str, str]) -> None:
    result = SliResult(unit=unit, baseline=0, during=0, after=0, effect=effect, ci_low=low, ci_high=high)
    assert effect_texts(result) == expected


def test_sign_of_what_rounds_to_zero_is_none() -> None:
    assert signed(-0.04, 1) == "0.0"
    assert signed(-0.06, 1) == "−0.1"


def test_limits_keep_their_digits() -> None:
    assert limit_text(Objective.model_validate({"sli": "availability", "at_least": "99.95%"})) == "≥ 99.95 %"
    assert quantity_text(Quantity(value=0.25, unit="s")) == "250 ms"
    assert quantity_text(Quantity(value=0.07, unit="ratio")) == "7 %"


def test_interval_not_to_be_trusted_is_marked_and_explained() -> None:
    run = held()
    slis = dict(run.verdict.slis)
    slis["availability"] = slis["availability"].model_copy(update={"reliable": False, "why": "the window is too short"})
    verdict = run.verdict.model_copy(update={"slis": slis})
    assert sli_rows(run.record, verdict)[0].interval.endswith("*")
    assert "* the interval is not to be trusted" in end_block(run.record, verdict, width=120)
    assert any("the window is too short" in n for n in words.measurement_notes(run.record, verdict))


def test_breaker_states_are_named_and_other_numbers_stay() -> None:
    assert words.expectation_words("breaker_state reaches 2") == "breaker_state reaches open"
    assert words.expectation_words("breaker_state was 0 before and 0 to 2 during the fault") == (
        "breaker_state was closed before and closed to open during the fault"
    )
    assert words.expectation_words("ready_replicas was 2 before") == "ready_replicas was 2 before"
    assert words.expectation_words("breaker_state stays at 0") == "breaker_state stays at closed"


def test_an_slo_without_a_measurement_is_a_question_mark() -> None:
    run = RUNS["refused_unsteady"]
    assert [r.mark for r in sli_rows(run.record, run.verdict)] == ["?", "?"]


def test_what_was_never_measured_is_no_row_of_dashes() -> None:
    run = RUNS["refused_guard"]
    nothing = {"availability": SliResult(unit="ratio", baseline=None, during=None, after=None)}
    assert sli_rows(run.record, run.verdict.model_copy(update={"slis": nothing})) == []
    lost = held()
    assert len(sli_rows(lost.record, lost.verdict.model_copy(update={"slis": nothing}))) == 1


def test_abort_time_is_said_once() -> None:
    run = RUNS["aborted"]
    assert run.record.abort
    reasons = (run.record.abort.reason + "; fault proven gone 0.42 s after the decision",)
    text = " ".join(words.explanation(run.record, run.verdict.model_copy(update={"reasons": reasons})))
    assert text.count("0.42 s") == 1


def test_what_a_person_stopped_was_not_breached() -> None:
    run = all_runs()["aborted"]
    assert run.record.abort is not None
    for cause in ("stop", "signal", "lever", "dagster"):
        abort = run.record.abort.model_copy(update={"cause": cause})
        text = " ".join(words.explanation(run.record.model_copy(update={"abort": abort}), run.verdict))
        assert "stopped → proven clean in 0.42 s" in text
        assert "breach →" not in text


def test_again_is_a_command_that_works() -> None:
    run = held()
    assert "again: mlchaos run serving-pod-failure " in end_block(run.record, run.verdict, width=120)
    assert "again: mlchaos run --type pod_kill" in end_block(
        run.record, run.verdict, again="mlchaos run --type pod_kill"
    )
    elsewhere = run.record.environment.model_copy(update={"name": "staging"})
    there = run.record.model_copy(update={"environment": elsewhere})
    assert words.again_command(there) == "mlchaos run serving-pod-failure --environment staging"
    other = run.record.experiment.model_copy(update={"name": "adhoc-x"})
    page = render_html(run.record.model_copy(update={"experiment": other}), run.samples, run.verdict)
    assert "mlchaos run adhoc-x" not in page
    assert "mlchaos run serving-pod-failure" in render_html(run.record, run.samples, run.verdict)


def test_the_star_is_explained_only_where_it_is_shown() -> None:
    run = held()
    starred = {n: r.model_copy(update={"reliable": False}) for n, r in run.verdict.slis.items()}
    verdict = run.verdict.model_copy(update={"slis": starred})
    assert "* the interval" in end_block(run.record, verdict, width=120)
    assert "* the interval" not in end_block(run.record, verdict, width=60)


def test_a_sandbox_that_is_left_up_is_said_last() -> None:
    run = held()
    last = "  sandbox still up: mlchaos sandbox down"
    up = run.record.environment.model_copy(update={"sandbox": SandboxOptions()})
    assert end_block(run.record.model_copy(update={"environment": up}), run.verdict).splitlines()[-1] == last
    down = run.record.environment.model_copy(update={"sandbox": None})
    assert "sandbox down" not in end_block(run.record.model_copy(update={"environment": down}), run.verdict)
