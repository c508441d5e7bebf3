"""Assets of a whole environment: its error budget, and what changed in its experiments."""

# No postponed annotations here: Dagster reads the type of `context` when an op is made.

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration import metadata as md
from mlchaos_dagster.orchestration.ops import RESULTS_IO, Pair

WEEK = timedelta(days=7)
AFTER_RUNS = dg.AutomationCondition.any_deps_updated() & ~dg.AutomationCondition.in_progress()
"""With Dagster's automation sensor switched on, both are refreshed after every run."""


def build(environment: Environment, pairs: Sequence[Pair]) -> list[dg.AssetsDefinition]:
    """`error_budget` and `experiment_history` of one environment."""
    prefix = keys.python_name(environment.name)
    verdicts = [dg.AssetKey(keys.asset_path(e.name, environment.name, "verdict")) for e, _ in pairs]
    check = dg.AssetCheckSpec(
        "budget_above_limit",
        asset=dg.AssetKey([prefix, "error_budget"]),
        description="Enough error budget is left for experiments to run.",
    )

    @dg.asset(
        key=[prefix, "error_budget"],
        deps=verdicts,
        group_name="environment",
        kinds={"chaos"},
        check_specs=[check],
        io_manager_key=RESULTS_IO,
        required_resource_keys={"platform"},
        automation_condition=AFTER_RUNS,
        description=f"What is left of the error budget of {environment.name}, which experiments spend.",
    )
    def error_budget(context: dg.AssetExecutionContext) -> Iterable[Any]:
        limit = environment.limits.budget_at_least
        try:
            budget = context.resources.platform.budget(environment)
        except MlChaosError as e:
            raise dg.Failure(f"the error budget cannot be read: {e}") from e
        row = {
            "at": context.resources.platform.now().timestamp(),
            "remaining": budget.remaining if budget else None,
            "limit": limit,
            "detail": budget.detail if budget else "none declared",
        }
        yield dg.Output(
            [row], metadata={**md.numbers({"remaining": row["remaining"], "limit": limit}), "detail": row["detail"]}
        )
        yield dg.AssetCheckResult(
            check_name="budget_above_limit",
            asset_key=dg.AssetKey([prefix, "error_budget"]),
            passed=budget is None or budget.remaining >= limit,
            description=md.budget_words(budget.remaining, limit) if budget else "none declared for this environment",
        )

    @dg.asset(
        key=[prefix, "experiment_history"],
        deps=verdicts,
        group_name="environment",
        kinds={"chaos"},
        io_manager_key=RESULTS_IO,
        required_resource_keys={"platform"},
        automation_condition=AFTER_RUNS,
        description=f"Every experiment of {environment.name}: how it ended last, and what changed since last week.",
    )
    def experiment_history(context: dg.AssetExecutionContext) -> dg.Output[list[dict[str, Any]]]:
        platform = context.resources.platform
        runs = [(r, v) for r, v in platform.store().all() if r.environment.name == environment.name]
        rows = history_rows([e.name for e, _ in pairs], runs, platform.now())
        changed = [r for r in rows if r["since last week"] not in ("", "the same")]
        outcomes: dict[str, int] = {}
        for row in rows:
            outcomes[row["last"]] = outcomes.get(row["last"], 0) + 1
        return dg.Output(
            rows or [{"experiment": "none"}],
            metadata=md.without_nothing(
                {
                    "what changed since last week": md.table(
                        {k: row[k] for k in ("experiment", "since last week", "because")} for row in changed
                    )
                    or "nothing",
                    "experiments": md.table(rows),
                    "runs": len(runs),
                    **{f"last_{k.lower().replace(' ', '_')}": n for k, n in outcomes.items()},
                }
            ),
        )

    return [error_budget, experiment_history]


def history_rows(
    names: Sequence[str], runs: Sequence[tuple[RunRecord, Verdict | None]], now: datetime
) -> list[dict[str, Any]]:
    """One row an experiment. `runs`: newest first. Shadow runs do not count."""
    rows: list[dict[str, Any]] = []
    for name in names:
        own = [(r, v) for r, v in runs if r.experiment.name == name and v is not None and not r.shadow]
        week_ago = (now - WEEK).timestamp()
        before = next((v for r, v in own if r.zero_wall <= week_ago), None)
        last = own[0] if own else None
        rows.append(
            {
                "experiment": name,
                "last": last[1].outcome.value if last and last[1] else "never run",
                "when": _day(last[0].zero_wall) if last else "",
                "a week ago": before.outcome.value if before else "",
                "since last week": _change(before, last[1] if last else None),
                "runs": len(own),
                "because": last[1].reasons[0] if last and last[1] and last[1].reasons else "",
            }
        )
    return rows


def _change(before: Verdict | None, now: Verdict | None) -> str:
    if now is None:
        return ""
    if before is None:
        return f"new: {now.outcome.value}"
    if before.outcome is now.outcome:
        return "the same"
    return f"{before.outcome.value} → {now.outcome.value}"


def _day(wall: float) -> str:
    return datetime.fromtimestamp(wall, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
