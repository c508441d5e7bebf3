"""`defs.yaml` → the library: a thin component, so that `dg` lists, checks and scaffolds it."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from mlchaos_dagster.errors import SpecError
from mlchaos_dagster.orchestration.definitions import load


class ChaosLibrary(dg.Component, dg.Model, dg.Resolvable):
    """Chaos experiments of a library directory, in one or several environments."""

    library: Sequence[str] = ()
    """Library directories, read before the shipped one; relative to where Dagster was started."""
    environments: Sequence[str] = ()
    """Names of environments; default `MLCHAOS_ENVIRONMENT`, else `sandbox`."""
    results: str = ""
    """Where results are kept: a directory or s3://bucket/prefix; default the state directory."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """All definitions of the library."""
        try:
            return load(self.results, self.library, self.environments)
        except SpecError as e:
            # One line a problem, without our stack: the file and line are what helps.
            raise dg.DagsterInvalidDefinitionError(f"the library has problems:\n{e}") from None
