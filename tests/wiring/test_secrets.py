"""Secrets: files and records hold a reference; only the probe that is about to start holds what it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlchaos_dagster import settings, wiring
from mlchaos_dagster.catalog import SHIPPED
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.parsing import parse_model
from mlchaos_dagster.errors import ConfigError

SECRET = "Bearer hunter2hunter2"


def environment(headers: str) -> Environment:
    text = (SHIPPED / "environments" / "sandbox.yaml").read_text()
    text = text.replace('"{gateway}/predict"', "http://127.0.0.1:9/predict")
    return parse_model(text.replace("  rate: 50", f"  headers: {headers}\n  rate: 50"), "e.yaml", Environment).value


@pytest.mark.parametrize("source", ["env", "file"])
def test_a_reference_is_read_for_the_probe_alone(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    monkeypatch.setenv("PREDICT_AUTH", SECRET)
    reference = {"env": "env:PREDICT_AUTH", "file": f"file:{path}"}[source]
    here = environment(f'{{Authorization: "{reference}", X-Team: ml}}')

    built: list[Any] = []

    class Probe:
        def __init__(self, config: Any) -> None:
            built.append(config)

        def start(self, zero: float) -> None: ...

    monkeypatch.setattr("mlchaos_dagster.probes.http.HttpProbe", Probe)
    wiring.request_source(here, settings.Home(tmp_path)).start(0.0)
    assert built[0].headers == {"Authorization": SECRET, "X-Team": "ml"}
    assert "hunter2" not in here.model_dump_json() and reference in here.model_dump_json()

    asked: list[Any] = []
    monkeypatch.setattr("mlchaos_dagster.probes.once.success_ratio", lambda *_, **more: asked.append(more) or 1.0)
    far = here.model_copy(update={"sandbox": None})
    wiring.health_reader(far, settings.load({"MLCHAOS_HOME": str(tmp_path)}))()
    assert asked[0]["headers"]["Authorization"] == SECRET


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("env:NOT_THERE_AT_ALL", "env:NOT_THERE_AT_ALL: the variable is not set"),
        ("file:/nowhere/token", "file:/nowhere/token: the file cannot be read"),
        ("env:TWO_LINES", "env:TWO_LINES: holds more than one line of text"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named_before_anything_starts(
    reference: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO_LINES", "hunter2\nX-Evil: 1")
    here = environment(f'{{Authorization: "{reference}"}}')
    with pytest.raises(ConfigError, match=f"environment sandbox, probe.headers.Authorization: {said}") as caught:
        wiring.prepare(here, settings.load({"MLCHAOS_HOME": str(tmp_path)}))
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "sandbox").exists()
