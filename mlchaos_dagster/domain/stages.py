"""Progressive chaos: one hypothesis in stages, each wider than the one before and run only after it held.

Owns how stages are written and the experiment that each of them becomes; knows nothing of files or of running.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from mlchaos_dagster.domain.spec import (
    AbortCondition,
    BlastRadius,
    Experiment,
    Head,
    Length,
    Model,
    Objective,
    Promises,
    Quantity,
)
from mlchaos_dagster.domain.units import Fraction, parse_fraction

MOST = 9
"""Stages of one experiment: their names end in one digit, and sort in the order in which they run."""
_SPOKEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s+(second|minute|hour|day)s?\s*")
_TITLE = 200


def _spoken(raw: Any) -> Any:
    """`5 minutes` as people write it → `5m`; anything else as it is."""
    match = _SPOKEN.fullmatch(raw) if isinstance(raw, str) else None
    return f"{match[1]}{match[2][0]}" if match else raw


def _percentage(raw: Any) -> Any:
    """`10` or `10%` → `10%`: the field's name says that it is a percentage, so a bare number is one."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return raw
    if not 1 <= raw <= 100:
        raise ValueError(f"{raw:g} is not a percentage from 1 to 100. Allowed: such as 10 for 10 % of the targets")
    return f"{raw:g}%"


def _share(raw: Any) -> Any:
    """`0.99` or `99%` → 0.99."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return parse_fraction(raw)
    if not 0 < raw <= 1:
        raise ValueError(f"{raw:g} is not a share from 0 to 1. Allowed: such as 0.99, or 99%")
    return float(raw)


class Stage(Model):
    """One step: how much of the target, for how long, and what must hold meanwhile."""

    key: str = ""
    """What `depends_on` of a later stage says. Default stage_1, stage_2, …; in a mapping of stages its own keys."""
    name: Annotated[str, Field(min_length=1, max_length=80)] | None = None
    """A few words for people."""
    title: Annotated[str, Field(min_length=1, max_length=_TITLE)] | None = None
    """The whole title; default: that of the experiment, which stage it is, and its name."""
    hypothesis: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    """Default: that of the experiment."""
    fraction: Annotated[Fraction, Field(gt=0)] | None = None
    """Share of the targets; short for `blast_radius: {fraction: …}`."""
    blast_radius: BlastRadius | None = None
    chaos_percentage: (
        Annotated[
            Fraction,
            Field(gt=0),
            BeforeValidator(_percentage),
            WithJsonSchema({"type": ["number", "string"], "examples": [10, "10%"]}),
        ]
        | None
    ) = None
    """The same as `fraction`, written as a number from 1 to 100."""
    duration: Annotated[
        Length,
        BeforeValidator(_spoken),
        WithJsonSchema({"type": "string", "examples": ["5m", "5 minutes"]}),
    ]
    success_threshold: (
        Annotated[
            float, BeforeValidator(_share), WithJsonSchema({"type": ["number", "string"], "examples": [0.99, "99%"]})
        ]
        | None
    ) = None
    """The availability that must hold, 0–1; short for `steady_state: [{sli: availability, at_least: …}]`."""
    steady_state: tuple[Objective, ...] = ()
    """Replace the experiment's objectives on the same side of the same SLI; its other objectives hold, too."""
    abort: tuple[AbortCondition, ...] | None = None
    """Replace the experiment's abort conditions."""
    depends_on: str | None = None
    """The stage that must have held before; default: the one before."""

    @model_validator(mode="after")
    def _once(self) -> Stage:
        sizes = ("fraction", "blast_radius", "chaos_percentage")
        given = [n for n in sizes if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(sizes)}; it has {', '.join(given) or 'none'}")
        if self.success_threshold is not None and any(o.sli == "availability" and o.floor for o in self.steady_state):
            raise ValueError("steady_state: a second limit on availability, beside success_threshold")
        return self

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What this stage says itself about the steady state."""
        if self.success_threshold is None:
            return self.steady_state
        limit = Quantity(value=self.success_threshold, unit="ratio")
        return (*self.steady_state, Objective(sli="availability", at_least=limit))


def _listed(raw: Any) -> Any:
    """A mapping of stages is the list of its values, each with its key."""
    if not isinstance(raw, dict):
        return raw
    stages = cast("dict[str, Any]", raw)
    return [{"key": k, **cast("dict[str, Any]", v)} if isinstance(v, dict) else v for k, v in stages.items()]


def _ordered(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Every stage with its key, and the key of the stage that it waits for.

    Raises:
        ValueError: a key twice, or a dependency on what does not come before.
    """
    found: list[Stage] = []
    for i, stage in enumerate(stages):
        before = [s.key for s in found]
        key = stage.key or f"stage_{i + 1}"
        if key in before:
            raise ValueError(f'{i}.key: "{key}" is an earlier stage already. Allowed: one key for a stage')
        if stage.depends_on is not None and stage.depends_on not in before:
            allowed = ", ".join(before) or "none, nothing comes before the first stage"
            raise ValueError(f'{i}.depends_on: "{stage.depends_on}" is no earlier stage. Allowed: {allowed}')
        depends_on = stage.depends_on or (before[-1] if before else None)
        found.append(stage.model_copy(update={"key": key, "depends_on": depends_on}))
    return tuple(found)


