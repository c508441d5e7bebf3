"""The watch loop: samples in, and at every look the question whether the fault must go now.

Owns the sliding SLIs, the abort conditions, blindness, and people's stop requests. Knows nothing of
how a fault is made or taken away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlchaos_dagster.domain.environment import SHIFT_MEASURES, Environment
from mlchaos_dagster.domain.record import STATUS_UNSENT, AbortFacts, RequestSample, SignalSample, Span
from mlchaos_dagster.domain.spec import AbortCondition
from mlchaos_dagster.domain.units import show_value
from mlchaos_dagster.engine.ports import Clock, RequestSource, SignalSource, StopSource, Watcher
from mlchaos_dagster.judgement.census import Requests
from mlchaos_dagster.judgement.measures import request_value, requests_of, signal_name
from mlchaos_dagster.judgement.shift import FEWEST_VALUES, Reference

FEWEST = 5
"""Requests a sliding window needs before a condition is judged on it: one lost request of one is no 100 %."""
SLOW_TICK_S = 0.5
"""How often progress is told; people read no faster."""


@dataclass
class Tracker:
    """One abort condition and since when it has been crossed."""

    condition: AbortCondition
    since: float | None = None

    def look(self, t: float, value: float | None) -> bool:
        """Note one reading; True when the limit has been crossed long enough."""
        if value is None:
            return self.since is not None and t - self.since >= self.condition.for_s
        if not self.condition.crossed_by(value):
            self.since = None
            return False
        if self.since is None:
            self.since = t
        return t - self.since >= self.condition.for_s


class Live:
    """SLIs over the last `width_s` seconds, from what has been answered so far."""

    def __init__(self, environment: Environment, width_s: float) -> None:
        self.environment = environment
        self.width_s = width_s
        self.requests: deque[RequestSample] = deque()
        self.signals: dict[str, float] = {}
        self.reference: Reference | None = None
        """What the baseline answered, once it is known; before, SLIs of answered numbers are None."""
        self._answers: deque[RequestSample] = deque(maxlen=2 * FEWEST_VALUES)
        self._shifts = [n for n, s in environment.slis.items() if s.measure in SHIFT_MEASURES]
        self._read_at: dict[str, float] = {}

    def add(self, requests: Sequence[RequestSample], signals: Sequence[SignalSample]) -> None:
        """New measurements. Requests sent too late say more of the probe than of the target."""
        late = self.environment.sampling.max_lateness
        on_time = [r for r in requests if r.status != STATUS_UNSENT and r.sent_s - r.due_s <= late]
        self.requests.extend(on_time)
        if self._shifts and self.reference is not None:
            self._answers.extend(r for r in on_time if r.ok)
        for s in signals:
            self.signals[s.name] = s.value
            self._read_at[s.name] = s.t

    def unread_for(self, name: str, t: float, began: float = 0.0) -> float:
        """Seconds since the last reading of a signal; since `began` when there was none."""
        return t - self._read_at.get(name, began)

    def values(self, t: float) -> dict[str, float | None]:
        """Every SLI now; None where there is too little to say."""
        while self.requests and self.requests[0].done_s < t - self.width_s:
            self.requests.popleft()
        recent, reference = requests_of(self.requests), self.reference
        if reference is not None:
            recent = reference.judged(recent)
        answers = self._recent_answers(t)
        values: dict[str, float | None] = {}
        for name, sli in self.environment.slis.items():
            if sli.measure is not None:
                over = answers if name in self._shifts else recent
                if sli.measure == "golden_error_rate":
                    over = recent.select(recent.compared)
                values[name] = request_value(sli.measure, over, reference) if len(over) >= FEWEST else None
            else:
                source = signal_name(name, sli)
                fresh = self.unread_for(source, t) <= self.environment.sampling.blind_for
                values[name] = self.signals.get(source) if fresh else None
        return values

    def _recent_answers(self, t: float) -> Requests:
        """The newest answers, for distances: at a low rate the sliding window alone holds too few for any."""
        while self._answers and self._answers[0].done_s < t - max(self.width_s, self.environment.sampling.blind_for):
            self._answers.popleft()
        return requests_of(self._answers)


class Watch:
    """Pumps the sources of one run and decides, at every look, whether to go on."""

    def __init__(
        self,
        environment: Environment,
        clock: Clock,
        requests: RequestSource,
        signals: SignalSource,
        stops: Sequence[StopSource],
        tell: Callable[[str, dict[str, Any]], None],
        needed: frozenset[str] = frozenset(),
    ) -> None:
        self.environment, self.clock = environment, clock
        self.request_source, self.signal_source, self.stops, self.tell = requests, signals, stops, tell
        self.zero = clock.monotonic()
        self.requests: list[RequestSample] = []
        self.signals: list[SignalSample] = []
        self.gaps: list[Span] = []
        self.live = Live(environment, environment.sampling.window)
        self.needed = needed
        """Signals that an objective, a limit or an expectation rests on: their silence is blindness, too."""
        self._last_seen = self._began = 0.0
        self._last_told = -1.0
        self.running = False

    @property
    def now(self) -> float:
        """Seconds on the run's clock."""
        return self.clock.monotonic() - self.zero

    def start(self) -> None:
        """Start the sources. Raises ProbeError."""
        self.running = True
        self.request_source.start(self.zero)
        self.signal_source.start(self.zero)
        self._last_seen = self._began = self.now

    def stop(self) -> None:
        """Stop the sources and keep what they still had. Idempotent."""
        if not self.running:
            return
        self.running = False
        self._keep(self.request_source.stop(), self.signal_source.stop())
        self.requests.sort(key=lambda r: r.due_s)
        self.signals.sort(key=lambda s: s.t)

    def pump(self) -> float:
        """Take in what was measured since the last look; returns now."""
        if self.running:
            self._keep(self.request_source.drain(), self.signal_source.drain())
        return self.now

    def _keep(self, requests: list[RequestSample], signals: list[SignalSample]) -> None:
        self.requests += requests
        self.signals += signals
        self.live.add(requests, signals)
        on_time = self.environment.sampling.max_lateness
        # Moment by moment: that we looked late does not mean that nothing was measured meanwhile.
        for done in sorted(r.done_s for r in requests if r.status != STATUS_UNSENT and r.sent_s - r.due_s <= on_time):
            if done - self._last_seen > self.environment.sampling.blind_for:
                self.gaps.append(Span(start=self._last_seen, end=done))
            self._last_seen = max(self._last_seen, done)

    def stop_asked(self, t: float) -> AbortFacts | None:
        """Somebody's word, if it was given."""
        for source in self.stops:
            asked = source.requested()
            if asked is not None:
                return AbortFacts(cause=asked[0], reason=asked[1], breach_at=t)  # type: ignore[arg-type]
        return None

    def blind(self, t: float) -> AbortFacts | None:
        """No measurement for too long, of the probe or of a signal that the experiment rests on."""
        limit, missing = self.environment.sampling.blind_for, t - self._last_seen
        for name in sorted(self.needed):
            silent = self.live.unread_for(name, t, self._began)
            if silent > limit:
                self.gaps.append(Span(start=t - silent, end=t))
                return AbortFacts(
                    cause="blind",
                    reason=f"{name} could not be read for {silent:.1f} s (blind_for {limit:g} s){self._trouble}",
                    first_bad_at=t - silent,
                    breach_at=t,
                )
        if missing <= limit:
            return None
        self.gaps.append(Span(start=self._last_seen, end=t))
        return AbortFacts(
            cause="blind",
            reason=f"no request of the probe was answered or timed out for {missing:.1f} s "
            f"(blind_for {self.environment.sampling.blind_for:g} s)",
            first_bad_at=self._last_seen,
            breach_at=t,
        )

    @property
    def _trouble(self) -> str:
        """Why signals are not told, where their source knows."""
        said = " ".join(str(getattr(self.signal_source, "trouble", "")).split())
        return f": {said[:300]}" if said else ""

    def limits(self, t: float, trackers: Sequence[Tracker], values: dict[str, float | None]) -> AbortFacts | None:
        """The first abort condition that has been crossed for its time."""
        for tracker in trackers:
            condition = tracker.condition
            if tracker.look(t, values.get(condition.sli)):
                side = "above" if condition.above is not None else "below"
                now = values.get(condition.sli)
                return AbortFacts(
                    cause="limit",
                    reason=f"{condition.sli} {side} {show_value(condition.limit.value, condition.limit.unit)} for "
                    f"{condition.for_s:g} s (now {show_value(now, condition.limit.unit)})",
                    first_bad_at=tracker.since,
                    breach_at=t,
                )
        return None

    def wants_out(
        self,
        t: float,
        trackers: Sequence[Tracker] = (),
        watcher: Watcher | None = None,
        values: dict[str, float | None] | None = None,
    ) -> AbortFacts | None:
        """The first reason to end it now: somebody's word, a lost watchdog, a crossed limit, blindness."""
        return (
            self.stop_asked(t)
            or (_watcher_lost(t, watcher) if watcher is not None and not watcher.alive() else None)
            or self.limits(t, trackers, self.live.values(t) if values is None else values)
            or self.blind(t)
        )

    def until(
        self,
        end: float,
        phase: str,
        *,
        trackers: Sequence[Tracker] = (),
        each: Callable[[float], AbortFacts | bool | None] | None = None,
        watcher: Watcher | None = None,
        start: float | None = None,
    ) -> AbortFacts | None:
        """Look every `sampling.interval` until `end`; returns why to stop early, or None.

        `each(t)` runs at every look: an AbortFacts aborts, True ends the phase early as wished.
        """
        begun = self.now if start is None else start
        while True:
            t = self.pump()
            values = self.live.values(t)
            abort = self.wants_out(t, trackers, watcher, values)
            if abort:
                return abort
            if each is not None:
                said = each(t)
                if isinstance(said, AbortFacts):
                    return said
                if said:
                    return None
            if t - self._last_told >= SLOW_TICK_S:
                self._last_told = t
                self._tick(phase, t, begun, end, values, trackers)
            if t >= end:
                return None
            self.clock.sleep(min(self.environment.sampling.interval, end - t))

    def _tick(
        self,
        phase: str,
        t: float,
        begun: float,
        end: float,
        values: dict[str, float | None],
        trackers: Sequence[Tracker],
    ) -> None:
        aborts = [
            {
                "sli": k.condition.sli,
                "limit": k.condition.limit.value,
                "unit": k.condition.limit.unit,
                "side": "above" if k.condition.above is not None else "below",
                "for": k.condition.for_s,
                "since": k.since,
                "now": values.get(k.condition.sli),
            }
            for k in trackers
        ]
        self.tell(
            "tick",
            {
                "phase": phase,
                "t": t,
                "elapsed": t - begun,
                "planned": end - begun,
                "slis": values,
                "signals": dict(self.live.signals),
                "abort": aborts,
                "requests": len(self.requests),
            },
        )


def _watcher_lost(t: float, watcher: Watcher) -> AbortFacts:
    which = getattr(watcher, "why_not", "")
    return AbortFacts(cause="watcher", reason=f"a heartbeat was lost: {which or 'the watchdog process'}", breach_at=t)
