"""What a person sees while a run goes on: a live view on a terminal, one line per moment elsewhere.

Both take the engine's progress events (`progress(kind, data)`), never raise and never block: a broken pipe or a
resized window must not disturb a run that holds a fault.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO, TypeAlias

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment, Objective, Quantity
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.domain.units import show_duration, show_value
from mlchaos_dagster.evidence.rows import BREAKER_STATES, BROKEN, MET, limit_text, quantity_text
from mlchaos_dagster.evidence.selection import shown_name

Line: TypeAlias = list[tuple[str, str]]
"""Segments: text and the name of its style."""

PHASES = ("baseline", "fault", "recovery")
_BLOCKS = "▁▂▃▄▅▆▇█"
_HISTORY = 600
_LABEL = 11
_BAR = 20


class LiveState:
    """What is known of a run so far, and how it looks at a given width. Knows nothing of terminals."""

    def __init__(self, experiment: Experiment, environment: Environment, run_id: str, *, shadow: bool = False) -> None:
        self.experiment, self.environment, self.run_id, self.shadow = experiment, environment, run_id, shadow
        self.guards: list[tuple[str, bool, str]] = []
        self.planned: dict[str, float] = {}
        self.elapsed: dict[str, float] = {}
        self.phase = ""
        self.notes: dict[str, str] = {}
        self.series: dict[str, deque[float | None]] = {}
        self.aborts: list[dict[str, Any]] = []
        self.requests = 0
        self.incidents: list[str] = []
        self.stopping = ""
        """Said from the request to stop until the target is proven clean."""

    def update(self, kind: str, data: dict[str, Any]) -> None:
        """Take one progress event; an unknown one is ignored."""
        if kind == "phase":
            self._phase(data)
        elif kind == "guard":
            self.guards.append((str(data.get("name", "")), bool(data.get("passed")), str(data.get("saw", ""))))
        elif kind == "moment":
            self._moment(data)
        elif kind == "tick":
            self._tick(data)
        elif kind == "incident":
            self.incidents.append(str(data.get("text", "")))

    def _phase(self, data: dict[str, Any]) -> None:
        self.phase = str(data.get("name", ""))
        self.run_id = str(data.get("run_id") or self.run_id)
        self.planned[self.phase] = float(data.get("seconds") or 0.0)
        self.elapsed.setdefault(self.phase, 0.0)
        if self.phase == "fault":
            targets = listed(data.get("targets") or ()) or self.experiment.target
            kind = data.get("kind") or self.experiment.fault.kind
            self.notes["fault"] = f"{'shadow, not injected: ' if self.shadow else ''}{kind} on {targets}"

    def _moment(self, data: dict[str, Any]) -> None:
        name, t = str(data.get("name", "")), float(data.get("t") or 0.0)
        if name == "injected":
            self.elapsed["injected_at"] = t
        elif name == "confirmed":
            after = t - self.elapsed.get("injected_at", t)
            self.notes["fault"] = f"{self.notes.get('fault', '')}  ·  confirmed after {after:.2f} s"
        elif name == "stop_requested":
            self.stopping = stopping_text(self.phase)
            self.notes["recovery"] = self.stopping
        elif name == "proven_clean":
            self.stopping = ""
            self.notes["recovery"] = "proven clean"

    def _tick(self, data: dict[str, Any]) -> None:
        phase = str(data.get("phase", ""))
        self.phase = phase or self.phase
        self.elapsed[phase] = max(0.0, float(data.get("elapsed") or 0.0))
        if data.get("planned"):
            self.planned[phase] = float(data["planned"])
        self.requests = int(data.get("requests") or self.requests)
        now: dict[str, Any] = {**(data.get("signals") or {}), **(data.get("slis") or {})}
        for name, value in now.items():
            known = isinstance(value, (int, float)) and not math.isnan(value)
            self.series.setdefault(str(name), deque(maxlen=_HISTORY)).append(float(value) if known else None)
        self.aborts = list(data.get("abort") or ())

    # ---- looks

    def lines(self, width: int) -> list[Line]:
        """The view, at most `width` columns wide."""
        run = f" · run {self.run_id[:8]}" if self.run_id else ""
        title: Line = [(self.experiment.name, "bold"), (f" · {self.environment.name}{run}", "")]
        used = sum(len(t) for t, _ in title)
        hypothesis = "SHADOW (nothing is injected)  " if self.shadow else ""
        hypothesis += self.experiment.hypothesis
        room = width - used - 2
        if room > 24:
            title.append(("  " + _cut(hypothesis, room), "dim"))
        lines: list[Line] = [title]
        lines.append(self._guards(width))
        lines += [self._bar(phase) for phase in PHASES]
        lines.append([])
        lines += self._measurements(width)
        lines.append(self._abort())
        last = (self.stopping, "bold magenta") if self.stopping else ("Ctrl-C stops and recovers", "dim")
        lines.append([(" " * _LABEL, ""), last])
        lines += [[("! " + text, "red")] for text in self.incidents[-3:]]
        return [_clip(line, width) for line in lines]

    def _guards(self, width: int) -> Line:
        line: Line = [(f"{'guards':<{_LABEL}}", "bold")]
        for name, passed, saw in self.guards:
            mark, style = (MET, "green") if passed else (BROKEN, "bold red")
            line += [(f"{mark} ", style), (name if passed else f"{name}: {saw}", ""), ("   ", "")]
        if not self.guards:
            return [*line, ("…", "dim")]
        if sum(len(text) for text, _ in line[:-1]) > width and all(passed for _, passed, _ in self.guards):
            count = len(self.guards)
            return [line[0], (f"{count} of {count} guards ", ""), (MET, "green")]
        return line

    def _bar(self, phase: str) -> Line:
        planned, elapsed = self.planned.get(phase, 0.0), self.elapsed.get(phase, 0.0)
        later = phase in PHASES and self.phase in PHASES and PHASES.index(self.phase) > PHASES.index(phase)
        done = 1.0 if later and planned else min(1.0, elapsed / planned) if planned else 0.0
        full = round(done * _BAR)
        style = {"baseline": "blue", "fault": "yellow", "recovery": "green"}[phase]
        line: Line = [(f"{phase:<{_LABEL}}", "bold"), ("█" * full, style), ("░" * (_BAR - full), "dim")]
        if planned:
            shown = f"{elapsed if later else planned:.0f} s" if later else f"{elapsed:.0f} / {planned:.0f} s"
            line.append((f"  {shown:<11}", ""))
        if note := self.notes.get(phase, ""):
            line.append((note, ""))
        elif phase == "baseline" and self.requests and self.phase == "baseline":
            line.append((f"{self.requests} requests", ""))
        return line

    def _measurements(self, width: int) -> list[Line]:
        objectives: dict[str, Objective] = {}
        for o in self.experiment.steady_state:
            objectives.setdefault(o.sli, o)
        spoken = [e.subject for e in self.experiment.expect]
        names = [n for n in (*objectives, *spoken, "ready_replicas") if n in self.series]
        label = max([_LABEL, *(len(shown_name(n)) + 2 for n in names)])
        spark = max(10, min(60, width - label - 11 - 22))
        lines: list[Line] = []
        for name in dict.fromkeys(names):
            values = list(self.series[name])
            now = values[-1] if values else None
            objective = objectives.get(name)
            met = None if objective is None or now is None else objective.met_by(now)
            line: Line = [(f"{shown_name(name):<{label}}", "bold")]
            line.append((f"{self._value(name, now):<11}", "bold red" if met is False else ""))
            line.append((f"{sparkline(values, spark, objective):<{spark}}", "cyan"))
            if objective is not None:
                mark = {True: MET, False: BROKEN, None: " "}[met]
                line.append((f"  SLO {limit_text(objective)}  ", ""))
                line.append((mark, "green" if met else "bold red"))
            lines.append(line)
        return lines

    def _value(self, name: str, value: float | None) -> str:
        if value is not None and "breaker" in name and value in BREAKER_STATES:
            return BREAKER_STATES[value]
        sli = self.environment.slis.get(name)
        return show_value(value, sli.shown_unit if sli else "")

    def _abort(self) -> Line:
        """The condition nearest to tripping: one that is crossed, else the first."""
        line: Line = [(f"{'abort if':<{_LABEL}}", "bold")]
        if not self.aborts:
            conditions = (*self.experiment.abort, *self.environment.limits.abort)
            texts = [
                f"{shown_name(c.sli)} {'>' if c.above is not None else '<'} {quantity_text(c.limit)} "
                f"for {show_duration(c.for_s)}"
                for c in conditions
            ]
            return [*line, (" · ".join(texts) or "no limit declared; blind or stopped", "")]
        nearest = next((a for a in self.aborts if a.get("since") is not None), self.aborts[0])
        name = str(nearest.get("sli", ""))
        unit: Any = nearest.get("unit")
        if unit not in ("ratio", "s", ""):
            sli = self.environment.slis.get(name)
            unit = sli.shown_unit if sli else ""
        sign = "<" if nearest.get("side") == "below" else ">"
        limit, now = nearest.get("limit"), nearest.get("now")
        shown = quantity_text(Quantity(value=float(limit), unit=unit)) if isinstance(limit, (int, float)) else "–"
        text = f"{shown_name(name)} {sign} {shown} for {show_duration(float(nearest.get('for') or 0.0))}"
        crossed = nearest.get("since") is not None
        line.append((f"{text}   now {self._value(name, now)}", "bold red" if crossed else ""))
        if crossed:
            line.append(("   CROSSED", "bold red"))
        return line


class LiveView:
    """A live view on a terminal: `with LiveView(…) as view: run(progress=view)`."""

    def __init__(
        self,
        experiment: Experiment,
        environment: Environment,
        run_id: str,
        *,
        shadow: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        from rich.console import Console

        self._state = LiveState(experiment, environment, run_id, shadow=shadow)
        # The view goes to stderr by default: stdout is for the result alone.
        self._console = Console(file=stream, stderr=stream is None, highlight=False)
        self._lock = threading.Lock()
        self._live: Any = None

    def __enter__(self) -> LiveView:
        from rich.live import Live

        self._live = Live(
            get_renderable=self._render, console=self._console, refresh_per_second=5, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """One progress event. Only remembers it; a thread of rich draws."""
        with self._lock, contextlib.suppress(TypeError, ValueError, AttributeError, KeyError):
            self._state.update(kind, data)

    def _render(self) -> Any:
        from rich.text import Text

        with self._lock:
            lines = self._state.lines(self._console.width)
        text = Text(no_wrap=True, overflow="crop")
        for i, line in enumerate(lines):
            if i:
                text.append("\n")
            for part, style in line:
                text.append(part, style or None)
        return text


def stopping_text(phase: str) -> str:
    """What a request to stop makes the run do now."""
    return "stopping, taking the fault away…" if phase == "fault" else "stopping…"


class PlainProgress:
    """One line per phase, guard, moment and incident; none per sample. For logs and pipes."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        self._stream, self._prefix, self._phase = stream, prefix, ""

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """One progress event; a stream that is gone is ignored."""
        line = plain_line(kind, data)
        if kind == "phase":
            self._phase = str(data.get("name", ""))
        elif kind == "moment" and data.get("name") == "stop_requested":
            line += f"; {stopping_text(self._phase)}"
        if line:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(f"{self._prefix}{line}\n")
                self._stream.flush()


