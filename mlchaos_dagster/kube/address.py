"""Which cluster an environment means, kept where every process that cleans up finds it.

A kubeconfig can be edited, and a context pointed elsewhere, between a fault and its recovery: so the uid of the cluster
is kept, too, and another cluster of the same name is never taken for it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.engine.files import write_json
from mlchaos_dagster.errors import ConfigError, DriverUnavailable
from mlchaos_dagster.kube.client import NAME, Cluster

IN_A_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def connect(options: Kubernetes) -> Cluster:
    """The cluster, not asked yet. Raises ConfigError: no such file or context."""
    kubeconfig = options.kubeconfig.removeprefix("file:")
    kubeconfig = os.path.expanduser(kubeconfig) if kubeconfig else ""
    return Cluster(options.context, kubeconfig, timeout_s=options.request_timeout)


def remember(path: Path, options: Kubernetes, default_kubeconfig: str = "") -> Cluster:
    """Ask the cluster who it is and write it down, before any run. Returns the connection.

    Args:
        path: `Home.cluster(environment)`.
        options: What the environment says.
        default_kubeconfig: Of this process (`KUBECONFIG`); kept, since who cleans up may have another.

    Raises:
        ConfigError: the context does not exist, or it now leads to another cluster while leases are kept for the old.
        DriverUnavailable: the cluster did not answer.
    """
    if options.context and not options.kubeconfig:
        if default_kubeconfig:
            options = options.model_copy(update={"kubeconfig": f"file:{Path(default_kubeconfig).absolute()}"})
        elif options.uid and IN_A_POD.exists():
            options = options.model_copy(update={"context": ""})
    cluster = connect(options)
    uid = cluster.identity()
    if options.uid and options.uid != uid:
        raise ConfigError(
            f"{options.context or 'this pod'} leads to the cluster {uid}. Allowed: {options.uid} (kubernetes.uid)"
        )
    before = _read(path)
    if before is not None and before["uid"] != uid:
        raise ConfigError(
            f"context {options.context} leads to another cluster than before (uid {uid}, was {before['uid']}). Allowed: "
            f"the old one; or, when `mlchaos recover` finds nothing left on it, remove {path}"
        )
    known = {"uid": uid, "options": options.model_dump(mode="json")}
    if known != before:
        write_json(path, known)
    return cluster


def other_ledger(path: Path) -> str:
    """Another environment of this machine that keeps its leases for the same cluster in another namespace; empty: none.

    Two ledgers of one cluster do not see each other: two faults could hold one target.
    """
    mine = _read(path)
    for other in sorted(path.parent.iterdir()) if mine is not None else ():
        theirs = _read(other) if other != path else None
        if mine is None or theirs is None or theirs["uid"] != mine["uid"]:
            continue
        space = theirs["options"].get("control_namespace")
        if space != mine["options"].get("control_namespace"):
            return f"environment {other.stem} keeps its leases of this cluster in the namespace {space}"
    return ""


def recall(path: Path) -> tuple[Cluster, Kubernetes, str]:
    """Connection, options and uid of a remembered cluster.

    Raises:
        DriverUnavailable: none is remembered, or its kubeconfig is gone.
    """
    known = _read(path)
    if known is None:
        raise DriverUnavailable(f"no cluster is known for it: {path} is missing or unreadable", driver=NAME)
    try:
        options = Kubernetes.model_validate(known["options"])
        return connect(options), options, str(known["uid"])
    except (ConfigError, ValidationError) as e:
        raise DriverUnavailable(f"{path}: {e}", driver=NAME) from e


def _read(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text())
        return known if isinstance(known["uid"], str) and isinstance(known["options"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
