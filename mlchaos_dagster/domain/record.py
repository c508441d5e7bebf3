"""What a run saw: enough to judge it again, by newer rules, without new chaos.

All times `t`, `due_s`, … are seconds on the run's own clock: `time.monotonic()` minus `zero_mono`.
`wall(t)` gives the time of day. A record holds facts; the judgement on them is a `Verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.spec import Experiment

STATUS_NO_CONNECTION = 0
STATUS_TIMEOUT = -1
STATUS_UNSENT = -2


class RequestSample(NamedTuple):
    """One request of the open-loop probe."""

    due_s: float
    """When the schedule wanted it sent."""
    sent_s: float
    """When it was sent; `sent_s - due_s` is its lateness."""
    done_s: float
    """When its answer, error or timeout was there; `done_s - due_s` is its corrected latency."""
    status: int
    """HTTP code; 0 no connection, -1 timed out, -2 not sent (too many in flight)."""
    ok: bool
    path: str
    """Which path answered: `model`, `cache`, `error`."""
    replica: str
    item: int = -1
    """Index of the JSON body it carried; -1: none."""
    value: float = math.nan
    """The number in the answer (`probe.value`); NaN: there was none, or nobody looked."""


class SignalSample(NamedTuple):
    """One reading of one gauge."""

    t: float
    name: str
    value: float


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GuardResult(_Fact):
    """One guard: what it saw and what would let the run through."""

    name: str
    passed: bool
    saw: str
    needs: str = ""


class Moment(_Fact):
    """A named instant, to the millisecond."""

    name: Literal[
        "baseline_started",
        "baseline_ended",
        "inject_requested",
        "injected",
        "confirmed",
        "first_bad",
        "breach",
        "stop_requested",
        "recover_requested",
        "proven_clean",
        "window_ended",
        "judged",
        "steady_again",
        "observation_ended",
    ]
    t: float
    note: str = ""


class Span(_Fact):
    """A phase of the run."""

    start: float
    end: float

    @property
    def length(self) -> float:
        """Seconds."""
        return self.end - self.start


class Evidence(_Fact):
    """What a driver read back from the target, never from memory."""

    present: bool
    """Something of the fault is still there: a rule, a hold, a scheduled kill."""
    effective: bool
    """Its effect was seen at the target: a process really gone, a link really slow."""
    lines: tuple[str, ...] = ()
    """The reading, in words, one fact a line."""


class FaultFacts(_Fact):
    """What was injected, where, and whether it was seen."""

    kind: str
    backend: str
    targets: tuple[str, ...] = ()
    existing: int = 0
    """How many targets the selector matched; `len(targets)` of them were hit."""
    params: dict[str, Any] = {}
    confirmed: bool = False
    evidence: tuple[str, ...] = ()
    lease_id: str = ""
    token: int = 0


class AbortFacts(_Fact):
    """Why the fault was taken away early. Times on the run's clock."""

    cause: Literal["limit", "blind", "stop", "signal", "lever", "dagster", "watcher", "fenced", "error", "budget"]
    reason: str
    first_bad_at: float | None = None
    breach_at: float
    clean_at: float | None = None

    @property
    def seconds(self) -> float | None:
        """Breach (the decision) → proven clean (RX-05)."""
        return None if self.clean_at is None else self.clean_at - self.breach_at


class CleanFacts(_Fact):
    """Proof that nothing of the fault is left (RX-01)."""

    proven: bool
    evidence: tuple[str, ...] = ()
    command: str = ""
    """When not proven: the exact command that clears it."""


class ActionFacts(_Fact):
    """One rollback action: why, on what, what came of it, and how it was undone. Times on the run's clock."""

    kind: str
    target: str
    """Logical."""
    why: str
    t: float
    ids: tuple[str, ...] = ()
    """What it changed; empty: nothing needed it."""
    lines: tuple[str, ...] = ()
    """Read back from the target after it was made, and after it was undone."""
    error: str = ""
    lease_id: str = ""
    undone_at: float | None = None
    """When it was as before again; None: it is an act, it did nothing, or it could not be undone (see `command`)."""
    command: str = ""
    """When it could not be undone: what undoes it."""