def plain_line(kind: str, data: dict[str, Any]) -> str:
    """One event as one line; empty for ticks and unknown kinds."""
    if kind == "phase":
        seconds = data.get("seconds")
        length = f", {show_duration(float(seconds))}" if seconds else ""
        targets = listed(data.get("targets") or ())
        on = f": {data.get('kind', 'fault')} on {targets}" if targets else ""
        return f"phase     {data.get('name', '')}{length}{on}"
    if kind == "guard":
        mark = MET if data.get("passed") else BROKEN
        return f"guard     {mark} {data.get('name', '')}: {data.get('saw', '')}"
    if kind == "moment":
        note = f"  {data['note']}" if data.get("note") else ""
        return f"{float(data.get('t') or 0.0):8.2f} s {str(data.get('name', '')).replace('_', ' ')}{note}"
    if kind == "incident":
        return f"incident  {data.get('text', '')}"
    return ""


def sparkline(values: Sequence[float | None], width: int, objective: Objective | None = None) -> str:
    """The newest `width` values as blocks, on a scale that shows where the objective lies; a gap is a blank."""
    recent = list(values)[-width:]
    finite = [v for v in recent if v is not None and math.isfinite(v)]
    if not finite:
        return " " * len(recent)
    low, high = (0.0, max(finite)) if objective is None or not objective.floor else (min(finite), max(finite))
    if objective is not None:
        limit = objective.limit.value
        # One more step beyond the limit, so that touching it is seen; a floor close to 1 keeps its small scale.
        low, high = (min(low, limit - abs(1 - limit)), high) if objective.floor else (low, max(high, limit))
    span = high - low or 1.0
    out: list[str] = []
    for v in recent:
        if v is None:
            out.append(" ")
        elif math.isinf(v):
            out.append(_BLOCKS[-1])
        else:
            out.append(_BLOCKS[min(7, max(0, round((v - low) / span * 7)))])
    return "".join(out)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)].rstrip() + "…"


def _clip(line: Line, width: int) -> Line:
    out: Line = []
    left = width
    for text, style in line:
        if left <= 0:
            break
        out.append((text[:left], style))
        left -= len(text)
    return out
