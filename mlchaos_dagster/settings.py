"""`MLCHAOS_*` → one frozen object. The only reader of `os.environ`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlchaos_dagster.errors import ConfigError

STATE_DIR = ".mlchaos"


@dataclass(frozen=True)
class Home:
    """The state directory and the places in it."""

    root: Path

    @property
    def ledger(self) -> Path:
        """Open and closed leases, heartbeats."""
        return self.root / "ledger"

    @property
    def backups(self) -> Path:
        """Content that a driver copied before it damaged it, by open lease."""
        return self.ledger / "backups"

    @property
    def records(self) -> Path:
        """One record (and its raw samples) per run."""
        return self.root / "records"

    @property
    def reports(self) -> Path:
        """One HTML report per run."""
        return self.root / "reports"

    @property
    def dagster(self) -> Path:
        """Dagster's storage."""
        return self.root / "dagster"

    @property
    def assets(self) -> Path:
        """What the IO manager keeps, one file per asset and run."""
        return self.root / "assets"

    @property
    def stops(self) -> Path:
        """Stop requests by run id, and the lever."""
        return self.root / "stop"

    @property
    def active(self) -> Path:
        """One file per run that has begun and not ended."""
        return self.root / "active"

    @property
    def gates(self) -> Path:
        """Gates by environment, closed by the error-budget sensor."""
        return self.root / "gates"

    @property
    def incidents(self) -> Path:
        """The incident log, one JSON a line."""
        return self.root / "incidents.jsonl"

    def cluster(self, environment: str) -> Path:
        """Which cluster an environment means, for the processes that clean up."""
        return self.root / "clusters" / f"{environment}.json"

    def sandbox(self, environment: str) -> Path:
        """The embedded platform of one environment."""
        return self.root / "sandbox" / environment


@dataclass(frozen=True)
class Settings:
    """What the surroundings say."""

    home: Home
    environment: str
    """`MLCHAOS_ENVIRONMENT`; default `sandbox`, because it needs nothing."""
    library: tuple[Path, ...]
    """`MLCHAOS_LIBRARY`, separated like PATH: searched before the shipped library."""
    color: bool
    """False when `NO_COLOR` is set (no-color.org)."""
    user: str
    """Who starts runs; goes into records."""
    kubeconfig: str = ""
    """`KUBECONFIG`, the first file of it that exists; where an environment names none."""


def resolved(value: str, env: Mapping[str, str] | None = None) -> str:
    """What a reference (`env:NAME`, `file:PATH`) stands for, read now; any other text is itself.

    Raises:
        ConfigError: there is no such variable or file, or it is empty; names it, and never its content.
    """
    kind, _, name = value.partition(":")
    if kind == "env":
        found = (os.environ if env is None else env).get(name, "")
    elif kind == "file":
        try:
            found = Path(name).expanduser().read_text()
        except (OSError, ValueError) as e:
            raise ConfigError(f"{value}: the file cannot be read: {getattr(e, 'strerror', '') or 'no text'}") from e
    else:
        return value
    found = found.strip()
    if not found:
        raise ConfigError(f"{value}: {'the variable is not set' if kind == 'env' else 'the file is empty'}")
    if not found.isprintable():
        raise ConfigError(f"{value}: holds more than one line of text")
    return found


def load(env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Settings from the environment variables, defaults for a laptop.

    The state directory is `MLCHAOS_HOME`, else `.mlchaos` in the nearest folder upwards that has a
    `dagster.yaml` or a `.mlchaos`, else `.mlchaos` here.
    """
    env = os.environ if env is None else env
    here = (cwd or Path.cwd()).resolve()
    if env.get("MLCHAOS_HOME"):
        root = Path(env["MLCHAOS_HOME"]).expanduser()
        root = root if root.is_absolute() else here / root
    else:
        found = (d for d in (here, *here.parents) if (d / "dagster.yaml").is_file() or (d / STATE_DIR).is_dir())
        root = next(found, here) / STATE_DIR
    library = tuple(Path(p).expanduser() for p in env.get("MLCHAOS_LIBRARY", "").split(os.pathsep) if p)
    return Settings(
        home=Home(root.resolve()),
        environment=env.get("MLCHAOS_ENVIRONMENT") or "sandbox",
        library=library,
        color=not env.get("NO_COLOR"),
        user=env.get("MLCHAOS_USER") or env.get("USER") or env.get("LOGNAME") or "",
        kubeconfig=next((p for p in env.get("KUBECONFIG", "").split(os.pathsep) if p and Path(p).is_file()), ""),
    )
