"""The JSON Schemas that are shipped say what the models say."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain import schema
from mlchaos_dagster.domain.parsing import parse_any


@pytest.mark.parametrize("name", schema.texts())
def test_shipped_schemas_are_up_to_date(name: str) -> None:
    assert (schema.FOLDER / name).read_text("utf-8") == schema.texts()[name], (
        "run: python -m mlchaos_dagster.domain.schema --write"
    )


@pytest.mark.parametrize("kind", ["experiment", "environment", "suite"])
def test_every_library_file_fits_its_schema(kind: str) -> None:
    body = json.loads((schema.FOLDER / f"{kind}.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(body)
    validator = Draft202012Validator(body)
    files = [p for p in Catalog().files() if f"{kind}s" in p.parts]
    assert files
    for path in files:
        plain = parse_any(path.read_bytes(), str(path)).document.root.plain()
        assert [e.message for e in validator.iter_errors(plain)] == []


def test_the_schema_knows_a_wrong_unit() -> None:
    validator = Draft202012Validator(schema.schema_of("experiment"))
    path = next(p for p in Catalog().files() if p.stem == "serving-pod-failure")
    plain = parse_any(path.read_bytes()).document.root.plain()
    plain["duration"] = 30
    assert [e.json_path for e in validator.iter_errors(plain)] == ["$.duration"]
