"""Progress: the live view at any width, one line per moment elsewhere, and never an exception into the run."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest

from mlchaos_dagster.domain.spec import Objective
from mlchaos_dagster.evidence.live import LiveState, LiveView, PlainProgress, sparkline

from .builders import environment, experiment

FLOOR = Objective.model_validate({"sli": "availability", "at_least": "99%"})
CEILING = Objective.model_validate({"sli": "latency_p95", "below": "300ms"})


def events() -> list[tuple[str, dict[str, Any]]]:
    abort = {
        "sli": "error_rate",
        "limit": 0.05,
        "unit": "ratio",
        "side": "above",
        "for": 3.0,
        "since": None,
        "now": 0.006,
    }
    out: list[tuple[str, dict[str, Any]]] = [
        ("phase", {"name": "guards", "seconds": 0.0}),
        ("guard", {"name": "health", "passed": True, "saw": "0.99"}),
        ("guard", {"name": "error budget", "passed": False, "saw": "4 % left"}),
        ("phase", {"name": "baseline", "seconds": 10.0}),
    ]
    out += [
        ("tick", {"phase": "baseline", "t": i, "elapsed": i, "planned": 10, "requests": i * 50, "abort": [],
                  "slis": {"availability": 1.0, "latency_p95": None}, "signals": {"ready_replicas": 3.0}})
        for i in range(10)
    ]  # fmt: skip
    out += [
        ("phase", {"name": "fault", "seconds": 15.0, "targets": ("inference-1",), "kind": "pod_failure"}),
        ("moment", {"name": "injected", "t": 10.0, "note": ""}),
        ("moment", {"name": "confirmed", "t": 10.04, "note": "inference-1 gone"}),
        ("tick", {"phase": "fault", "t": 17, "elapsed": 7, "planned": 15, "abort": [abort],
                  "slis": {"availability": 0.98, "latency_p95": math.inf}, "signals": {"ready_replicas": 2.0}}),
        ("incident", {"text": "abort: error_rate"}),
    ]  # fmt: skip
    return out


def shown(width: int, extra: list[tuple[str, dict[str, Any]]] | None = None) -> str:
    state = LiveState(experiment(), environment(), "7f3a91c2-long")
    for kind, data in events() + (extra or []):
        state.update(kind, data)
    return "\n".join("".join(t for t, _ in line) for line in state.lines(width))


def test_live_view_says_where_the_run_stands() -> None:
    text = shown(120)
    for part in (
        "serving-pod-failure · sandbox · run 7f3a91c2 ", "✔ health", "✘ error budget: 4 % left",
        "7 / 15 s   pod_failure on inference-1  ·  confirmed after 0.04 s", "baseline   ████████████████████",
        "98.0 %", "SLO ≥ 99 %  ✘", "no answer", "error rate > 5 % for 3 s   now 0.6 %", "Ctrl-C stops and recovers",
        "! abort: error_rate",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "None" not in text


def test_run_id_comes_with_the_guards() -> None:
    state = LiveState(experiment(), environment(), "")
    assert "run" not in "".join(t for t, _ in state.lines(200)[0][:2]).split(" · ")[-1]
    state.update("phase", {"name": "guards", "seconds": 0.0, "run_id": "7f3a91c2-long"})
    state.update("phase", {"name": "baseline", "seconds": 10.0})
    assert "sandbox · run 7f3a91c2" in "".join(t for t, _ in state.lines(120)[0])


def test_crossed_abort_limit_is_said_first() -> None:
    crossed = {"sli": "latency_p95", "limit": 0.3, "side": "above", "for": 2.0, "since": 12.0, "now": 0.5}
    tick = ("tick", {"phase": "fault", "elapsed": 8, "planned": 15, "slis": {}, "signals": {}, "abort": [crossed]})
    text = shown(120, [tick])
    assert "p95 > 300 ms for 2 s   now 500 ms   CROSSED" in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_live_view_never_exceeds_the_terminal(width: int) -> None:
    assert max(len(line) for line in shown(width).splitlines()) <= width


def test_live_view_survives_any_event() -> None:
    state = LiveView(experiment(), environment(), "x", stream=io.StringIO())
    for kind, data in [
        ("tick", {}),
        ("moment", {"t": "?"}),
        ("phase", {}),
        ("guard", {}),
        ("what", {}),
        ("tick", {"abort": 5}),
    ]:
        state(kind, data)


def test_live_view_on_a_stream_that_breaks() -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    with LiveView(experiment(), environment(), "x", stream=io.StringIO()) as view:
        for kind, data in events():
            view(kind, data)
    PlainProgress(Broken())("moment", {"name": "injected", "t": 1.0})


def test_plain_progress_is_one_line_per_moment_and_none_per_tick() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    for kind, data in events():
        progress(kind, data)
    lines = stream.getvalue().splitlines()
    assert len(lines) == len([k for k, _ in events() if k != "tick"])
    assert "guard     ✘ error budget: 4 % left" in lines
    assert "phase     fault, 15 s: pod_failure on inference-1" in lines
    assert "   10.04 s confirmed  inference-1 gone" in lines
    assert "\x1b" not in stream.getvalue()


def test_sparkline_scale() -> None:
    assert sparkline([1.0, 1.0], 10, FLOOR) == "██"
    assert sparkline([1.0, 0.5], 10, FLOOR) == "█▁"
    assert sparkline([0.01, None, 0.3], 10, CEILING) == "▁ █"
    assert sparkline([0.1, math.inf], 10, CEILING) == "▃█"
    assert len(sparkline([1.0] * 100, 5)) == 5
    assert sparkline([], 5) == ""


def test_many_passed_guards_are_summed_up_where_they_do_not_fit() -> None:
    state = LiveState(experiment(), environment(), "7f3a91c2")
    for i in range(10):
        state.update("guard", {"name": f"guard number {i}", "passed": True, "saw": "fine"})
    narrow, wide = (["".join(t for t, _ in line) for line in state.lines(w)] for w in (80, 400))
    assert "guards     10 of 10 guards ✔" in narrow
    assert any("✔ guard number 9" in line for line in wide)
    state.update("guard", {"name": "last", "passed": False, "saw": "bad"})
    assert not any("of 11 guards" in "".join(t for t, _ in line) for line in state.lines(80))


def test_a_stop_is_answered_at_once() -> None:
    stop: tuple[str, dict[str, Any]] = ("moment", {"name": "stop_requested", "t": 18.0, "note": "Ctrl-C"})
    assert "stopping, taking the fault away…" in shown(120, [stop])
    assert "stopping" not in shown(120, [stop, ("moment", {"name": "proven_clean", "t": 18.2})])
    stream = io.StringIO()
    progress = PlainProgress(stream)
    for kind, data in [*events(), stop]:
        progress(kind, data)
    assert stream.getvalue().splitlines()[-1].endswith("stop requested  Ctrl-C; stopping, taking the fault away…")
