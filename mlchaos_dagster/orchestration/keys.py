"""Names: asset keys, checks, run tags. Imports nothing heavy, so that the CLI may use it too."""

from __future__ import annotations

import re

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.faults import LitmusEngine
from mlchaos_dagster.domain.record import RunRecord, Verdict
from mlchaos_dagster.domain.spec import Experiment

PHASES = ("experiment", "baseline_metrics", "chaos_metrics", "recovery_analysis", "verdict")
"""Asset per phase, in the order of the lineage."""

CHECKS = (
    "guards_passed",
    "steady_state_before",
    "fault_fired",
    "steady_state_held",
    "recovered_in_time",
    "left_clean",
)
"""Promises, all on `verdict`, so that one page (and one automation condition) tells of all of them."""
BACKEND_AGREES = "backend_agrees"
"""The promise of experiments whose backend has probes and a verdict of its own."""

TAG = "mlchaos/"
TAG_EXPERIMENT = TAG + "experiment"
TAG_ENVIRONMENT = TAG + "environment"
TAG_TARGET = TAG + "target"
TAG_OUTCOME = TAG + "outcome"
TAG_SUITE = TAG + "suite"
TAG_KIND = TAG + "kind"
"""`experiment` on every chaos run: what the queue limits together. Operations never carry it."""
TAG_SHADOW = TAG + "shadow"
TAG_SEED = TAG + "seed"
TAG_BACKEND = TAG + "backend"
"""Which backend makes the fault of this one run, where its environment has several."""
TAG_STARTED_BY = TAG + "started_by"
TAG_NOT_AFTER = TAG + "not_after"
"""ISO time at which the suite's window closes: a run that is still queued or running then stops."""


def python_name(name: str) -> str:
    """A name as Dagster takes it: dashes become underscores."""
    return name.replace("-", "_")


def graph_name(experiment: str, environment: str) -> str:
    """The node that holds the ops of one experiment in one environment."""
    return f"{python_name(environment)}__{python_name(experiment)}"


def asset_path(experiment: str, environment: str, phase: str) -> tuple[str, str, str]:
    """The asset key's parts: environment, experiment, phase."""
    return python_name(environment), python_name(experiment), phase


def finding_check(name: str) -> str:
    """The check of one finding of a backend: `litmus probe check-login` → `litmus_probe_check_login`."""
    return re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")


def checks_of(experiment: Experiment) -> tuple[str, ...]:
    """The promises of an experiment; of a ChaosEngine also each of its probes."""
    fault = experiment.fault
    if not isinstance(fault, LitmusEngine):
        return CHECKS
    spec = fault.engine["experiments"][0].get("spec") or {}
    probes = [finding_check(f"litmus probe {one.get('name', '')}") for one in spec.get("probe") or []]
    return (*CHECKS, BACKEND_AGREES, *dict.fromkeys(probes))


def target_tag(experiment: Experiment, environment: Environment) -> str:
    """What two runs must not share at a time: the logical target in its environment."""
    return f"{environment.name}.{experiment.target}"


def run_tags(experiment: Experiment, environment: Environment) -> dict[str, str]:
    """Tags of every run of an experiment: to filter by, and to queue by."""
    return {
        TAG_KIND: "experiment",
        TAG_EXPERIMENT: experiment.name,
        TAG_ENVIRONMENT: environment.name,
        TAG_TARGET: target_tag(experiment, environment),
    }


def outcome_word(record: RunRecord, verdict: Verdict) -> str:
    """The outcome; a shadow run injected nothing and never counts."""
    return f"SHADOW-{verdict.outcome.value}" if record.shadow else verdict.outcome.value
