"""An experiment from a few words: `mlchaos run --type pod_kill --target inference --duration 30`.

The words are checked one by one, so that each problem names its option. What was not said is filled in conservatively:
one target, the environment's availability objective, the environment's own abort limits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.faults import ALIASES, BROUGHT, FAULTS
from mlchaos_dagster.domain.nodes import Document, Node, resolve_plain
from mlchaos_dagster.domain.parsing import one_line, unknown, validate
from mlchaos_dagster.domain.spec import MAX_DURATION_S, NAME_PATTERN, Experiment, Model
from mlchaos_dagster.domain.units import Duration, parse_positive_duration
from mlchaos_dagster.errors import Problem, SpecError

_DEFAULTS: dict[str, dict[str, str]] = {
    "network_latency": {"latency": "200ms", "jitter": "20ms"},
    "network_loss": {"fraction": "20%"},
    "cpu_stress": {"load": "80%"},
    "memory_stress": {"size": "500Mi"},
}
_DEFAULT_DURATION = "30s"


@dataclass(frozen=True)
class AdHoc:
    """The words."""

    type: str
    target: str
    name: str = ""
    duration: str | float = _DEFAULT_DURATION
    """Text with a unit, or bare seconds where the command line was used (R4-02)."""
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])


class AdHocFile(Model):
    """The same words in a `--config` file; there a duration needs its unit, as everywhere in files."""

    type: str
    target: str | None = None
    target_app: str | None = None
    name: str = ""
    duration: Duration = 30.0
    safety_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    params: dict[str, Any] = {}
    schema_: Annotated[Literal["mlchaos/v1"] | None, Field(alias="schema")] = None


def seconds(text: str) -> float:
    """Seconds of a command-line duration: `30` as in R4-02, or any duration with a unit.

    Raises:
        ValueError: neither; says what is allowed.
    """
    value = resolve_plain(text.strip())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = f"{value}s" if value > 0 else text
        if value <= 0:
            raise ValueError(f'"{text}" is not more than zero. Allowed: a positive duration, such as 30s')
    return parse_positive_duration(text)


def build(words: AdHoc, environment: Environment) -> Experiment:
    """The experiment that the words mean in an environment.

    Raises:
        SpecError: one problem for each wrong word.
    """
    problems: list[Problem] = []
    kind = words.type.replace("-", "_")
    kind = ALIASES.get(kind, kind)
    if kind in BROUGHT:
        problems.append(
            Problem("--type", f"{kind} is what a file brings. Allowed: mlchaos run FILE, such as engine.yaml.")
        )
    elif kind not in FAULTS:
        problems.append(Problem("--type", unknown("fault", words.type, [*FAULTS, *ALIASES])))
    elif environment.backend_for(kind) is None:
        served = ", ".join(k for kinds in environment.backends.values() for k in kinds)
        what = f"no backend of environment {environment.name} serves {kind}. Allowed: {served}."
        problems.append(Problem("--type", what))
    if words.target not in environment.targets:
        problems.append(Problem("--target", unknown("target", words.target, environment.targets)))
    if words.name and not (re.fullmatch(NAME_PATTERN, words.name) and len(words.name) <= 63):
        what = f'"{words.name}" is not a name. Allowed: lower-case letters, digits and dashes, such as demo-1.'
        problems.append(Problem("--name", one_line(what)))
    duration = 0.0
    try:
        duration = float(words.duration) if not isinstance(words.duration, str) else seconds(words.duration)
        if duration > MAX_DURATION_S:
            raise ValueError(f"{words.duration} is more than a week. Allowed: at most 7d")
    except ValueError as e:
        problems.append(Problem("--duration", one_line(str(e))))
    if problems:
        raise SpecError(problems)
    return _experiment(words, kind, duration, environment)


def _experiment(words: AdHoc, kind: str, duration: float, environment: Environment) -> Experiment:
    objective = environment.error_budget.objective if environment.error_budget else 0.95
    steady = [{"sli": n, "at_least": f"{objective * 100:g}%"} for n in environment.slis if n == "availability"]
    if not steady:
        what = f"the environment {environment.name} has no SLI availability to judge by. Allowed: an experiment file."
        raise SpecError(what, "--type")
    body: dict[str, Any] = {
        "schema": "mlchaos/v1",
        "name": words.name or f"adhoc-{kind}-{words.target}".replace("_", "-")[:63].rstrip("-"),
        "title": f"{kind} on {words.target}, from the command line",
        "hypothesis": f"{words.target} keeps {objective * 100:g} % availability under {kind}.",
        "area": "adhoc",
        "owner": "command-line",
        "target": words.target,
        "fault": {"kind": kind, **_DEFAULTS.get(kind, {}), **words.params},
        "blast_radius": {"count": 1},
        "duration": f"{duration:g}s",
        "steady_state": steady,
    }
    try:
        return validate(Document("--param", _node(body)), Experiment).value
    except SpecError as e:
        # There is no file: the path in the message is the place.
        raise SpecError([Problem("--param", p.what.removeprefix("fault.")) for p in e.problems]) from e


def _node(value: Any) -> Node:
    if isinstance(value, Mapping):
        return Node({str(k): (Node(str(k), 1, 1), _node(v)) for k, v in value.items()}, 1, 1, "mapping")  # pyright: ignore
    if isinstance(value, list):
        return Node([_node(v) for v in value], 1, 1, "list")  # pyright: ignore
    return Node(value, 1, 1)


def params_of(given: tuple[str, ...]) -> dict[str, Any]:
    """`("latency=300ms",)` → `{"latency": "300ms"}`. Raises SpecError."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise SpecError(f'"{text}" is not NAME=VALUE. Allowed: such as latency=300ms.', "--param")
        found[key.strip()] = resolve_plain(value.strip())
    return found
