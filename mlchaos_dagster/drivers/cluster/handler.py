"""What one fault kind must be able to do on a cluster. The handlers are in `faults/`.

Rules for every handler:
- nothing is kept between calls but what ends with the process (a thread that kills on an interval, an open exec stream);
- an object is changed only if it still is the frozen one: by uid, and where it is patched by `resourceVersion`;
- `recover` works from another machine, before, during and after `inject`, also when the object is gone;
- `active` reads the cluster or the pod again; an object that is gone holds no fault, and is said to be gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.engine.ports import Lease, Objection, Step
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.refs import Ref


@dataclass(frozen=True)
class Injection:
    """One lease, as a handler sees it."""

    lease: Lease
    refs: tuple[Ref, ...]
    undo: dict[str, Any]
    """What this handler's `undo` returned."""

    @property
    def params(self) -> dict[str, Any]:
        """Of the fault, as SI numbers."""
        return self.lease.params


@dataclass(frozen=True)
class Request:
    """A fault that is about to be made."""

    kind: str
    refs: tuple[Ref, ...]
    existing: tuple[Ref, ...]
    """Everything that the selector matched; only preflight knows it."""
    params: dict[str, Any]
    target: Target
    backup: Path = Path()


class Handler(Protocol):
    """One kind, or a few that are alike (`request.kind` and `injection.lease.kind` tell)."""

    kinds: frozenset[str]
    """Object kinds it can hit: `pod`, `deployment`, `node`, …"""
    self_limiting: bool
    """Ends by itself at the lease's deadline, whoever is dead."""

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """Everything that inject, recover and active will ask of the API server."""
        ...

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """What speaks against it, beyond the guards that hold for all kinds. Read-only."""
        ...

    def undo(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """As `Driver.undo`."""
        ...

    def inject(self, site: Site, injection: Injection, step: Step) -> None:
        """As `Driver.inject`."""
        ...

    def recover(self, site: Site, injection: Injection, step: Step) -> None:
        """As `Driver.recover`."""
        ...

    def active(self, site: Site, injection: Injection) -> Evidence:
        """As `Driver.active`."""
        ...
