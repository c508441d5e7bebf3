"""JSON Schemas for editors, generated from the models: `python -m mlchaos_dagster.domain.schema --write`.

A YAML file opts in with `# yaml-language-server: $schema=…/experiment.schema.json` in its first line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mlchaos_dagster.domain.parsing import MODELS, Kind
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.domain.stages import Progressive

FOLDER = Path(__file__).parent.parent / "library" / "schemas"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(kind: Kind) -> dict[str, Any]:
    """The JSON Schema of one kind of file."""
    if kind == "experiment":
        body = _with_stages_or_without()
    else:
        body = MODELS[kind].model_json_schema(by_alias=True, mode="validation")
    return {"$schema": _DIALECT, "$id": f"mlchaos/v1/{kind}", **body, "title": f"mlchaos {kind}"}


def _with_stages_or_without() -> dict[str, Any]:
    """By `if`, not `anyOf`: an editor then says what is wrong with the one form that was meant."""
    both: TypeAdapter[Any] = TypeAdapter(Experiment | Progressive)
    body = both.json_schema(by_alias=True, mode="validation")
    forms = {"then": {"$ref": "#/$defs/Progressive"}, "else": {"$ref": "#/$defs/Experiment"}}
    return {"$defs": body["$defs"], "if": {"required": ["stages"]}, **forms}


def texts() -> dict[str, str]:
    """File name → what it must hold."""
    files: list[Kind] = ["experiment", "environment", "suite", "stages"]
    return {f"{kind}.schema.json": json.dumps(schema_of(kind), indent=2, ensure_ascii=False) + "\n" for kind in files}


def main(arguments: list[str]) -> int:
    """Write the files, or say which are out of date (exit code 1)."""
    stale = [n for n, t in texts().items() if not (FOLDER / n).is_file() or (FOLDER / n).read_text("utf-8") != t]
    if arguments == ["--write"]:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in stale:
            (FOLDER / name).write_text(texts()[name], "utf-8")
        return 0
    for name in stale:
        sys.stderr.write(f"{name} is out of date: python -m mlchaos_dagster.domain.schema --write\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
