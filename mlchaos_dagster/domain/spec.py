"""The experiment as a team writes it.

Owns the shape of an experiment and a suite; knows nothing of backends, files or Dagster.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from mlchaos_dagster.domain.faults import Fault
from mlchaos_dagster.domain.units import Duration, Fraction, parse_quantity, unit_of

NAME_PATTERN = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
EVERYTHING = "all"
"""In a suite: every experiment of the library."""
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=63)]
"""Lower case, digits, dashes: usable as Dagster key, file name and Kubernetes object name."""


class Model(BaseModel):
    """Closed and immutable: an unknown field is an error, not a silent wish."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Quantity(BaseModel):
    """A threshold and the unit it was written in (`ratio`, `s` or plain)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float
    unit: Literal["ratio", "s", ""] = ""


def _quantity(raw: Any) -> Any:
    if isinstance(raw, (Quantity, dict)):
        return cast(Any, raw)
    return Quantity(value=parse_quantity(raw), unit=unit_of(raw))  # type: ignore[arg-type]


Threshold = Annotated[
    Quantity,
    BeforeValidator(_quantity),
    WithJsonSchema({"type": ["string", "number"], "examples": ["99%", "300ms", 2]}),
]


class Objective(Model):
    """An SLI and the side of a limit it must stay on."""

    sli: str
    at_least: Threshold | None = None
    above: Threshold | None = None
    at_most: Threshold | None = None
    below: Threshold | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Objective:
        given = [n for n in ("at_least", "above", "at_most", "below") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of at_least, above, at_most, below; it has {', '.join(given) or 'none'}"
            )
        return self

    @property
    def side(self) -> Literal["at_least", "above", "at_most", "below"]:
        """The comparison that was written."""
        for name in ("at_least", "above", "at_most", "below"):
            if getattr(self, name) is not None:
                return name
        raise AssertionError("an objective has one side")

    @property
    def limit(self) -> Quantity:
        """The limit that was written."""
        quantity: Quantity = getattr(self, self.side)
        return quantity

    @property
    def floor(self) -> bool:
        """True when more is better (`at_least`, `above`)."""
        return self.side in ("at_least", "above")

    def met_by(self, value: float) -> bool:
        """Whether `value` is on the good side."""
        limit = self.limit.value
        return {
            "at_least": value >= limit,
            "above": value > limit,
            "at_most": value <= limit,
            "below": value < limit,
        }[self.side]


class AbortCondition(Model):
    """A limit that, crossed for `for`, takes the fault away at once."""

    sli: str
    above: Threshold | None = None
    below: Threshold | None = None
    for_s: Annotated[Duration, Field(alias="for")] = 3.0
    """Seconds the limit must be crossed without a break; shorter is jumpier. 3 s: three one-second windows."""

    @model_validator(mode="after")
    def _one_side(self) -> AbortCondition:
        if (self.above is None) == (self.below is None):
            raise ValueError("needs exactly one of above, below")
        return self

    @property
    def limit(self) -> Quantity:
        """The limit that was written."""
        quantity = self.above if self.above is not None else self.below
        assert quantity is not None
        return quantity

    def crossed_by(self, value: float) -> bool:
        """Whether `value` is on the bad side."""
        return value > self.limit.value if self.above is not None else value < self.limit.value


class DegradationSpec(Model):
    """Abort, besides the limits, once an objective is surely broken by more than before (anytime-valid)."""

    margin: Fraction = 0.1
    """Rise of the share of bad requests over the baseline that is tolerated. 10 pp: what the experiment came to see
    should not end it."""
    alpha: Annotated[Fraction, Field(gt=0, lt=0.5)] = 0.01
    """Probability of a false alarm over the whole window, however often it is looked at."""


class Expectation(Model):
    """An effect that must be *seen*: the fault fired, or the mechanism under test acted."""

    signal: str | None = None
    sli: str | None = None
    drops: Literal[True] | None = None
    """During the window it was lower than ever in the baseline, by more than three standard deviations of its noise; or half of
    the window lower than 95 % of the baseline."""
    rises: Literal[True] | None = None
    """During the window it was higher than ever in the baseline, by more than three standard deviations of its noise; or half of
    the window higher than 95 % of the baseline."""
    reaches: Threshold | None = None
    """During the window it was at least this (for `breaker_state`: 1 half-open, 2 open)."""
    stays: Threshold | None = None
    """During the window it never left this value."""

    @model_validator(mode="after")
    def _shape(self) -> Expectation:
        if (self.signal is None) == (self.sli is None):
            raise ValueError("needs exactly one of signal, sli")
        given = [n for n in ("drops", "rises", "reaches", "stays") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of drops, rises, reaches, stays; it has {', '.join(given) or 'none'}")
        return self

    @property
    def subject(self) -> str:
        """The signal's or SLI's name."""
        return self.signal or self.sli or ""

    def __str__(self) -> str:
        if self.drops:
            return f"{self.subject} drops"
        if self.rises:
            return f"{self.subject} rises"
        if self.reaches is not None:
            return f"{self.subject} reaches {self.reaches.value:g}"
        return f"{self.subject} stays at {self.stays.value if self.stays else 0:g}"


class BlastRadius(Model):
    """How much of the target may be hit. Checked against what was resolved."""

    fraction: Annotated[Fraction, Field(gt=0)] | None = None
    """Share of the resolved targets, rounded down, at least one."""
    count: Annotated[int, Field(gt=0, strict=True)] | None = None
    """Number of targets; more than exist is an error."""
    max_targets: Annotated[int, Field(gt=0, strict=True)] = 10
    """Hard cap; a resolved set above it is refused rather than silently cut."""

    @model_validator(mode="after")
    def _one(self) -> BlastRadius:
        if (self.fraction is None) == (self.count is None):
            raise ValueError("needs exactly one of fraction, count")
        return self

    def words(self, taken: int, existing: int) -> str:
        """`1 of 3 (33 %) for 10 % asked, at least one`: what was asked for is said where it is not what was hit."""
        share = taken / existing if existing else 0.0
        said = f"{taken} of {existing} ({share * 100:.0f} %)"
        if self.fraction is None or abs(share - self.fraction) < 0.005:
            return said
        why = "at least one" if share > self.fraction else "rounded down"
        return f"{said} for {self.fraction * 100:g} % asked, {why}"

    def take(self, existing: int) -> int:
        """How many of `existing` targets are hit.

        Raises:
            ValueError: nothing exists, `count` is more than exists, or the result is above `max_targets`.
        """
        if existing <= 0:
            raise ValueError("the target's selector matched nothing")
        if self.count is not None and self.count > existing:
            raise ValueError(f"blast_radius.count: {self.count} is more than exists. Allowed: 1 to {existing}")
        taken = self.count if self.count is not None else max(1, int((self.fraction or 0) * existing + 1e-9))
        if taken > self.max_targets:
            raise ValueError(f"blast_radius: {taken} of {existing} targets is more than max_targets {self.max_targets}")
        return taken


class RecoverySpec(Model):
    """How soon the steady state must be back after the fault is gone."""

    within: Duration = 30.0
    """Limit on removed → steady again. 30 s: the restart of a pod with a model to load."""
    dwell: Duration = 2.0
    """All objectives must hold this long before it counts as steady. 2 s: two abort windows."""


class ScaleUp(Model):
    """Bring workloads that want fewer replicas up to `at_least`; as many as before when the run has seen the recovery."""

    target: Name
    """A logical target that is a workload in the environment."""
    at_least: Annotated[int, Field(ge=1, le=1000, strict=True)]

    def params(self) -> dict[str, Any]:
        """As drivers take them."""
        return {"at_least": self.at_least}


class RestartUnhealthy(Model):
    """Delete pods that have not been ready for `after`; their controllers bring others."""

    target: Name
    """A logical target that is pods in the environment."""
    at_most: Annotated[int, Field(ge=1, le=100, strict=True)] = 1
    after: Duration = 10.0
    """10 s: longer than a pod that is about to be ready takes."""

    def params(self) -> dict[str, Any]:
        """As drivers take them; with the pods' own grace."""
        return {"after_s": self.after, "interval_s": None, "signal": "term"}


