"""The picture: honest bins, marks that never overlap, and a drawing for every way a run can end."""

from __future__ import annotations

import io
import math
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlchaos_dagster.domain.record import RequestSample, Samples, SignalSample, Span
from mlchaos_dagster.evidence.layout import bands_of, marks_of, rows_of
from mlchaos_dagster.evidence.palette import DARK, LIGHT
from mlchaos_dagster.evidence.plots import PNG_LIMIT_BYTES, picture_png, picture_svg
from mlchaos_dagster.evidence.series import bin_width, blind_spans, extent, first_bad, request_series, signal_steps

from .builders import aborted, all_runs, deviated, held, requests

RUNS = all_runs()
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", RUNS)
def test_every_outcome_has_a_picture(name: str) -> None:
    run = RUNS[name]
    found = texts(picture_svg(*run))
    png = picture_png(*run, 900)
    assert len(png) <= PNG_LIMIT_BYTES
    assert Image.open(io.BytesIO(png)).size[0] == 900
    assert not any(word in t.lower() for t in found for word in ("nan", "none", "inf "))
    assert ("nothing was measured" in found) == (name == "refused_guard")


def test_marks_and_bands_of_a_held_run() -> None:
    found = texts(picture_svg(*held()))
    for label in (
        "injected",
        "confirmed 0.04 s",
        "first bad 0.10 s",
        "recover 15.00 s",
        "clean 15.02 s",
        "steady 17.60 s",
    ):
        assert label in found
    assert "baseline 10 s" in found
    assert "fault 15 s · pod_failure on inference-1 (1 of 3)" in found
    assert "recovery 5.7 s" in found
    assert "SLO ≥ 99 %" in found


def test_breaker_states_are_named_and_gaps_are_said() -> None:
    assert {"closed", "half-open", "open"} <= set(texts(picture_svg(*deviated())))
    assert "not measured" in texts(picture_svg(*aborted()))
    assert "not measured" not in texts(picture_svg(*held()))


def test_shadow_marks_no_injection() -> None:
    run = RUNS["shadow"]
    assert [m for m in marks_of(run.record, run.verdict) if m.label.startswith(("injected", "clean"))] == []
    assert any("nothing injected" in label for b in bands_of(run.record, 31.0) for label in b.labels)


def test_unclean_picture_does_not_speak_of_recovery() -> None:
    found = texts(picture_svg(*RUNS["unclean"]))
    assert not any(t.startswith(("clean", "steady", "recovery")) for t in found)
    assert any("not proven clean" in t for t in found)


def test_steady_again_is_marked_where_the_table_says() -> None:
    run = held()
    assert run.record.window
    marks = {m.label.split()[0]: m.t for m in marks_of(run.record, run.verdict)}
    assert marks["steady"] == pytest.approx(run.record.window.end + 2.6)
    censored = run.verdict.recovery.model_copy(update={"censored": ("steady",)})
    verdict = run.verdict.model_copy(update={"recovery": censored})
    assert "steady" not in {m.label.split()[0] for m in marks_of(run.record, verdict)}


def test_svg_follows_the_page_and_is_the_same_every_time() -> None:
    svg = picture_svg(*held())
    assert svg == picture_svg(*held())
    assert svg.startswith("<svg ")
    assert "prefers-color-scheme: dark" in svg
    assert "var(--mc-ink" in svg
    outside = svg.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert "http" not in outside
    assert set(LIGHT) == set(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT), "every colour stands for one variable"


def test_matplotlib_is_used_without_pyplot() -> None:
    picture_svg(*held())
    assert "matplotlib.pyplot" not in sys.modules


def test_rendering_is_quick() -> None:
    run = deviated()
    picture_svg(*run)
    begin = time.process_time()
    picture_svg(*run)
    picture_png(*run, 1000)
    # A guard against one artist per sample, not a benchmark: 0.3 s when written.
    assert time.process_time() - begin < 3.0


def test_a_long_run_stays_small() -> None:
    run = held()
    rows = requests(0.0, 3600.0, fail=0.01)
    record = run.record.model_copy(
        update={
            "baseline": Span(start=0, end=600), "window": Span(start=600, end=3000), "after": Span(start=3001, end=3600),
            "moments": (),
        }
    )  # fmt: skip
    svg = picture_svg(record, Samples(rows), run.verdict)
    assert len(svg) < 300_000
    assert "minutes since the window's start" in texts(svg)


