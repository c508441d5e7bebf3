"""One graph of ops per experiment and environment, as five assets and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import dagster as dg

from mlchaos_dagster.orchestration import keys
from mlchaos_dagster.orchestration.ops import OPS, WAITS_FOR, Pair, check_output, make_ops

MEASURED_BY = {
    "experiment": "check_guards",
    "baseline_metrics": "measure_baseline",
    "chaos_metrics": "judge",
    "recovery_analysis": "judge",
    "verdict": "report",
}
PROMISES = {
    "guards_passed": "Every guard let the run through.",
    "steady_state_before": "The steady state held before the fault; nothing is injected into a system that already fails.",
    "fault_fired": "The fault's effect was seen at the target.",
    "steady_state_held": "Every objective and expectation held while the fault was there.",
    "recovered_in_time": "The steady state was back within the limit after the fault was gone.",
    "left_clean": "The target was read back: nothing of the fault is left.",
    keys.BACKEND_AGREES: "Every probe of the backend passed, and so did its own verdict.",
}
PROBE = "This probe of the backend passed."
ABOUT = {
    "experiment": "The plan and the guards. {0.title}",
    "baseline_metrics": "The steady state before the fault: {0.title}",
    "chaos_metrics": "What the fault did, and by how much: {0.title}",
    "recovery_analysis": "How long it took to come back, and the proof that nothing is left: {0.title}",
    "verdict": "{0.hypothesis}",
}


def build_assets(pairs: Iterable[Pair]) -> list[dg.AssetsDefinition]:
    """Assets of all experiments; the ops behind them are shared."""
    by_graph = {keys.graph_name(e.name, env.name): (e, env) for e, env in pairs}
    ops = make_ops(by_graph)
    return [_experiment_assets(name, pair, ops) for name, pair in by_graph.items()]


def _experiment_assets(name: str, pair: Pair, ops: Mapping[str, dg.OpDefinition]) -> dg.AssetsDefinition:
    experiment, environment = pair
    asset = {phase: dg.AssetKey(keys.asset_path(experiment.name, environment.name, phase)) for phase in keys.PHASES}
    # In the lineage, and in a run of both, this experiment comes after the verdict of the one that it waits for.
    # Whether that one held is the guard's business: this edge says nothing of outcomes.
    before_all = _verdict_before(pair)
    specs = [
        dg.AssetCheckSpec(check, asset=asset["verdict"], description=PROMISES.get(check, PROBE), blocking=False)
        for check in keys.checks_of(experiment)
    ]
    graph = dg.GraphDefinition(
        name=name,
        description=f"{experiment.title} ({environment.name})",
        node_defs=list(ops.values()),
        dependencies={
            later: {"after": dg.DependencyDefinition(earlier, "done")}
            for earlier, later in zip(OPS, OPS[1:], strict=False)
        },
        input_mappings=_waiting() if before_all else [],
        output_mappings=_mappings(specs),
    )
    tags = {
        **{k: _tag_value(v) for k, v in experiment.tags.items()},
        keys.TAG_EXPERIMENT: experiment.name,
        keys.TAG_ENVIRONMENT: environment.name,
        # The graph shows the last part of a key only; the labels under a node tell whose `verdict` it is.
        f"dagster/kind/{experiment.name[:50]}": "",
        f"dagster/kind/{experiment.fault.kind}": "",
    }
    return dg.AssetsDefinition.from_graph(
        graph,
        keys_by_input_name=dict.fromkeys([WAITS_FOR], before_all) if before_all else {},
        keys_by_output_name=asset,
        # As people read it, down the graph; the ops' own order is what is executed.
        internal_asset_deps={
            phase: {asset[before]} if before else {before_all} if before_all else set()
            for before, phase in zip(("", *keys.PHASES), keys.PHASES, strict=False)
        },
        can_subset=False,
        group_name=keys.python_name(experiment.area),
        check_specs=specs,
        descriptions_by_output_name={phase: about.format(experiment) for phase, about in ABOUT.items()},
        owners_by_output_name={phase: [owner(experiment.owner)] for phase in keys.PHASES},
        tags_by_output_name=dict.fromkeys(keys.PHASES, tags),
    )


def _verdict_before(pair: Pair) -> dg.AssetKey | None:
    experiment, environment = pair
    if experiment.depends_on is None:
        return None
    return dg.AssetKey(keys.asset_path(experiment.depends_on, environment.name, "verdict"))


def _waiting() -> list[dg.InputMapping]:
    return [dg.InputMapping(graph_input_name=WAITS_FOR, mapped_node_name=OPS[0], mapped_node_input_name=WAITS_FOR)]


def _mappings(specs: Iterable[dg.AssetCheckSpec]) -> list[dg.OutputMapping]:
    outputs = [(phase, op, phase) for phase, op in MEASURED_BY.items()]
    outputs += [(spec.get_python_identifier(), "report", check_output(spec.name)) for spec in specs]
    return [
        dg.OutputMapping(graph_output_name=out, mapped_node_name=op, mapped_node_output_name=op_out)
        for out, op, op_out in outputs
    ]


def owner(name: str) -> str:
    """An owner as Dagster takes it: an address, or a team."""
    return name if "@" in name or name.startswith("team:") else f"team:{keys.python_name(name)}"


def _tag_value(value: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in value)[:63]
    return kept.strip("-_.")


def asset_keys(pair: Pair) -> list[dg.AssetKey]:
    """The five assets of an experiment, for run requests."""
    experiment, environment = pair
    return [dg.AssetKey(keys.asset_path(experiment.name, environment.name, phase)) for phase in keys.PHASES]


def check_keys(pair: Pair) -> list[dg.AssetCheckKey]:
    """Its checks."""
    experiment, environment = pair
    verdict = dg.AssetKey(keys.asset_path(experiment.name, environment.name, "verdict"))
    return [dg.AssetCheckKey(verdict, check) for check in keys.checks_of(experiment)]