class AbortRollout(Model):
    """Take back the version that an Argo Rollout is shipping: all traffic goes to the stable one. An act: not undone."""

    target: Name
    """A logical target that is Rollouts in the environment; those that ship nothing are left alone."""

    def params(self) -> dict[str, Any]:
        """As drivers take them."""
        return {}


class ResumeRollout(Model):
    """Let an Argo Rollout go on that waits in a pause. An act: not undone."""

    target: Name
    """A logical target that is Rollouts in the environment; those that do not wait are left alone."""
    retry: bool = False
    """Also those that were aborted: the version that was taken back is tried again."""

    def params(self) -> dict[str, Any]:
        """As drivers take them."""
        return {"retry": self.retry}


class RollbackAction(Model):
    """One thing to do for a service that the fault's removal alone does not bring back."""

    scale_up: ScaleUp | None = None
    restart_unhealthy: RestartUnhealthy | None = None
    abort_rollout: AbortRollout | None = None
    resume_rollout: ResumeRollout | None = None

    @model_validator(mode="after")
    def _one(self) -> RollbackAction:
        if len(self._given()) != 1:
            raise ValueError(f"needs exactly one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def kind(self) -> str:
        """Its name."""
        return self._given()[0]

    @property
    def of(self) -> ScaleUp | RestartUnhealthy | AbortRollout | ResumeRollout:
        """What it is."""
        action: ScaleUp | RestartUnhealthy | AbortRollout | ResumeRollout = getattr(self, self.kind)
        return action

    def _given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


class RollbackSpec(Model):
    """What is done, once, after the fault was taken away because a limit was broken (R3-09)."""

    actions: Annotated[tuple[RollbackAction, ...], Field(min_length=1, max_length=10)]
    """In their order."""
    slower_than: Duration | None = None
    """Also when the service is not steady again this long after the fault is gone; absent: only after a breach."""


Mechanism = Literal[
    "restart",
    "breaker",
    "fallback",
    "retries",
    "readiness",
    "checkpoints",
    "data_validation",
    "model_check",
    "golden_check",
    "canary",
    "feature_validation",
    "autoscaler",
    "backpressure",
    "spool",
    "failover",
    "cert_reload",
    "credential_overlap",
    "segmentation",
    "degraded",
]
"""Resilience mechanisms of the embedded platform; what each does is said in sandbox/config.py."""


class Teeth(Model):
    """What the experiment validates, and how it proves that it could have failed (`make teeth`)."""

    mechanism: Mechanism
    """Switched off in the cell; the experiment must then say DEVIATED or ABORTED."""
    also_off: tuple[Mechanism, ...] = ()
    """Other mechanisms off in that cell, because they would mask the missing one."""
    breaks: str
    """What the reason must then name: an SLI, an expected signal, or `recovery`."""


MAX_DURATION_S = 7 * 86400.0


def _bounded(seconds: float) -> float:
    if seconds > MAX_DURATION_S:
        raise ValueError(f"{seconds / 86400:g}d is more than a week. Allowed: at most 7d")
    return seconds


Length = Annotated[Duration, AfterValidator(_bounded)]
"""Seconds of a fault window; at most a week."""


class Head(Model):
    """What an experiment is about."""

    schema_: Annotated[Literal["mlchaos/v1"], Field(alias="schema")]
    name: Name
    title: Annotated[str, Field(min_length=1, max_length=200)]
    hypothesis: Annotated[str, Field(min_length=1, max_length=2000)]
    area: Name
    """Dagster group."""
    owner: str
    """A person's or team's address; Dagster asset owner."""
    target: Name
    """Logical; each environment maps it."""
    fault: Fault

    @model_validator(mode="after")
    def _named(self) -> Head:
        if self.name == EVERYTHING:
            raise ValueError(f'name: "{EVERYTHING}" means every experiment in a suite. Allowed: another name')
        return self


class Size(Model):
    """How much is hit, and for how long."""

    blast_radius: BlastRadius
    duration: Length
    """Length of the fault window before the environment's `duration_scale`."""


class Promises(Model):
    """What must hold, what must be seen, and what must have been shown before."""

    steady_state: Annotated[tuple[Objective, ...], Field(min_length=1)]
    """Holds before (else no chaos), judged during, regained after."""
    expect: tuple[Expectation, ...] = ()
    recovery: RecoverySpec = RecoverySpec()
    abort: tuple[AbortCondition, ...] = ()
    """On top of the environment's own limits."""
    rollback: RollbackSpec | None = None
    """Actions beyond taking the fault away; absent: none."""
    degradation: DegradationSpec | None = None
    """An anytime-valid comparison with the baseline, beside the limits; absent: none."""
    teeth: Teeth | None = None
    prerequisites: tuple[str, ...] = ()
    depends_on: Name | None = None
    """The experiment whose latest run in the same environment must have HELD; else this one is REFUSED."""
    depends_within: Duration = 86400.0
    """How long ago that run may have ended. 24 h: yesterday's proof says little of today's platform."""
    tags: dict[str, str] = {}

    @model_validator(mode="after")
    def _coherent(self) -> Promises:
        for i, condition in enumerate(self.abort):
            for slo in self.steady_state:
                if slo.sli == condition.sli and _looser(condition, slo):
                    raise ValueError(
                        f"abort[{i}]: the limit on {condition.sli} is looser than the steady state it guards "
                        f"(it would let the fault run on while the promise is broken). "
                        f"Allowed: {'below' if slo.floor else 'above'} a value at least as strict as "
                        f"{slo.limit.value:g}, or a limit on another SLI"
                    )
        seen: set[tuple[str, bool]] = set()
        for i, slo in enumerate(self.steady_state):
            if (slo.sli, slo.floor) in seen:
                raise ValueError(f"steady_state[{i}]: a second limit of the same side on {slo.sli}")
            seen.add((slo.sli, slo.floor))
        return self


class Experiment(Promises, Size, Head):
    """One experiment: a hypothesis about a target under a fault. (Fields of the last base come first.)"""

    @model_validator(mode="after")
    def _not_itself(self) -> Experiment:
        if self.depends_on == self.name:
            raise ValueError("depends_on: an experiment cannot wait for itself. Allowed: another experiment")
        return self


def _looser(condition: AbortCondition, slo: Objective) -> bool:
    """Whether an abort limit on the same SLI tolerates what the objective already calls broken."""
    if slo.floor:
        return condition.below is not None and condition.below.value < slo.limit.value
    return condition.above is not None and condition.above.value > slo.limit.value


class SuiteSchedule(Model):
    """When a suite runs by itself."""

    cron: str
    """Five fields, in `timezone`."""
    timezone: str
    window: Annotated[str, Field(pattern=r"^\d\d:\d\d-\d\d:\d\d$")] | None = None
    """Runs are requested only between these times of day."""
    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = ()
    """Only on these days; empty: every day."""
    min_interval: Duration | None = None
    """At least this long after the suite's last run."""


class _OrEverything:
    """The JSON Schema of a list of names, or the word for all of them."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"const": EVERYTHING}]}


class Suite(Model):
    """Experiments that run together, one after the other."""

    schema_: Annotated[Literal["mlchaos/v1"], Field(alias="schema")]
    name: Name
    title: str
    experiments: Annotated[
        tuple[Name, ...],
        Field(min_length=1),
        BeforeValidator(lambda raw: (raw,) if raw == EVERYTHING else raw),  # pyright: ignore[reportUnknownLambdaType]
        _OrEverything(),
    ]
    """Names in their order; one with stages stands for all of them. `all`: every experiment of the library."""
    schedule: SuiteSchedule | None = None

    @property
    def everything(self) -> bool:
        """Whether it names no experiments but takes whatever the library holds."""
        return self.experiments == (EVERYTHING,)
