"""A service of the platform as a pod: ``python -m mlchaos_dagster.sandbox.pod ROLE``.

The role modules are those of the sandbox on one machine; what its supervisor does there (start, restart, probe, balance,
limit) is Kubernetes' part here. A role is a module with ``main(lifeline)``, or one of two errands that end:
``train-model`` writes the first model, ``fetch-model`` copies the promoted one from the object store.

Configuration is the environment's: each field of ``SandboxConfig`` as ``PLATFORM_<FIELD>``, and

    PLATFORM_NAME             of this pod; default: the host's
    PLATFORM_PORT             to serve on; default 8080
    PLATFORM_DATA             directory for what this pod writes; default /var/lib/platform
    PLATFORM_TOKEN_FILE       what all services of one platform share; the object store's keys follow from it
    PLATFORM_PEER_<KEY>       URL of another service (see ``Service.peers``)
    PLATFORM_WITHOUT          mechanisms that are off, comma between them
    PLATFORM_DRAIN            seconds to go on answering after SIGTERM; default 2
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .config import SandboxConfig, SandboxConfigError
from .lifeline import Lifeline

ROLES = ("feature_store", "feature_writer", "gateway", "inference", "object_store", "rollout")
"""Roles of serving; others run as well: any module here with ``main(lifeline)``."""
_PREFIX = "PLATFORM_"
_FETCH_AGAIN_S = 0.5


def _nanoseconds(path: Path) -> float:
    return int(path.read_text()) / 1e9


def _usage_usec(path: Path) -> float:
    return int(path.read_text().split("usage_usec", 1)[1].split(None, 1)[0]) / 1e6


_CGROUPS = Path("/sys/fs/cgroup")
_CPU = {_CGROUPS / "cpuacct/cpuacct.usage": _nanoseconds, _CGROUPS / "cpu.stat": _usage_usec}
"""Where a container's own cgroup tells its CPU time: version 1, version 2."""


class PodLifeline(Lifeline):
    """Nobody to report to: readiness is asked for by probes, and the kubelet ends this process."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config, -1)

    def report(self, **facts: Any) -> None:
        """Say on standard output what changed."""
        _say(at=round(time.time(), 3), **facts)

    def listen(self) -> socket.socket:
        """Serve the whole pod network, on the one port that services and probes know."""
        sock = socket.create_server(("", int(self.config["port"])), backlog=512)
        sock.setblocking(False)
        return sock

    def gauges(self) -> dict[str, Callable[[], float]]:
        """CPU seconds of everything in this container, not of this process alone; none where no cgroup tells."""
        for path, read in _CPU.items():
            if path.exists():
                return {"container_cpu_seconds": partial(read, path)}
        return {}


def settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a role is told, from environment variables.

    Raises:
        SandboxConfigError: an unknown variable of ours or a value that cannot be; the message says what is allowed.
    """
    ours = {name.removeprefix(_PREFIX): value for name, value in environment.items() if name.startswith(_PREFIX)}
    peers = {name.removeprefix("PEER_").lower(): ours.pop(name) for name in list(ours) if name.startswith("PEER_")}
    data = Path(ours.pop("DATA", "/var/lib/platform"))
    own: dict[str, Any] = {
        "name": ours.pop("NAME", "") or socket.gethostname(),
        "port": _number("PORT", ours.pop("PORT", "8080")),
        "drain_s": _number("DRAIN", ours.pop("DRAIN", "2")),
        "peers": peers,
        "token": _token(ours.pop("TOKEN_FILE", "")),
        "data": str(data),
        "database": str(data / "features.sqlite"),
        "model_dir": str(data / "model"),
        "model_sha256": _promised(data / "model"),
    }
    off = [name.strip() for name in ours.pop("WITHOUT", "").split(",") if name.strip()]
    fields = {name.lower(): _number(name, value) for name, value in ours.items()}
    return {**SandboxConfig.from_dict({**fields, "mechanisms": dict.fromkeys(off, False)}).to_dict(), **own}


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _number(name: str, text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        raise SandboxConfigError(f"{_PREFIX}{name} must be a number, not {text!r}") from None
    return int(value) if value.is_integer() else value


def _token(path: str) -> str:
    try:
        return Path(path).read_text().strip() if path else ""
    except OSError as error:
        raise SandboxConfigError(f"{_PREFIX}TOKEN_FILE: {error}") from None


def _promised(model: Path) -> str:
    """Checksum on the card of the model that was fetched for this pod; empty where there is none."""
    try:
        return str(json.loads((model / "model.json").read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def train_model(config: Mapping[str, Any]) -> None:
    """Train the first model into this pod's directory."""
    from .model import train

    train(Path(config["model_dir"]), int(config["seed"]))


def fetch_model(config: Mapping[str, Any]) -> None:
    """Copy the promoted model from the object store into this pod's directory; wait until there is one."""
    from .model import replace
    from .registry import BUCKET, CURRENT, artifact_key, card_key
    from .s3 import S3, S3Error, S3Unavailable

    directory = Path(config["model_dir"])
    directory.mkdir(parents=True, exist_ok=True)
    store = S3(lambda: config["peers"]["object_store"], config["token"], tries=1)
    said = ""
    while True:
        try:
            version = json.loads(store.get(BUCKET, CURRENT))["version"]
            artifact, card = store.get(BUCKET, artifact_key(version)), store.get(BUCKET, card_key(version))
            break
        except (S3Error, S3Unavailable, ValueError, KeyError) as error:
            if str(error) != said:
                _say(no_model_yet=str(error))
            said = str(error)
            time.sleep(_FETCH_AGAIN_S)
    replace(directory / "model.bin", artifact)
    replace(directory / "model.json", card)


ERRANDS = {"train-model": train_model, "fetch-model": fetch_model}


def main(arguments: list[str]) -> int:
    """Run one role until SIGTERM, or one errand; 2: the configuration cannot be."""
    if len(arguments) != 1:
        sys.stderr.write(f"usage: pod ROLE. Allowed: {', '.join((*ROLES, *ERRANDS))}, …\n")
        return 2
    (role,) = arguments
    try:
        config = settings(os.environ)
        Path(config["data"]).mkdir(parents=True, exist_ok=True)
        if role in ERRANDS:
            ERRANDS[role](config)
            return 0
        module = importlib.import_module(f".{role.replace('-', '_')}", __package__)
    except (SandboxConfigError, ModuleNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    asyncio.run(module.main(PodLifeline(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
