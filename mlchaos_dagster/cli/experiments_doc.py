"""docs/experiments.md from the library: `python -m mlchaos_dagster.cli.experiments_doc --write`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.environment import Environment, Sli
from mlchaos_dagster.domain.faults import ALIASES, FAULTS
from mlchaos_dagster.domain.spec import AbortCondition, Experiment, Objective, Suite
from mlchaos_dagster.domain.stages import Progressive
from mlchaos_dagster.domain.units import show_duration, show_percent, show_value

TARGET = Path(__file__).parents[2] / "docs" / "experiments.md"
_SIDES = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
_HEAD = """\
<!-- Generated from mlchaos_dagster/library by `python -m mlchaos_dagster.cli.experiments_doc --write`. -->

# Experiments

What is shipped, as the library's files say it. `mlchaos describe NAME` prints one as a document, `mlchaos run NAME` runs
it, `mlchaos init DIR` begins a library of your own. The sandbox shortens long windows, and the record says so.
"""


def text(catalog: Catalog) -> str:
    """The whole page."""
    environment = catalog.environment("sandbox")
    written = catalog.written()
    # Some measure what is to be had on clusters only.
    elsewhere = {name: sli for e in catalog.environments() for name, sli in e.slis.items()}
    known = environment.model_copy(update={"slis": {**elsewhere, **environment.slis}})
    parts = [_HEAD, _overview(written, environment)]
    parts += [_experiment(s, known) if isinstance(s, Experiment) else _in_stages(s, known) for s in written]
    parts += ["## Suites\n", _suites(catalog.suites(expanded=False)), "## Faults\n", _faults(environment)]
    parts += [f"## The environment `{environment.name}`\n", _environment(environment)]
    return "\n".join(parts)


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    names = list(headers)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def _overview(written: list[Experiment | Progressive], environment: Environment) -> str:
    rows = [
        (
            f"[`{e.name}`](#{e.name})",
            e.title,
            f"`{e.fault.kind}` on `{e.target}`",
            _window(e, environment),
            e.teeth.mechanism if e.teeth else "–",
        )
        for e in written
    ]
    return table(("experiment", "what it says", "fault", "window", "mechanism it validates"), rows)


def _window(spec: Experiment | Progressive, environment: Environment) -> str:
    ones = [spec] if isinstance(spec, Experiment) else spec.experiments()
    asked = ", ".join(show_duration(e.duration) for e in ones)
    if any(_elsewhere(e, environment) for e in ones):
        return asked
    return f"{asked} ({', '.join(show_duration(environment.scaled(e.duration)) for e in ones)} in the sandbox)"


def _elsewhere(e: Experiment, environment: Environment) -> bool:
    """Whether only other environments can run it."""
    return e.target not in environment.targets or environment.backend_for(e.fault.kind) is None


def _in_stages(p: Progressive, environment: Environment) -> str:
    """What all stages share, as of any experiment, and a table of what each asks for itself."""
    ones = p.experiments()
    rows = [
        (
            f"`{e.name}`",
            stage.name or "–",
            _radius(e),
            _window(e, environment),
            "; ".join(_objective(o, environment) for o in e.steady_state),
            f"`{e.depends_on}` has held" if e.depends_on else "–",
        )
        for e, stage in zip(ones, p.stages, strict=True)
    ]
    stages = table(("stage", "", "blast radius", "window", "steady state", "starts only after"), rows)
    shared = ones[0].model_copy(update={"name": p.name, "title": p.title})
    text = _experiment(shared, environment, without=("blast radius", "steady state"))
    return f"{text}\n{stages}"


def _radius(e: Experiment) -> str:
    radius = e.blast_radius
    hit = f"{show_percent(radius.fraction, 0)} of the targets" if radius.fraction else f"{radius.count} target(s)"
    return f"{hit}, never more than {radius.max_targets}"


def _experiment(e: Experiment, environment: Environment, without: tuple[str, ...] = ()) -> str:
    params = ", ".join(f"{k} {v}" for k, v in _params(e) if v is not None)
    limits = () if _elsewhere(e, environment) else environment.limits.abort
    rows = [
        ("fault", f"`{e.fault.kind}`{f' ({params})' if params else ''} on `{e.target}`"),
        ("blast radius", _radius(e)),
        ("steady state", "; ".join(_objective(o, environment) for o in e.steady_state)),
        ("must be seen", "; ".join(str(x) for x in e.expect) or "the fault's own effect"),
        ("recovery", f"steady again within {show_duration(e.recovery.within)}"),
        ("aborts when", "; ".join(_abort(a, environment) for a in (*e.abort, *limits))),
    ]
    if e.teeth:
        off = ", ".join(f"`{m}`" for m in (e.teeth.mechanism, *e.teeth.also_off))
        rows.append(("teeth", f"with {off} switched off it must fail, and name `{e.teeth.breaks}`"))
    if e.depends_on:
        rows.append(("waits for", f"`{e.depends_on}` to have held within {show_duration(e.depends_within)}"))
    if e.prerequisites:
        rows.append(("prerequisites", "; ".join(e.prerequisites)))
    rows = [row for row in rows if row[0] not in without]
    return f"### {e.name}\n\n{e.title}.\n\n> {e.hypothesis}\n\n{table(('', ''), rows)}"


def _params(e: Experiment) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in e.fault.model_dump(mode="json").items() if k != "kind"]


def _objective(o: Objective, environment: Environment) -> str:
    return f"`{o.sli}` {_SIDES[o.side]} {show_value(o.limit.value, environment.slis[o.sli].shown_unit)}"


def _abort(a: AbortCondition, environment: Environment) -> str:
    side = ">" if a.above is not None else "<"
    value = show_value(a.limit.value, environment.slis[a.sli].shown_unit)
    return f"`{a.sli}` {side} {value} for {show_duration(a.for_s)}"


def _suites(suites: list[Suite]) -> str:
    rows: list[tuple[str, ...]] = []
    for s in suites:
        plan = s.schedule
        when = "by hand" if plan is None else f"`{plan.cron}` {plan.timezone}"
        if plan is not None and plan.window:
            when += f", only {plan.window}"
        if plan is not None and plan.min_interval:
            when += f", at least {show_duration(plan.min_interval)} apart"
        names = "every experiment of the library" if s.everything else ", ".join(f"`{n}`" for n in s.experiments)
        rows.append((f"`{s.name}`", s.title, names, when))
    return table(("suite", "what for", "experiments", "when"), rows)


def _faults(environment: Environment) -> str:
    rows: list[tuple[str, ...]] = []
    for kind, model in FAULTS.items():
        words = [a for a, k in ALIASES.items() if k == kind]
        params = [
            f"`{n}`{'' if f.is_required() else ' (optional)'}" for n, f in model.model_fields.items() if n != "kind"
        ]
        rows.append(
            (
                f"`{kind}`" + (f" (with `--type` also `{'`, `'.join(words)}`)" if words else ""),
                (model.__doc__ or "").strip().splitlines()[0],
                ", ".join(params) or "–",
                environment.backend_for(kind) or "–",
            )
        )
    return table(("fault", "what it does", "parameters", "sandbox backend"), rows)


def _environment(environment: Environment) -> str:
    targets = [(f"`{n}`", f"`{t.select}`", t.describe) for n, t in environment.targets.items()]
    slis = [(f"`{n}`", _source(s), s.shown_unit or "plain number") for n, s in environment.slis.items()]
    return table(("target", "selects", "what it is"), targets) + "\n" + table(("SLI", "source", "unit"), slis)


def _source(sli: Sli) -> str:
    if sli.measure:
        return "probe"
    return ("signal" if sli.signal else "PromQL") + ("" if sli.reduce == "mean" else f" ({sli.reduce})")


def main(arguments: list[str]) -> int:
    """Write the page, or say that it is out of date (exit code 1)."""
    wanted = text(Catalog())
    if arguments == ["--write"]:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(wanted, "utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text("utf-8") == wanted:
        return 0
    sys.stderr.write(f"{TARGET} is out of date: python -m mlchaos_dagster.cli.experiments_doc --write\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
