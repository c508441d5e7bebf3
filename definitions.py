"""What `dagster dev`, `dg dev` and a deployment load."""

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """Everything under mlchaos_dagster/defs: the chaos library, and what you put beside it."""
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