class Finding(_Fact):
    """What a backend judged by itself in its own fault: a probe of a ChaosEngine, the verdict of its ChaosResult."""

    name: str
    passed: bool | None
    """None: the backend did not come to a judgement."""
    saw: str
    """Its own words: which probe, what it expected, what it found."""


class RunRecord(_Fact):
    """The facts of one run."""

    schema_version: Literal["mlchaos/record/v1"] = "mlchaos/record/v1"
    run_id: str
    experiment: Experiment
    environment: Environment
    seed: int
    shadow: bool = False
    started_by: str = ""
    versions: dict[str, str] = {}
    zero_mono: float
    zero_wall: float
    window_s: float = 0.0
    """Planned length of the fault window after scaling."""
    guards: tuple[GuardResult, ...] = ()
    moments: tuple[Moment, ...] = ()
    baseline: Span | None = None
    window: Span | None = None
    """Injected (or would have been) → recover requested."""
    after: Span | None = None
    """Proven clean → observation ended."""
    fault: FaultFacts | None = None
    abort: AbortFacts | None = None
    clean: CleanFacts | None = None
    actions: tuple[ActionFacts, ...] = ()
    """Rollback actions, in their order."""
    findings: tuple[Finding, ...] = ()
    """Of a backend that judges for itself, after a full window."""
    error: str = ""
    """An error of ours or of a backend, one line."""
    incidents: tuple[str, ...] = ()
    guards_s: float = 0.0
    samples_file: str = ""
    samples_sha256: str = ""

    def wall(self, t: float) -> float:
        """Unix time of an instant of this run."""
        return self.zero_wall + t

    def moment(self, name: str) -> float | None:
        """The first instant with this name."""
        return next((m.t for m in self.moments if m.name == name), None)

    @property
    def full(self) -> Span | None:
        """The window as it was asked for: from the fault's being made to its planned end. A backend may need many seconds before.

        None where it was not reached.
        """
        begun, ended = self.moment("injected"), self.moment("window_ended")
        return None if begun is None or ended is None or ended <= begun else Span(start=begun, end=ended)

    @property
    def tested(self) -> Span | None:
        """The window without the wait for a backend's own judgement, in which its fault may long be over by itself."""
        ended = self.moment("window_ended")
        if self.window is None or ended is None or self.moment("judged") is None:
            return self.window
        return Span(start=self.window.start, end=ended)


class Samples:
    """All raw measurements of a run, as columns."""

    def __init__(
        self, requests: Iterable[RequestSample] = (), signals: Iterable[SignalSample] = (), gaps: Iterable[Span] = ()
    ) -> None:
        self.requests: list[RequestSample] = list(requests)
        self.signals: list[SignalSample] = list(signals)
        self.gaps: list[Span] = list(gaps)

    def requests_due(self, span: Span) -> list[RequestSample]:
        """Requests whose scheduled time lies in the span (the census of that phase)."""
        return [r for r in self.requests if span.start <= r.due_s < span.end]

    def requests_open_or_due(self, span: Span) -> list[RequestSample]:
        """Requests due in the span, and those due before it that were still unanswered when it began."""
        return [r for r in self.requests if r.due_s < span.end and (r.due_s >= span.start or r.done_s > span.start)]

    def signal(self, name: str) -> list[tuple[float, float]]:
        """(t, value) of one signal, in time order."""
        return [(s.t, s.value) for s in self.signals if s.name == name]

    def to_columns(self) -> dict[str, Any]:
        """JSON-able columns, lossless: a stored run is judged on the very same numbers."""
        columns: Sequence[str] = RequestSample._fields
        requests = {name: [getattr(r, name) for r in self.requests] for name in columns}
        requests["value"] = [None if math.isnan(v) else v for v in requests["value"]]
        names = sorted({s.name for s in self.signals})
        return {
            "requests": requests,
            "signals": {n: [[t, v] for t, v in self.signal(n)] for n in names},
            "gaps": [[g.start, g.end] for g in self.gaps],
        }

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> Samples:
        """The inverse of `to_columns`; columns that an older version did not write take their defaults."""
        requests = columns["requests"]
        n = len(requests["due_s"])
        known = {name: requests[name] for name in RequestSample._fields if name in requests}
        known |= {name: [d] * n for name, d in RequestSample._field_defaults.items() if name not in requests}
        known["value"] = [math.nan if v is None else v for v in known["value"]]
        rows = zip(*(known[name] for name in RequestSample._fields), strict=True)
        signals = [SignalSample(t, n, v) for n, steps in columns["signals"].items() for t, v in steps]
        signals.sort(key=lambda s: s.t)
        return cls(
            (RequestSample(*row) for row in rows), signals, (Span(start=a, end=b) for a, b in columns.get("gaps", []))
        )


