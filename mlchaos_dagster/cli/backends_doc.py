"""docs/backends.md from the drivers' tables: `python -m mlchaos_dagster.cli.backends_doc --write`."""

from __future__ import annotations

import sys
from pathlib import Path

from mlchaos_dagster.cli.experiments_doc import table
from mlchaos_dagster.domain.faults import FAULTS
from mlchaos_dagster.drivers.chaos_mesh import differences as chaos_mesh
from mlchaos_dagster.drivers.chaos_mesh.driver import ChaosMeshDriver
from mlchaos_dagster.drivers.cluster.differences import Difference
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.drivers.litmus import differences as litmus
from mlchaos_dagster.drivers.litmus.driver import LitmusDriver
from mlchaos_dagster.drivers.litmus.faults import BROUGHT as ENGINE

TARGET = Path(__file__).parents[2] / "docs" / "backends.md"
_BROUGHT = frozenset({ENGINE, "chaos_mesh_resource"})
_HEAD = """\
<!-- Generated from the drivers by `python -m mlchaos_dagster.cli.backends_doc --write`. -->

# One fault, several backends

An experiment names a fault, never a tool. Which tool makes it is a line of the environment:

```yaml
backends:
  kubernetes: [pod_delete, pod_failure, network_latency, cpu_stress]
  litmus: [pod_delete, network_latency, cpu_stress]
  chaos_mesh: [pod_delete, pod_failure, network_latency]
prefer: chaos_mesh          # of the kinds that several serve; without it each kind may stand once
```

`mlchaos run NAME -e ENVIRONMENT --backend litmus` moves one run. The record keeps which one it was. Guards, freezing of targets, the window,
the abort, the verdict and the proof that the fault is gone are the same for all: they are ours. What differs is the fault.

Installing, verifying and bringing your own: [litmus.md](litmus.md), [chaos-mesh.md](chaos-mesh.md). Without any other tool:
[kubernetes.md](kubernetes.md).
"""


def text() -> str:
    """The whole page."""
    parts = [_HEAD, "## Who serves what\n", _overview(), "A team's own resource is a fault, too: see below.\n"]
    parts += ["## What is different\n", _general()]
    for kind in FAULTS:
        told = {"Litmus": litmus.DIFFERENCES.get(kind), "Chaos Mesh": chaos_mesh.DIFFERENCES.get(kind)}
        if there := {tool: one for tool, one in told.items() if one is not None}:
            parts += [f"### {kind}\n", (FAULTS[kind].__doc__ or "").strip().splitlines()[0] + "\n", _kind(there)]
    parts += ["## A resource of your own\n", _brought()]
    return "\n".join(parts)


def _overview() -> str:
    rows = [
        (
            f"[`{kind}`](#{kind})" if kind in litmus.DIFFERENCES or kind in chaos_mesh.DIFFERENCES else f"`{kind}`",
            "✔" if kind in KubernetesDriver.faults else "–",
            _by(litmus.DIFFERENCES.get(kind)),
            _by(chaos_mesh.DIFFERENCES.get(kind)),
        )
        for kind in FAULTS
        if kind in KubernetesDriver.faults | LitmusDriver.faults | ChaosMeshDriver.faults and kind not in _BROUGHT
    ]
    return table(("fault", "`kubernetes`: our own", "`litmus`: experiment", "`chaos_mesh`: resource"), rows)


def _by(one: Difference | None) -> str:
    return one.by if one is not None else "–"


def _general() -> str:
    rows = [
        (
            "until the effect is there",
            "At once, but for network faults: their agent must start first.",
            litmus.START,
            chaos_mesh.START,
        ),
        ("end", "By the run itself, in a second or two.", litmus.END, chaos_mesh.END),
        (
            "its own word for it",
            "There is none: the target is looked at.",
            "ChaosResult, read; never enough. `completed` is no success, `stopped` is no proof.",
            "Conditions and records, read; never enough: `AllRecovered` is true before anything began.",
        ),
        (
            "what runs where the target is",
            "A helper container in the pod, or a command in its container.",
            "A runner, an experiment and helper pods beside the target; helpers are privileged.",
            "Nothing: its daemon is on every node, privileged.",
        ),
    ]
    return table(("", "`kubernetes`", "`litmus`", "`chaos_mesh`"), rows)


def _kind(told: dict[str, Difference]) -> str:
    asked = (
        ("made by", lambda d: d.by),
        ("what is hit, and how", lambda d: d.differs),
        ("ends, when everybody of ours is dead", lambda d: d.dead),
        ("our own look", lambda d: d.sees),
        ("limits", lambda d: d.limits or "–"),
    )
    return table(("", *told), [(what, *(tell(one) for one in told.values())) for what, tell in asked])


def _brought() -> str:
    return """\
| | `litmus_engine` | `chaos_mesh_resource` |
|---|---|---|
| what it takes | a ChaosEngine, with its probes | any kind of Chaos Mesh, also out of a Schedule or a Workflow |
| how | `mlchaos run engine.yaml`, `mlchaos check engine.yaml`, `mlchaos import engine.yaml` | the same |
| what we set | name, targets (frozen), duration, grace of at least 30 s, clean-up, labels | name, selector (frozen), duration, labels |
| what stays yours | all else; several experiments in one engine become several runs | all else |
| its own judgement | verdict and probes become findings: one that fails makes the run DEVIATED | there is none |
| our own look | as the neutral fault that it is; where there is none, the tool's word counts, and the evidence says so | the same |
"""


def main(arguments: list[str]) -> int:
    """Write the page, or say that it is out of date (exit code 1)."""
    wanted = text()
    if arguments == ["--write"]:
        TARGET.write_text(wanted, "utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text("utf-8") == wanted:
        return 0
    sys.stderr.write(f"{TARGET} is out of date: python -m mlchaos_dagster.cli.backends_doc --write\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