class _OrMapping:
    """The JSON Schema of a list that may be written as a mapping."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        listed = handler(core_schema)
        mapping = {"type": "object", "additionalProperties": listed["items"], "minProperties": 1, "maxProperties": MOST}
        return {"anyOf": [listed, mapping]}


Stages = Annotated[
    tuple[Stage, ...],
    Field(min_length=1, max_length=MOST),
    BeforeValidator(_listed),
    AfterValidator(_ordered),
    _OrMapping(),
]


class _Staged(Model):
    stages: Stages
    """From narrow to wide; each starts only after the one before has HELD."""
    max_targets: Annotated[int, Field(gt=0, strict=True)] = 10
    """Hard cap of every stage that gives a share only."""


class Progressive(Promises, _Staged, Head):
    """An experiment in stages. It is never run itself: each stage is an experiment of its own, NAME-1, NAME-2, …"""

    @model_validator(mode="after")
    def _each(self) -> Progressive:
        """Every stage makes a sound experiment. Raises ValueError that names the stage."""
        if len(self.name) > 61:
            raise ValueError(f'name: "{self.name}" leaves no room for the number of a stage. Allowed: 61 characters')
        for i in range(len(self.stages)):
            try:
                self.stage(i)
            except ValidationError as e:
                raise ValueError(f"stages[{i}]: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e
        return self

    def stage_name(self, number: int) -> str:
        """`serving-progressive-1` for number 1."""
        return f"{self.name}-{number}"

    @property
    def stage_names(self) -> tuple[str, ...]:
        """In the order in which they run."""
        return tuple(self.stage_name(i) for i in range(1, len(self.stages) + 1))

    def experiments(self) -> list[Experiment]:
        """The stages as experiments, in order."""
        return [self.stage(i) for i in range(len(self.stages))]

    def stage(self, index: int) -> Experiment:
        """The experiment of one stage, counted from 0."""
        stage = self.stages[index]
        body = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"stages", "max_targets"})
        own = stage.model_dump(mode="json", by_alias=True, exclude_none=True)
        radius = own.get("blast_radius") or {
            "fraction": own.get("fraction") or own["chaos_percentage"],
            "max_targets": self.max_targets,
        }
        keys = [s.key for s in self.stages]
        if stage.depends_on is not None:
            body["depends_on"] = self.stage_name(keys.index(stage.depends_on) + 1)
        body |= {
            "name": self.stage_name(index + 1),
            "title": stage.title or self._title(index),
            "hypothesis": stage.hypothesis or self.hypothesis,
            "blast_radius": radius,
            "duration": own["duration"],
            "steady_state": [o.model_dump(mode="json", exclude_none=True) for o in self._objectives(stage)],
        }
        if stage.abort is not None:
            body["abort"] = own["abort"]
        return Experiment.model_validate(body)

    def _title(self, index: int) -> str:
        name = self.stages[index].name
        mark = f" (stage {index + 1} of {len(self.stages)}{f': {name}' if name else ''})"
        room = _TITLE - len(mark)
        return (self.title if len(self.title) <= room else self.title[: room - 1] + "…") + mark

    def _objectives(self, stage: Stage) -> list[Objective]:
        own = {(o.sli, o.floor): o for o in stage.objectives}
        kept = [own.pop((o.sli, o.floor), o) for o in self.steady_state]
        return [*kept, *own.values()]

    def origin(self, index: int, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Where in this spec a field of a stage's experiment was written."""
        stage, within = self.stages[index], ("stages", index)
        head = path[0] if path else ""
        if head == "blast_radius":
            if stage.blast_radius is not None:
                return (*within, *path)
            return (*within, "fraction" if stage.fraction is not None else "chaos_percentage")
        if head == "steady_state" and len(path) > 1 and isinstance(path[1], int):
            objective = self._objectives(stage)[path[1]]
            if objective in stage.steady_state:
                return (*within, "steady_state", stage.steady_state.index(objective), *path[2:])
            return path if objective in self.steady_state else (*within, "success_threshold")
        own = head == "duration" or (head == "abort" and stage.abort is not None)
        return (*within, *path) if own else path


class StageFile(Model):
    """Stages alone, for an experiment of the library: `mlchaos run NAME --stages FILE`."""

    progressive_chaos: Stages


def staged(experiment: Experiment, stages: tuple[Stage, ...]) -> Progressive:
    """The experiment in stages; blast radius and duration are theirs.

    Raises:
        ValidationError: a stage does not go with the experiment; the message begins with `stages[i]`.
    """
    body = experiment.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"blast_radius", "duration"})
    body["max_targets"] = experiment.blast_radius.max_targets
    body["stages"] = stages
    return Progressive.model_validate(body)
