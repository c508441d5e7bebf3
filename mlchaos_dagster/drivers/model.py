"""The model backend: bytes of an artifact change (a file, or objects in a registry), or a bad version is promoted.

What each does and how it is taken back is in model_files.py, model_registry.py and (for artifacts on S3) in s3.py; here
is who is meant. Nothing here ends by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.environment import Target
from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers import model_files, model_registry
from mlchaos_dagster.drivers.s3 import S3Driver
from mlchaos_dagster.engine.ports import Lease, Step, no_step
from mlchaos_dagster.errors import DriverError, DriverUnavailable, RecoverFailed

NAME = "model"


class ModelDriver:
    """Driver for model artifacts. Targets: `file:/path`, or the bucket of a registry as `s3://NAME`.

    Args:
        sandbox_directory: Where relative paths begin, and whose store `{object_store}` stands for.
    """

    name = NAME
    faults = frozenset({"model_corruption", "bad_model"})
    self_limiting: frozenset[str] = frozenset()
    """None: what was changed stays changed until somebody takes it back."""

    def __init__(self, sandbox_directory: Path | str) -> None:
        self.directory = Path(sandbox_directory)
        self._s3 = S3Driver(sandbox_directory)

    def resolve(self, target: Target) -> tuple[str, ...]:
        """Files that match the target's glob, or its bucket.

        Raises:
            DriverUnavailable: the store did not answer.
        """
        return self._s3.resolve(target) if target.s3 is not None else model_files.resolve(self.directory, target.select)

    def undo(
        self,
        kind: str,
        targets: tuple[str, ...],
        params: dict[str, Any],
        *,
        target: Target,
        backup: Path,
        step: Step = no_step,
    ) -> dict[str, Any]:
        """Copies of files, versions of objects.

        Raises:
            DriverUnavailable: the store could not be asked.
            DriverError: it could not be undone.
        """
        if kind == "bad_model":
            return model_registry.undo(target, self.directory, backup, step)
        if target.s3 is None:
            return model_files.undo(targets, str(params["how"]), backup, step)
        every = {**params, "fraction": 1.0}
        return self._s3.undo("s3_object_corruption", targets, every, target=target, backup=backup, step=step)

    def inject(self, lease: Lease, step: Step = no_step) -> None:
        """Change the bytes, or promote the bad version.

        Raises:
            DriverUnavailable: nothing was touched.
            InjectFailed: it may be partly there.
        """
        if lease.kind == "bad_model":
            model_registry.inject(lease, step)
        elif "files" in lease.undo:
            model_files.inject(lease, step)
        else:
            self._s3.inject(_on_s3(lease), step)

    def recover(self, lease: Lease, step: Step = no_step) -> None:
        """Take it back, and read back what is there then.

        Raises:
            RecoverFailed: the fault may be live.
        """
        try:
            if "place" not in lease.undo and "files" not in lease.undo:
                raise DriverError("the lease's undo data is lost", driver=NAME, verb="recover", lease_id=lease.id)
            if lease.kind == "bad_model":
                model_registry.recover(lease, step)
            elif "files" in lease.undo:
                model_files.recover(lease, step)
            else:
                self._s3.recover(_on_s3(lease), step)
        except RecoverFailed:
            raise
        except DriverError as e:
            raise RecoverFailed(str(e), driver=NAME, verb="recover", lease_id=lease.id) from e

    def active(self, lease: Lease) -> Evidence:
        """What the bytes are now.

        Raises:
            DriverUnavailable: the store did not answer, or the lease's undo data is lost.
        """
        if "files" in lease.undo:
            return model_files.active(lease)
        if "place" not in lease.undo:
            raise DriverUnavailable("the lease's undo data is lost", driver=NAME, verb="active", lease_id=lease.id)
        return model_registry.active(lease) if lease.kind == "bad_model" else self._s3.active(_on_s3(lease))


def _on_s3(lease: Lease) -> Lease:
    return replace(lease, params={**lease.params, "fraction": 1.0})
