"""Our own look at the pods, by what is done to them: Chaos Mesh's word is not taken for a fact, neither on nor off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mlchaos_dagster.drivers.cluster.handler import Injection, Request
from mlchaos_dagster.engine.ports import Objection, Step
from mlchaos_dagster.kube.client import Permission, Site
from mlchaos_dagster.kube.objects import Object


@dataclass(frozen=True)
class Seen:
    """What was seen at all frozen pods."""

    present: bool
    """Something of the fault is there."""
    effective: bool
    """Its effect was seen at every one."""
    lines: tuple[str, ...]


class Eyes(Protocol):
    """One way to look. Nothing is kept between calls."""

    def permissions(self, site: Site, request: Request) -> Iterable[Permission]:
        """What looking and mending ask of the API server."""
        ...

    def objections(self, site: Site, request: Request) -> Iterable[Objection]:
        """Why nothing could be seen there."""
        ...

    def before(self, site: Site, request: Request, step: Step) -> dict[str, Any]:
        """What is compared with later; part of the lease."""
        ...

    def open(self, site: Site, injection: Injection, step: Step) -> dict[str, str]:
        """Get ready, before the fault; annotations that our resource is to carry."""
        ...

    def reopen(self, site: Site, injection: Injection, step: Step) -> None:
        """Get ready again, for who recovers, wherever `open` was."""
        ...

    def look(self, site: Site, injection: Injection, those: list[Object], *, last: bool = False) -> Seen:
        """What is there now. Raises DriverUnavailable: it could not be seen.

        `those` are our resources; after the `last` look whatever looks in the pods goes, and leaves word of it there.
        """
        ...

    def mend(self, site: Site, injection: Injection, step: Step) -> list[str]:
        """Take away at the pods what Chaos Mesh could not; what was done. May do nothing."""
        ...
