"""What people read of a run whose answers were wrong: terminal, page, picture, JSON say the same."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest

from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.record import Samples
from mlchaos_dagster.evidence import words
from mlchaos_dagster.evidence.json_output import run_json
from mlchaos_dagster.evidence.panels import panels_of
from mlchaos_dagster.evidence.plots import picture_png, picture_svg
from mlchaos_dagster.evidence.report import render_html, render_markdown
from mlchaos_dagster.evidence.series import answer_series, extent, first_bad
from mlchaos_dagster.evidence.terminal import end_block
from mlchaos_dagster.judgement.verdict import judge

from . import builders

pytestmark = pytest.mark.req("RX-03")
ITEMS = 100
SCORES = np.random.default_rng(2).beta(2, 5, ITEMS)


@cache
def run(*, spoken: bool = True, wrong: bool = True) -> builders.Run:
    """The held run, whose answers carry numbers that are wrong for 2 s of the window."""
    record, samples, _ = builders.held()
    assert record.window is not None
    start = record.window.start + 1.0
    rows = [
        r._replace(
            done_s=r.sent_s + 0.03,
            status=200,
            ok=True,
            item=k % ITEMS,
            value=float(SCORES[k % ITEMS]) + 0.4 * (wrong and start <= r.due_s < start + 2.0),
        )
        for k, r in enumerate(samples.requests)
    ]
    raw = record.environment.model_dump(mode="json", by_alias=True)
    raw["probe"] |= {"value": "score", "items": {"name": "entity_id", "from": 0, "to": ITEMS - 1}}
    raw["slis"] |= {n: {"measure": n} for n in ("golden_error_rate", "prediction_psi", "prediction_ks")}
    spec = record.experiment.model_dump(mode="json", by_alias=True, exclude_none=True)
    if spoken:
        spec["steady_state"] += [
            {"sli": "golden_error_rate", "at_most": "0.5%"}, {"sli": "prediction_psi", "below": 0.2}
        ]  # fmt: skip
    record = record.model_copy(
        update={
            "environment": type(record.environment).model_validate(raw),
            "experiment": type(record.experiment).model_validate(spec),
        }
    )
    changed = Samples(rows, samples.signals, samples.gaps)
    return builders.Run(record, changed, judge(record, changed))


def test_every_form_says_what_was_wrong() -> None:
    record, samples, verdict = run()
    assert verdict.outcome is Outcome.DEVIATED and verdict.golden is not None
    sentence = f"{verdict.golden.wrong} of {verdict.golden.compared} answers differ from the golden predictions"
    block = end_block(record, verdict, width=120)
    assert sentence in re.sub(r"\s+", " ", block)
    assert re.search(r"golden error rate .*≤ 0\.5 %\s+✘", block)
    assert re.search(r"availability .*✔", block)
    assert sentence in render_html(record, samples, verdict)
    assert sentence in render_markdown(record, samples, verdict, picture=False)
    said = json.loads(json.dumps(run_json(record, verdict)))
    assert sentence in said["reasons"][0] and said["golden"]["digest"] == verdict.golden.digest
    assert said["slis"]["golden_error_rate"]["met"] is False and said["slis"]["availability"]["met"] is True
    notes = words.measurement_notes(record, verdict)
    assert any(f"golden predictions: {ITEMS} items" in n and verdict.golden.digest[:12] in n for n in notes)


def test_the_picture_shows_when() -> None:
    record, samples, verdict = run()
    assert record.window is not None
    svg = picture_svg(record, samples, verdict)
    assert "golden error rate" in svg and "prediction psi" in svg and "wrong number" in svg
    assert len(picture_png(record, samples, verdict)) > 10_000
    assert first_bad(record, samples) == pytest.approx(record.window.start + 1.0, abs=0.05)
    span = extent(record, samples)
    edges = record.window.start + np.arange(-4.0, 9.0)
    golden = answer_series(record, samples, span, edges, "golden_error_rate")
    assert golden.tolist() == [0.0] * 5 + [1.0, 1.0] + [0.0] * 5
    psi = answer_series(record, samples, span, edges, "prediction_psi")
    assert psi[4] == 0.0 and psi[6] > 0.5 and psi[9] == 0.0


def test_wrong_answers_are_shown_though_nobody_asked_and_right_ones_are_not() -> None:
    def titles(r: builders.Run) -> list[str]:
        return [p.title for p in panels_of(r.record, r.samples, r.verdict, extent(r.record, r.samples))]

    assert "golden error rate" in titles(run(spoken=False)) and "prediction psi" not in titles(run(spoken=False))
    assert "golden error rate" not in titles(run(spoken=False, wrong=False))
    record, _, verdict = run(spoken=False)
    assert any("answers differ" in n for n in words.measurement_notes(record, verdict))
    assert any("answers differ" in n for n in words.measurement_notes(run().record, run().verdict))
    right = run(wrong=False)
    assert not any("answers differ" in n for n in words.measurement_notes(right.record, right.verdict))
