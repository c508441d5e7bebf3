"""`mlchaos init DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from mlchaos_dagster.cli.app import common, current
from mlchaos_dagster.errors import SpecError, StoreError

_EXPERIMENT = """\
# yaml-language-server: $schema=../../schemas/experiment.schema.json
# Change one thing at a time, and look: `mlchaos check --library {library}` says what is wrong, with line and column.
schema: mlchaos/v1
name: my-first-experiment
title: The prediction service survives losing one replica
hypothesis: With one replica down, availability stays at 99 % or more and p95 under 300 ms.
area: serving
owner: {owner}
target: prediction-service         # `mlchaos list` shows the environments; each maps this name to something real
fault: {{kind: pod_failure}}
blast_radius: {{count: 1}}
duration: 10m                      # the sandbox shortens it and says so
steady_state:                      # must hold before (else nothing is injected), during, and again after
  - {{sli: availability, at_least: 99%}}
  - {{sli: latency_p95, below: 300ms}}
expect:                            # must be seen, else DEVIATED
  - {{signal: ready_replicas, drops: true}}
recovery: {{within: 30s}}
abort:
  - {{sli: error_rate, above: 5%, for: 3s}}
"""
_SUITE = """\
# yaml-language-server: $schema=../schemas/suite.schema.json
schema: mlchaos/v1
name: my-suite
title: What must survive here
experiments:
  - my-first-experiment
  - serving-pod-delete             # from the shipped library
"""


@click.command("init")
@click.argument("directory", metavar="DIR")
@common
def command(directory: str) -> None:
    """Write a first library to DIR: one experiment, one suite, JSON Schemas for editors. Never overwrites."""
    from mlchaos_dagster.domain.schema import texts

    app = current()
    root = Path(directory).expanduser()
    owner = f"{app.settings.user or 'ml-platform'}@example.com"
    files = {
        root / "experiments" / "serving" / "my-first-experiment.yaml": _EXPERIMENT.format(library=root, owner=owner),
        root / "suites" / "my-suite.yaml": _SUITE,
        **{root / "schemas" / name: text for name, text in texts().items()},
    }
    there = [path for path in files if path.exists()]
    if there:
        raise SpecError(f"{there[0]} is there already. Allowed: a folder without it.", "DIR")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    except OSError as e:
        raise StoreError(f"cannot write {root}: {e.strerror or e}") from e
    app.dump({"directory": str(root), "files": [str(p) for p in files]})
    for path in files:
        app.out(f"wrote {path}")
    app.out(f"\nnext: mlchaos check --library {root}   then: mlchaos run --library {root} my-first-experiment")
