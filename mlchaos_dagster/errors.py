"""Every error of the project, sorted by one question: is the target safe?

    MlChaosError
    ├ SpecError                  nothing touched: a YAML file or an argument is wrong
    ├ ConfigError                nothing touched: settings, environment or installation are wrong
    ├ DriverError(driver, verb, lease_id)
    │ ├ DriverUnavailable        nothing touched: the backend could not be reached
    │ ├ InjectFailed             maybe partial; the engine recovers after it
    │ └ RecoverFailed            THE FAULT MAY BE LIVE: the lease stays open, guards refuse
    ├ ProbeError                 becomes a gap in the series; never leaves the watch loop
    ├ StoreError                 a record or the ledger could not be written: nothing is injected
    │ └ LeaseRefused             the ledger said no: target taken, lease fenced or closed
    └ InternalError              a bug of ours; exit code 6

Refusals and aborts are values (:class:`mlchaos_dagster.domain.outcome.Outcome`), not errors.
"""

from __future__ import annotations

from dataclasses import dataclass


class MlChaosError(Exception):
    """Base of all errors raised on purpose by this project."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input, in words a person can act on."""

    where: str
    """`file:line:column`, or the argument's name."""
    what: str
    """What is wrong, what is allowed, and the nearest right word."""

    def __str__(self) -> str:
        return f"{self.where}  {self.what}" if self.where else self.what


class SpecError(MlChaosError):
    """An experiment, environment, suite or argument is wrong. Nothing was touched. Exit code 2."""

    def __init__(self, problems: list[Problem] | str, where: str = "") -> None:
        if isinstance(problems, str):
            problems = [Problem(where, problems)]
        self.problems: list[Problem] = problems
        super().__init__("\n".join(str(p) for p in problems))


class ConfigError(MlChaosError):
    """Settings, environment or installation are wrong. Nothing was touched. Exit code 2."""


class DriverError(MlChaosError):
    """A backend refused or failed; subclasses say what that means for the target."""

    def __init__(self, message: str, *, driver: str = "", verb: str = "", lease_id: str = "") -> None:
        self.driver, self.verb, self.lease_id = driver, verb, lease_id
        prefix = f"{driver}.{verb}: " if driver and verb else ""
        super().__init__(prefix + message)


class DriverUnavailable(DriverError):
    """The backend could not be reached. Nothing was touched by this call."""


class InjectFailed(DriverError):
    """Inject did not end well. The fault may be partly there; the engine recovers."""


class Halted(MlChaosError):
    """A driver was told to stop halfway through a long verb. The fault is partly there; the engine recovers."""


class RecoverFailed(DriverError):
    """Recover did not end well: the fault may be live. The lease stays open."""


class ProbeError(MlChaosError):
    """A measurement failed. It becomes a gap; it never leaves the watch loop."""


class StoreError(MlChaosError):
    """A record or the ledger could not be read or written."""


class LeaseRefused(StoreError):
    """The ledger said no: the target is taken, the lease is fenced, or it is closed."""


class InternalError(MlChaosError):
    """A bug of ours. Exit code 6."""