@pytest.mark.parametrize(
    "samples",
    [
        Samples(requests(0.3, 31.0, fail=1.0, timeout=True)),
        Samples([], [SignalSample(1.0, "ready_replicas", 3.0)]),
        Samples(requests(0.3, 0.4)),
        Samples([RequestSample(1.0, 5.0, 6.0, -2, False, "error", "")]),
        Samples(requests(0.3, 31.0), [SignalSample(float(t), "odd $name", math.nan) for t in range(5)]),
        Samples(requests(0.3, 31.0, latency_s=4.0)),
    ],
)
def test_odd_samples_are_drawn(samples: Samples) -> None:
    run = held()
    assert "<svg" in picture_svg(run.record, samples, run.verdict)
    assert picture_png(run.record, samples, run.verdict, 600)


# ---- series


def test_bins_start_at_the_injection_and_count_everything_once() -> None:
    rows = requests(0.0, 20.0, fail=0.1)
    series = request_series(rows, Span(start=0, end=20), anchor_s=10.32, max_lateness_s=0.05)
    assert np.isclose(series.edges, 10.32).any()
    seconds = np.minimum(series.edges[1:], 20) - np.maximum(series.edges[:-1], 0)
    assert np.sum(series.ok_per_s * seconds) + np.sum(series.failed_per_s * seconds) == pytest.approx(len(rows))
    assert sum(np.sum(v * seconds) for v in series.paths_per_s.values()) == pytest.approx(len(rows))


def test_bins_know_failures_latency_and_lateness() -> None:
    rows = [RequestSample(i / 10, i / 10, i / 10 + 0.02, 200, i != 3, "model", "a") for i in range(10)]
    rows += [RequestSample(1.0 + i / 10, 1.0 + i / 10, 1.1 + i / 10, 200, True, "cache", "a") for i in range(10)]
    rows.append(RequestSample(1.5, 1.7, 9.0, 200, True, "model", "a"))
    series = request_series(rows, Span(start=0, end=3), anchor_s=0.0, max_lateness_s=0.05)
    assert series.late == 1
    assert series.availability[0] == pytest.approx(0.9)
    assert series.error_rate[0] == pytest.approx(0.1)
    assert math.isinf(series.p95_s[0])
    assert series.p50_s[0] == pytest.approx(0.02)
    assert series.p95_s[1] == pytest.approx(0.1)
    assert math.isnan(series.availability[2])
    assert series.paths_per_s["cache"].tolist() == [0, 10, 0]
    assert series.paths_per_s["error"].tolist() == [1, 0, 0]


def test_signal_steps_stand_until_the_next_reading() -> None:
    samples = Samples([], [SignalSample(t, "x", v) for t, v in [(0, 3), (1, 3), (2, 2), (3, math.nan), (4, 2)]])
    times, values = signal_steps(samples, "x", 9.0)
    assert times.tolist() == [0, 2, 9]
    assert values.tolist() == [3, 2, 2]


def test_silence_of_the_probe_is_blind_and_not_counted_twice() -> None:
    run = aborted()
    assert [(g.start, g.end) for g in blind_spans(run.record, run.samples)] == [(14.52, 16.5)]
    silent = blind_spans(run.record, Samples(run.samples.requests))
    assert len(silent) == 1
    assert silent[0].length == pytest.approx(2.0, abs=0.1)


def test_first_bad_is_a_failure_or_a_slow_answer() -> None:
    run = held()
    slow = [RequestSample(t, t, t + (0.4 if t > 12 else 0.01), 200, True, "model", "") for t in (11.0, 12.5, 13.0)]
    assert first_bad(run.record, Samples(slow)) == 12.5
    assert first_bad(run.record, Samples(slow[:1])) is None


@pytest.mark.parametrize(("length", "width"), [(41, 1), (180, 1), (181, 2), (900, 5), (7200, 60)])
def test_bin_width(length: float, width: float) -> None:
    assert bin_width(length) == width


def test_extent_of_nothing() -> None:
    run = RUNS["refused_guard"]
    assert extent(run.record, Samples()).length == 1.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 40)), max_size=9))
def test_labels_never_overlap_and_no_line_cuts_a_label(marks: list[tuple[float, float]]) -> None:
    marks.sort()
    starts, widths = [m[0] for m in marks], [m[1] for m in marks]
    rows = rows_of(starts, widths, gap=0.5)
    for i in range(len(marks)):
        for j in range(i + 1, len(marks)):
            inside = starts[j] < starts[i] + widths[i]
            # Same row: they would touch. Later mark in a higher row: its line would run down through the label.
            assert not (inside and rows[j] >= rows[i])
