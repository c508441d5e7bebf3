"""What would keep experiments from running now. Read-only; the guards decide again when a run starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.domain.units import show_percent
from mlchaos_dagster.engine.guards import read_gate
from mlchaos_dagster.engine.stops import StopFiles
from mlchaos_dagster.orchestration.ports import Finding, Platform


def preflight(platform: Platform, environment: Environment, experiments: Sequence[Experiment]) -> list[Finding]:
    """One finding per thing that is needed."""
    name, home = environment.name, platform.settings.home
    findings = [
        _asked(f"{name}: state directory", lambda: _writable(platform)),
        _asked(f"{name}: lever", lambda: _lever(StopFiles(home).lever(), name)),
        _asked(f"{name}: gate", lambda: _gate(read_gate(home.gates / f"{name}.json"))),
        _asked(f"{name}: open leases", lambda: _leases(platform)),
        _asked(f"{name}: error budget", lambda: _budget(platform, environment)),
    ]
    unserved = [e.name for e in experiments if environment.backend_for(e.fault.kind) is None]
    if unserved:
        saw = f"{len(unserved)} experiments cannot run here: {', '.join(unserved[:5])}"
        findings.append(Finding(f"{name}: backends", True, saw))
    return findings


def _asked(what: str, look: Callable[[], tuple[bool, str, str]]) -> Finding:
    try:
        ok, saw, needs = look()
    except Exception as e:  # noqa: BLE001 - what cannot be read is a finding
        ok, saw, needs = False, f"cannot be read: {e}", "see `mlchaos doctor`"
    return Finding(what, ok, saw, needs)


def _writable(platform: Platform) -> tuple[bool, str, str]:
    root = platform.settings.home.root
    root.mkdir(parents=True, exist_ok=True)
    probe = root / ".preflight"
    probe.write_text("")
    probe.unlink()
    return True, str(root), ""


def _lever(reason: str | None, environment: str) -> tuple[bool, str, str]:
    needs = "" if reason is None else f"`mlchaos stop --release -e {environment}` once it is safe"
    return reason is None, reason or "released", needs


def _gate(reason: str | None) -> tuple[bool, str, str]:
    return reason is None, reason or "open", "" if reason is None else "the error budget back above its limit"


def _leases(platform: Platform) -> tuple[bool, str, str]:
    leases = platform.leases()
    if not leases:
        return True, "none", ""
    held = ", ".join(f"{lease.experiment} on {', '.join(lease.targets)}" for lease in leases)
    return True, f"{len(leases)}: {held}", "those runs to end, or `mlchaos recover` when their owners are gone"


def _budget(platform: Platform, environment: Environment) -> tuple[bool, str, str]:
    budget = platform.budget(environment)
    if budget is None:
        return True, "none declared", ""
    limit = environment.limits.budget_at_least
    needs = "" if budget.remaining >= limit else f"at least {show_percent(limit, 0)}"
    return budget.remaining >= limit, f"{show_percent(budget.remaining, 0)} left ({budget.detail})", needs
