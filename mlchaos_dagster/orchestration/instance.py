"""The Dagster instance of the state directory: the one that `dagster dev` in the project uses, from any directory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster._core.errors import DagsterHomeNotSetError
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager
from dagster._serdes import ConfigurableClassData

from mlchaos_dagster.errors import ConfigError
from mlchaos_dagster.settings import Home


def open_instance(home: Home) -> dg.DagsterInstance:
    """`DAGSTER_HOME` when it is set, else the `dagster.yaml` beside the state directory, with absolute paths.

    What ops print belongs to the terminal here: no configuration makes Dagster capture it to a file, where the live
    view would go, too. Without any configuration, storage lies in the state directory. Relative paths in a
    `dagster.yaml` mean "from where I was started", which is the project for `dagster dev` and anything for a command
    line.

    Raises:
        ConfigError: the configuration is wrong, the state directory cannot be written, or the storage cannot be
            opened.
    """
    _probe(home.root, home)
    try:
        try:
            return _uncaptured(dg.DagsterInstance.get())
        except DagsterHomeNotSetError:
            pass
        _probe(home.dagster, home)
        for found in (*home.dagster.glob("history"), *home.dagster.glob("history/runs")):
            _probe(found, home)
        for name in ("history/runs.db", "history/runs/index.db", "schedules/schedules.db"):
            with _told(home), contextlib.suppress(FileNotFoundError), open(home.dagster / name, "r+b"):
                pass
        project = home.root.parent
        overrides = _overrides(project, home)
        reference = InstanceRef.from_dir(str(home.dagster), config_dir=str(project), overrides=overrides)
        return dg.DagsterInstance.from_ref(reference)
    except ConfigError:
        raise
    except Exception as e:
        # Of Dagster, of YAML, of whatever database it is: nothing was touched.
        what = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(f"Dagster's storage cannot be opened: {what}") from e


def _probe(folder: Path, home: Home) -> None:
    with _told(home):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def _told(home: Home) -> Iterator[None]:
    """Storage that cannot be written fails deep in Dagster, in SQL; say it first, in words."""
    try:
        yield
    except OSError as e:
        raise ConfigError(
            f"state directory {home.root} cannot be written: {e.strerror or e}. Set MLCHAOS_HOME or --home"
        ) from e


def _uncaptured(instance: dg.DagsterInstance) -> dg.DagsterInstance:
    reference = instance.get_ref()
    if reference.compute_logs_data.class_name == NoOpComputeLogManager.__name__:
        return instance
    with contextlib.suppress(Exception):  # that it cannot be closed says nothing about the other
        instance.dispose()
    ours = ConfigurableClassData(NoOpComputeLogManager.__module__, NoOpComputeLogManager.__name__, "{}\n")
    return dg.DagsterInstance.from_ref(reference._replace(compute_logs_data=ours))


def _overrides(project: Path, home: Home) -> dict[str, Any]:
    path = project / "dagster.yaml"
    configured: dict[str, Any] = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    storage = configured.get("storage") or {"sqlite": {"base_dir": str(home.dagster)}}
    found: dict[str, Any] = {
        "storage": _absolute(storage, project),
        "telemetry": {"enabled": False},
        "compute_logs": {"module": NoOpComputeLogManager.__module__, "class": NoOpComputeLogManager.__name__},
    }
    artifacts = configured.get("local_artifact_storage")
    if isinstance(artifacts, dict):
        found["local_artifact_storage"] = _absolute(artifacts, project)
    return found


def _absolute(value: Any, project: Path) -> Any:
    """The same configuration with every relative `base_dir` made absolute."""
    if not isinstance(value, dict):
        return value
    return {
        k: str(project / v)
        if k == "base_dir" and isinstance(v, str) and not Path(v).is_absolute()
        else _absolute(v, project)
        for k, v in value.items()
    }
