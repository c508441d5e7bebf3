"""Guards: what must be true before anything is injected. Unknown is never safe.

A guard returns what it saw and what would let the run through; one that crashes refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from mlchaos_dagster.domain.record import GuardResult
from mlchaos_dagster.domain.targets import listed
from mlchaos_dagster.domain.units import show_duration, show_percent
from mlchaos_dagster.engine import actions
from mlchaos_dagster.engine.active import ENDED
from mlchaos_dagster.errors import DriverUnavailable, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.domain.record import RunRecord, Verdict
    from mlchaos_dagster.engine.ports import Objection
    from mlchaos_dagster.engine.run import Run

PHASE_WORDS = {ENDED: "writing its report"}
STAGE_GUARD = "stage before held"
CLOCK_S = 60.0
"""A run that ended this far in the future was dated by a clock that is wrong."""
WATCHER_START_S = 10.0
"""How long the watchdog process may take to beat for the first time; a loaded machine starts Python slowly."""


def ledger_clean(run: Run) -> GuardResult:
    """No lease file is unreadable: an unknown fault may be live behind it."""
    broken = run.kit.ledger.unreadable()
    return GuardResult(
        name="ledger readable",
        passed=not broken,
        saw="every lease can be read" if not broken else f"unreadable: {', '.join(broken)}",
        needs="" if not broken else "`mlchaos recover` (it takes the fault behind an unreadable lease away first)",
    )


def lever_released(run: Run) -> GuardResult:
    """Nobody pulled the lever, and no stop was asked for this run."""
    asked = run.watch.stop_asked(run.watch.now)
    return GuardResult(
        name="lever released",
        passed=asked is None,
        saw="no stop requested" if asked is None else asked.reason,
        needs="" if asked is None else f"`mlchaos stop --release -e {run.environment.name}` once it is safe",
    )


def gate_open(run: Run) -> GuardResult:
    """The error-budget sensor has not closed this environment's gate."""
    closed = read_gate(run.kit.gate)
    return GuardResult(
        name="gate open",
        passed=closed is None,
        saw="open" if closed is None else f"closed: {closed}",
        needs="" if closed is None else "the error budget back above its limit (the sensor opens the gate again)",
    )


def read_gate(path: Path) -> str | None:
    """Why the gate is closed, or None. An unreadable gate is closed."""
    try:
        state = json.loads(path.read_text())
        return str(state.get("reason") or "no reason given") if state.get("closed") else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as e:
        return f"the gate file cannot be read ({e})"


def no_freeze(run: Run) -> GuardResult:
    """No freeze window covers now, nor the planned end of the run."""
    now = run.kit.clock.wall()
    begin, end = (datetime.fromtimestamp(t, timezone.utc) for t in (now, now + run.longest_s))
    for freeze in run.environment.freezes:
        if freeze.start < end and begin < freeze.end:
            return GuardResult(
                name="no freeze",
                passed=False,
                saw=f"frozen until {freeze.end.isoformat()}: {freeze.reason}",
                needs=f"a start after {freeze.end.isoformat()}",
            )
    return GuardResult(name="no freeze", passed=True, saw="no freeze window")


def stage_before_held(run: Run) -> GuardResult:
    """What this experiment waits for has held here, and lately. Only running it (again) opens this guard."""
    name, within = run.experiment.depends_on, run.experiment.depends_within
    if name is None:
        return GuardResult(name=STAGE_GUARD, passed=True, saw="waits for no other experiment")
    now = run.kit.clock.wall()
    try:
        found = run.kit.store.latest(name, run.environment.name, now - within)
        saw, passed = _held(name, found, now, within)
    except StoreError as e:
        saw, passed = f"whether {name} held cannot be told: {e}", False
    needs = "" if passed else f"{name} HELD here within {show_duration(within)}: `mlchaos run {name}`"
    return GuardResult(name=STAGE_GUARD, passed=passed, saw=saw, needs=needs)