class SliResult(_Fact):
    """One SLI before, during and after, with its effect."""

    unit: str
    baseline: float | None
    during: float | None
    after: float | None
    effect: float | None = None
    """during − baseline, in `unit`."""
    ci_low: float | None = None
    ci_high: float | None = None
    reliable: bool = True
    why: str = ""
    """Why the interval is missing or not to be trusted."""
    samples: int = 0
    """Requests (or readings) in the window that counted."""
    late: int = 0
    """Excluded because they were sent too late."""
    detectable: float | None = None
    """Smallest harmful change this window would have seen (80 % power)."""
    slo: str = ""
    """The objective, as written; empty: none."""
    met: bool | None = None


class GoldenFacts(_Fact):
    """The golden predictions of a run, and how the answers of its window compare with them."""

    digest: str
    """SHA-256 over items and golden numbers rounded to the tolerance: equal in two runs that were served alike."""
    items: int
    """Items with a golden number that answers are compared with."""
    unstable: tuple[int, ...] = ()
    """Items left out in the window: their baseline answers disagree by more than the tolerance."""
    declared: bool = False
    """Whether the numbers are the environment's; else they are the baseline's medians."""
    tolerance: float = 0.0
    compared: int = 0
    """Answers of the window that could be compared."""
    wrong: int = 0
    """Of these, how many differ or carry no number."""
    without_number: int = 0
    first_item: int | None = None
    """Of the first wrong answer."""
    first_value: float | None = None
    """None: it carried no number."""
    first_golden: float | None = None
    """None: nothing is known of this item."""


class ExpectationResult(_Fact):
    """An expectation and what was seen."""

    expected: str
    seen: bool | None
    """None: not measured."""
    saw: str


class RecoveryResult(_Fact):
    """Fault gone → detect → rescheduled → ready → steady, in seconds (RX-06)."""

    detect_s: float | None = None
    """Effect began → the platform acted on it (a replica left the balance, a breaker opened)."""
    reschedule_s: float | None = None
    """Fault taken away → the replacement process runs."""
    ready_s: float | None = None
    """Fault taken away → as many replicas ready as before."""
    steady_s: float | None = None
    """Fault taken away → every objective holds again, for the dwell time."""
    censored: tuple[str, ...] = ()
    """Parts that had not happened when the observation ended; their value is a lower bound."""
    within_s: float = 0.0
    met: bool | None = None


class Verdict(_Fact):
    """A judgement on a record. Pure: the same record gives the same verdict."""

    outcome: Outcome
    reasons: tuple[str, ...]
    """In words, the decisive one first."""
    slis: dict[str, SliResult] = {}
    expectations: tuple[ExpectationResult, ...] = ()
    recovery: RecoveryResult = RecoveryResult()
    fault_fired: bool = False
    steady_before: bool | None = None
    held: bool | None = None
    golden: GoldenFacts | None = None
    """None: the probe reads no numbers, or there was no baseline."""
    advice: str = ""
    """How to see what was not seen, or what would let the run through."""
    judged_by: str = ""
