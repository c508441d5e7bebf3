"""The experiment document (`mlchaos describe NAME`): what is believed, what is done, how it is undone.

Markdown made from the spec and the environment alone; nothing is measured and nothing is asked of a backend.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import AbortCondition, Experiment
from mlchaos_dagster.domain.stages import Progressive
from mlchaos_dagster.domain.units import show_duration, show_percent
from mlchaos_dagster.evidence.masking import mask_text, secrets_in
from mlchaos_dagster.evidence.rows import limit_text, quantity_text
from mlchaos_dagster.evidence.selection import shown_name, sli_label, spoken_slis
from mlchaos_dagster.evidence.words import expectation_words, shortened_by


def experiment_document(
    experiment: Experiment, environment: Environment, *, by_hand: Sequence[tuple[str, str]] = ()
) -> str:
    """Hypothesis, scope, prerequisites, success criteria, steps, metrics and rollback plan as Markdown.

    Args:
        experiment: what is described.
        environment: where it would run.
        by_hand: further (command, what it does) of the rollback plan, as a driver knows them.
    """
    parts = [
        f"# {_md(experiment.title)}",
        f"`{experiment.name}` · area {experiment.area} · owner {_md(experiment.owner)} · environment {environment.name}",
        "## Hypothesis",
        _md(experiment.hypothesis),
        "## Scope",
        _table(("", ""), _scope(experiment, environment)),
        "## Prerequisites",
        "\n".join(f"- [ ] {p}" for p in _prerequisites(experiment, environment)),
        "## Success criteria",
        "\n".join(f"- {c}" for c in _criteria(experiment)),
        "## Steps",
        "\n".join(f"{i}. {s}" for i, s in enumerate(_steps(experiment, environment), 1)),
        "## Metrics",
        _table(("metric", "source", "objective"), _metrics(experiment, environment)),
        "## Rollback plan",
        _rollback_words(environment),
        _table(
            ("by hand", "what it does"),
            [(f"`{c}`", _md(w)) for c, w in (*by_hand_commands(experiment, environment), *by_hand)],
        ),
    ]
    if experiment.teeth is not None:
        parts += ["## What it validates", _teeth(experiment)]
    known = secrets_in(environment.model_dump(mode="json"), experiment.model_dump(mode="json"))
    return mask_text("\n\n".join(parts) + "\n", known)


def stages_document(progressive: Progressive, environment: Environment) -> str:
    """The document of an experiment in stages: what all share, and what each stage asks for itself."""
    experiments = progressive.experiments()
    first = experiments[0]
    shared = [row for row in _scope(first, environment) if row[0] not in ("duration", "blast radius")]
    rows = [
        (
            f"`{e.name}`",
            _md(stage.name or "–"),
            _radius(e),
            _window(e, environment),
            "; ".join(f"{shown_name(o.sli)} {limit_text(o)}" for o in e.steady_state),
            f"`{e.depends_on}` HELD" if e.depends_on else "–",
        )
        for e, stage in zip(experiments, progressive.stages, strict=True)
    ]
    within = show_duration(progressive.depends_within)
    parts = [
        f"# {_md(progressive.title)}",
        f"`{progressive.name}` · {len(rows)} stages · area {progressive.area} · owner {_md(progressive.owner)} · "
        f"environment {environment.name}",
        "## Hypothesis",
        _md(progressive.hypothesis),
        "## Scope",
        _table(("", ""), shared),
        "## Stages",
        _table(("experiment", "stage", "blast radius", "duration", "must hold", "starts only after"), rows),
        "A share of the targets is rounded down, and is never less than one target; the report says how many of how many "
        "were hit.",
        "## Steps",
        f"1. Run `{first.name}` as any experiment: guards, baseline, fault, recovery, verdict. "
        f"`mlchaos describe {first.name}` shows it in full.",
        f"2. Run the next stage only when the one before came to HELD, in {environment.name}, not longer than {within} ago. "
        "Every other outcome ends the experiment there: the stages behind it are not started, and a guard refuses "
        "whoever starts one by hand.",
        "3. Each stage has its own record, verdict and report.",
        "## Prerequisites",
        "\n".join(f"- [ ] {p}" for p in _prerequisites(first, environment)),
        "## Rollback plan",
        _rollback_words(environment),
        _table(("by hand", "what it does"), [(f"`{c}`", _md(w)) for c, w in by_hand_commands(first, environment)]),
    ]
    if first.teeth is not None:
        parts += ["## What it validates", _teeth(first)]
    known = secrets_in(environment.model_dump(mode="json"), progressive.model_dump(mode="json"))
    return mask_text("\n\n".join(parts) + "\n", known)


def by_hand_commands(experiment: Experiment, environment: Environment) -> list[tuple[str, str]]:
    """The commands somebody types who wants the fault gone, mildest first; all work without Dagster."""
    place = f"--environment {environment.name}"
    commands = [
        ("mlchaos status " + place, "open leases, active runs, the lever: what is going on"),
        (f"mlchaos stop {experiment.name} {place}", "asks this experiment's run to stop; it recovers at once"),
        (
            "mlchaos stop --all " + place,
            f"the lever: stops everything and keeps new runs out until mlchaos stop --release {place}",
        ),
        (
            "mlchaos recover " + place,
            "takes every fault away that an open lease names, whoever made it; may be repeated",
        ),
    ]
    if "sandbox" in environment.backends:
        commands.append(("mlchaos sandbox down", "ends every process of the embedded platform, and each fault with it"))
    return commands


def _scope(experiment: Experiment, environment: Environment) -> list[tuple[str, str]]:
    target = environment.targets.get(experiment.target)
    where = markdown_code(target.select) if target else "not mapped in this environment"
    if target and target.describe:
        where += f" ({_md(target.describe)})"
    params = {k: v for k, v in experiment.fault.params().items() if v is not None}
    fault = f"`{experiment.fault.kind}`" + (
        f" ({', '.join(f'{k} {v:g}' if isinstance(v, float) else f'{k} {v}' for k, v in params.items())})"
        if params
        else ""
    )
    backend = environment.backend_for(experiment.fault.kind)
    return [
        ("system", f"{experiment.target}: {where}"),
        ("fault", f"{fault} by {backend or 'no backend of this environment'}"),
        ("duration", _window(experiment, environment)),
        ("blast radius", f"{_radius(experiment)}; frozen before the fault"),
        ("environment", environment.name + (f": {_md(environment.title)}" if environment.title else "")),
    ]


def _radius(experiment: Experiment) -> str:
    radius = experiment.blast_radius
    share = _counted(radius.count) if radius.count is not None else show_percent(radius.fraction, 0)
    return f"{share}, never more than {_counted(radius.max_targets)}"


def _counted(targets: int) -> str:
    return f"{targets} target{'s' * (targets != 1)}"


def _window(experiment: Experiment, environment: Environment) -> str:
    duration = show_duration(environment.scaled(experiment.duration))
    if environment.scaled(experiment.duration) == experiment.duration:
        return duration
    asked = show_duration(experiment.duration)
    return f"{duration} here (asked for {asked}; {shortened_by(experiment.duration, environment)})"


def _prerequisites(experiment: Experiment, environment: Environment) -> list[str]:
    limits, said = environment.limits, [_md(p) for p in experiment.prerequisites]
    if experiment.depends_on is not None:
        within = show_duration(experiment.depends_within)
        said.append(f"`{experiment.depends_on}` HELD in {environment.name} within the last {within}")
    said.append(f"Health score at least {limits.health_at_least:.2f}")
    if environment.error_budget is not None:
        said.append(f"Error budget at least {show_percent(limits.budget_at_least, 0)} left")
    said += [
        "No freeze window covers the run",
        "No open lease on the target, and the lever is not pulled",
        "The watchdog beats",
        f"The steady state holds for {show_duration(environment.sampling.baseline)} before the fault",
    ]
    return said


def _criteria(experiment: Experiment) -> list[str]:
    said = [f"{shown_name(o.sli)} {limit_text(o)} before, during and after the fault" for o in experiment.steady_state]
    said += [f"seen: {_md(expectation_words(str(e)))}" for e in experiment.expect]
    said.append(
        f"every objective holds again within {show_duration(experiment.recovery.within)} "
        f"of the fault's removal, for {show_duration(experiment.recovery.dwell)}"
    )
    said.append("the target itself shows that nothing of the fault is left")
    return said


def _steps(experiment: Experiment, environment: Environment) -> list[str]:
    aborts = [*environment.limits.abort, *experiment.abort]
    watch = "Watch; abort on " + "; ".join(
        [*(_condition(c) for c in aborts), f"no measurement for {show_duration(environment.sampling.blind_for)}",
         "a stop request", "a lost watchdog"]
    )  # fmt: skip
    return [
        "Check every guard; one refusal, or one that cannot be checked, ends the run.",
        f"Measure the baseline for {show_duration(environment.sampling.baseline)} "
        f"at {environment.probe.rate:g} requests per second; refuse unless it is steady.",
        "Freeze the targets and write the lease.",
        f"Inject `{experiment.fault.kind}` and see its effect at the target within "
        f"{show_duration(environment.safety.confirm_within)}.",
        watch + ".",
        f"After {show_duration(environment.scaled(experiment.duration))} take the fault away and read back that it is gone.",
        "Go on measuring until the steady state is back, or the observation ends.",
        "Judge, and write the report.",
    ]


def _metrics(experiment: Experiment, environment: Environment) -> list[tuple[str, str, str]]:
    objectives: dict[str, list[str]] = {}
    for o in experiment.steady_state:
        objectives.setdefault(o.sli, []).append(limit_text(o))
    rows: list[tuple[str, str, str]] = []
    for name in spoken_slis(experiment, environment):
        sli = environment.slis[name]
        measure: str | None = sli.measure  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        source = (
            f"probe: {measure}"
            if measure
            else f"signal: {sli.signal}"
            if sli.signal
            else f"PromQL {markdown_code(sli.query or '')}"
        )
        rows.append((sli_label(name, environment), source, " and ".join(objectives.get(name, [])) or "–"))
    read = {environment.slis[n].signal for n in spoken_slis(experiment, environment)}
    signals = dict.fromkeys(e.signal for e in experiment.expect if e.signal and e.signal not in read)
    return rows + [(shown_name(s), f"signal: {s}", "–") for s in signals]


def _rollback_words(environment: Environment) -> str:
    safety = environment.safety
    return (
        f"The run takes the fault away itself, also when it is interrupted (bounded by {show_duration(safety.recover_timeout)}). "
        f"If its process dies or hangs for {show_duration(safety.lease_ttl)}, the watchdog fences it and recovers; behind both "
        f"stands the backend's own deadline, {show_duration(safety.deadline_grace)} after the window."
    )


def _teeth(experiment: Experiment) -> str:
    assert experiment.teeth is not None
    teeth = experiment.teeth
    masked = f" (also off, because they would hide it: {', '.join(teeth.also_off)})" if teeth.also_off else ""
    return (
        f"The mechanism **{teeth.mechanism}**. With it switched off{masked} this experiment must come out DEVIATED or "
        f"ABORTED, and name {_md(teeth.breaks)} (`make teeth`)."
    )


def _condition(condition: AbortCondition) -> str:
    side = "above" if condition.above is not None else "below"
    return f"{shown_name(condition.sli)} {side} {quantity_text(condition.limit)} for {show_duration(condition.for_s)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _md(text: str) -> str:
    """Text of a spec in Markdown: no HTML, no broken tables, no line breaks."""
    for a, b in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(a, b)
    return " ".join(text.split())


def markdown_code(text: str) -> str:
    """A code span; what would break out of one is escaped as text instead."""
    text = " ".join(text.split())
    return _md(text) if "`" in text or "<" in text else "`" + text.replace("|", "\\|") + "`"


markdown_text = _md
"""For the report's Markdown, so that there is one way of escaping."""