def _held(name: str, found: tuple[RunRecord, Verdict | None] | None, now: float, within: float) -> tuple[str, bool]:
    """What the newest run came to, in words, and whether it is good enough."""
    if found is None:
        return f"no run of {name} here within {show_duration(within)}", False
    record, verdict = found
    ended = record.wall(max([0.0, *(m.t for m in record.moments)]))
    age, which = now - ended, f"(run {record.run_id[:8]})"
    if verdict is None:
        return f"{name} was not judged {which}", False
    word = f"SHADOW-{verdict.outcome.value}" if record.shadow else verdict.outcome.value
    if record.shadow or not verdict.outcome.is_pass:
        return f"{name} {word} {which}", False
    if age > within:
        return f"{name} {word} {show_duration(age)} ago {which}", False
    if age < -CLOCK_S:
        return f"{name} {word} {show_duration(-age)} from now {which}: a clock is wrong", False
    return f"{name} {word} {show_duration(max(0.0, age))} ago {which}", True


def target_resolved(run: Run) -> GuardResult:
    """The selector matches, and the blast radius fits what exists."""
    target = run.environment.targets[run.experiment.target]
    try:
        existing = run.kit.driver.resolve(target)
    except DriverUnavailable as e:
        return GuardResult(
            name="target resolved", passed=False, saw=str(e), needs="a backend that is there and answers"
        )
    try:
        run.freeze_targets(existing)
    except ValueError as e:
        return GuardResult(
            name="blast radius",
            passed=False,
            saw=f"{target.select} matches {len(existing)}: {e}",
            needs="a selector or blast radius that fits what exists",
        )
    share = len(run.targets) / len(existing)
    passed = share <= run.environment.limits.max_fraction + 1e-9
    limit = show_percent(run.environment.limits.max_fraction, 0)
    return GuardResult(
        name="blast radius",
        passed=passed,
        saw=f"{listed(run.targets, 10)}: {run.experiment.blast_radius.words(len(run.targets), len(existing))}",
        needs="" if passed else f"at most {limit} of a target (limits.max_fraction)",
    )


def backend_willing(run: Run) -> GuardResult:
    """The backend has no objection: permissions, opt-in, other chaos on the target, what would fight the fault."""
    ask = getattr(run.kit.driver, "preflight", None)
    if ask is None and run.experiment.rollback is None:
        return GuardResult(name="backend willing", passed=True, saw="it has no conditions of its own")
    fault, target = run.experiment.fault, run.environment.targets[run.experiment.target]
    objections: tuple[Objection, ...] = ()
    if ask is not None:
        objections = ask(fault.kind, run.targets, run.existing, fault.params(), target=target)
    objections += tuple(actions.objections(run))
    return GuardResult(
        name="backend willing",
        passed=not objections,
        saw="; ".join(o.saw for o in objections) or "no objection",
        needs="; ".join(o.needs for o in objections),
    )


def target_free(run: Run) -> GuardResult:
    """No open lease holds one of our targets. (The ledger checks again, under its mutex, when the lease is written.)"""
    for lease in run.kit.ledger.leases():
        shared = set(lease.targets) & set(run.targets)
        if shared:
            return GuardResult(
                name="target free",
                passed=False,
                saw=f"{listed(sorted(shared))} held by {lease.experiment} (run {lease.run_id[:8]}, lease {lease.id})",
                needs="that run to end, or `mlchaos recover` when its owner is gone",
            )
    return GuardResult(name="target free", passed=True, saw="no open lease on it")


def environment_free(run: Run) -> GuardResult:
    """No other run of this environment: its fault would be measured as ours. Of two that begin together, the first stays."""
    mine = (run.zero_wall, run.run_id)
    for other in run.kit.active.running():
        if other.environment == run.environment.name and (other.started_wall, other.run_id) < mine:
            return GuardResult(
                name="environment free",
                passed=False,
                saw=f"{other.experiment} runs here (run {other.run_id[:8]}, {PHASE_WORDS.get(other.phase, other.phase)}): each would measure the other's fault",
                needs="another try in a few seconds" if other.phase == ENDED else "that run to end",
            )
    if said := occupied(run):
        return GuardResult(name="environment free", passed=False, saw=said, needs="that run to end")
    return GuardResult(name="environment free", passed=True, saw="no other run here")


