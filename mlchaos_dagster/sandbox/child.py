"""Where every child process begins: bound to its supervisor first, slow imports after.

``python -m mlchaos_dagster.sandbox.child ROLE --sandbox DIRECTORY --name NAME``; a role is a module with ``main``.
"""

from __future__ import annotations

import sys

from .lifeline import attach


def main(role: str) -> None:
    """Run a role until the supervisor ends it, or itself."""
    lifeline = attach()
    import asyncio
    import importlib

    asyncio.run(importlib.import_module(f".{role}", __package__).main(lifeline))


if __name__ == "__main__":
    main(sys.argv[1])