def occupied(run: Run) -> str:
    """Who else makes a fault in this environment, as the ledger of its cluster says; empty: nobody.

    Raises:
        StoreError: it does not say.
    """
    elsewhere = getattr(run.kit.ledger, "elsewhere", None)
    for lease in elsewhere() if elsewhere is not None else ():
        if lease.environment == run.environment.name and lease.run_id != run.run_id:
            where = lease.owner.host or "another machine"
            return f"{lease.experiment} runs here (run {lease.run_id[:8]}, from {where}): each would measure the other's fault"
    return ""


def changed_since(run: Run) -> str:
    """What is no longer as the guards saw it, a whole baseline ago, when the fault is about to be made; empty: nothing.

    Raises:
        DriverError: the backend did not answer.
    """
    again = getattr(run.kit.driver, "recheck", None)
    if again is None:
        return ""
    target = run.environment.targets[run.experiment.target]
    existing = run.kit.driver.resolve(target)
    if missing := sorted(set(run.targets) - set(existing)):
        return f"not there any more: {listed(missing, 10)}"
    try:
        most = run.experiment.blast_radius.take(len(existing))
    except ValueError as e:
        return str(e)
    limit = run.environment.limits.max_fraction
    if len(run.targets) > most or len(run.targets) / len(existing) > limit + 1e-9:
        return (
            f"{len(existing)} targets are there now, {len(run.existing)} were: {len(run.targets)} of them are too many"
        )
    fault = run.experiment.fault
    objections: tuple[Objection, ...] = again(fault.kind, run.targets, existing, fault.params(), target=target)
    return "; ".join(f"{o.saw} (needed: {o.needs})" for o in objections)


def watcher_alive(run: Run) -> GuardResult:
    """The watchdog process beats."""
    clock = run.kit.clock
    watcher = run.start_watcher()
    end = clock.monotonic() + WATCHER_START_S
    while not (alive := watcher.alive()) and clock.monotonic() < end:
        clock.sleep(0.02)
    why_not = "" if alive else str(getattr(watcher, "why_not", ""))
    needs = why_not or "a watchdog process that can start (see its log in the ledger directory)"
    return GuardResult(
        name="watcher alive",
        passed=alive,
        saw="its heart beats" if alive else f"no heartbeat within {WATCHER_START_S:g} s",
        needs="" if alive else needs,
    )


def budget_left(run: Run) -> GuardResult:
    """Enough error budget is left."""
    if run.kit.budget is None:
        return GuardResult(name="error budget", passed=True, saw="none declared for this environment")
    budget = run.kit.budget()
    limit = run.environment.limits.budget_at_least
    passed = budget.remaining >= limit
    return GuardResult(
        name="error budget",
        passed=passed,
        saw=f"{show_percent(budget.remaining, 0)} left ({budget.detail})",
        needs="" if passed else f"at least {show_percent(limit, 0)} left (limits.budget_at_least)",
    )


def healthy(run: Run) -> GuardResult:
    """The system health score reaches the threshold (R4-03)."""
    health = run.kit.health()
    limit = run.environment.limits.health_at_least
    passed = health.score >= limit
    return GuardResult(
        name="health",
        passed=passed,
        saw=f"{health.score:.2f} {'≥' if passed else '<'} {limit:.2f} ({health.detail})",
        needs="" if passed else f"a health score of at least {limit:.2f} (--safety-threshold, limits.health_at_least)",
    )


GUARDS: tuple[Callable[[Run], GuardResult], ...] = (
    lever_released,
    gate_open,
    no_freeze,
    ledger_clean,
    stage_before_held,
    target_resolved,
    target_free,
    backend_willing,
    environment_free,
    watcher_alive,
    budget_left,
    healthy,
)
"""Cheap and decisive ones first; the first that refuses ends the check."""
